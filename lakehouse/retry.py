"""Retry of commits. Trying again starts with loading the table, so that no row is written twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lakehouse.errors import CommitConflict

MAX_ATTEMPTS = 6
FIRST_DELAY_SECONDS = 0.2
"""Doubled after each attempt."""
Result = TypeVar("Result")


def retry_commit(attempt: Callable[[], Result], *, attempts: int | None = None, missing_files: bool = True) -> Result:
    """Call `attempt`, again when another writer commits first, and return its result.

    attempts       how often it is called at most (default: MAX_ATTEMPTS)
    missing_files  also retry when a file is gone: maintenance may delete files that the attempt was reading

    Raises CommitConflict, or FileNotFoundError, from the last attempt.
    """
    limit = attempts or MAX_ATTEMPTS
    retryable = (CommitConflict, FileNotFoundError) if missing_files else (CommitConflict,)
    for number in range(limit):
        try:
            return attempt()
        except retryable:
            if number == limit - 1:
                raise
            time.sleep(FIRST_DELAY_SECONDS * 2**number)
    raise AssertionError
