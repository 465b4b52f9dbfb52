"""Maintenance of a table: compaction, snapshot expiry and deletion of orphan files. Safe beside a running writer.

Compaction and expiry commit like any other writer, and are retried when another writer commits first. Orphan files are deleted
only when they are older than any active writer can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.snapshots import ancestors_of

from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.compaction import MAX_ATTEMPTS, compact
from lakehouse.iceberg.table_files import delete_file, file_system, list_files, referenced_files
from lakehouse.iceberg.table_handle import TableHandle
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
    """Compact one table, expire its old snapshots and delete its orphan files.

    Raises CommitConflict, and FileNotFoundError if a file stays missing: one that an erasure has just replaced does not.
    """
    compaction = compact(lake, table)
    retention, orphan_retention = lake.settings.snapshot_retention_hours, lake.settings.orphan_retention_hours
    expired = retry_commit(lambda: expire(lake, table, retention, now), attempts=MAX_ATTEMPTS)
    orphans, size = retry_commit(lambda: delete_orphans(lake, table, orphan_retention, now), attempts=MAX_ATTEMPTS)
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
    """Expire snapshots that were replaced longer ago than the retention, and a staged snapshot of that age.

    The current snapshot always stays. Other branches and tags keep what their own retention asks for: a branch its head and
    the snapshots within its `min-snapshots-to-keep` or `max-snapshot-age-ms`, a tag its snapshot. One that is older than its
    `max-ref-age-ms` is removed. Returns the number of expired snapshots. Raises CommitConflict.
    """
    handle = lake.load(table, create=False)
    snapshots_before = len(handle.iceberg_table.metadata.snapshots)
    # Iceberg's times are whole milliseconds, rounded down
    limit = math.floor((now - timedelta(hours=retention_hours)).timestamp() * 1000)
    if (staged := handle.staged) is not None and staged.timestamp_ms < limit:
        handle.discard_staged()
        handle = lake.load(table, create=False)
    if outlived := _outlived_refs(handle, now):
        handle.remove_refs(outlived)
        handle = lake.load(table, create=False)
    kept = handle.lineage_snapshot_ids | _retained_by_refs(handle, now)
    replaced_at = _replacement_times(handle)
    old = [
        snapshot.snapshot_id
        for snapshot in handle.published_snapshots
        if replaced_at.get(snapshot.snapshot_id, snapshot.timestamp_ms) < limit and snapshot.snapshot_id not in kept
    ]
    if old:
        handle.expire_snapshots(old)
    return snapshots_before - len(handle.iceberg_table.metadata.snapshots)


def _replacement_times(handle: TableHandle) -> dict[int, int]:
    """Return when each snapshot ceased to be the current one, in milliseconds since 1970.

    This is what readers and time travel depend on, and the snapshot log records it: a staged snapshot is created long before it
    is published. Without those that were never current, and the one that is.
    """
    metadata = handle.iceberg_table.metadata
    times = {entry.snapshot_id: later.timestamp_ms for entry, later in pairwise(metadata.snapshot_log)}
    return {number: time for number, time in times.items() if number != metadata.current_snapshot_id}


def _outlived_refs(handle: TableHandle, now: datetime) -> list[str]:
    """Return the branches and tags of others that are older than their `max-ref-age-ms`."""
    moment, metadata = now.timestamp() * 1000, handle.iceberg_table.metadata
    return [
        name
        for name, ref in handle.other_refs.items()
        if ref.max_ref_age_ms is not None
        and (head := metadata.snapshot_by_id(ref.snapshot_id)) is not None
        and moment - head.timestamp_ms > ref.max_ref_age_ms
    ]


def _retained_by_refs(handle: TableHandle, now: datetime) -> set[int]:
    """Return the heads of all branches and tags, and the snapshots that the retention of others' branches asks for."""
    metadata = handle.iceberg_table.metadata
    retained = {ref.snapshot_id for ref in metadata.refs.values()}
    for ref in handle.other_refs.values():
        if ref.snapshot_ref_type is SnapshotRefType.BRANCH:
            oldest = now.timestamp() * 1000 - (ref.max_snapshot_age_ms or 0)
            history = ancestors_of(metadata.snapshot_by_id(ref.snapshot_id), metadata)
            for count, snapshot in enumerate(history):
                if count >= (ref.min_snapshots_to_keep or 1) and snapshot.timestamp_ms < oldest:
                    break
                retained.add(snapshot.snapshot_id)
    return retained


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
        delete_file(filesystem, info.path)
    return len(orphans), sum(int(info.size or 0) for info in orphans)
