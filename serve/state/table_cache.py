"""The newest snapshots of tables for look-ups, checked for changes at most once per interval."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from lakehouse.engine.upstream_table import UpstreamTable
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table


@dataclass(frozen=True)
class CachedTable:
    """A table as of a snapshot; snapshot_id and committed_at are None for an empty table."""

    rows: UpstreamTable
    snapshot_id: int | None
    committed_at: datetime | None

    def read(self, predicate: pl.Expr | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Return the live rows that match `predicate`, with all declared columns or the given ones."""
        return self.rows.read(columns or self.rows.table.schema.names, predicate)


class TableCache:
    """Returns tables as of a recent snapshot. Thread-safe."""

    def __init__(self, lake: Lake, seconds: float = 1.0) -> None:
        self.lake, self.seconds = lake, seconds
        self._entries: dict[str, tuple[float, CachedTable]] = {}
        self._lock = threading.Lock()

    def get(self, table: Table) -> CachedTable:
        """Return a table as of a snapshot that was the newest at most `seconds` ago."""
        with self._lock:
            entry = self._entries.get(table.name)
            now = time.monotonic()
            if entry is not None and now - entry[0] < self.seconds:
                return entry[1]
            handle = self.lake.load(table)
            newest = handle.snapshot
            if entry is not None and newest is not None and entry[1].snapshot_id == newest.snapshot_id:
                cached = entry[1]
            else:
                cached = CachedTable(
                    UpstreamTable(table, handle.reader, tuple(handle.files())),
                    newest.snapshot_id if newest else None,
                    datetime.fromtimestamp(newest.timestamp_ms / 1000, UTC) if newest else None,
                )
            self._entries[table.name] = (now, cached)
            return cached
