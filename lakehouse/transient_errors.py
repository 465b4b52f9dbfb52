"""Recognition of transient errors: a full disk, an unreachable object store or catalog, a lost Ray node."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

from sqlalchemy.exc import InterfaceError, OperationalError

from lakehouse.errors import TransientError

NOTHING_LOST = "committed data is complete, and the rest is read again"
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_TEXTS = ("No space left on device", "database or disk is full")
UNREACHABLE_ERRORS = (ConnectionError, TimeoutError, OperationalError, InterfaceError)
MAX_SHOWN = 300
"""Characters of another library's message that are shown."""


def as_transient_error(error: BaseException) -> TransientError | None:
    """Return the transient error behind an exception, or None if the cause is another (a bug, for example)."""
    causes = list(causes_of(error))
    if any(_is_full_disk(cause) for cause in causes):
        return TransientError(f"The disk is full. Free some space and run again: {NOTHING_LOST}.")
    for cause in causes:
        if _is_unreachable_store(cause):
            return TransientError(
                f"The warehouse or its catalog cannot be used: {_first_line(cause)}. Run again: {NOTHING_LOST}."
            )
    lost = [cause for cause in causes if _is(cause, "ray.exceptions", "RayError")]
    if lost and not any(_is(cause, "ray.exceptions", "RayTaskError") for cause in lost):
        return TransientError(f"Ray lost a task ({type(lost[0]).__name__}). Run again: {NOTHING_LOST}.")
    missing = [cause for cause in causes if isinstance(cause, ModuleNotFoundError)]
    if lost and missing:
        # the driver has the module, so it is installed: Ray deletes the code of a job that has died while workers still use it
        return TransientError(
            f"A Ray worker lacks the code it needs ({_first_line(missing[0])}). Run again: {NOTHING_LOST}. "
            "If the error persists, install the packages of requirements.lock on all nodes."
        )
    return None


def is_file_missing(error: BaseException) -> bool:
    """Return whether a missing file caused an error."""
    return any(isinstance(cause, FileNotFoundError) for cause in causes_of(error))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, the innermost last. Includes causes that Ray's exceptions wrap."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__


def _is_full_disk(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS
    return full or any(text in str(error) for text in FULL_DISK_TEXTS)


def _is_unreachable_store(error: BaseException) -> bool:
    """Return whether an object store or a catalog is unreachable.

    pyarrow's object stores raise OSError with the store's error in its text; the REST catalog's client uses requests.
    """
    return (
        isinstance(error, UNREACHABLE_ERRORS)
        or (isinstance(error, OSError) and "AWS Error" in str(error))
        or _is(error, "requests.exceptions", "RequestException")
    )


def _is(error: BaseException, module: str, name: str) -> bool:
    """Return isinstance of a class in a module, without importing the module: if it is not loaded, nothing raised it."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(error, known)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:MAX_SHOWN].rstrip(".") if lines else type(error).__name__
