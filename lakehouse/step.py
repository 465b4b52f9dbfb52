"""Declarations: how a table is filled from others. Frozen values, pure functions, no I/O.

A step is a function of the SET of rows upstream. The engine finds the groups that new upstream rows touch,
gathers everything about those groups, calls `transform`, and replaces those groups in the target. A full rebuild is
the same call with every group touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import polars as pl

from lakehouse.table import Table

ReadRows = Callable[[Table, Sequence[str], pl.Expr], pl.DataFrame]
"""read_rows(table, columns, predicate): the living rows of a table for which `predicate` holds."""


@dataclass(frozen=True)
class Parsed:
    """What parsing gave: the rows, and those that cannot be read.

    rejected has the columns reason (str), source_position (str), original (binary).
    parsed_positions (str): the positions at which a row was read well: a correction may stand beside the row that it
    corrects, and then nothing is wrong there.
    """

    rows: pl.DataFrame
    rejected: pl.DataFrame | None = None
    parsed_positions: pl.Series | None = None


@dataclass(frozen=True)
class Grouped:
    """Read all living rows of the touched groups from `table`, over its whole history.

    keys     one or more tuples of expressions over the table's columns; each tuple gives the target's group
             columns, in order. A row belongs to every group that one of the tuples gives (null: to none).
    columns  the columns that `transform` gets (empty: all)
    parse    run over the new rows only, to find those that cannot be read: they go to quarantine. `transform` gets the
             rows as they are in the table
    always   rows of touched groups that are read whatever the step's `ordered_by` moment
    resolve  columns that identify a source record: a new row whose keys are null (a delete that names nothing
             else) touches the groups of the earlier rows with the same values here, and `transform` also gets all
             rows that share them with a gathered row
    """

    table: Table
    keys: tuple[tuple[pl.Expr, ...], ...]
    columns: tuple[str, ...] = ()
    parse: Callable[[pl.DataFrame], Parsed] | None = None
    always: pl.Expr | None = None
    resolve: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """Read only the rows of `table` that are new; what was there before is in the target's own rows (`old`).

    parse gives rows that have the target's group columns. For targets whose merge is associative, commutative
    and idempotent.
    """

    table: Table
    parse: Callable[[pl.DataFrame], Parsed]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broadcast:
    """Read all of a small table.

    touch(changed rows) -> predicate over the columns of `through` (default: the target), named in
    `touch_columns`: the rows for which it holds give the groups to recompute (`touch_keys`: expressions, default:
    the group columns). None: a change touches nothing by itself. Where `columns` has the key, rows that changed in
    other columns only are not among the changed ones.
    """

    table: Table
    columns: tuple[str, ...] = ()
    affects: Callable[[pl.DataFrame], pl.Expr] | None = None
    through: Table | None = None
    affected_keys: tuple[pl.Expr, ...] = ()


@dataclass(frozen=True)
class Lookup:
    """Read the rows of `table` whose column `on` has one of the values that `values(gathered frames)` gives.

    touch and the rest: as in `Whole`.
    """

    table: Table
    on: str
    values: Callable[[Mapping[str, pl.DataFrame]], pl.Series]
    columns: tuple[str, ...] = ()
    affects: Callable[[pl.DataFrame], pl.Expr] | None = None
    through: Table | None = None
    affected_keys: tuple[pl.Expr, ...] = ()


Read = Grouped | Delta | Broadcast | Lookup


Context = Any
"""A frozen dataclass of the settings that shape results, given to the engine once. Part of every definition fingerprint."""

TransformFunction = Callable[[Mapping[str, pl.DataFrame], Context], pl.DataFrame]
"""fill(frames, context): frames by the reads' names, plus 'old' (the target's own living rows of the touched
groups, business columns only) and 'groups' (the touched groups). Gives the rows of the touched groups as they
must be now, with the target's columns."""


@dataclass(frozen=True)
class Step:
    """How one table is filled.

    reads      by the name under which `transform` gets them
    expand     widens the touched groups (e.g. to whole connected components): expand(groups, lookup,
               context) -> groups; a step that has it runs as a single task
    ordered_by a column of the target by which groups are histories: only rows from the first change on are
               recomputed; `transform` also gets 'opening', the last row of each group before it, and the Grouped
               tables must have a column of the same name
    shaped_by  settings of the step's own that shape its rows: when they change, everything is recomputed
    """

    target: Table
    reads: Mapping[str, Read]
    transform: TransformFunction
    expand: Callable[[pl.DataFrame, ReadRows, Context], pl.DataFrame] | None = None
    ordered_by: str = ""
    parameters: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.target.quarantines and (self.ordered_by or any(isinstance(read, Delta) for read in self.reads.values())):
            raise ValueError(
                f"{self.target.name}: a step that builds on the table's own rows cannot hold some of them back: its rows would "
                "depend on the order of arrival. Use the severity warn or fail, or reject rows where they are parsed."
            )


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


def in_dependency_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the steps, each after all that it reads."""
    by_name = {step.target.name: step for step in steps}
    graph = {name: upstream_names(step) & by_name.keys() for name, step in by_name.items()}
    return tuple(by_name[name] for name in TopologicalSorter(graph).static_order())
