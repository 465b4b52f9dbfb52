"""Files of a table replaced because rows in them must go, and its past forgotten. For erasure: nothing else rewrites history.

Position deletes leave the old row in its file, an old snapshot refers to old files, and manifests hold the least and the
greatest value of each column. So the files with such rows are replaced, an empty commit drops the manifests that tell of
their removal, all older snapshots are expired, and what nothing refers to any more is deleted at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Snapshot

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.errors import committing
from lakehouse.iceberg.maintenance import expire, referenced_files
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.table_handle import AUDIT_BRANCH, TableHandle
from lakehouse.table import DELETED, SEQUENCE, Table

REWRITTEN = "shopsphere.rewritten"
"""Names, in a snapshot's summary, why it rewrote the table: once for each reason."""
ROWS, FILES = "shopsphere.rewritten-rows", "shopsphere.rewritten-files"

Edit = Callable[[pl.DataFrame], tuple[pl.DataFrame, pl.Series, pl.Series | None]]
"""edit(rows) -> the rows as they must be, which of them changed, and a key by which rows speak of the same thing: a row with
the key of a changed one counts as changed."""


@dataclass(frozen=True)
class RewriteResult:
    """What a rewrite did to a table."""

    table: str
    rows: int = 0
    files: int = 0


@dataclass(frozen=True)
class PurgeResult:
    """What forgetting a table's past did."""

    table: str
    files_rewritten: int
    tombstones: int
    snapshots_expired: int
    files_deleted: int
    bytes_deleted: int


def find_rewrite(handle: TableHandle, reason: str) -> Snapshot | None:
    """The snapshot that rewrote the table for this reason; None: none did, or it is gone."""
    for snapshot in handle.iceberg_table.metadata.snapshots:
        if snapshot.summary and snapshot.summary.additional_properties.get(REWRITTEN) == reason:
            return snapshot
    return None


def rewrite(lake: Lake, table: Table, edit: Edit, reason: str) -> RewriteResult:
    """Replace the files with rows that `edit` changes, in one commit, once for each `reason`.

    Changed rows get the sequence of the commit, so that tables downstream take them for new. It commits even when nothing
    changes: a writer that began before fails then, and begins anew. Raises CommitConflict.
    """
    handle = lake.load(table)
    if (done := find_rewrite(handle, reason)) is not None and done.summary:
        told = done.summary.additional_properties
        return RewriteResult(table.name, int(told[ROWS]), int(told[FILES]))
    files, columns = handle.files(), handle.reader.schema.names
    edited = []
    touched: set[str] = set()
    for file in files:
        rows, changed, keys = edit(handle.reader.read([file], columns))
        edited.append((file, rows, changed, keys))
        if keys is not None:
            touched |= set(keys.filter(changed).drop_nulls().to_list())
    added, removed, count = [], [], 0
    for file, rows, changed, keys in edited:
        if keys is not None and touched:
            changed |= keys.is_in(list(touched)).fill_null(False)
        if not changed.any():
            continue
        count += int(changed.sum())
        removed.append(file)
        sequence = pl.when(changed).then(pl.lit(handle.next_sequence, pl.Int64)).otherwise(pl.col(SEQUENCE))
        added += handle.writer.write(rows.with_columns(sequence.alias(SEQUENCE)))
    handle.commit(
        added,
        positions=handle.positions,
        removed_paths=_without(files, removed),
        changes_rows=bool(removed),
        properties={REWRITTEN: reason, ROWS: str(count), FILES: str(len(removed))},
    )
    return RewriteResult(table.name, count, len(removed))


def replace_rows(handle: TableHandle, gone: pl.Expr, rows: pl.DataFrame) -> int:
    """Take the rows for which `gone` holds out of their files and write others, in one commit; gives how many went."""
    files, columns = handle.files(), handle.reader.schema.names
    added, removed, count = list(handle.writer.write(rows)), [], 0
    for file in files:
        old = handle.reader.read([file], columns)
        kept = old.filter(~gone)
        if kept.height < old.height:
            count += old.height - kept.height
            removed.append(file)
            added += handle.writer.write(kept)
    if added or removed:
        handle.commit(added, positions=handle.positions, removed_paths=_without(files, removed))
    return count


def _without(files: Iterable[File], removed: Iterable[File]) -> frozenset[str]:
    """The files that go, and the delete files that concern no other file."""
    gone = {file.path for file in removed}
    needed = {path for file in files if file.path not in gone for path in file.deletes}
    return frozenset(gone | {path for file in files for path in file.deletes if path not in needed})


