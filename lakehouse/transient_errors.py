"""What fails below us and may work again: a full disk, an object store or catalog out of reach, a lost Ray node."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

from sqlalchemy.exc import InterfaceError, OperationalError

from lakehouse.errors import TransientError

NOTHING_LOST = "what was committed is whole, the rest is read again"


def as_transient_error(error: BaseException) -> TransientError | None:
    """The outage that an error tells of, or None when it tells of something else (a mistake in a program, say)."""
    causes = list(causes_of(error))
    if any(_disk_is_full(cause) for cause in causes):
        return TransientError(f"The disk is full. Free some space and run again: {NOTHING_LOST}.")
    for cause in causes:
        if _store_is_away(cause):
            return TransientError(
                f"The warehouse or its catalog cannot be used: {_first_line(cause)}. Run again: {NOTHING_LOST}."
            )
    lost = [cause for cause in causes if _is(cause, "ray.exceptions", "RayError")]
    if lost and not any(_is(cause, "ray.exceptions", "RayTaskError") for cause in lost):
        return TransientError(f"Ray lost what was under way ({type(lost[0]).__name__}). Run again: {NOTHING_LOST}.")
    missing = [cause for cause in causes if isinstance(cause, ModuleNotFoundError)]
    if lost and missing:
        # what the driver has and a worker has not: Ray deletes the code of a job that died under its workers
        return TransientError(
            f"A Ray worker has not the code it needs ({_first_line(missing[0])}). Run again: {NOTHING_LOST}. "
            "Where it stays so, the nodes lack packages of requirements.lock."
        )
    return None


def is_file_missing(error: BaseException) -> bool:
    """Whether an error tells of a file that is not there."""
    return any(isinstance(cause, FileNotFoundError) for cause in causes_of(error))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, the innermost last; through Ray's exceptions too."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__


def _disk_is_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left on device", "database or disk is full"))


def _store_is_away(error: BaseException) -> bool:
    """pyarrow's object stores raise OSError and name the store's error; the REST catalog is spoken to by requests."""
    return (
        isinstance(error, ConnectionError | TimeoutError | OperationalError | InterfaceError)
        or (isinstance(error, OSError) and "AWS Error" in str(error))
        or _is(error, "requests.exceptions", "RequestException")
    )


def _is(error: BaseException, module: str, name: str) -> bool:
    """isinstance, without importing what was never loaded."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(error, known)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
