"""The only Iceberg I/O: load a table, read what is there or what changed, write data files, commit once.

A `TableHandle` is a table as it was when it was loaded. Everything read through it is of that moment, and a commit
through it succeeds only if nobody committed since: commit retries are off, so a stale writer fails rather than
repeating its rows.
"""

from __future__ import annotations

import contextlib
import io as io_module
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.conversions import from_bytes
from pyiceberg.exceptions import (
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.expressions import AlwaysTrue, BooleanExpression, GreaterThan
from pyiceberg.io import FileIO
from pyiceberg.io.pyarrow import _dataframe_to_data_files, schema_to_pyarrow
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC, PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table import Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    SetSnapshotRefUpdate,
)
from pyiceberg.transforms import DayTransform, IdentityTransform, MonthTransform, Transform, YearTransform
from pyiceberg.typedef import Record
from pyiceberg.types import (
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    IcebergType,
    IntegerType,
    LongType,
    NestedField,
    TimestamptzType,
)
from pyiceberg_core import transform as iceberg_transform

from lakehouse.errors import CommitConflict, SchemaConflict, SettingsError, TableNotFound
from lakehouse.iceberg.errors import catalog_errors, committing
from lakehouse.iceberg.file_io import NonEmptyFileIO
from lakehouse.iceberg.row_delta import RowDelta
from lakehouse.settings import LakeSettings
from lakehouse.table import DELETED, GROUP_HASH, SEQUENCE, Table

POSITIONS = "shopsphere.positions"
DATA_SEQUENCE = "shopsphere.data-sequence"
FINGERPRINT = "shopsphere.shape"
ROWS = "shopsphere.rows"
ROWS_CHANGED = "shopsphere.rows-changed"
VIOLATIONS = "shopsphere.violations"
"""Rows of the table that break each expectation of rows, as JSON."""
EXPECTATIONS = "shopsphere.expectations"
AUDIT_BRANCH = "audit"
"""Where a build of a gold table waits until it is published."""
PATH_FIELD, POS_FIELD = 2147483546, 2147483545
"""Reserved field ids of a position delete file (Iceberg spec, 'Reserved Field IDs')."""

FILE, POS = "_file", "_pos"
"""Where a row read from a table lies: the number of its file in the list that was read, its position there."""

TABLE_PROPERTIES = {
    "format-version": "2",
    "commit.retry.num-retries": "0",
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
    "write.parquet.row-group-limit": "65536",
    "write.parquet.compression-codec": "zstd",
}
"""Retries off: see the module text. Small row groups: a look-up of scattered keys then decodes little."""

TRANSFORMS: dict[str, Transform[Any, Any]] = {
    "identity": IdentityTransform(),
    "day": DayTransform(),
    "month": MonthTransform(),
    "year": YearTransform(),
}


@dataclass(frozen=True)
class File:
    """A data file as one snapshot has it, with the position deletes that apply to it."""

    path: str
    deletes: tuple[str, ...]
    rows: int
    bytes: int
    partition: Record = field(compare=False)


def stored_columns(table: Table) -> list[tuple[str, pa.DataType, str, bool]]:
    """The columns of a table as it is stored: the declared ones and the engine's (name, type, doc, required)."""
    engine: list[tuple[str, pa.DataType, str, bool]] = [
        (SEQUENCE, pa.int64(), "Sequence of the commit that wrote or changed the row", False)
    ]
    if table.key:
        engine.append((GROUP_HASH, pa.int32(), "Hash of the row's group, for look-ups", False))
    if table.keeps_tombstones:
        engine.append((DELETED, pa.bool_(), "True where the row is a tombstone: deleted, kept until gold has heard of it", False))
    return [(c.name, c.type, c.doc, c.required) for c in table.columns] + engine


@cache
def iceberg_schema(table: Table) -> Schema:
    """The Iceberg schema of a declaration, with its documentation."""
    from pyiceberg.io.pyarrow import _ConvertToIcebergWithoutIDs, visit_pyarrow
    from pyiceberg.schema import assign_fresh_schema_ids

    plain = pa.schema([pa.field(name, type_, nullable=True) for name, type_, _, _ in stored_columns(table)])
    converted = visit_pyarrow(plain, _ConvertToIcebergWithoutIDs())
    assert isinstance(converted, Schema)
    docs = {name: doc for name, _, doc, _ in stored_columns(table)}
    fields = [
        NestedField(field_id=number, name=f.name, field_type=f.field_type, required=f.name in table.identifier, doc=docs[f.name])
        for number, f in enumerate(converted.fields, start=1)
    ]
    identifier = [f.field_id for f in fields if f.name in table.identifier]
    return assign_fresh_schema_ids(Schema(*fields, identifier_field_ids=identifier))


