"""Upstream tables as tasks read them: one snapshot, picklable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from lakehouse.iceberg.reader import File, FileReader, live_rows
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import BOOKKEEPING, SEQUENCE, Table


@dataclass(frozen=True)
class UpstreamTable:
    """One snapshot of a table that a step reads, or some of its files. Picklable."""

    table: Table
    reader: FileReader
    files: tuple[File, ...]

    def read(self, columns: Sequence[str], predicate: pl.Expr | None = None, *, positions: bool = False) -> pl.DataFrame:
        """Read the live rows that match `predicate`; `positions` adds `_file` and `_pos`."""
        return self.reader.read(self.files, columns, live_rows(self.table, predicate), positions=positions)

    @property
    def columns(self) -> list[str]:
        """Return the stored columns, without those that the engine adds."""
        return [name for name in self.reader.schema.names if name not in BOOKKEEPING]

    @property
    def can_be_truncated(self) -> bool:
        """Return whether rows may record that the source table was emptied (`_op` 't'). Such a row affects every group."""
        return self.table.layer == "bronze" and "_op" in self.reader.schema.names

    def existing(self, columns: Sequence[str]) -> list[str]:
        """Return those of `columns` (empty: all) that the stored table has."""
        stored = set(self.columns)
        return [name for name in (columns or self.columns) if name in stored]


def open_upstream(handle: TableHandle) -> UpstreamTable:
    """Return the snapshot of a loaded table, with all its files."""
    return UpstreamTable(handle.table, handle.reader, tuple(handle.files()))


def batch_files(files: Sequence[File], rows: int) -> list[tuple[File, ...]]:
    """Split files into batches of about `rows` rows."""
    batches: list[tuple[File, ...]] = []
    batch: list[File] = []
    for file in files:
        if batch and sum(item.rows for item in batch) + file.rows > rows:
            batches.append(tuple(batch))
            batch = []
        batch.append(file)
    return [*batches, tuple(batch)] if batch else batches


def newer_than(since: int | None, positions: Sequence[str] = ()) -> pl.Expr | None:
    """Return the predicate for rows committed after the sequence `since`, or at one of the given source positions. None:
    every row."""
    if since is None:
        return None
    newer = pl.col(SEQUENCE) > since
    return newer | pl.col("_source_position").is_in(list(positions)) if positions else newer
