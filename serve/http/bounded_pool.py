"""Back-pressure: slow work runs in a few threads behind a bounded queue."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from polars.exceptions import PanicException

from serve.http.problems import retry_later

T = TypeVar("T")


class BoundedThreadPool:
    """Runs functions in `threads` threads; at most `queue` more may wait, and further calls fail with 429."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._capacity = threads + queue
        self._pending = 0

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the function's result. Raises Problem 429 when the queue is full."""
        if self._pending >= self._capacity:
            raise retry_later(429, "Too many requests are queued.")
        self._pending += 1
        try:
            work = functools.partial(call_catching_panic, function, *arguments)
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Wait for running work and cancel queued work."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def call_catching_panic(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function; raise RuntimeError on a polars panic, which is not an Exception and would end the event loop."""
    try:
        return function(*arguments)
    except PanicException as error:
        raise RuntimeError(f"polars panicked: {error}") from None
