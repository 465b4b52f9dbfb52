"""Progress of a long operation, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

StageCallback = Callable[[str, int, int], None]
"""callback(stage, done, total): (stage, 0, 1) when a stage starts, (stage, 1, 1) when it is complete."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Discard progress."""


@contextmanager
def stage(progress: StageCallback, name: str) -> Iterator[None]:
    """Report a stage as started, then as complete. A stage that fails stays incomplete."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)
