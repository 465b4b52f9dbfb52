"""Waiting for what servers and processes do, ports for them, and what a test does when a program is not installed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import pytest

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], what: str = "it did not come", seconds: float = 90.0) -> Found:
    """Wait until something holds; gives what it is. Raises AssertionError saying what there was to wait for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} (not within {seconds:.0f} s)"
        time.sleep(0.05)
    return found


def eventually(action: Callable[[], Found], seconds: float = 30.0) -> Found:
    """What `action` gives, tried until it raises nothing."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def missing(what: str) -> NoReturn:
    """Skip the test, saying what to install; where CI is set, everything must be there."""
    skip: Any = pytest.fail if os.environ.get("CI") else pytest.skip
    skip(what)
    raise AssertionError
