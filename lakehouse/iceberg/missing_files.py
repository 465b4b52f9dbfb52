"""Detection of missing files: a file that a table's current snapshot needs, deleted by mistake or lost with a disk."""

from __future__ import annotations

from collections.abc import Iterable

from lakehouse.errors import MissingFilesError, TableNotFound
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table


def find_missing_file(lake: Lake, table: Table) -> str | None:
    """Return a missing file that the current snapshot of a table needs, or 'its metadata'.

    Return None if no file is missing or the table does not exist. Raises CatalogUnreachable, and the store's errors when
    it cannot be determined.
    """
    # checked twice, because a concurrent rewrite deletes files that the snapshot loaded here needs and the newer one does not
    return _find_missing_file(lake, table) and _find_missing_file(lake, table)


def _find_missing_file(lake: Lake, table: Table) -> str | None:
    reading = "its metadata"
    try:
        handle = lake.load(table, create=False)
        if handle.snapshot is None:
            return None
        reading = handle.snapshot.manifest_list
        files = handle.files()
    except TableNotFound:
        return None
    except FileNotFoundError:
        return reading
    needed = (path for file in files for path in (file.path, *file.deletes))
    return next((path for path in needed if not handle.iceberg_table.io.new_input(path).exists()), None)


def missing_files_error(lake: Lake, tables: Iterable[Table]) -> MissingFilesError | None:
    """Return the error for the first of the tables that misses a file, or None if no file is missing."""
    for table in tables:
        if (missing := find_missing_file(lake, table)) is None:
            continue
        if table.layer == "bronze":
            return MissingFilesError(
                f"{table.name}: a file is missing ({missing}). Restore it from the store's versions or a backup."
            )
        return MissingFilesError(
            f"{table.name}: a file is missing ({missing}). Re-create the table from its inputs.",
            remedy="rebuild",
            remedy_tables=(table.name,),
        )
    return None
