"""Declarations: how a table is computed from others. Frozen values, pure functions, no I/O.

A step is a function of the SET of upstream rows. The engine finds the groups that new upstream rows affect, gathers all rows
of these groups, calls `transform`, and replaces the groups in the target. A full rebuild is the same call with every group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import polars as pl

from lakehouse.table import Table

ReadRows = Callable[[Table, Sequence[str], pl.Expr], pl.DataFrame]
"""read_rows(table, columns, predicate) -> the live rows of a table that match `predicate`."""

Context = Any
"""A frozen dataclass of the settings that influence rows, passed to the engine once. Part of every definition fingerprint."""

TransformFunction = Callable[[Mapping[str, pl.DataFrame], Context], pl.DataFrame]
"""transform(frames, context) -> all rows of the affected groups, with the target's columns.

frames: by the name of the read, plus 'old' (the target's live rows of these groups, declared columns only) and 'groups'.
"""

EraseFunction = Callable[[pl.DataFrame, Context], pl.DataFrame]
"""erase(parsed rows, context) -> the rows that replace the target's rows with the same keys.

Called with the rows parsed from upstream rows that an erasure has rewritten in place.
"""


@dataclass(frozen=True)
class Parsed:
    """The result of parsing upstream rows.

    rows              the parsed rows
    rejected          rows that cannot be parsed: reason (str), source_position (str), original (binary)
    parsed_positions  source positions (str) at which a row was parsed. A correction has the position of the row it corrects:
                      if it can be parsed, nothing is rejected at that position
    """

    rows: pl.DataFrame
    rejected: pl.DataFrame | None = None
    parsed_positions: pl.Series | None = None


@dataclass(frozen=True)
class Grouped:
    """Read all live rows of the affected groups, over the table's whole history.

    keys     one or more tuples of expressions over the table's columns; each tuple returns the target's group columns, in
             order. A row belongs to every group that one of the tuples returns; a tuple with a null returns none. The
             expressions may only read columns that the table has in its key or tracks, see `Table.tracked`
    columns  the columns that `transform` gets (empty: all)
    parse    applied to new rows only, to find those to quarantine; `transform` gets the rows as they are stored
    always   rows of affected groups that are read whatever the time from which a history is recomputed (`Step.ordered_by`)
    resolve  columns that identify a source record. A new row whose keys are null (a delete that names nothing else) affects
             the groups of the record's earlier rows, and `transform` also gets all rows of the records of gathered rows
    """

    table: Table
    keys: tuple[tuple[pl.Expr, ...], ...]
    columns: tuple[str, ...] = ()
    parse: Callable[[pl.DataFrame], Parsed] | None = None
    always: pl.Expr | None = None
    resolve: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """Read only the new rows of a table and merge them with the target's own rows (`old`).

    For targets whose merge is associative, commutative and idempotent.

    parse    returns rows that have the target's group columns
    columns  the columns that `parse` gets (empty: all)
    erase    how an erasure replaces the target's rows. Required: rows that were built from a rewritten upstream row are
             not read again, so without it they would keep the erased values
    """

    table: Table
    parse: Callable[[pl.DataFrame], Parsed]
    columns: tuple[str, ...] = ()
    erase: EraseFunction | None = None


@dataclass(frozen=True)
class Broadcast:
    """Read the whole of a small table.

    columns        the columns that `transform` gets (empty: all). If they include the key, a change in other columns affects
                   nothing
    affects        affects(changed rows) -> predicate over the columns of `through`: the matching rows name the affected
                   groups. None: a change affects no group
    through        a table upstream (default: the target)
    affected_keys  expressions over the columns of `through` that return the target's group columns (default: these columns)
    """

    table: Table
    columns: tuple[str, ...] = ()
    affects: Callable[[pl.DataFrame], pl.Expr] | None = None
    through: Table | None = None
    affected_keys: tuple[pl.Expr, ...] = ()


@dataclass(frozen=True)
class Lookup:
    """Read the rows of a table whose column `on` has one of the values that `values(gathered frames)` returns.

    The other fields are those of `Broadcast`, except that a change in any column counts.
    """

    table: Table
    on: str
    values: Callable[[Mapping[str, pl.DataFrame]], pl.Series]
    columns: tuple[str, ...] = ()
    affects: Callable[[pl.DataFrame], pl.Expr] | None = None
    through: Table | None = None
    affected_keys: tuple[pl.Expr, ...] = ()


Read = Grouped | Delta | Broadcast | Lookup


@dataclass(frozen=True)
class Step:
    """How one table is computed.

    reads       by the name under which `transform` gets them
    expand      expand(groups, read_rows, context) -> a superset of the affected groups, for example whole connected
                components. A step with it is merged in a single task
    ordered_by  a column of the target that makes groups histories: only rows from the first change on are recomputed.
                `transform` also gets 'opening', the last row of each group before that. The `Grouped` tables must have a
                column of the same name
    parameters  names and values of the step's own settings that influence its rows: part of its definition fingerprint

    Raises ValueError for a declaration that would leave wrong rows without an error.
    """

    target: Table
    reads: Mapping[str, Read]
    transform: TransformFunction
    expand: Callable[[pl.DataFrame, ReadRows, Context], pl.DataFrame] | None = None
    ordered_by: str = ""
    parameters: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self._check_quarantine()
        for name, read in self.reads.items():
            if isinstance(read, Grouped):
                self._check_keys(name, read)
            if isinstance(read, Delta) and read.erase is None:
                raise ValueError(
                    f"{self.target.name}: the Delta read '{name}' of {read.table.name} does not declare how an erasure replaces "
                    "the table's rows. Set `erase` to a function that returns the new rows."
                )

    def _check_quarantine(self) -> None:
        """Refuse quarantined rows in a step that builds on the table's own rows."""
        builds_on_own_rows = self.ordered_by or any(isinstance(read, Delta) for read in self.reads.values())
        if self.target.quarantines and builds_on_own_rows:
            raise ValueError(
                f"{self.target.name}: a step that builds on the table's own rows cannot quarantine some of them: the result "
                "would depend on the order of arrival. Use severity warn or fail, or reject rows in `parse`."
            )

    def _check_keys(self, name: str, read: Grouped) -> None:
        """Refuse group keys over columns whose old values are lost when they change.

        Bronze is append-only, so its old values stay. Silver keeps the row with the old value as a tombstone if the column
        is in the key or tracked. Gold keeps no tombstones, so even deleted rows are lost.
        """
        table = read.table
        if table.layer == "bronze":
            return
        if not table.keeps_tombstones:
            raise ValueError(
                f"{self.target.name}: the read '{name}' groups rows of {table.name}, which keeps no tombstones: the groups of "
                "deleted rows would stay stale. Read the silver table that it is built from, or use a Broadcast or Lookup read."
            )
        kept = {*table.key, *table.tracked}
        used = root_names(*(expression for keys in read.keys for expression in keys))
        order = [self.ordered_by] if self.ordered_by else []
        if lost := [column for column in dict.fromkeys([*used, *order]) if column not in kept]:
            raise ValueError(
                f"{self.target.name}: the read '{name}' groups or orders by {', '.join(lost)} of {table.name}, which neither has "
                "it in its key nor tracks it: when the value changes, the group of the old value would stay stale. "
                f"Add it to `tracked` of {table.name}."
            )


def root_names(*expressions: pl.Expr | None) -> list[str]:
    """Return the columns that the expressions read, conditions included."""
    return list(dict.fromkeys(name for e in expressions if e is not None for name in e.meta.root_names()))


def upstream_tables(step: Step) -> list[Table]:
    """Return the tables that a step reads, or reads through, each once; without its own."""
    tables: dict[str, Table] = {}
    for read in step.reads.values():
        tables.setdefault(read.table.name, read.table)
        if isinstance(read, Broadcast | Lookup) and read.through is not None:
            tables.setdefault(read.through.name, read.through)
    tables.pop(step.target.name, None)
    return list(tables.values())


def upstream_names(step: Step) -> set[str]:
    """Return the names of the tables that a step reads."""
    return {table.name for table in upstream_tables(step)}


def in_dependency_order(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps, each after the steps whose tables it reads. Raises graphlib.CycleError."""
    by_name = {step.target.name: step for step in steps}
    graph = {name: upstream_names(step) & by_name.keys() for name, step in by_name.items()}
    return tuple(by_name[name] for name in TopologicalSorter(graph).static_order())
