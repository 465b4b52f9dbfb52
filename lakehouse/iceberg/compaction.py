"""Compaction: small files are merged, and files with deleted rows are rewritten without them.

Compaction commits like any other writer: from a handle loaded before the read, without commit retries. If a writer commits
in between, compaction fails and starts again; if compaction commits in between, the writer does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyiceberg.manifest import DataFile

from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.retry import retry_commit
from lakehouse.table import Table

TARGET_BYTES = 64 * 1024 * 1024
"""Total size of the files that are merged into one."""
SMALL_BYTES = TARGET_BYTES // 4
"""A smaller file is merged with others."""
MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class CompactionResult:
    """The number of data files before and after a compaction, and of the position delete files that it merged."""

    files_before: int
    files_after: int
    deletes_merged: int


def files_to_compact(files: Iterable[File]) -> list[File]:
    """Return the files of a partition that are worth rewriting: small ones, and those with deleted rows."""
    files = list(files)
    with_deletes = [file for file in files if file.deletes]
    small = [file for file in files if not file.deletes and file.bytes < SMALL_BYTES]
    chosen = [*with_deletes, *(small if len(small) > 1 or with_deletes else [])]
    return chosen if with_deletes or len(chosen) > 1 else []


def compact(lake: Lake, table: Table) -> CompactionResult:
    """Rewrite small files and files with deleted rows, partition by partition, in one commit.

    Raises CommitConflict, and FileNotFoundError if a file stays missing.
    """
    return retry_commit(lambda: _compact(lake.load(table, create=False)), attempts=MAX_ATTEMPTS)


def _compact(handle: TableHandle) -> CompactionResult:
    files = handle.files()
    by_partition: dict[str, list[File]] = {}
    for file in files:
        by_partition.setdefault(repr(file.partition), []).append(file)
    added: list[DataFile] = []
    removed: set[str] = set()
    columns = handle.reader.schema.names
    order = [name for name in (handle.table.sort_by or handle.table.key) if name in columns]
    for partition in by_partition.values():
        for batch in _batches(files_to_compact(partition)):
            rows = handle.reader.read(batch, columns)
            added += handle.writer.write(rows.sort(order, nulls_last=True) if order else rows)
            removed |= {file.path for file in batch}
    deletes = {path for file in files for path in file.deletes}
    merged = {path for path in deletes if not any(path in file.deletes for file in files if file.path not in removed)}
    if removed:
        handle.commit(
            added,
            positions=handle.positions,
            removed_paths=frozenset(removed | merged),
            changes_rows=False,
            replaces_files=True,
        )
    return CompactionResult(
        files_before=len(files), files_after=len(files) - len(removed) + len(added), deletes_merged=len(merged)
    )


def _batches(files: list[File]) -> list[list[File]]:
    """Split files into batches of at most TARGET_BYTES, which bounds the memory. Skips a single file without deletes."""
    batches: list[list[File]] = []
    for file in files:
        if batches and sum(item.bytes for item in batches[-1]) + file.bytes <= TARGET_BYTES:
            batches[-1].append(file)
        else:
            batches.append([file])
    return [batch for batch in batches if len(batch) > 1 or batch[0].deletes]
