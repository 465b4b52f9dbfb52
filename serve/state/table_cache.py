"""The newest snapshots of tables, for look-ups: asked for again at most every so often."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from lakehouse.engine.engine import UpstreamTable
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table


@dataclass(frozen=True)
class Snapshot:
    """A table as of its newest snapshot; snapshot_id and at are None for an empty one."""

    rows: UpstreamTable
    snapshot_id: int | None
    at: datetime | None

    def read(self, predicate: pl.Expr | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The living rows for which `predicate` holds, all declared columns unless some are named."""
        return self.rows.read(columns or self.rows.table.schema.names, predicate)


class TableCache:
    """Hands out snapshots. Any thread may ask."""

    def __init__(self, lake: Lake, seconds: float = 1.0) -> None:
        self.lake, self.seconds = lake, seconds
        self._kept: dict[str, tuple[float, Snapshot]] = {}
        self._lock = threading.Lock()

    def of(self, table: Table) -> Snapshot:
        """The newest snapshot, or one that was the newest at most `seconds` ago."""
        with self._lock:
            kept = self._kept.get(table.name)
            now = time.monotonic()
            if kept is not None and now - kept[0] < self.seconds:
                return kept[1]
            handle = self.lake.load(table)
            current = handle.snapshot
            if kept is not None and current is not None and kept[1].snapshot_id == current.snapshot_id:
                found = kept[1]
            else:
                found = Snapshot(
                    UpstreamTable(table, handle.reader, tuple(handle.files())),
                    current.snapshot_id if current else None,
                    datetime.fromtimestamp(current.timestamp_ms / 1000, UTC) if current else None,
                )
            self._kept[table.name] = (now, found)
            return found
