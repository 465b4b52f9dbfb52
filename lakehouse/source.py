"""The protocol of a source of bronze rows. The engine calls it to plan, reads in parallel, commits, and acknowledges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

Position = Mapping[str, Any]
"""How far a source has been read for a table: a JSON object, stored in the snapshot that contains the rows."""

RESNAPSHOT, EPOCH = "again", "generation"
"""Keys of a position. Stored positions have the second, so its value stays."""


def restart_position(position: Position | None) -> Position | None:
    """Return the position from which a re-snapshot is planned; None for a table that was never read. It is never stored.

    The rows of a re-snapshot supersede all earlier ones and must sort after them, so they belong to the next epoch.
    """
    return None if position is None else {**position, RESNAPSHOT: True, EPOCH: epoch(position) + 1}


def is_resnapshot(position: Position | None) -> bool:
    """Return whether the table must be read from the beginning again."""
    return bool(position and position.get(RESNAPSHOT))


def epoch(position: Position | None) -> int:
    """Return the epoch of the rows after this position: the number of re-snapshots so far."""
    return int(position.get(EPOCH, 0)) if position else 0


@dataclass(frozen=True)
class Rows:
    """Rows of one bronze table, with the planned columns (without `_ingested_at`, which the engine adds)."""

    table: str
    rows: pa.Table


@dataclass(frozen=True)
class Reached:
    """The position of a table once all rows of its task are committed; overrides the plan's."""

    table: str
    position: Position


class Task(Protocol):
    """A part of a plan: picklable, runs in any process, and reads the same rows each time."""

    def read(self) -> Iterator[Rows | Reached]:
        """Yield rows in batches of bounded size, and optionally the position reached."""
        ...


@dataclass(frozen=True)
class Plan:
    """The new rows of a source.

    tasks       run in parallel; none if nothing is new
    schemas     for each bronze table that the tasks may fill, the current columns of the source
    positions   for each such table, the position after the rows of all tasks (unless a task yields `Reached`)
    rows        expected number of rows, if the source can count them cheaply
    held        a resource to close after the tasks, for example the connection that exports a snapshot
    """

    tasks: tuple[Task, ...] = ()
    schemas: Mapping[str, pa.Schema] = field(default_factory=dict)
    positions: Mapping[str, Position] = field(default_factory=dict)
    rows: int | None = None
    held: Any = None


class Source(Protocol):
    """A source system. It keeps no state: positions are stored in Iceberg snapshots only."""

    name: str
    tables: tuple[str, ...]

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """Return a plan that reads the rows after `positions`.

        positions  by bronze table; None: never read; `is_resnapshot`: read from the beginning, in the next epoch
        schemas    the tables' current columns

        Raises SourceError when the source is unreachable, OffsetExpired when the next rows were deleted there.
        """
        ...

    def acknowledge(self, plan: Plan) -> None:
        """Tell the source that all rows of the plan are committed, so that it may discard them. Idempotent."""
        ...

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Return how far each table is behind its source, as a short text ('0 messages', '12 kB of WAL')."""
        ...
