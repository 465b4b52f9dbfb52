"""Whole tables in memory, for pages that show distributions over all customers, stores or products."""

from __future__ import annotations

import polars as pl

from lakehouse.table import Table
from serve.state.table_cache import TableCache


class TableFrames:
    """Reads whole tables, and reads them again when there is a newer snapshot."""

    def __init__(self, tables: TableCache) -> None:
        self.tables = tables
        self._frames: dict[str, tuple[int | None, pl.DataFrame]] = {}

    def read(self, table: Table, columns: tuple[str, ...]) -> pl.DataFrame:
        """Return a whole table. Callers must always request the same columns of a table."""
        newest = self.tables.get(table)
        entry = self._frames.get(table.name)
        if entry is None or entry[0] != newest.snapshot_id:
            self._frames[table.name] = entry = (newest.snapshot_id, newest.read(columns=columns))
        return entry[1]
