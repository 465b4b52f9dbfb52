"""Conversion of declarations to Iceberg schemas and partition specs, between Iceberg, Arrow and polars schemas, and the
rules by which a stored schema may evolve."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from pyiceberg.io.pyarrow import _ConvertToIcebergWithoutIDs, schema_to_pyarrow, visit_pyarrow
from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC, PartitionField, PartitionSpec
from pyiceberg.schema import Schema, assign_fresh_schema_ids
from pyiceberg.transforms import DayTransform, IdentityTransform, MonthTransform, Transform, YearTransform
from pyiceberg.types import DecimalType, DoubleType, FloatType, IcebergType, IntegerType, LongType, NestedField

from lakehouse.table import DELETED, GROUP_HASH, SEQUENCE, Table

TRANSFORMS: dict[str, Transform[Any, Any]] = {
    "identity": IdentityTransform(),
    "day": DayTransform(),
    "month": MonthTransform(),
    "year": YearTransform(),
}
FIRST_PARTITION_FIELD_ID = 1000


class StoredColumn(NamedTuple):
    """A column of a table as it is stored."""

    name: str
    type: pa.DataType
    doc: str
    required: bool


def stored_columns(table: Table) -> list[StoredColumn]:
    """Return the columns of a table as it is stored: the declared ones, then the engine's."""
    engine = [StoredColumn(SEQUENCE, pa.int64(), "Sequence of the commit that wrote or changed the row", False)]
    if table.key:
        engine.append(StoredColumn(GROUP_HASH, pa.int32(), "Hash of the row's group, for look-ups", False))
    if table.keeps_tombstones:
        doc = f"True where the row is a tombstone: deleted, but kept for downstream tables. Read with WHERE NOT {DELETED}"
        engine.append(StoredColumn(DELETED, pa.bool_(), doc, False))
    return [StoredColumn(c.name, c.type, c.doc, c.required) for c in table.columns] + engine


def table_comment(table: Table) -> str:
    """Return the comment of a table as it is stored, which warns other engines of rows that only look live."""
    if not table.keeps_tombstones:
        return table.doc
    return f"{table.doc} Contains deleted rows (tombstones): read it with WHERE NOT {DELETED}."


@cache
def iceberg_schema(table: Table) -> Schema:
    """Return the Iceberg schema of a declaration, with its documentation."""
    columns = stored_columns(table)
    plain = pa.schema([pa.field(column.name, column.type, nullable=True) for column in columns])
    converted = visit_pyarrow(plain, _ConvertToIcebergWithoutIDs())
    assert isinstance(converted, Schema)
    docs = {column.name: column.doc for column in columns}
    fields = [
        NestedField(field_id=number, name=f.name, field_type=f.field_type, required=f.name in table.identifier, doc=docs[f.name])
        for number, f in enumerate(converted.fields, start=1)
    ]
    identifier = [f.field_id for f in fields if f.name in table.identifier]
    return assign_fresh_schema_ids(Schema(*fields, identifier_field_ids=identifier))


@cache
def declared_types(table: Table) -> pa.Schema:
    """Return the Arrow types of a declaration as they come back from the stored table."""
    return arrow_schema(iceberg_schema(table))


def partition_spec(table: Table, schema: Schema) -> PartitionSpec:
    """Return the Iceberg partition spec of a declaration."""
    if not table.partition_by:
        return UNPARTITIONED_PARTITION_SPEC
    return PartitionSpec(
        *(
            PartitionField(
                source_id=schema.find_field(part.column).field_id,
                field_id=FIRST_PARTITION_FIELD_ID + number,
                transform=TRANSFORMS[part.transform],
                name=part.column if part.transform == "identity" else f"{part.column}_{part.transform}",
            )
            for number, part in enumerate(table.partition_by)
        )
    )


def arrow_schema(schema: Schema) -> pa.Schema:
    """Return the Arrow schema of an Iceberg schema, with plain strings and bytes and without field ids."""
    plain = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    return pa.schema(
        [f.with_type(plain.get(f.type, f.type)).remove_metadata() for f in schema_to_pyarrow(schema, include_field_ids=False)]
    )


def polars_schema(schema: pa.Schema) -> dict[str, pl.DataType]:
    """Return the polars types of an Arrow schema."""
    frame = pl.from_arrow(schema.empty_table())
    assert isinstance(frame, pl.DataFrame)
    return dict(frame.schema)


def as_arrow(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return a polars frame as an Arrow table of exactly that schema. Missing columns are null, others are dropped."""
    frame = frame.select(pl.col(f.name) if f.name in frame.columns else pl.lit(None).alias(f.name) for f in schema)
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)


def promoted_type(stored: IcebergType, incoming: pa.DataType) -> IcebergType | None:
    """Return the wider Iceberg type that a stored column needs for incoming values, or None if it needs none."""
    if isinstance(stored, IntegerType) and pa.types.is_int64(incoming):
        return LongType()
    if isinstance(stored, FloatType) and pa.types.is_float64(incoming):
        return DoubleType()
    if isinstance(stored, DecimalType) and pa.types.is_decimal(incoming) and incoming.scale == stored.scale:
        return DecimalType(incoming.precision, stored.scale) if incoming.precision > stored.precision else None
    return None


def is_compatible(stored: pa.DataType, incoming: pa.DataType) -> bool:
    """Return whether incoming values fit a stored column, if need be after Iceberg has promoted its type."""
    if stored == incoming:
        return True
    if pa.types.is_integer(stored) and pa.types.is_integer(incoming):
        return True
    if pa.types.is_floating(stored) and pa.types.is_floating(incoming):
        return True
    return bool(pa.types.is_decimal(stored) and pa.types.is_decimal(incoming) and stored.scale == incoming.scale)


def can_evolve(table: Table, stored: Schema, stored_spec: PartitionSpec) -> bool:
    """Return whether Iceberg can evolve a stored table to its declaration.

    The partitioning must be the same, and the type of each column equal, promotable, or already wider. (A wider type was
    promoted by another version of the declaration. That is no reason to drop the table.)
    """
    stored_types, declared = arrow_schema(stored), iceberg_schema(table)
    for f in declared_types(table):
        if f.name not in stored_types.names or (stored_type := stored_types.field(f.name).type) == f.type:
            continue
        grows = promoted_type(stored.find_field(f.name).field_type, f.type) is not None
        if not grows and promoted_type(declared.find_field(f.name).field_type, stored_type) is None:
            return False
    return partition_layout(stored_spec, stored) == partition_layout(partition_spec(table, declared), declared)


def partition_layout(spec: PartitionSpec, schema: Schema) -> list[tuple[str, str]]:
    """Return a partition spec as pairs of column name and transform."""
    return [(str(schema.find_column_name(part.source_id)), str(part.transform)) for part in spec.fields]