def purge_history(lake: Lake, table: Table, *, tombstones: bool) -> PurgeResult:
    """Leave of a table only its living rows, in files without deletes, and its newest snapshot, whatever branch or tag names
    another.

    tombstones: take these out too; only when every table downstream has read them. A writer at work meanwhile begins anew.
    Files that nothing refers to are deleted at once, if they were referred to or are older than the last commit: who wrote
    them cannot commit any more. Raises CommitConflict.
    """
    handle = lake.load(table)
    cleaned, buried = _cleaned(handle, tombstones)
    if cleaned:
        handle = lake.load(table)
    if named := [name for name in handle.iceberg_table.metadata.refs if name not in (MAIN_BRANCH, AUDIT_BRANCH)]:
        _unname(handle, named)
        handle = lake.load(table)
    # the newest may be of another engine, and positions told by one before; or on a branch that has ended
    needed = len(handle.lineage_snapshot_ids) > 1 or bool(named)
    if handle.snapshot is not None and (needed or _tells_of_removals(handle) or _unreferenced(handle)[1]):
        # the snapshot that removed files lists them, with the bounds of their values; and who wrote what nothing refers to
        # yet cannot commit any more
        handle.commit(positions=handle.positions, changes_rows=False)
        handle = lake.load(table)
    before = referenced_files(handle)
    expired = expire(lake, table, 0, datetime.now(UTC) + timedelta(days=1))
    handle = lake.load(table)
    files, size = _delete_unreferenced(handle, before)
    return PurgeResult(table.name, cleaned, buried, expired, files, size)


def _unname(handle: TableHandle, names: Iterable[str]) -> None:
    """End branches and tags that others have made: what they name could not be forgotten."""
    with committing(handle.table.name), handle.iceberg_table.manage_snapshots() as snapshots:
        for name in names:
            snapshots.remove_tag(name)  # of a branch the same: it says only which name goes


def _tells_of_removals(handle: TableHandle) -> bool:
    snapshot = handle.snapshot
    return snapshot is not None and any(m.deleted_files_count != 0 for m in snapshot.manifests(handle.iceberg_table.io))


def _cleaned(handle: TableHandle, tombstones: bool) -> tuple[int, int]:
    """Replace the files with deleted rows, and tombstones; gives how many, and how many tombstones went."""
    files, columns = handle.files(), handle.reader.schema.names
    added: list[Any] = []
    removed, buried = [], 0
    for file in files:
        marked = 0
        if tombstones and DELETED in columns:
            marked = int(handle.reader.read([file], [DELETED])[DELETED].fill_null(False).sum())
        if not file.deletes and not marked:
            continue
        rows = handle.reader.read([file], columns)
        if marked:
            rows = rows.filter(~pl.col(DELETED).fill_null(False))
        buried += marked
        removed.append(file)
        added += handle.writer.write(rows)
    if removed:
        handle.commit(added, positions=handle.positions, removed_paths=_without(files, removed), changes_rows=False)
    return len(removed), buried


def file_system(handle: TableHandle) -> tuple[FileSystem, str]:
    """The file system that holds a table, and its place there. Raises ShopSphereError when it is none that can be listed."""
    io = handle.iceberg_table.io
    if not isinstance(io, PyArrowFileIO):
        raise ShopSphereError(f"{handle.table.name}: its files cannot be listed. Use a catalog with PyArrow's file access.")
    scheme, netloc, root = io.parse_location(handle.iceberg_table.location())
    return io.fs_by_scheme(scheme, netloc), root


def list_files(handle: TableHandle) -> list[FileInfo]:
    """All files below a table's location."""
    filesystem, root = file_system(handle)
    found = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return [info for info in found if info.type == FileType.File]


def _unreferenced(handle: TableHandle) -> tuple[list[FileInfo], list[FileInfo]]:
    """The files that nothing refers to: those older than the last commit, and those that a writer may be at."""
    io = handle.iceberg_table.io
    filesystem, _ = file_system(handle)
    assert isinstance(io, PyArrowFileIO)
    found = list_files(handle)
    keep = {io.parse_location(path)[2] for path in referenced_files(handle)}
    newest = filesystem.get_file_info([io.parse_location(handle.iceberg_table.metadata_location)[2]])[0].mtime
    left = [info for info in found if info.path not in keep]
    older = [info for info in left if newest and info.mtime < newest]
    return older, [info for info in left if info not in older]


def _delete_unreferenced(handle: TableHandle, before: set[str]) -> tuple[int, int]:
    io = handle.iceberg_table.io
    filesystem, _ = file_system(handle)
    assert isinstance(io, PyArrowFileIO)
    known = {io.parse_location(path)[2] for path in before}
    older, newer = _unreferenced(handle)
    gone = [*older, *(info for info in newer if info.path in known)]
    for info in gone:
        delete_file(filesystem, info.path)
    return len(gone), sum(int(info.size or 0) for info in gone)


def delete_file(filesystem: FileSystem, path: str) -> None:
    """Delete a file; one that somebody else deleted first is no error."""
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)
