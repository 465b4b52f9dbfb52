"""The clear-text values that an unfinished erasure has to search for, in a private file beside the warehouse.

Only these texts can prove that they are gone, so they are kept until the proof is done, readable by their owner alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lakehouse.iceberg.catalog import Lake
from pipelines.privacy.private_files import open_private
from pipelines.privacy.receipt import Baseline, SalesTotals, erasures_directory
from pipelines.privacy.suppression import Erasure, erasures

SUFFIX = ".order.json"
"""Suffix of the files' names. The search of the home directory skips these files."""


@dataclass(frozen=True)
class SearchList:
    """The texts to search for.

    shared    by kind, how many values are not searched for because other people show them too
    baseline  the state when the erasure was requested
    """

    texts: tuple[str, ...]
    shared: Mapping[str, int]
    baseline: Baseline


def search_list_file(lake: Lake, erasure: Erasure) -> Path:
    """Return the path of an erasure's search list."""
    return erasures_directory(lake) / f"{erasure.id}{SUFFIX}"


@contextmanager
def stored_search_list(lake: Lake, erasure: Erasure, search_list: SearchList) -> Iterator[None]:
    """Write the search list and hold its lock while the body commits the erasure.

    A list that is not locked and belongs to no erasure was left by a process that died before its commit:
    `discard_orphaned_lists` deletes it.
    """
    stored = {"texts": search_list.texts, "shared": dict(search_list.shared), **asdict(search_list.baseline)}
    file = search_list_file(lake, erasure)
    draft = file.with_name(f".{erasure.id}.draft")
    with os.fdopen(open_private(draft), "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        draft.rename(file)  # the file never has its final name without the lock
        stream.write(json.dumps(stored).encode())
        stream.flush()
        os.fsync(stream.fileno())
        yield


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a search list, so that one process of this machine finishes the erasure. No lock without a file."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def read_search_list(lake: Lake, erasure: Erasure) -> SearchList | None:
    """Read an erasure's search list; None when it is not on this machine."""
    try:
        stored: dict[str, Any] = json.loads(search_list_file(lake, erasure).read_text())
    except FileNotFoundError:
        return None
    baseline = Baseline(SalesTotals(**stored["sums"]), stored["stored"])
    return SearchList(tuple(stored["texts"]), stored["shared"], baseline)


def discard_orphaned_lists(lake: Lake) -> None:
    """Delete the search lists of erasures that were never committed or are finished: left by killed processes."""
    for file in erasures_directory(lake).glob("*" + SUFFIX):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.name.split(".")[0] not in {erasure.id for erasure in erasures(lake) if not erasure.finished}:
                file.unlink()
