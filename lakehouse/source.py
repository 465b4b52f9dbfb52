"""Declarations: what a source of bronze rows is. The engine plans, extracts in parallel, commits, acknowledges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

Position = Mapping[str, Any]
"""How far a table has read its source: a JSON object, stored in the snapshot that holds the rows."""

RESNAPSHOT, EPOCH = "again", "generation"


def restart_position(position: Position | None) -> Position | None:
    """The position to plan from when a table must be read from its beginning once more; None when it never was read.

    What is read then is newer than all that was read before, and must sort so: it is the next generation. Never stored.
    """
    return None if position is None else {**position, RESNAPSHOT: True, EPOCH: epoch(position) + 1}


def is_resnapshot(position: Position | None) -> bool:
    """Whether the table must be read from its beginning once more."""
    return bool(position and position.get(RESNAPSHOT))


def epoch(position: Position | None) -> int:
    """How many times the table was begun anew, by the time the rows after this position are read."""
    return int(position.get(EPOCH, 0)) if position else 0


@dataclass(frozen=True)
class Rows:
    """Rows of one bronze table, with the columns planned for it (without _ingested_at, which the engine stamps)."""

    table: str
    rows: pa.Table


@dataclass(frozen=True)
class Reached:
    """The position of a table once everything its task gave is committed; overrides the plan's."""

    table: str
    position: Position


class Task(Protocol):
    """A piece of reading: picklable, runs anywhere, and gives the same rows each time it is run."""

    def read(self) -> Iterator[Rows | Reached]:
        """Give rows in batches of bounded size, and perhaps the position reached."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is new at a source.

    tasks       run in parallel; none: nothing is new
    schemas     for each bronze table the tasks may fill, its columns as the source has them now
    positions   for each such table, the position that stands for all tasks' rows (unless a task says Reached)
    rows        how many rows to expect, where the source can tell cheaply
    held        whatever must stay open until the tasks are done (e.g. the connection that exports a snapshot)
    """

    tasks: tuple[Task, ...] = ()
    schemas: Mapping[str, pa.Schema] = field(default_factory=dict)
    positions: Mapping[str, Position] = field(default_factory=dict)
    rows: int | None = None
    held: Any = None


class Source(Protocol):
    """A source system. Positions are the only memory: they come out of Iceberg and go back into it."""

    name: str
    tables: tuple[str, ...]

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """Find what is new past `positions` (by bronze table; None: never read; `is_again`: read all anew, in the next
        generation). `schemas`: the tables' columns today.

        Raises SourceError when the source cannot be reached, OffsetGone when what comes next was deleted there.
        """
        ...

    def acknowledge(self, plan: Plan) -> None:
        """Everything of the plan is committed: the source may forget it. Called only then; harmless when repeated."""
        ...

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """How far each table is behind its source, as a short text ('0 messages', '12 kB of WAL')."""
        ...
