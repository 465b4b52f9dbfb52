"""The files of a table: all below its location, and those that its snapshots reference."""

from __future__ import annotations

import contextlib

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType
from pyiceberg.io.pyarrow import PyArrowFileIO

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.table_handle import TableHandle


def file_system(handle: TableHandle) -> tuple[FileSystem, str]:
    """Return the file system of a table, and the table's path in it. Raises ShopSphereError if it cannot be listed."""
    io = handle.iceberg_table.io
    if not isinstance(io, PyArrowFileIO):
        raise ShopSphereError(f"{handle.table.name}: its files cannot be listed. Use a catalog with PyArrow's file access.")
    scheme, netloc, root = io.parse_location(handle.iceberg_table.location())
    return io.fs_by_scheme(scheme, netloc), root


def list_files(handle: TableHandle) -> list[FileInfo]:
    """Return all files below a table's location."""
    filesystem, root = file_system(handle)
    found = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return [info for info in found if info.type == FileType.File]


def referenced_files(handle: TableHandle) -> set[str]:
    """Return the locations of all files that a snapshot of the table needs, of its metadata files and registered statistics."""
    metadata, io = handle.iceberg_table.metadata, handle.iceberg_table.io
    paths = {handle.iceberg_table.metadata_location, *(entry.metadata_file for entry in metadata.metadata_log)}
    paths |= {file.statistics_path for file in (*metadata.statistics, *metadata.partition_statistics)}
    for snapshot in metadata.snapshots:
        paths.add(snapshot.manifest_list)
        for manifest in snapshot.manifests(io):
            if manifest.manifest_path in paths:
                continue
            paths.add(manifest.manifest_path)
            paths |= {entry.data_file.file_path for entry in manifest.fetch_manifest_entry(io, discard_deleted=True)}
    return paths


def delete_file(filesystem: FileSystem, path: str) -> None:
    """Delete a file. It is no error if it has already been deleted."""
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)
