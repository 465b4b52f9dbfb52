"""A directory of this process that no other local user can enter, for sockets and logs of the processes that it starts."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PREFIX = "shopsphere-"
KEPT_SECONDS = 24 * 3600.0
"""How long the directory of a killed process stays, for its logs."""
KILL_SECONDS = 5.0
_LOCK = "lock"


@functools.cache
def private_directory() -> Path:
    """Return the directory. It is created at the first call with mode 0700, and removed when the process ends.

    Its path has 24 characters where /tmp exists: the address of a socket may have 107, and Ray's own part of it takes 80.
    What a killed process has left is cleaned up: processes that it started at once, its directory after a day.
    """
    parent = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    abandoned = _abandoned(Path(parent))
    _stop_processes(abandoned)
    _remove_old(abandoned)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held until the process ends, in whatever way
    atexit.register(_remove_own, directory, os.getpid())
    return directory


def _abandoned(parent: Path) -> list[Path]:
    """Return the directories of this user's processes that no longer run."""
    found = []
    for directory in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid == os.geteuid() and not _is_locked(directory):
                found.append(directory)
    return found


def _stop_processes(abandoned: Sequence[Path]) -> None:
    """Kill what was started by processes that were killed themselves, such as a proxy that still holds its port."""
    for process in psutil.process_iter() if abandoned else ():
        with contextlib.suppress(psutil.Error):
            if process.uids().effective == os.geteuid() and _uses(process, abandoned):
                process.kill()
                process.wait(KILL_SECONDS)


def _uses(process: psutil.Process, directories: Sequence[Path]) -> bool:
    """Return whether a process was started for one of the directories. Ray's agents replace their command line by a title, and
    have only their logs there."""
    command = " ".join(process.cmdline())
    used = [file.path for file in process.open_files()] if command.startswith("ray::") else [command]
    return any(f"{directory}/" in text for directory in directories for text in used)


def _remove_old(abandoned: Sequence[Path]) -> None:
    for directory in abandoned:
        with contextlib.suppress(OSError):
            if time.time() - directory.lstat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)


def _is_locked(directory: Path) -> bool:
    """Return whether a process holds the directory. Raises OSError when it has no lock: something else made it."""
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _remove_own(directory: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child also runs the functions registered with atexit
        shutil.rmtree(directory, ignore_errors=True)
