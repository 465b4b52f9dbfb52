"""Maintenance of a table: compaction, snapshot expiry and deletion of orphan files. Safe beside a running writer.

Compaction and expiry commit like any other writer, and are retried when another writer commits first. Orphan files are deleted
only when they are older than any active writer can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from pyiceberg.io.pyarrow import PyArrowFileIO

from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.compaction import MAX_ATTEMPTS, compact
from lakehouse.iceberg.errors import committing
from lakehouse.iceberg.table_files import file_system, list_files, referenced_files
from lakehouse.retry import retry_commit
from lakehouse.table import Table


@dataclass(frozen=True, kw_only=True)
class MaintenanceResult:
    """What maintenance of a table merged, expired and deleted."""

    table: str
    files_before: int
    files_after: int
    deletes_merged: int
    snapshots_expired: int
    orphans_deleted: int
    orphan_bytes: int


def maintain(lake: Lake, table: Table, now: datetime) -> MaintenanceResult:
    """Compact one table, expire its old snapshots and delete its orphan files. Raises CommitConflict."""
    compaction = compact(lake, table)
    hours = lake.settings.snapshot_retention_hours
    expired = retry_commit(lambda: expire(lake, table, hours, now), attempts=MAX_ATTEMPTS, missing_files=False)
    orphans, size = delete_orphans(lake, table, lake.settings.orphan_retention_hours, now)
    return MaintenanceResult(
        table=table.name,
        files_before=compaction.files_before,
        files_after=compaction.files_after,
        deletes_merged=compaction.deletes_merged,
        snapshots_expired=expired,
        orphans_deleted=orphans,
        orphan_bytes=size,
    )


def expire(lake: Lake, table: Table, retention_hours: float, now: datetime) -> int:
    """Expire the snapshots that were replaced longer ago than the retention; return their number.

    A snapshot that has been staged for that long is discarded. The current snapshot always stays, and so do the heads of
    branches and tags that others have created. Raises CommitConflict and CatalogUnreachable.
    """
    handle = lake.load(table, create=False)
    limit = (now - timedelta(hours=retention_hours)).timestamp() * 1000
    discarded = 0
    if (staged := handle.staged) is not None and staged.timestamp_ms < limit:
        handle.discard_staged()
        handle, discarded = lake.load(table, create=False), 1
    snapshots = sorted(handle.published_snapshots, key=lambda s: s.sequence_number or 0)
    heads = {ref.snapshot_id for ref in handle.iceberg_table.metadata.refs.values()}
    # the age counts from the moment a snapshot was replaced, not committed: readers and time travel rely on that
    old = [before.snapshot_id for before, after in pairwise(snapshots) if after.timestamp_ms < limit]
    old = [snapshot_id for snapshot_id in old if snapshot_id not in handle.lineage_snapshot_ids and snapshot_id not in heads]
    if old:
        with committing(table.name):
            handle.iceberg_table.maintenance.expire_snapshots().by_ids(old).commit()
    return len(old) + discarded


def delete_orphans(lake: Lake, table: Table, retention_hours: float, now: datetime) -> tuple[int, int]:
    """Delete the unreferenced files below the table's location that are older than the retention; return number and bytes."""
    handle = lake.load(table, create=False)
    io = handle.iceberg_table.io
    if not isinstance(io, PyArrowFileIO):
        return 0, 0
    filesystem, _ = file_system(handle)
    limit = now - timedelta(hours=retention_hours)
    found = [info for info in list_files(handle) if info.mtime is not None and info.mtime.astimezone(UTC) < limit]
    # the references are read after the listing, so that a file committed in between is among them
    keep = {io.parse_location(path)[2] for path in referenced_files(lake.load(table, create=False))}
    orphans = [info for info in found if info.path not in keep]
    for info in orphans:
        filesystem.delete_file(info.path)
    return len(orphans), sum(int(info.size or 0) for info in orphans)
