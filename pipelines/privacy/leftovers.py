"""Searches everything that ShopSphere stores for values that an erasure should have removed."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem

from lakehouse.byte_search import FileSearchResult, SearchTerms, search_files
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_files import file_system, list_files
from lakehouse.project import Project
from lakehouse.run_history import OPERATIONS
from lakehouse.table import Table
from pipelines.privacy.search_list import SUFFIX


def existing_tables(lake: Lake, project: Project) -> list[Table]:
    """Return the project's and the operations tables that exist in the catalog."""
    return [table for table in (*project.tables.values(), *OPERATIONS.values()) if lake.exists(table)]


def search_tables_and_home(lake: Lake, project: Project, needles: SearchTerms) -> FileSearchResult:
    """Search all files below the location of every table, and the files of the home directory."""
    total = FileSearchResult()
    seen: set[str] = set()
    for table in existing_tables(lake, project):
        handle = lake.load(table)
        files = list_files(handle)
        seen |= {info.path for info in files}
        total += search_files(file_system(handle)[0], files, needles)
    others = [info for info in _home_files(Path(lake.settings.home).absolute()) if info.path not in seen]
    return total + search_files(LocalFileSystem(), others, needles)


def files_below(directory: Path) -> list[FileInfo]:
    """Return all files below a local directory."""
    found = LocalFileSystem().get_file_info(FileSelector(str(directory), recursive=True))
    return [info for info in found if info.type == FileType.File]


def _home_files(home: Path) -> list[FileInfo]:
    """Return the files of a home directory: a local warehouse, the catalog, MLflow, reports and logs.

    Left out are the sandbox (it is the source), other home directories within this one, and the search lists.
    """
    excluded = [
        directory
        for directory in home.iterdir()
        if directory.is_dir() and (directory.name == "sandbox" or (directory / "catalog.db").exists())
    ]
    return [
        info
        for info in files_below(home)
        if not info.path.endswith(SUFFIX) and not any(Path(info.path).is_relative_to(other) for other in excluded)
    ]
