"""The columns of a data file by their field ids, as the Iceberg specification requires.

A name is not enough after another engine has renamed a column and added one of the old name: the file has the values of the
renamed column under the name of the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.table.metadata import TableMetadata

FIELD_ID = b"PARQUET:field_id"
"""The key under which pyarrow returns the field id of a Parquet column."""


@dataclass(frozen=True)
class ColumnMapping:
    """The field ids of a table's columns.

    ids             by the current name of the column
    name_mapping    by the name in a file without field ids: the table's name mapping, or the current names
    """

    ids: Mapping[str, int]
    name_mapping: Mapping[str, int]

    def names_in(self, source: Any) -> dict[str, str]:
        """Return the name that each column has in a Parquet file, by its current name; without those that the file lacks.

        source: a path or a binary stream, whose position is restored
        """
        names = self.names_in_schema(pq.read_schema(source))
        if hasattr(source, "seek"):
            source.seek(0)
        return names

    def names_in_schema(self, stored: pa.Schema) -> dict[str, str]:
        """Return the name that each column has in a file of this schema, by its current name."""
        by_id = {int(f.metadata[FIELD_ID]): f.name for f in stored if f.metadata and FIELD_ID in f.metadata}
        by_id = by_id or {self.name_mapping[name]: name for name in stored.names if name in self.name_mapping}
        return {name: by_id[number] for name, number in self.ids.items() if number in by_id}


def column_mapping(metadata: TableMetadata) -> ColumnMapping | None:
    """Return the mapping of a table whose files may have other columns under the current names; None if names suffice.

    They do as long as no schema of the table gives another meaning to a name. If schemas are missing, which some engines remove
    with expired snapshots, they may have.
    """
    current = {f.name: f.field_id for f in metadata.schema().fields}
    found = metadata.name_mapping()
    without_ids = {name: f.field_id for f in found.root if f.field_id is not None for name in f.names} if found else current
    complete = len(metadata.schemas) == max(schema.schema_id for schema in metadata.schemas) + 1
    pairs = {(f.name, f.field_id) for schema in metadata.schemas for f in schema.fields} | set(without_ids.items())
    unambiguous = len({name for name, _ in pairs}) == len(pairs) == len({number for _, number in pairs})
    return None if complete and unambiguous else ColumnMapping(current, without_ids)
