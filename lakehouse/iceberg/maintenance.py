"""Compaction, snapshot expiry, orphan files. Safe beside a running writer.

Compaction commits like any other writer: from a handle loaded before the read, without retries. A writer that
commits in between makes it fail, and it starts over; a compaction that commits in between makes the writer start
over. Orphans are deleted only when they are older than any write under way can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from pyarrow.fs import FileSelector, FileType
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import DataFile

from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.errors import catalog_errors
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.retry import retry_commit
from lakehouse.table import Table

TARGET_BYTES = 64 * 1024 * 1024
ATTEMPTS = 5


@dataclass(frozen=True)
class MaintenanceResult:
    """What maintenance did to a table."""

    table: str
    files_before: int
    files_after: int
    deletes_merged: int
    snapshots_expired: int
    orphans_deleted: int
    orphan_bytes: int


def worth_compacting(files: Iterable[File]) -> list[File]:
    """Files that are small or have rows deleted by position, where joining or cleaning them pays."""
    files = list(files)
    dirty = [file for file in files if file.deletes]
    small = [file for file in files if not file.deletes and file.bytes < TARGET_BYTES // 4]
    chosen = [*dirty, *(small if len(small) > 1 or dirty else [])]
    return chosen if dirty or len(chosen) > 1 else []


def compact(lake: Lake, table: Table) -> tuple[int, int, int]:
    """Rewrite small and dirty files, partition by partition, in one commit; gives files before, after, deletes merged."""
    return retry_commit(lambda: _compact(lake.load(table, create=False)), attempts=ATTEMPTS, missing_files=False)


def _compact(handle: TableHandle) -> tuple[int, int, int]:
    files = handle.files()
    by_partition: dict[str, list[File]] = {}
    for file in files:
        by_partition.setdefault(repr(file.partition), []).append(file)
    added: list[DataFile] = []
    removed: set[str] = set()
    order = [name for name in (handle.table.sort_by or handle.table.key) if name in handle.reader.schema.names]
    for group in by_partition.values():
        chosen = worth_compacting(group)
        for part in _batches(chosen):
            rows = handle.reader.read(part, handle.reader.schema.names)
            added += handle.writer.write(rows.sort(order, nulls_last=True) if order else rows)
            removed |= {file.path for file in part}
    deletes = {path for file in files for path in file.deletes}
    merged = {path for path in deletes if not any(path in file.deletes for file in files if file.path not in removed)}
    if removed:
        handle.commit(added, positions=handle.positions, removed_paths=frozenset(removed | merged), changes_rows=False)
    return len(files), len(files) - len(removed) + len(added), len(merged)


def _batches(files: list[File]) -> list[list[File]]:
    """Files in batches of bounded size, so that memory is bounded too."""
    result: list[list[File]] = []
    for file in files:
        if result and sum(item.bytes for item in result[-1]) + file.bytes <= TARGET_BYTES:
            result[-1].append(file)
        else:
            result.append([file])
    return [batch for batch in result if len(batch) > 1 or batch[0].deletes]


def expire(lake: Lake, table: Table, retention_hours: float, now: datetime) -> int:
    """Forget snapshots that were replaced longer ago than the retention, and a build that has waited that long to be
    published; the current one always stays, and so do the heads of branches and tags that others have made."""
    handle = lake.load(table, create=False)
    limit = (now - timedelta(hours=retention_hours)).timestamp() * 1000
    refused = 0
    if (build := handle.staged) is not None and build.timestamp_ms < limit:
        handle.discard_staged()
        handle, refused = lake.load(table, create=False), 1
    snapshots = sorted(handle.published_snapshots, key=lambda s: s.sequence_number or 0)
    named = {ref.snapshot_id for ref in handle.iceberg_table.metadata.refs.values()}
    # what counts is since when a snapshot is not the current one any more: readers and time travel rely on that
    old = [before.snapshot_id for before, after in pairwise(snapshots) if after.timestamp_ms < limit]
    old = [number for number in old if number not in handle.lineage_snapshot_ids and number not in named]
    if old:
        from pyiceberg.exceptions import CommitFailedException

        try:
            with catalog_errors(table.name):
                handle.iceberg_table.maintenance.expire_snapshots().by_ids(old).commit()
        except CommitFailedException as error:
            raise CommitConflict(
                f"{table.name}: another writer committed while snapshots were being expired. Run again."
            ) from error
    return len(old) + refused


def referenced_files(handle: TableHandle) -> set[str]:
    """Every file that some snapshot of the table still needs, and its metadata files."""
    metadata, io = handle.iceberg_table.metadata, handle.iceberg_table.io
    paths = {handle.iceberg_table.metadata_location, *(entry.metadata_file for entry in metadata.metadata_log)}
    for snapshot in metadata.snapshots:
        paths.add(snapshot.manifest_list)
        for manifest in snapshot.manifests(io):
            if manifest.manifest_path in paths:
                continue
            paths.add(manifest.manifest_path)
            paths |= {entry.data_file.file_path for entry in manifest.fetch_manifest_entry(io, discard_deleted=True)}
    return paths


def delete_orphans(lake: Lake, table: Table, retention_hours: float, now: datetime) -> tuple[int, int]:
    """Delete files below the table's location that no snapshot needs and that are older than the retention."""
    handle = lake.load(table, create=False)
    io = handle.iceberg_table.io
    if not isinstance(io, PyArrowFileIO):
        return 0, 0
    location = handle.iceberg_table.location()
    scheme, netloc, root = io.parse_location(location)
    filesystem = io.fs_by_scheme(scheme, netloc)
    limit = now - timedelta(hours=retention_hours)
    found = [
        info
        for info in filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        if info.type == FileType.File and info.mtime is not None and info.mtime.astimezone(UTC) < limit
    ]
    # listed first, then what is referenced: a file committed in between is in the second list
    keep = {io.parse_location(path)[2] for path in referenced_files(lake.load(table, create=False))}
    orphans = [info for info in found if info.path not in keep]
    for info in orphans:
        filesystem.delete_file(info.path)
    return len(orphans), sum(int(info.size or 0) for info in orphans)


def maintain(lake: Lake, table: Table, now: datetime) -> MaintenanceResult:
    """Compact, expire, and clean one table."""
    before, after, merged = compact(lake, table)
    hours = lake.settings.snapshot_retention_hours
    expired = retry_commit(lambda: expire(lake, table, hours, now), attempts=ATTEMPTS, missing_files=False)
    orphans, size = delete_orphans(lake, table, lake.settings.orphan_retention_hours, now)
    return MaintenanceResult(table.name, before, after, merged, expired, orphans, size)
