"""Which bronze column takes the values of a source column, and what happens when types change."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.errors import SchemaConflict, UnknownColumn
from pipelines.bronze.tables import INGESTED_AT, POSTGRES_METADATA, POSTGRES_TABLES, row_schema
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres.catalog import PublishedTable
from pipelines.sources.postgres.types import SourceColumn, retyped_column_name, sql_type_name, wider_type

RESERVED = frozenset({*(column.name for column in POSTGRES_METADATA), INGESTED_AT.name})


def planned_schema(source: PublishedTable, current: pa.Schema | None, settings: PostgresSettings) -> pa.Schema:
    """Return the columns to fill: those the bronze table has, those it declares, and the source's. Raises SchemaConflict."""
    declared = row_schema(POSTGRES_TABLES[source.name][0])
    types = {item.name: item.type for item in current if item.name != INGESTED_AT.name} if current is not None else {}
    types |= {item.name: item.type for item in declared if item.name not in types}
    for column in source.columns:
        name, type_ = _bronze_name(column), column.arrow_type
        wider = wider_type(types.get(name, type_), type_)
        if wider is not None:
            types[name] = wider
        elif settings.retyped_columns == "error":
            raise _conflict(source.bronze_table, name, types[name], type_)
        else:
            types[retyped_column_name(name, type_)] = type_
    return pa.schema([pa.field(name, type_) for name, type_ in types.items()])


def target_column(table: str, column: SourceColumn, schema: pa.Schema, settings: PostgresSettings) -> str:
    """Return the planned column that takes the values of a source column.

    Raises UnknownColumn when there is none (the engine adds it and retries), and SchemaConflict.
    """
    name, type_ = _bronze_name(column), column.arrow_type
    if name not in schema.names:
        raise UnknownColumn(table, name, sql_type_name(type_), type_)
    established = schema.field(name).type
    wider = wider_type(established, type_)
    if wider == established:
        return name
    if wider is not None:
        raise UnknownColumn(table, name, sql_type_name(type_), wider)
    if settings.retyped_columns == "error":
        raise _conflict(table, name, established, type_)
    retyped = retyped_column_name(name, type_)
    if retyped not in schema.names:
        raise UnknownColumn(table, retyped, sql_type_name(type_), type_)
    return retyped


def _bronze_name(column: SourceColumn) -> str:
    """Return the column's name, with '__source' appended when bronze uses that name itself."""
    return f"{column.name}__source" if column.name in RESERVED else column.name


def _conflict(table: str, name: str, established: pa.DataType, arriving: pa.DataType) -> SchemaConflict:
    return SchemaConflict(
        table,
        name,
        sql_type_name(established),
        sql_type_name(arriving),
        f'Change the source back to {sql_type_name(established)}, or set postgres.retyped_columns = "beside" '
        f"(SHOPSPHERE_POSTGRES__RETYPED_COLUMNS=beside) to store the new values in '{retyped_column_name(name, arriving)}'.",
    )
