"""Writers that are interrupted between any two steps of their commits: each runs in a thread of its own, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from pyiceberg.exceptions import CommitFailedException, ServerError

from lakehouse.engine.engine import Engine
from lakehouse.iceberg import maintenance, rewrite
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.reader import FileReader

TIMEOUT_SECONDS = 60


class Killed(BaseException):
    """The process of a writer was killed."""


class Fault(Enum):
    """What happens to a writer at the point where it is paused."""

    KILL = "killed"
    FAIL = "answer lost: reported as failed"
    LOSE = "answer lost: unknown outcome"


class Writer(threading.Thread):
    """An action on an engine of its own, paused at every step of its reads and commits until `advance`.

    error   the exception that ended the action, None if it succeeded
    point   where it is paused
    """

    def __init__(self, kind: str, engine: Engine, action: Callable[[Engine], object]) -> None:
        super().__init__(daemon=True, name=kind)
        self.kind, self.engine, self.action = kind, engine, action
        self.error: BaseException | None = None
        self.point, self.done = "start", False
        self._fault: Fault | None = None
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        add_pauses(engine.lake)
        self.start()

    def run(self) -> None:
        """Wait for the first `advance`, then perform the action."""
        try:
            self._wait()
            self.action(self.engine)
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self.engine.lake.catalog.close()
            self._paused.release()

    def pause(self, point: str) -> None:
        """Let others run; then continue, or raise the fault that was injected. Called in the writer's thread."""
        self.point = point
        self._paused.release()
        self._wait()

    def _wait(self) -> None:
        self._resumed.acquire()
        fault, self._fault = self._fault, None
        if fault is Fault.KILL:
            raise Killed
        if fault is not None and self.point.startswith("committed"):
            raise CommitFailedException("lost") if fault is Fault.FAIL else ServerError("lost")

    def advance(self, fault: Fault | None = None) -> None:
        """Continue to the next point, with a fault at the present one. Called by the scheduler."""
        if self.done:
            return
        self._fault = fault
        self._resumed.release()
        if not self._paused.acquire(timeout=TIMEOUT_SECONDS):
            raise AssertionError(f"{self.kind} does not reach a point after '{self.point}'")

    def advance_by(self, points: int) -> None:
        """Continue over some points."""
        for _ in range(points):
            self.advance()

    def advance_to(self, point: str, times: int = 1) -> None:
        """Continue until a point whose name begins so was reached several times, or to the end."""
        while times and not self.done:
            self.advance()
            times -= self.point.startswith(point)

    def finish(self) -> None:
        """Continue to the end."""
        while not self.done:
            self.advance()


def pause(point: str) -> None:
    """Pause the current thread if it is a writer."""
    if isinstance(writer := threading.current_thread(), Writer):
        writer.pause(point)


def add_pauses(lake: Lake) -> None:
    """Pause before a table is loaded or committed, between a commit's check and its swap, and before its answer arrives."""
    catalog: Any = lake.catalog
    load, commit, write = catalog.load_table, catalog.commit_table, catalog._write_metadata

    def load_table(identifier: Any) -> Any:
        pause(f"load {identifier if isinstance(identifier, str) else '.'.join(identifier)}")
        return load(identifier)

    def commit_table(table: Any, requirements: Any, updates: Any) -> Any:
        name = ".".join(table.name())
        pause(f"commit {name}")
        response = commit(table, requirements, updates)
        pause(f"committed {name}")
        return response

    def write_metadata(*arguments: Any, **named: Any) -> None:
        write(*arguments, **named)
        pause("swap")

    catalog.load_table, catalog.commit_table, catalog._write_metadata = load_table, commit_table, write_metadata


@contextmanager
def pauses_in_the_product() -> Iterator[None]:
    """Pause before files are read, listed and deleted, and instead of waiting for a retry."""

    def pausing(function: Callable[..., Any], point: str) -> Callable[..., Any]:
        def paused(*arguments: Any, **named: Any) -> Any:
            pause(point)
            return function(*arguments, **named)

        return paused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileReader, "read", pausing(FileReader.read, "read"))
        patch.setattr("lakehouse.retry.time", SimpleNamespace(sleep=lambda seconds: pause("retry")))
        for module, name in ((maintenance, "referenced_files"), (rewrite, "referenced_files"), (rewrite, "delete_file")):
            patch.setattr(module, name, pausing(getattr(module, name), name))
        yield
