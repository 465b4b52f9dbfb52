"""PostgreSQL types as Arrow types, and values from the text that PostgreSQL prints.

The initial read (COPY) and the change stream (pgoutput) both carry values as text. Both use `parse_text`, so a row is the same
whichever way it came.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lakehouse.table import TIMESTAMP

BOOL, BIGINT, SMALLINT, INTEGER, DATE, TIMESTAMPTZ, NUMERIC = 16, 20, 21, 23, 1082, 1184, 1700
PLAIN_TYPES = {
    BOOL: pa.bool_(),
    BIGINT: pa.int64(),
    SMALLINT: pa.int32(),
    INTEGER: pa.int32(),
    DATE: pa.date32(),
    TIMESTAMPTZ: TIMESTAMP,
}
MAX_DECIMAL_PRECISION = 38


@dataclass(frozen=True)
class SourceColumn:
    """A column as PostgreSQL declares it. type_id, modifier: see pg_attribute.atttypid and atttypmod."""

    name: str
    type_id: int
    modifier: int

    @property
    def arrow_type(self) -> pa.DataType:
        """The Arrow type of its values; text when no Arrow type holds them exactly."""
        if self.type_id == NUMERIC and self.modifier >= 4:
            precision = ((self.modifier - 4) >> 16) & 0xFFFF
            scale = (((self.modifier - 4) & 0x7FF) ^ 1024) - 1024
            if 0 <= scale <= precision <= MAX_DECIMAL_PRECISION:
                return pa.decimal128(precision, scale)
        return PLAIN_TYPES.get(self.type_id, pa.string())


def wider_type(established: pa.DataType, arriving: pa.DataType) -> pa.DataType | None:
    """Return which of two types holds the values of both; None when neither does."""
    if established == arriving:
        return established
    if {established, arriving} == {pa.int32(), pa.int64()}:
        return pa.int64()
    if pa.types.is_decimal(established) and pa.types.is_decimal(arriving) and established.scale == arriving.scale:
        return established if established.precision >= arriving.precision else arriving
    return None


def sql_type_name(type_: pa.DataType) -> str:
    """Return the type's name in PostgreSQL: 'bigint', 'numeric(18,2)' ..."""
    if pa.types.is_decimal(type_):
        return f"numeric({type_.precision},{type_.scale})"
    names = {pa.int32(): "integer", pa.int64(): "bigint", pa.bool_(): "boolean", pa.date32(): "date", TIMESTAMP: "timestamptz"}
    return names.get(type_, "text")


def retyped_column_name(column: str, type_: pa.DataType) -> str:
    """Return the name of the column that takes values of another type than `column` has: 'amount__numeric_18_4'."""
    return f"{column}__{sql_type_name(type_).replace('(', '_').replace(',', '_').rstrip(')')}"


def parse_text(text: pa.Array, type_: pa.DataType) -> tuple[pa.Array, list[tuple[int, str]]]:
    """Return values parsed from text, and (row, text) of those that the type cannot hold, which are null."""
    if pa.types.is_string(type_):
        return text, []
    if pa.types.is_boolean(type_):
        return pc.equal(text, "t"), []
    try:
        return pc.cast(text, type_), []
    except pa.ArrowInvalid:
        pass
    values, unreadable = [], []
    for row, value in enumerate(text.to_pylist()):
        try:
            values.append(pc.cast(pa.scalar(value, pa.string()), type_).as_py())
        except pa.ArrowInvalid:
            values.append(None)
            unreadable.append((row, value))
    return pa.array(values, type_), unreadable
