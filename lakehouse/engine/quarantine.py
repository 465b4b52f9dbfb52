"""Quarantine: the rows that cannot be parsed, and those that violate an expectation of severity quarantine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from lakehouse.engine.frames import conform, frames_of, stamp
from lakehouse.engine.row_diff import row_diff
from lakehouse.engine.step_tables import StepTables
from lakehouse.expectations import REASON
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.parallel import Blocks
from lakehouse.step import Delta, Grouped, Parsed
from lakehouse.table import BOOKKEEPING, DELETED, Table

REJECTED: dict[str, Any] = {
    "source_table": pl.String,
    "reason": pl.String,
    "source_position": pl.String,
    "original": pl.Binary,
    "_source_time": pl.Datetime("us", "UTC"),
}
"""The columns of a rejected row."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedGroups:
    """The groups of a step's own table that were evaluated, with their quarantined rows.

    quarantined  rows in the form of the quarantine table
    groups       the groups they are of
    """

    quarantined: Sequence[pl.DataFrame]
    groups: Sequence[pl.DataFrame]


def update_quarantine(
    tables: StepTables, extracted: Blocks, evaluated: EvaluatedGroups, *, full: bool, reparse_all: bool
) -> None:
    """Write the rows that were rejected, and delete those that are valid now.

    full         every group of the table was evaluated
    reparse_all  also parse the rows again that are in quarantine already

    Committed before the target, so that a crash in between repeats it; through a handle that was loaded before the read, so
    that a slow copy of the job cannot bring back rows that another one has released.
    """
    quarantine = tables.quarantine
    table = quarantine.table
    member, wanted = pl.lit(False), [conform(pl.DataFrame(schema=REJECTED), table)]
    for source, parse, positions in _parsed_positions(tables, extracted, reparse_all):
        wanted.append(_unreadable(parse, source, positions, table))
        member |= _at(source.table, positions)
    if tables.step.target.quarantines:
        rows = pl.concat([wanted[0], *(conform(frame, table) for frame in evaluated.quarantined)])
        stored = quarantine.read(["source_position"], pl.col("source_table") == tables.step.target.name)["source_position"]
        affected = stored if full else positions_of_groups(stored, tables.step.target, evaluated.groups)
        if positions := sorted({*affected.to_list(), *rows["source_position"].to_list()}):
            wanted.append(rows)
            member |= _at(tables.step.target, positions)
    _replace(quarantine, member, pl.concat(wanted))


def _replace(quarantine: TableHandle, member: pl.Expr, wanted: pl.DataFrame) -> None:
    """Replace the member rows of the quarantine table by the wanted ones, in one commit."""
    table, files = quarantine.table, quarantine.files()
    old = quarantine.reader.read(files, [*(c.name for c in table.columns), DELETED], member, positions=True)
    diff = row_diff(table, old, wanted)
    if not diff.empty:
        written = quarantine.writer.write(stamp(table, diff.written, quarantine.next_sequence))
        deletes = quarantine.writer.write_deletes(files, diff.deleted)
        quarantine.commit([*written, *deletes], positions=quarantine.positions)


def _at(table: Table, positions: list[str]) -> pl.Expr:
    return (pl.col("source_table") == table.name) & pl.col("source_position").is_in(positions)


def _parsed_positions(
    tables: StepTables, extracted: Blocks, reparse_all: bool
) -> list[tuple[TableHandle, Callable[[pl.DataFrame], Parsed], list[str]]]:
    """Return, for each read that parses, the source positions that were rejected or corrected."""
    found = []
    for name, read in tables.step.reads.items():
        if not isinstance(read, Grouped | Delta) or read.parse is None:
            continue
        positions = {p for frame in frames_of(extracted, f"rejected:{name}") for p in frame["source_position"].to_list()}
        positions |= {p for frame in frames_of(extracted, f"fixed:{name}") for p in frame["_source_position"].to_list()}
        if reparse_all:
            stored = tables.quarantine.read(["source_position"], pl.col("source_table") == read.table.name)
            positions |= set(stored["source_position"].to_list())
        if positions:
            found.append((tables.upstream[read.table.name], read.parse, sorted(positions)))
    return found


def _unreadable(
    parse: Callable[[pl.DataFrame], Parsed], source: TableHandle, positions: list[str], quarantine: Table
) -> pl.DataFrame:
    """Return the quarantine rows of the positions at which no row can be parsed, not even a correction.

    The quarantine row shows the row as it was received, not a correction that cannot be parsed either.
    """
    columns = [name for name in source.reader.schema.names if name not in BOOKKEEPING]
    rows = source.reader.read(source.files(), columns, pl.col("_source_position").is_in(positions))
    parsed = parse(rows)
    rejected = pl.DataFrame(schema=REJECTED) if parsed.rejected is None else parsed.rejected
    unreadable = rejected["source_position"]
    if parsed.parsed_positions is not None:
        unreadable = unreadable.filter(~unreadable.is_in(parsed.parsed_positions.implode()))
    if unreadable.is_empty():
        return conform(pl.DataFrame(schema=REJECTED), quarantine)
    broken = rows.filter(pl.col("_source_position").is_in(unreadable.implode()))
    received = pl.col("_op") != "fix"
    shown = broken.filter(received | ~received.any().over("_source_position"))
    times = shown.group_by("_source_position").agg(pl.col("_source_time").min())
    rejected_now = parse(shown).rejected
    assert rejected_now is not None
    chosen = (
        rejected_now.sort("source_position", "reason", "original", nulls_last=True)
        .unique("source_position", keep="first", maintain_order=True)
        .join(times, left_on="source_position", right_on="_source_position", how="left")
        .with_columns(source_table=pl.lit(source.table.name))
    )
    return conform(chosen, quarantine)


def quarantine_rows(table: Table, rows: pl.DataFrame) -> pl.DataFrame:
    """Return rows that violate an expectation in the form of the quarantine table: the key as JSON for a source position, the
    row as JSON."""
    columns = [column.name for column in table.columns]
    found = rows.select(
        pl.lit(table.name).alias("source_table"),
        pl.col(REASON).alias("reason"),
        _as_json(table.key).alias("source_position"),
        _as_json(columns).cast(pl.Binary).alias("original"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("_source_time"),
    )
    # of several rows with one key, one is shown
    return found.sort("source_position", "original").unique("source_position", keep="first", maintain_order=True)


def _as_json(columns: Sequence[str]) -> pl.Expr:
    """Return the columns as one JSON object of texts."""
    return pl.struct(pl.col(name).cast(pl.String) for name in columns).struct.json_encode()


def positions_of_groups(positions: pl.Series, table: Table, groups: Sequence[pl.DataFrame]) -> pl.Series:
    """Return those of the positions (keys as JSON) that belong to one of the groups."""
    if not positions.len() or not groups:
        return positions.clear()
    types = pl.Struct(dict.fromkeys(table.group, pl.String))
    decoded = pl.DataFrame({"key": positions}).with_columns(pl.col("key").str.json_decode(types).alias("group")).unnest("group")
    wanted = pl.concat(groups).select(pl.col(name).cast(pl.String) for name in table.group)
    return decoded.join(wanted, on=list(table.group), how="semi", nulls_equal=True)["key"]
