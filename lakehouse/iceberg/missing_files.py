"""Files of a table that are gone, by a mistake or with a disk: which, and the way out."""

from __future__ import annotations

from collections.abc import Iterable

from lakehouse.errors import MissingFilesError, TableNotFound
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table


def find_missing_file(lake: Lake, table: Table) -> str | None:
    """A file that the newest snapshot of a table needs and that is not there, or 'its metadata'; None: all are there, or there
    is no such table. Raises CatalogUnreachable, and the store's errors when it cannot tell."""
    # looked for twice: whoever rewrites the table meanwhile takes files away that the newest snapshot does not need
    return _missing_file(lake, table) and _missing_file(lake, table)


def _missing_file(lake: Lake, table: Table) -> str | None:
    asked = "its metadata"
    try:
        handle = lake.load(table, create=False)
        if handle.snapshot is None:
            return None
        asked = handle.snapshot.manifest_list
        files = handle.files()
    except TableNotFound:
        return None
    except FileNotFoundError:
        return asked
    needed = (path for file in files for path in (file.path, *file.deletes))
    return next((path for path in needed if not handle.iceberg_table.io.new_input(path).exists()), None)


def missing_files_error(lake: Lake, tables: Iterable[Table]) -> MissingFilesError | None:
    """What is wrong with the first of the tables that has lost a file, and what to do; None: nothing is missing."""
    for table in tables:
        if (missing := find_missing_file(lake, table)) is not None:
            way_out = (
                "Put it back from the store's versions or a backup."
                if table.layer == "bronze"
                else f"Fill the table anew: python -m app rebuild {table.name}"
            )
            return MissingFilesError(f"{table.name} has lost a file ({missing}). {way_out}")
    return None
