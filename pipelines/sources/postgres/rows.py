"""Batches of bronze rows from columns of text, as COPY and pgoutput both carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pyarrow as pa

from lakehouse.table import TIMESTAMP
from pipelines.sources.postgres.types import parse_text

BATCH_ROWS = 100_000
BATCH_BYTES = 32 << 20


def text_array(values: Sequence[bytes | None]) -> pa.Array:
    """Return values as PostgreSQL sent them. Bytes that are not UTF-8 (in an SQL_ASCII database) are written as \\xNN."""
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return pa.array([None if value is None else value.decode("utf-8", "backslashreplace") for value in values], pa.string())


def repeated(value: str | int, count: int) -> pa.Array:
    """Return an array that has one value `count` times."""
    return pa.repeat(pa.scalar(value, pa.string() if isinstance(value, str) else pa.int64()), count)


def bronze_batch(
    schema: pa.Schema, text: Mapping[str, pa.Array], *, op: pa.Array, position: pa.Array, moment: pa.Array, unchanged: pa.Array
) -> pa.Table:
    """Return a batch of bronze rows.

    text       source columns as text, by bronze column; columns of the schema that are not among them are null
    moment     microseconds since 1970
    unchanged  names of the columns that an update did not send
    Values that the type of their column cannot hold are null there and kept as text in `_unreadable`.
    """
    count = len(op)
    unreadable: dict[int, dict[str, str]] = {}
    columns: dict[str, pa.Array] = {
        "_op": op,
        "_source_position": position,
        "_source_time": moment.cast(TIMESTAMP),
        "_unchanged": unchanged,
    }
    for name, values in text.items():
        columns[name], failures = parse_text(values, schema.field(name).type)
        for row, value in failures:
            unreadable.setdefault(row, {})[name] = value
    columns["_unreadable"] = (
        pa.array(
            [json.dumps(unreadable[row], sort_keys=True) if row in unreadable else None for row in range(count)], pa.string()
        )
        if unreadable
        else pa.nulls(count, pa.string())
    )
    return pa.table(
        [columns[item.name] if item.name in columns else pa.nulls(count, item.type) for item in schema], schema=schema
    )
