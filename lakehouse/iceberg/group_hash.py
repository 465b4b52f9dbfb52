"""The stored hash of a row's group, by which the rows of a group are found without reading the whole table."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg_core import transform as iceberg_transform

from lakehouse.table import GROUP_HASH


def group_hash(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Return a 31-bit hash of the given columns for each row of `frame`.

    It is Iceberg's bucket hash (murmur3) of the columns' text. It is stored, so it must never change.
    """
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
