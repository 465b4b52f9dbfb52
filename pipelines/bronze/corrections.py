"""Corrections of unreadable rows: the corrected row, to be stored as a second row at the same source position."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.errors import ShopSphereError
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.name_list import join_names, split_names
from pipelines.bronze.tables import (
    COPIED_FIELDS,
    EVENTS,
    INGESTED_AT,
    MARKETPLACE_ORDERS,
    POSTGRES_KEYS,
    POSTGRES_METADATA,
)
from pipelines.sources.postgres.types import parse_text, sql_type_name

METADATA = frozenset({*(column.name for column in POSTGRES_METADATA), INGESTED_AT.name, *BOOKKEEPING})
"""Columns of a bronze table that its source does not have."""


def corrected_row(table: Table, row: pl.DataFrame, value: bytes, schema: pa.Schema) -> pl.DataFrame:
    """Return a bronze row (one, as it was received) with the corrected `value` in it, and `_op` 'fix'.

    value   a message's bytes; a document as Extended JSON; for a PostgreSQL table a JSON object of column to value, whose
            columns replace those of the row (texts as PostgreSQL prints them)
    schema  the columns of the bronze table
    Raises ShopSphereError when the value does not fit the table.
    """
    if table.name == EVENTS.name:
        changes: dict[str, pl.Series] = {"value": pl.Series([value], dtype=pl.Binary)}
    elif table.name == MARKETPLACE_ORDERS.name:
        changes = _document_columns(value)
    else:
        changes = _postgres_columns(table, row, value, schema)
    return row.with_columns(pl.lit("fix").alias("_op"), *(series.alias(name) for name, series in changes.items()))


def _document_columns(value: bytes) -> dict[str, pl.Series]:
    text = value.decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    document = parsed if isinstance(parsed, dict) else {}
    copied = {name: v if isinstance(v := document.get(name), str) else None for name in COPIED_FIELDS}
    return {name: pl.Series([item], dtype=pl.String) for name, item in {"document": text, **copied}.items()}


def _postgres_columns(table: Table, row: pl.DataFrame, value: bytes, schema: pa.Schema) -> dict[str, pl.Series]:
    corrections = _json_object(table, value)
    source_columns = [f.name for f in schema if f.name not in METADATA]
    if unknown := sorted(corrections.keys() - set(source_columns)):
        raise ShopSphereError(f"{table.name} has no column '{unknown[0]}'. Columns: {', '.join(source_columns)}.")
    changes = {name: _typed_value(table, name, item, schema.field(name).type) for name, item in corrections.items()}
    for name in POSTGRES_KEYS[table.name]:
        if name in changes and changes[name].cast(row.schema[name]).to_list() != row[name].to_list():
            raise ShopSphereError(f"{table.name}: '{name}' is part of the key, so a correction cannot change it. Leave it out.")
    unreadable = {name: text for name, text in json.loads(row["_unreadable"][0] or "{}").items() if name not in corrections}
    text = json.dumps(unreadable, ensure_ascii=False, sort_keys=True) if unreadable else None
    # a column that the update did not send has the value of the previous version, unless it is corrected
    unsent = [name for name in split_names(row["_unchanged"][0] or "") if name not in corrections]
    unchanged = join_names(unsent) or None
    return {
        **changes,
        "_unreadable": pl.Series([text], dtype=pl.String),
        "_unchanged": pl.Series([unchanged], dtype=pl.String),
    }


def _json_object(table: Table, value: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(value, parse_float=str)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ShopSphereError(
            f'{table.name}: a correction must be a JSON object of column to value, such as {{"column": "text"}}.'
        )
    return parsed


def _typed_value(table: Table, name: str, value: Any, type_: pa.DataType) -> pl.Series:
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    if pa.types.is_boolean(type_) and text is not None:
        text = {"true": "t", "t": "t", "false": "f", "f": "f"}.get(text.lower())
    array, unreadable = parse_text(pa.array([text], pa.string()), type_)
    if unreadable or (text is None and value is not None):
        raise ShopSphereError(
            f"{table.name}: the corrected value of '{name}' is not a valid {sql_type_name(type_)}. "
            "Write it as PostgreSQL prints it."
        )
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series
