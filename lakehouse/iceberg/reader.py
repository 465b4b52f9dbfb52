"""Reading the data files of a table, with their position deletes applied, in any process."""

from __future__ import annotations

import io as io_module
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import polars as pl
import pyarrow as pa
from pyiceberg.io import FileIO
from pyiceberg.typedef import Record

from lakehouse.iceberg.column_mapping import ColumnMapping
from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import DELETED, Table

FILE, POS = "_file", "_pos"
"""Columns that locate a row: the index of its file in the list of files read, and its position in that file."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A data file of one snapshot, with the position deletes that apply to it. spec_id: of its partition spec."""

    path: str
    deletes: tuple[str, ...]
    rows: int
    bytes: int
    spec_id: int
    partition: Record = field(compare=False)


@dataclass(frozen=True)
class FileReader:
    """Reads data files of one table in any process. Picklable; holds no connection.

    mapping  None if all files have the columns under their current names
    """

    io: FileIO
    schema: pa.Schema
    mapping: ColumnMapping | None = None

    def _source(self, path: str) -> Any:
        if path.startswith("file:") or path.startswith("/"):
            return path.removeprefix("file://")
        with self.io.new_input(path).open() as stream:
            return io_module.BytesIO(stream.read())

    @cached_property
    def _types(self) -> dict[str, pl.DataType]:
        return polars_schema(self.schema)

    def _deleted_positions(self, paths: Iterable[str]) -> dict[str, pl.Series]:
        """Return the deleted positions of each data file, from position delete files."""
        frames = [pl.read_parquet(self._source(path), columns=["file_path", "pos"]) for path in paths]
        if not frames:
            return {}
        parts = pl.concat(frames).partition_by("file_path", as_dict=True)
        return {str(key[0]): part["pos"] for key, part in parts.items()}

    def read(
        self,
        files: Sequence[File],
        columns: Sequence[str],
        predicate: pl.Expr | None = None,
        *,
        positions: bool = False,
    ) -> pl.DataFrame:
        """Return the rows of `files` that match `predicate`, without those deleted by position.

        A column that a file lacks is null. With `positions`, also return `_file` (index in `files`) and `_pos`.
        """
        wanted = list(dict.fromkeys(columns))
        roots = set(predicate.meta.root_names()) if predicate is not None else set()
        needed = [*wanted, *(name for name in roots if name not in wanted and name != POS)]
        deleted = self._deleted_positions(sorted({path for file in files for path in file.deletes}))
        frames = []
        for number, file in enumerate(files):
            lazy = self._scan(file, needed)
            if predicate is not None:
                lazy = lazy.filter(predicate)
            if (deleted_positions := deleted.get(file.path)) is not None:
                lazy = lazy.filter(~pl.col(POS).is_in(deleted_positions.cast(pl.UInt32).implode()))
            keep: list[pl.Expr | str] = list(wanted)
            if positions:
                keep = [*wanted, pl.lit(number, dtype=pl.UInt32).alias(FILE), POS]
            frames.append(lazy.select(keep).collect())
        if frames:
            return pl.concat(frames)
        empty: dict[str, Any] = {name: self._types[name] for name in wanted}
        return pl.DataFrame(schema={**empty, FILE: pl.UInt32, POS: pl.UInt32} if positions else empty)

    def _scan(self, file: File, columns: Sequence[str]) -> pl.LazyFrame:
        """Scan `_pos` and the given columns of a file, each with the type that the table has now."""
        source = self._source(file.path)
        lazy = pl.scan_parquet(source, row_index_name=POS, glob=False)
        present = lazy.collect_schema()
        stored = self.mapping.names_in(source) if self.mapping else {name: name for name in columns if name in present}
        return lazy.select(pl.col(POS), *(self._column(name, stored.get(name), present) for name in columns))

    def _column(self, name: str, stored: str | None, present: pl.Schema) -> pl.Expr:
        """Return a column of a file with its current name and type. stored: its name in the file; None if that lacks it."""
        if stored is None:
            return pl.lit(None, dtype=self._types[name]).alias(name)
        column = pl.col(stored) if stored == name else pl.col(stored).alias(name)
        return column if present[stored] == self._types[name] else column.cast(self._types[name])

    def read_at(self, files: Sequence[File], columns: Sequence[str], locations: pl.DataFrame) -> pl.DataFrame:
        """Return the rows at the given locations (`_file`, `_pos`), with their locations."""
        parts = []
        for key, part in locations.partition_by(FILE, as_dict=True).items():
            number = int(str(key[0]))
            at = pl.col(POS).is_in(part[POS].implode())
            rows = self.read([files[number]], columns, at, positions=True)
            parts.append(rows.with_columns(pl.lit(number, dtype=pl.UInt32).alias(FILE)))
        return pl.concat(parts) if parts else self.read((), columns, positions=True)


def live_rows(table: Table, predicate: pl.Expr | None, tombstones: bool = False) -> pl.Expr | None:
    """Return the predicate restricted to rows that are not tombstones, or unchanged with `tombstones`."""
    if not table.keeps_tombstones or tombstones:
        return predicate
    live = ~pl.col(DELETED).fill_null(False)
    return live if predicate is None else live & predicate
