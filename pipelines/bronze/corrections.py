"""Corrections of rows that cannot be read: the row as it must be, for a second row at the same source position."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.errors import ShopSphereError
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import COPIED_FIELDS, EVENTS, INGESTED_AT, MARKETPLACE_ORDERS, POSTGRES_METADATA, POSTGRES_TABLES
from pipelines.sources.postgres.types import parse_text, sql_type_name

OWN = frozenset({*(column.name for column in POSTGRES_METADATA), INGESTED_AT.name, *BOOKKEEPING})
"""Columns of a bronze table that its source does not have."""
POSTGRES_KEYS: Mapping[str, tuple[str, ...]] = {table.name: key for table, key in POSTGRES_TABLES.values()}


def corrected(table: Table, row: pl.DataFrame, value: bytes, types: pa.Schema) -> pl.DataFrame:
    """A bronze row (one, as it was received) with the corrected `value` in it, and `_op` 'fix'.

    value   a message's bytes; a document as Extended JSON; for a PostgreSQL table a JSON object, column to value: those
            columns are replaced (texts as PostgreSQL prints them)
    types   the columns of the bronze table
    Raises ShopSphereError when the value is none for this table.
    """
    if table.name == EVENTS.name:
        changes: dict[str, pl.Series] = {"value": pl.Series([value], dtype=pl.Binary)}
    elif table.name == MARKETPLACE_ORDERS.name:
        changes = _document(value)
    else:
        changes = _columns(table, row, value, types)
    return row.with_columns(pl.lit("fix").alias("_op"), *(series.alias(name) for name, series in changes.items()))


def _document(value: bytes) -> dict[str, pl.Series]:
    text = value.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    named = found if isinstance(found, dict) else {}
    texts = {name: v if isinstance(v := named.get(name), str) else None for name in COPIED_FIELDS}
    return {name: pl.Series([item], dtype=pl.String) for name, item in {"document": text, **texts}.items()}


def _columns(table: Table, row: pl.DataFrame, value: bytes, types: pa.Schema) -> dict[str, pl.Series]:
    given = _object(table, value)
    known = [f.name for f in types if f.name not in OWN]
    if unknown := sorted(given.keys() - set(known)):
        raise ShopSphereError(f"{table.name} has no column '{unknown[0]}'. Columns: {', '.join(known)}.")
    changes = {name: _typed(table, name, item, types.field(name).type) for name, item in given.items()}
    for name in POSTGRES_KEYS[table.name]:
        if name in changes and changes[name].cast(row.schema[name]).to_list() != row[name].to_list():
            raise ShopSphereError(f"{table.name}: '{name}' says which row it is, so a correction cannot change it. Leave it out.")
    left = {name: text for name, text in json.loads(row["_unreadable"][0] or "{}").items() if name not in given}
    text = json.dumps(left, ensure_ascii=False, sort_keys=True) if left else None
    # a column that the update left alone has the value of the version before, unless it is corrected
    unsent = [name for name in (row["_unchanged"][0] or "").split(",") if name and name not in given]
    unchanged = ",".join(unsent) or None
    return {
        **changes,
        "_unreadable": pl.Series([text], dtype=pl.String),
        "_unchanged": pl.Series([unchanged], dtype=pl.String),
    }


def _object(table: Table, value: bytes) -> dict[str, Any]:
    try:
        given = json.loads(value, parse_float=str)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ShopSphereError(f'{table.name}: a correction of its rows is a JSON object, column to value: {{"column": "text"}}.')
    return given


def _typed(table: Table, name: str, value: Any, type_: pa.DataType) -> pl.Series:
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
