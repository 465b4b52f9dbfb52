"""Wait for servers and processes, find free ports, and skip tests whose programs are not installed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import pytest

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], failure: str = "the condition was not met", seconds: float = 90.0) -> Found:
    """Wait until the condition is true and return its value. Raises AssertionError with `failure` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{failure} (within {seconds:.0f} s)"
        time.sleep(0.05)
    return found


def eventually(action: Callable[[], Found], seconds: float = 30.0) -> Found:
    """Retry `action` until it raises nothing and return its result. Raises its last error after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test because something is not installed; fail it when CI is set, where everything must be installed."""
    stop: Any = pytest.fail if os.environ.get("CI") else pytest.skip
    stop(reason)
    raise AssertionError
