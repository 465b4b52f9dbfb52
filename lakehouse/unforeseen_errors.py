"""Unforeseen exceptions as errors that can be recorded: the type and the place, without the text, which may quote a row."""

from __future__ import annotations

import traceback
from pathlib import Path

from lakehouse.errors import UnforeseenError
from lakehouse.transient_errors import causes_of

ROOT = Path(__file__).resolve().parents[1]


def unforeseen_error(name: str, error: BaseException) -> UnforeseenError:
    """Return the error to record for a source or table that failed with an unforeseen exception, which is its cause."""
    cause = list(causes_of(error))[-1]
    found = UnforeseenError(name, type(cause).__name__, _place(cause) or _place(error))
    found.__cause__ = error
    return found


def _place(error: BaseException) -> str:
    """Return where an exception was raised, as file:line: the innermost line of this project, '' if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return ""
