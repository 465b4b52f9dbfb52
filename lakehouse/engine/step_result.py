"""The result of one step of a run, and the clock that measures it."""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass, field

from lakehouse.expectations import ExpectationResult


@dataclass(frozen=True)
class StepResult:
    """The result of refreshing one table, or of ingesting into one.

    status              "unchanged": nothing new upstream; "read": new rows upstream, but no row changed; "changed";
                        "rebuilt"; "published": by hand
    rows_read           rows read upstream and in the table itself
    rows_changed        new rows upstream
    rows_deleted        rows of the table that were deleted or replaced
    cpu_seconds         of this process and of all workers
    worker_cpu_seconds  of the workers on Ray alone
    snapshot            the table's snapshot afterwards; None where there is none
    results             of the table's expectations; empty when none was evaluated
    """

    table: str
    status: str
    _: KW_ONLY
    rows_read: int = 0
    rows_changed: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    worker_cpu_seconds: float = 0.0
    parallel: bool = False
    snapshot: int | None = None
    results: tuple[ExpectationResult, ...] = ()


@dataclass(frozen=True)
class Stopwatch:
    """Wall-clock and CPU time of this process since it was created."""

    started: float = field(default_factory=time.monotonic)
    cpu_started: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        """Return the seconds elapsed."""
        return time.monotonic() - self.started

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU seconds used by this process."""
        return time.process_time() - self.cpu_started