@cache
def declared_types(table: Table) -> pa.Schema:
    """The Arrow types of a declaration, as they come back from the stored table."""
    return arrow_schema(iceberg_schema(table))


def partition_spec(table: Table, schema: Schema) -> PartitionSpec:
    """The Iceberg partition spec of a declaration."""
    if not table.partition_by:
        return UNPARTITIONED_PARTITION_SPEC
    return PartitionSpec(
        *(
            PartitionField(
                source_id=schema.find_field(part.column).field_id,
                field_id=1000 + number,
                transform=TRANSFORMS[part.transform],
                name=part.column if part.transform == "identity" else f"{part.column}_{part.transform}",
            )
            for number, part in enumerate(table.partition_by)
        )
    )


def group_hash(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """A 31-bit hash of the given columns, stable for ever: Iceberg's own bucket hash (murmur3) of their text."""
    if frame.height == 0:
        return pl.Series(GROUP_HASH, [], dtype=pl.Int32)
    parts = []
    for name in columns:
        dtype = frame.schema[name]
        expression = pl.col(name)
        if isinstance(dtype, pl.Datetime):
            expression = expression.dt.cast_time_unit("us").cast(pl.Int64)
        elif dtype == pl.Date:
            expression = expression.cast(pl.Int32)
        parts.append(expression.cast(pl.String).fill_null("\x00"))
    text = frame.select(pl.concat_str(parts, separator="\x1f").alias("t"))["t"]
    array = text.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
    return pl.Series(GROUP_HASH, iceberg_transform.bucket(array, 2**31 - 1), dtype=pl.Int32)


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow types of an Iceberg schema: plain strings and bytes, no field ids."""
    plain = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    return pa.schema(
        [f.with_type(plain.get(f.type, f.type)).remove_metadata() for f in schema_to_pyarrow(schema, include_field_ids=False)]
    )


def polars_schema(schema: pa.Schema) -> dict[str, pl.DataType]:
    """The polars types of an Arrow schema."""
    frame = pl.from_arrow(schema.empty_table())
    assert isinstance(frame, pl.DataFrame)
    return dict(frame.schema)


def as_arrow(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """A polars frame as an Arrow table of exactly that schema (missing columns: null)."""
    frame = frame.select(pl.col(f.name) if f.name in frame.columns else pl.lit(None).alias(f.name) for f in schema)
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)


@dataclass(frozen=True)
class FileReader:
    """Reads data files of one table in any process: picklable, holds no connection."""

    io: FileIO
    schema: pa.Schema

    def _source(self, path: str) -> Any:
        if path.startswith("file:") or path.startswith("/"):
            return path.removeprefix("file://")
        with self.io.new_input(path).open() as stream:
            return io_module.BytesIO(stream.read())

    @cached_property
    def _types(self) -> dict[str, pl.DataType]:
        return polars_schema(self.schema)

    def _deleted(self, paths: Iterable[str]) -> dict[str, pl.Series]:
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
        """The rows of `files` for which `predicate` holds, without those deleted by position.

        A column that a file does not have yet is null. `positions`: also give `_file` (index in `files`) and `_pos`.
        """
        wanted = list(dict.fromkeys(columns))
        roots = set(predicate.meta.root_names()) if predicate is not None else set()
        deleted = self._deleted(sorted({path for file in files for path in file.deletes}))
        frames = []
        for number, file in enumerate(files):
            lazy = pl.scan_parquet(self._source(file.path), row_index_name=POS, glob=False)
            present = lazy.collect_schema()
            needed = [*wanted, *(name for name in roots if name not in wanted and name != POS)]
            lazy = lazy.select(
                pl.col(POS),
                *(
                    pl.col(name)
                    if name in present and present[name] == self._types[name]
                    else pl.col(name).cast(self._types[name])
                    if name in present
                    else pl.lit(None, dtype=self._types[name]).alias(name)
                    for name in needed
                ),
            )
            if predicate is not None:
                lazy = lazy.filter(predicate)
            if (gone := deleted.get(file.path)) is not None:
                lazy = lazy.filter(~pl.col(POS).is_in(gone.cast(pl.UInt32).implode()))
            keep: list[pl.Expr | str] = list(wanted)
            if positions:
                keep = [*wanted, pl.lit(number, dtype=pl.UInt32).alias(FILE), POS]
            frames.append(lazy.select(keep).collect())
        if frames:
            return pl.concat(frames)
        empty: dict[str, Any] = {name: self._types[name] for name in wanted}
        return pl.DataFrame(schema={**empty, FILE: pl.UInt32, POS: pl.UInt32} if positions else empty)

    def at_positions(self, files: Sequence[File], columns: Sequence[str], where: pl.DataFrame) -> pl.DataFrame:
        """The rows at given places (`_file`, `_pos`), with these places."""
        parts = []
        for key, part in where.partition_by(FILE, as_dict=True).items():
            number = int(str(key[0]))
            at = pl.col(POS).is_in(part[POS].implode())
            rows = self.read([files[number]], columns, at, positions=True)
            parts.append(rows.with_columns(pl.lit(number, dtype=pl.UInt32).alias(FILE)))
        return pl.concat(parts) if parts else self.read((), columns, positions=True)


@dataclass(frozen=True)
class FileWriter:
    """Writes data files and position delete files in any process: picklable, holds no connection."""

    io: FileIO
    metadata: TableMetadata

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the table."""
        return arrow_schema(self.metadata.schema())

    def write(self, frame: pl.DataFrame | pa.Table) -> list[DataFile]:
        """Write rows to new data files. Nothing refers to them until they are committed."""
        table = frame if isinstance(frame, pa.Table) else as_arrow(frame, self.schema)
        if table.num_rows == 0:
            return []
        return list(
            _dataframe_to_data_files(
                table_metadata=self.metadata, df=table, io=self.io, write_uuid=uuid.uuid4(), counter=itertools.count(0)
            )
        )

    def write_deletes(self, files: Sequence[File], where: pl.DataFrame) -> list[DataFile]:
        """Write position delete files, one a partition; `where` has `_file` (index in `files`) and `_pos`."""
        if where.height == 0:
            return []
        paths = pl.DataFrame({FILE: pl.Series(range(len(files)), dtype=pl.UInt32), "file_path": [file.path for file in files]})
        located = where.select(FILE, pl.col(POS).cast(pl.Int64).alias("pos")).join(paths, on=FILE).sort("file_path", "pos")
        by_partition: dict[str, list[int]] = {}
        for number, file in enumerate(files):
            by_partition.setdefault(repr(file.partition), []).append(number)
        result = []
        for numbers in by_partition.values():
            part = located.filter(pl.col(FILE).is_in(numbers))
            if part.height:
                result.append(self._write_deletes(part, files[numbers[0]].partition))
        return result

    def _write_deletes(self, part: pl.DataFrame, partition: Record) -> DataFile:
        schema = pa.schema(
            [
                pa.field("file_path", pa.string(), nullable=False, metadata={"PARQUET:field_id": str(PATH_FIELD)}),
                pa.field("pos", pa.int64(), nullable=False, metadata={"PARQUET:field_id": str(POS_FIELD)}),
            ]
        )
        columns = part.select("file_path", "pos").to_arrow(compat_level=pl.CompatLevel.oldest())
        table = pa.table([columns["file_path"].cast(pa.string()), columns["pos"]], schema=schema)
        location = f"{self.metadata.location}/data/{uuid.uuid4()}-deletes.parquet"
        output = self.io.new_output(location)
        with output.create() as stream:
            pq.write_table(table, stream, compression="zstd")
        first, last = part["file_path"].min(), part["file_path"].max()
        return DataFile.from_args(
            content=DataFileContent.POSITION_DELETES,
            file_path=location,
            file_format=FileFormat.PARQUET,
            partition=partition,
            record_count=part.height,
            file_size_in_bytes=len(output),
            lower_bounds={PATH_FIELD: str(first).encode()},
            upper_bounds={PATH_FIELD: str(last).encode()},
            sort_order_id=None,
            equality_ids=None,
            key_metadata=None,
        )


class TableHandle:
    """A table as it was when it was loaded: what to read, and the one commit that may follow."""

    def __init__(self, table: Table, loaded: IcebergTable) -> None:
        self.table = table
        self.loaded = loaded
        self._transaction: Transaction | None = None

    @property
    def metadata(self) -> TableMetadata:
        """The metadata, with the schema changes prepared so far."""
        return self._transaction.table_metadata if self._transaction else self.loaded.metadata

    @property
    def snapshot(self) -> Snapshot | None:
        """The current snapshot, None for an empty table."""
        return self.loaded.metadata.current_snapshot()

    @property
    def sequence(self) -> int:
        """The sequence number that the next commit gets, if nobody else commits first."""
        return self.loaded.metadata.next_sequence_number()

    @property
    def history(self) -> list[Snapshot]:
        """The snapshots that readers have seen: all but a build that waits to be published."""
        waiting = self.loaded.metadata.refs.get(AUDIT_BRANCH)
        return [s for s in self.loaded.metadata.snapshots if waiting is None or s.snapshot_id != waiting.snapshot_id]

    def _told_by(self, snapshot: Snapshot | None) -> Iterator[Snapshot]:
        """The snapshots that tell of the table as of one of them: from that back to the newest of ours.

        Another engine's commits (a compaction, say) have nothing of ours; a commit of ours says all there is to say.
        """
        while snapshot is not None:
            yield snapshot
            if snapshot.summary and POSITIONS in snapshot.summary.additional_properties:
                return
            parent = snapshot.parent_snapshot_id
            snapshot = self.loaded.metadata.snapshot_by_id(parent) if parent is not None else None

    def summary(self, name: str, snapshot_id: int | None = None) -> str | None:
        """A property as of a snapshot (default: the current one): of the newest one up to there that has it."""
        start = self.snapshot if snapshot_id is None else self.loaded.metadata.snapshot_by_id(snapshot_id)
        for snapshot in self._told_by(start):
            properties = snapshot.summary.additional_properties if snapshot.summary else {}
            if name in properties:
                return str(properties[name])
        return None

    @property
    def telling(self) -> frozenset[int]:
        """The snapshots that positions are read from: maintenance must leave them."""
        return frozenset(snapshot.snapshot_id for snapshot in self._told_by(self.snapshot))

    @property
    def positions(self) -> dict[str, Any]:
        """How far each upstream has been read, from the current snapshot."""
        stored: dict[str, Any] = json.loads(self.summary(POSITIONS) or "{}")
        return stored

    @property
    def data_sequence(self) -> int:
        """The sequence of the last commit that changed rows; 0 for none."""
        return int(self.summary(DATA_SEQUENCE) or 0)

    def snapshot_of(self, sequence: int) -> int | None:
        """The id of the snapshot that a sequence number made; None when it is no longer there."""
        return next((s.snapshot_id for s in self.loaded.metadata.snapshots if s.sequence_number == sequence), None)

    @property
    def position(self) -> dict[str, Any]:
        """What a table downstream remembers of this one: its identity and the last change."""
        return {"table": str(self.loaded.metadata.table_uuid), "sequence": self.data_sequence}

    @property
    def arrow_schema(self) -> pa.Schema:
        """The stored columns and their Arrow types."""
        return arrow_schema(self.metadata.schema())

    @property
    def reader(self) -> FileReader:
        """A picklable reader of this table's files."""
        return FileReader(self.loaded.io, self.arrow_schema)

    @property
    def writer(self) -> FileWriter:
        """A picklable writer of files for this table."""
        return FileWriter(self.loaded.io, self.metadata)

    def files(
        self, since: int | None = None, where: BooleanExpression | None = None, snapshot_id: int | None = None
    ) -> list[File]:
        """The data files of the snapshot; with `since`, those that may hold rows of a later sequence."""
        if self.snapshot is None:
            return []
        row_filter: BooleanExpression = where or AlwaysTrue()
        if since is not None:
            row_filter = later(SEQUENCE, since)
        scan = self.loaded.scan(row_filter=row_filter, snapshot_id=snapshot_id)
        files = [
            File(
                task.file.file_path,
                tuple(sorted(delete.file_path for delete in task.delete_files)),
                task.file.record_count,
                task.file.file_size_in_bytes,
                task.file.partition,
            )
            for task in scan.plan_files()
        ]
        return sorted(files, key=lambda file: file.path)

    def read(self, columns: Sequence[str], predicate: pl.Expr | None = None, *, tombstones: bool = False) -> pl.DataFrame:
        """The rows for which `predicate` holds, all files; tombstones only when asked for."""
        return self.reader.read(self.files(), columns, live_rows(self.table, predicate, tombstones))

    def widen(self, columns: pa.Schema) -> None:
        """Prepare the schema for rows that have these columns; committed with the data. Raises SchemaConflict."""
        current = self.arrow_schema
        new = [f for f in columns if f.name not in current.names]
        promoted = [
            (f.name, target)
            for f in columns
            if f.name in current.names
            and current.field(f.name).type != f.type
            and (target := promotion(self.metadata.schema().find_field(f.name).field_type, f.type)) is not None
        ]
        for f in columns:
            if f.name in current.names and not compatible(current.field(f.name).type, f.type):
                raise SchemaConflict(self.table.name, f.name, str(current.field(f.name).type), str(f.type))
        if not new and not promoted:
            return
        if self._transaction is None:
            self._transaction = self.loaded.transaction()
        with self._transaction.update_schema() as update:
            if new:
                update.union_by_name(pa.schema([pa.field(f.name, f.type, nullable=True) for f in new]))
            for name, target in promoted:
                update.update_column(name, target)

    def describe(self) -> None:
        """Prepare what people read of the table as it is declared now (comments, owner, identifier); committed with the data."""
        schema, table = self.metadata.schema(), self.table
        told = {"comment": table.doc, "owner": table.owner}
        docs = [
            (name, doc)
            for name, _, doc, _ in stored_columns(table)
            if name in schema.column_names and schema.find_field(name).doc != doc
        ]
        identified = schema.identifier_field_names() == set(table.identifier)
        untold = {name: text for name, text in told.items() if self.metadata.properties.get(name) != text}
        if not docs and identified and not untold:
            return
        if self._transaction is None:
            self._transaction = self.loaded.transaction()
        if untold:
            self._transaction.set_properties(untold)
        # a column that the engine never leaves empty may be declared so, which Iceberg cannot know
        with self._transaction.update_schema(allow_incompatible_changes=True) as update:
            for name, doc in docs:
                update.update_column(name, doc=doc)
            if not identified:
                for name in table.identifier:
                    update.update_column(name, required=True)
                update.set_identifier_fields(*table.identifier)

    def commit(
        self,
        added: Iterable[DataFile] = (),
        *,
        positions: Mapping[str, Any],
        removed_paths: frozenset[str] = frozenset(),
        changes_rows: bool = True,
        properties: Mapping[str, str] | None = None,
        branch: str | None = None,
    ) -> int:
        """Commit once: files and positions together. Gives the snapshot id.

        Raises CommitConflict if anyone was first or the catalog's answer was lost: then the commit may have arrived, which
        the positions of the table tell when it is loaded again.

        branch: AUDIT_BRANCH (default: main) leaves the table as it is for its readers until `publish`.
        """
        transaction = self._transaction or self.loaded.transaction()
        kept = {name: told for name in (FINGERPRINT, ROWS, VIOLATIONS) if (told := self.summary(name)) is not None}
        summary = {
            **kept,
            POSITIONS: json.dumps(dict(positions), sort_keys=True),
            DATA_SEQUENCE: str(self.sequence if changes_rows else self.data_sequence),
            **(properties or {}),
        }
        delta = RowDelta(
            transaction,
            self.loaded.io,
            added=added,
            removed_paths=removed_paths,
            properties=summary,
            branch=branch or MAIN_BRANCH,
        )
        with committing(self.table.name):
            delta.commit()
            transaction.commit_transaction()
        self._transaction = None
        return delta.snapshot_id

    @property
    def build(self) -> Snapshot | None:
        """The build that waits to be published; None when there is none."""
        ref = self.loaded.metadata.refs.get(AUDIT_BRANCH)
        return self.loaded.metadata.snapshot_by_id(ref.snapshot_id) if ref else None

    @property
    def continued(self) -> bool:
        """Whether the waiting build continues the table as it is: no other can be published."""
        build, main = self.build, self.snapshot
        return build is not None and (main is None or build.parent_snapshot_id == main.snapshot_id)

    def publish(self) -> int:
        """Make the waiting build the table: main goes forward to it and the branch ends, in one commit. Gives its id.

        Raises CommitConflict when the build does not continue main as it was loaded, or either has moved since.
        """
        build = self.build
        if build is None or not self.continued:
            raise CommitConflict(
                f"{self.table.name}: the build on '{AUDIT_BRANCH}' does not continue the table, which has changed since. "
                "`python -m app run` builds what is still to be built, and drops it."
            )
        self._move(
            (
                SetSnapshotRefUpdate(
                    ref_name=MAIN_BRANCH,
                    type=SnapshotRefType.BRANCH,
                    snapshot_id=build.snapshot_id,
                    max_ref_age_ms=None,
                    max_snapshot_age_ms=None,
                    min_snapshots_to_keep=None,
                ),
                RemoveSnapshotRefUpdate(ref_name=AUDIT_BRANCH),
            ),
            build,
        )
        return build.snapshot_id

    def discard(self) -> None:
        """Forget the waiting build, if there is one. Raises CommitConflict when it has moved since."""
        if (build := self.build) is not None:
            self._move((RemoveSnapshotsUpdate(snapshot_ids=[build.snapshot_id]),), build)

    def _move(self, updates: tuple[Any, ...], build: Snapshot) -> None:
        main = self.snapshot
        requirements = (
            AssertTableUUID(uuid=self.loaded.metadata.table_uuid),
            AssertRefSnapshotId(ref=MAIN_BRANCH, snapshot_id=main.snapshot_id if main else None),
            AssertRefSnapshotId(ref=AUDIT_BRANCH, snapshot_id=build.snapshot_id),
        )
        with committing(self.table.name):
            done = self.loaded.catalog.commit_table(self.loaded, requirements, updates)
        self.loaded.metadata, self.loaded.metadata_location = done.metadata, done.metadata_location

    def newest(self, column: str) -> datetime | None:
        """The newest value of a date or time column as the statistics of its files have it; rows that were deleted since
        count until their file is compacted."""
        if self.snapshot is None:
            return None
        f = self.loaded.metadata.schema().find_field(column)
        assert isinstance(f.field_type, DateType | TimestamptzType)
        bounds = [(task.file.upper_bounds or {}).get(f.field_id) for task in self.loaded.scan().plan_files()]
        values: list[Any] = [from_bytes(f.field_type, bound) for bound in bounds if bound is not None]
        if not values:
            return None
        # microseconds, or days, since 1970
        unit = timedelta(days=1) if isinstance(f.field_type, DateType) else timedelta(microseconds=1)
        return datetime(1970, 1, 1, tzinfo=UTC) + int(max(values)) * unit


later: Any = GreaterThan
"""PyIceberg's predicate; its constructor's types are not those of its use."""


def live_rows(table: Table, predicate: pl.Expr | None, tombstones: bool = False) -> pl.Expr | None:
    """The predicate, restricted to rows that are not tombstones."""
    if not table.keeps_tombstones or tombstones:
        return predicate
    alive = ~pl.col(DELETED).fill_null(False)
    return alive if predicate is None else alive & predicate


def promotion(established: IcebergType, arriving: pa.DataType) -> IcebergType | None:
    """The wider Iceberg type that an established column must get for arriving values; None: none needed."""
    if isinstance(established, IntegerType) and pa.types.is_int64(arriving):
        return LongType()
    if isinstance(established, FloatType) and pa.types.is_float64(arriving):
        return DoubleType()
    if isinstance(established, DecimalType) and pa.types.is_decimal(arriving) and arriving.scale == established.scale:
        return DecimalType(arriving.precision, established.scale) if arriving.precision > established.precision else None
    return None


def compatible(established: pa.DataType, arriving: pa.DataType) -> bool:
    """Whether arriving values fit an established column, perhaps after Iceberg's own promotion of it."""
    if established == arriving:
        return True
    if pa.types.is_integer(established) and pa.types.is_integer(arriving):
        return True
    if pa.types.is_floating(established) and pa.types.is_floating(arriving):
        return True
    return bool(pa.types.is_decimal(established) and pa.types.is_decimal(arriving) and established.scale == arriving.scale)


def evolves(handle: TableHandle) -> bool:
    """Whether Iceberg can bring a stored table to its declaration: same partitioning, every type equal, promotable, or
    already wider (another version of the declaration promoted it: that is no reason to take it away)."""
    stored, types, declared = handle.metadata.schema(), handle.arrow_schema, iceberg_schema(handle.table)
    for f in declared_types(handle.table):
        if f.name not in types.names or (there := types.field(f.name).type) == f.type:
            continue
        grows = promotion(stored.find_field(f.name).field_type, f.type) is not None
        if not grows and promotion(declared.find_field(f.name).field_type, there) is None:
            return False
    return layout(handle.loaded.spec(), stored) == layout(partition_spec(handle.table, declared), declared)


def layout(spec: PartitionSpec, schema: Schema) -> list[tuple[str, str]]:
    """A partition spec by column names and transforms."""
    return [(str(schema.find_column_name(part.source_id)), str(part.transform)) for part in spec.fields]


def tables_on_disk(settings: LakeSettings) -> str:
    """The directory of the tables where that is one of this machine, '' where it is not."""
    properties = settings.catalog.properties
    if not properties:
        return str(Path(settings.home).absolute() / "warehouse")
    warehouse = properties.get("warehouse", "")
    if warehouse.startswith(("/", "file:")):
        return warehouse.removeprefix("file://")
    return ""


class Lake:
    """The catalog, and the tables in it."""

    def __init__(self, settings: LakeSettings) -> None:
        self.settings = settings

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog of the settings; raises SettingsError when it cannot be opened."""
        properties = dict(self.settings.catalog.properties)
        implementation = {"py-io-impl": f"{NonEmptyFileIO.__module__}.{NonEmptyFileIO.__qualname__}"}
        if not properties:
            home = Path(self.settings.home).absolute()
            (home / "warehouse").mkdir(parents=True, exist_ok=True)
            properties = {"type": "sql", "uri": f"sqlite:///{home / 'catalog.db'}", "warehouse": f"file://{home / 'warehouse'}"}
        try:
            catalog = load_catalog(self.settings.catalog.name, **implementation | properties)
            catalog.list_namespaces()
            return catalog
        except Exception as error:  # every catalog has errors of its own
            # nothing of the address but its kind: it may hold a password
            shown = f"'{self.settings.catalog.name}' of type {properties.get('type', 'unknown')}"
            raise SettingsError(
                f"The Iceberg catalog {shown} cannot be opened ({type(error).__name__}; --debug shows more). "
                "Correct the [catalog] section of the settings, or start the catalog."
            ) from error

    def load(self, table: Table, *, create: bool = True, evolve: bool = False) -> TableHandle:
        """Load a table, making it when it is not there. Raises TableNotFound with create=False.

        A declared column that the stored table lacks is added. evolve: for who fills the table from others. A column
        whose declared type grew is promoted; a table that Iceberg cannot evolve to its declaration is made anew, empty.
        Raises CatalogUnreachable.
        """
        catalog = self.catalog
        with catalog_errors(table.name):
            return self._load(catalog, table, create=create, evolve=evolve)

    def _load(self, catalog: Catalog, table: Table, *, create: bool, evolve: bool) -> TableHandle:
        try:
            handle = TableHandle(table, catalog.load_table(table.name))
        except NoSuchTableError:
            if not create:
                raise TableNotFound(
                    f"{table.name} does not exist yet. Run `python -m app run` first, then, if it is the fraud model's, "
                    "`python -m app train`."
                ) from None
        else:
            if not evolve or evolves(handle):
                stored = handle.arrow_schema.names
                handle.widen(pa.schema([f for f in declared_types(table) if evolve or f.name not in stored]))
                handle.describe()
                return handle
            with contextlib.suppress(NoSuchTableError):
                catalog.drop_table(table.name)
        with contextlib.suppress(NamespaceAlreadyExistsError):
            catalog.create_namespace(table.layer)
        schema = iceberg_schema(table)
        try:
            loaded = catalog.create_table(
                table.name,
                schema,
                partition_spec=partition_spec(table, schema),
                properties={**TABLE_PROPERTIES, "comment": table.doc, "owner": table.owner},
            )
        except TableAlreadyExistsError:
            loaded = catalog.load_table(table.name)
        return TableHandle(table, loaded)

    def drop(self, table: Table) -> None:
        """Forget a table, whatever is left of its files; they stay. Raises CatalogUnreachable."""
        catalog = self.catalog
        with catalog_errors(table.name), contextlib.suppress(NoSuchTableError):
            catalog.drop_table(table.name)

    def exists(self, table: Table) -> bool:
        """Whether the table has been made."""
        catalog = self.catalog
        with catalog_errors(table.name):
            return catalog.table_exists(table.name)
