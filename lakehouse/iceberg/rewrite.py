"""Replacement of files because rows in them must be removed physically, and removal of a table's history.

For erasure only: nothing else rewrites history. Position deletes leave the old row in its file, an old snapshot refers to old
files, and manifests contain the minimum and maximum of each column. So the files with such rows are replaced, an empty commit
drops the manifests that record their removal, all older snapshots are expired, and unreferenced files are deleted at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from pyarrow.fs import FileInfo
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.table.snapshots import Snapshot

from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import expire
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.snapshot_properties import REWRITTEN, REWRITTEN_FILES, REWRITTEN_ROWS
from lakehouse.iceberg.table_files import delete_file, file_system, list_files, referenced_files
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import DELETED, SEQUENCE, Table

Edit = Callable[[pl.DataFrame], tuple[pl.DataFrame, pl.Series, pl.Series | None]]
"""edit(rows) -> the edited rows, a mask of the changed ones, and optionally a key by which rows belong together: a row with the
key of a changed row counts as changed too."""


@dataclass(frozen=True)
class RewriteResult:
    """The number of rows and files that a rewrite changed in a table."""

    table: str
    rows: int = 0
    files: int = 0


@dataclass(frozen=True, kw_only=True)
class PurgeResult:
    """What the removal of a table's history rewrote, expired and deleted."""

    table: str
    files_rewritten: int
    tombstones: int
    snapshots_expired: int
    files_deleted: int
    bytes_deleted: int

    def __add__(self, later: PurgeResult) -> PurgeResult:
        """Return the sums of two removals from the same table."""
        return PurgeResult(
            table=self.table,
            files_rewritten=self.files_rewritten + later.files_rewritten,
            tombstones=self.tombstones + later.tombstones,
            snapshots_expired=self.snapshots_expired + later.snapshots_expired,
            files_deleted=self.files_deleted + later.files_deleted,
            bytes_deleted=self.bytes_deleted + later.bytes_deleted,
        )


def find_rewrite(handle: TableHandle, reason: str) -> Snapshot | None:
    """Return the snapshot that rewrote the table for this reason, or None if there is none or it has expired."""
    for snapshot in handle.iceberg_table.metadata.snapshots:
        if snapshot.summary and snapshot.summary.additional_properties.get(REWRITTEN) == reason:
            return snapshot
    return None


def rewrite(lake: Lake, table: Table, edit: Edit, reason: str) -> RewriteResult:
    """Replace the files with rows that `edit` changes, in one commit; at most once for each `reason`.

    Changed rows get the sequence of the commit, so that downstream tables read them as new. The commit happens even if
    nothing changes, so that a writer that started earlier fails and retries. Raises CommitConflict.
    """
    handle = lake.load(table)
    if (done := find_rewrite(handle, reason)) is not None and done.summary:
        properties = done.summary.additional_properties
        return RewriteResult(table.name, int(properties[REWRITTEN_ROWS]), int(properties[REWRITTEN_FILES]))
    files, columns = handle.files(), handle.reader.schema.names
    edited = []
    affected_keys: set[str] = set()
    for file in files:
        rows, changed, keys = edit(handle.reader.read([file], columns))
        edited.append((file, rows, changed, keys))
        if keys is not None:
            affected_keys |= set(keys.filter(changed).drop_nulls().to_list())
    added, removed, count = [], [], 0
    for file, rows, changed, keys in edited:
        if keys is not None and affected_keys:
            changed |= keys.is_in(list(affected_keys)).fill_null(False)
        if not changed.any():
            continue
        count += int(changed.sum())
        removed.append(file)
        sequence = pl.when(changed).then(pl.lit(handle.next_sequence, pl.Int64)).otherwise(pl.col(SEQUENCE))
        added += handle.writer.write(rows.with_columns(sequence.alias(SEQUENCE)))
    handle.commit(
        added,
        positions=handle.positions,
        removed_paths=_paths_to_remove(files, removed),
        changes_rows=bool(removed),
        properties={REWRITTEN: reason, REWRITTEN_ROWS: str(count), REWRITTEN_FILES: str(len(removed))},
    )
    return RewriteResult(table.name, count, len(removed))


def replace_rows(handle: TableHandle, obsolete: pl.Expr, rows: pl.DataFrame) -> int:
    """Remove the rows that match `obsolete` from their files and write `rows`, in one commit. Returns the number removed."""
    files, columns = handle.files(), handle.reader.schema.names
    added, removed, count = list(handle.writer.write(rows)), [], 0
    for file in files:
        old = handle.reader.read([file], columns)
        kept = old.filter(~obsolete)
        if kept.height < old.height:
            count += old.height - kept.height
            removed.append(file)
            added += handle.writer.write(kept)
    if added or removed:
        handle.commit(added, positions=handle.positions, removed_paths=_paths_to_remove(files, removed))
    return count


def _paths_to_remove(files: Iterable[File], removed: Iterable[File]) -> frozenset[str]:
    """Return the paths of the removed files, and of the delete files that apply to no other file."""
    removed_paths = {file.path for file in removed}
    needed = {path for file in files if file.path not in removed_paths for path in file.deletes}
    return frozenset(removed_paths | {path for file in files for path in file.deletes if path not in needed})


