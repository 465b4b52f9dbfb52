"""Rewrites the bronze rows of an erased person, and the rows that steps with a `Delta` read built from them."""

from __future__ import annotations

from functools import partial

import polars as pl

from lakehouse.engine.engine import Engine
from lakehouse.engine.frames import conform, stamp
from lakehouse.engine.row_diff import with_deleted_flag
from lakehouse.iceberg.rewrite import RewriteResult, find_rewrite, replace_rows, rewrite
from lakehouse.retry import retry_commit
from lakehouse.table import SEQUENCE, Table
from pipelines.bronze.tables import EVENTS, TABLES
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.suppression import Erasure, load_suppression
from pipelines.silver import events_clean
from pipelines.silver.events_clean import EVENTS_CLEAN, parse_events


def rewrite_bronze(engine: Engine, erasure: Erasure) -> tuple[RewriteResult, ...]:
    """Replace the suppressed values in all bronze tables, one commit per table and once per erasure."""
    suppression = load_suppression(engine.lake)
    assert suppression is not None
    anonymiser = Anonymiser(suppression)

    def edit(table: Table, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series | None]:
        edited = anonymiser(table, rows)
        return edited.rows, edited.changed, edited.keys

    return tuple(retry_commit(partial(rewrite, engine.lake, table, partial(edit, table), erasure.id)) for table in TABLES)


def replace_delta_rows(engine: Engine, erasure: Erasure) -> None:
    """Replace the rows of silver.events_clean that were built from rewritten messages.

    The table merges new rows with its own, so rows built from the former messages would remain otherwise.
    """

    def attempt() -> None:
        target, bronze = engine.lake.load(EVENTS_CLEAN), engine.lake.load(EVENTS)
        snapshot = find_rewrite(bronze, erasure.id)
        sequence = snapshot.sequence_number if snapshot is not None else None
        messages = bronze.read(["topic", "value", "_op", "_source_position", "_source_time"], pl.col(SEQUENCE) == sequence)
        rows = conform(events_clean.transform({"events": parse_events(messages).rows}, engine.context), EVENTS_CLEAN)
        if rows.is_empty():
            return
        new = stamp(EVENTS_CLEAN, with_deleted_flag(EVENTS_CLEAN, rows, False), target.next_sequence)
        replace_rows(target, pl.col("event_id").is_in(rows["event_id"].implode()), new)

    retry_commit(attempt)
