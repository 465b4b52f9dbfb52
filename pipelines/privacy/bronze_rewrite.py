"""Rewrites the bronze rows of an erased person, and the rows that steps with a `Delta` read built from them."""

from __future__ import annotations

from functools import partial

import polars as pl

from lakehouse.engine.engine import Engine
from lakehouse.engine.frames import conform, stamp
from lakehouse.engine.row_diff import with_deleted_flag
from lakehouse.iceberg.rewrite import RewriteResult, find_rewrite, replace_rows, rewrite
from lakehouse.project import Project
from lakehouse.retry import retry_commit
from lakehouse.step import Delta
from lakehouse.table import SEQUENCE, Table
from pipelines.bronze.tables import TABLES
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.suppression import Erasure, load_suppression


def rewrite_bronze(engine: Engine, erasure: Erasure) -> tuple[RewriteResult, ...]:
    """Replace the suppressed values in all bronze tables, one commit per table and once per erasure."""
    suppression = load_suppression(engine.lake)
    assert suppression is not None
    anonymiser = Anonymiser(suppression)

    def edit(table: Table, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series | None]:
        edited = anonymiser(table, rows)
        return edited.rows, edited.changed, edited.keys

    return tuple(retry_commit(partial(rewrite, engine.lake, table, partial(edit, table), erasure.id)) for table in TABLES)


def replace_delta_rows(engine: Engine, project: Project, erasure: Erasure) -> None:
    """Replace the rows that steps with a `Delta` read built from rewritten bronze rows, as the steps declare it.

    These steps merge new rows with the table's own, so rows built from the former bronze rows would remain otherwise.
    """
    for step in project.all_steps:
        for read in step.reads.values():
            if isinstance(read, Delta) and read.table.layer == "bronze":
                retry_commit(partial(_replace_rows, engine, step.target, read, erasure))


def _replace_rows(engine: Engine, table: Table, read: Delta, erasure: Erasure) -> None:
    assert read.erase is not None
    target, bronze = engine.lake.load(table), engine.lake.load(read.table)
    snapshot = find_rewrite(bronze, erasure.id)
    sequence = snapshot.sequence_number if snapshot is not None else None
    rewritten = bronze.read(list(read.columns) or read.table.schema.names, pl.col(SEQUENCE) == sequence)
    rows = conform(read.erase(read.parse(rewritten).rows, engine.context), table)
    if rows.is_empty():
        return
    new = stamp(table, with_deleted_flag(table, rows, False), target.next_sequence)
    same_key = pl.struct(table.key).is_in(rows.select(table.key).to_struct().implode())
    replace_rows(target, same_key, new)