def purge_history(lake: Lake, table: Table, *, tombstones_read_to: int | None) -> PurgeResult:
    """Reduce a table to its live rows, in files without deletes, and its current snapshot.

    tombstones_read_to  remove the tombstones up to this sequence, which every downstream table has read; None: keep all

    Branches and tags of others are removed, since they would keep older snapshots. A concurrent writer fails and retries.
    Unreferenced files are deleted at once if they were referenced before or are older than the last commit to main: their
    writer can no longer commit. Raises CommitConflict.
    """
    handle = lake.load(table)
    files_rewritten, tombstones_removed = _apply_deletes(handle, tombstones_read_to)
    if files_rewritten:
        handle = lake.load(table)
    if refs := list(handle.other_refs):
        handle.remove_refs(refs)
        handle = lake.load(table)
    # the current snapshot may be another engine's, with the positions in an earlier one; or on a branch that was removed
    needs_commit = len(handle.lineage_snapshot_ids) > 1 or bool(refs)
    if handle.snapshot is not None and (needs_commit or _records_removals(handle) or _unreferenced_files(handle)[1]):
        # the snapshot that removed files lists them, with the bounds of their values; and after this commit, the writer of a
        # file that is not referenced yet can no longer commit
        handle.commit(positions=handle.positions, changes_rows=False)
        handle = lake.load(table)
    before = referenced_files(handle)
    expired = expire(lake, table, 0, datetime.now(UTC) + timedelta(days=1))
    handle = lake.load(table)
    files, size = _delete_unreferenced(handle, before)
    return PurgeResult(
        table=table.name,
        files_rewritten=files_rewritten,
        tombstones=tombstones_removed,
        snapshots_expired=expired,
        files_deleted=files,
        bytes_deleted=size,
    )


def _records_removals(handle: TableHandle) -> bool:
    """Return whether a manifest of the current snapshot records removed files."""
    snapshot = handle.snapshot
    return snapshot is not None and any(m.deleted_files_count != 0 for m in snapshot.manifests(handle.iceberg_table.io))


def _apply_deletes(handle: TableHandle, tombstones_read_to: int | None) -> tuple[int, int]:
    """Replace the files with deleted rows or with tombstones that can go; return the number of files and of those tombstones."""
    obsolete = _tombstones(handle, tombstones_read_to) if tombstones_read_to is not None else None
    files, columns = handle.files(), handle.reader.schema.names
    added: list[Any] = []
    removed, tombstones_removed = [], 0
    for file in files:
        in_file = handle.reader.read([file], [SEQUENCE], obsolete).height if obsolete is not None else 0
        if not file.deletes and not in_file:
            continue
        rows = handle.reader.read([file], columns, ~obsolete if obsolete is not None else None)
        tombstones_removed += in_file
        removed.append(file)
        added += handle.writer.write(rows)
    if removed:
        handle.commit(
            added,
            positions=handle.positions,
            removed_paths=_paths_to_remove(files, removed),
            changes_rows=False,
            replaces_files=not tombstones_removed,
        )
    return len(removed), tombstones_removed


def has_tombstones(handle: TableHandle, until: int) -> bool:
    """Return whether a table has tombstones up to a sequence."""
    return handle.reader.read(handle.files(), [SEQUENCE], _tombstones(handle, until)).height > 0


def _tombstones(handle: TableHandle, until: int) -> pl.Expr:
    """Return the predicate of the tombstones up to a sequence."""
    if DELETED not in handle.reader.schema.names:
        return pl.lit(False)
    return pl.col(DELETED).fill_null(False) & (pl.col(SEQUENCE) <= until)


def _unreferenced_files(handle: TableHandle) -> tuple[list[FileInfo], list[FileInfo]]:
    """Return the unreferenced files: those older than the last commit to main, and those that a writer may still commit.

    The metadata file does not show that time: expiry writes a new one without moving main, and a writer that loaded the
    table before can still commit then.
    """
    io = handle.iceberg_table.io
    filesystem, _ = file_system(handle)
    assert isinstance(io, PyArrowFileIO)
    found = list_files(handle)
    keep = {io.parse_location(path)[2] for path in referenced_files(handle)}
    last_commit = None
    if handle.snapshot is not None:
        last_commit = filesystem.get_file_info([io.parse_location(handle.snapshot.manifest_list)[2]])[0].mtime
    unreferenced = [info for info in found if info.path not in keep]
    older = [info for info in unreferenced if last_commit and info.mtime < last_commit]
    return older, [info for info in unreferenced if info not in older]


def _delete_unreferenced(handle: TableHandle, before: set[str]) -> tuple[int, int]:
    """Delete unreferenced files that no writer can commit; return their number and bytes. before: files once referenced."""
    io = handle.iceberg_table.io
    filesystem, _ = file_system(handle)
    assert isinstance(io, PyArrowFileIO)
    once_referenced = {io.parse_location(path)[2] for path in before}
    older, newer = _unreferenced_files(handle)
    unreferenced = [*older, *(info for info in newer if info.path in once_referenced)]
    for info in unreferenced:
        delete_file(filesystem, info.path)
    return len(unreferenced), sum(int(info.size or 0) for info in unreferenced)
