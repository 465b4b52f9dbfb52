"""Conversions between frames and a table's declaration: types, groups, bookkeeping columns, blocks."""

from __future__ import annotations

import polars as pl

from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.schema import polars_schema
from lakehouse.parallel import Block, Blocks
from lakehouse.table import SEQUENCE, Table

SINCE = "since"
"""A column of groups: the time from which a history must be recomputed. Null: from its beginning."""
TIME = pl.Datetime("us", "UTC")


def unique_names(*names: str) -> list[str]:
    """Return the names without repetitions, in order."""
    return list(dict.fromkeys(names))


def conform(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Select the declared columns and cast them to the declared types. Raises polars' error for a value that does not fit."""
    return frame.select(pl.col(name).cast(dtype) for name, dtype in polars_schema(table.schema).items())


def cast_declared(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Cast the declared columns to the declared types, where they are stored with wider ones."""
    types = {name: dtype for name, dtype in polars_schema(table.schema).items() if name in frame.columns}
    return frame.cast({name: dtype for name, dtype in types.items() if frame.schema[name] != dtype})


def stamp(table: Table, rows: pl.DataFrame, sequence: int) -> pl.DataFrame:
    """Sort the rows in the table's order and add the sequence and the group hash."""
    order = list(table.sort_by or table.key)
    stamped = rows.with_columns(pl.lit(sequence, pl.Int64).alias(SEQUENCE), group_hash(rows, table.group))
    return stamped.sort(order, nulls_last=True)


def group_schema(table: Table) -> dict[str, pl.DataType]:
    """Return the group columns and their types."""
    types = polars_schema(table.schema)
    return {name: types[name] for name in table.group}


def conform_groups(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Return the distinct groups of the rows, with the declared types."""
    return frame.select(pl.col(name).cast(dtype) for name, dtype in group_schema(table).items()).unique()


def group_keys(frame: pl.DataFrame, keys: tuple[pl.Expr, ...], target: Table) -> pl.DataFrame:
    """Return the target's group columns for each row of `frame`, with the target's types."""
    types = group_schema(target)
    if not frame.height:
        return pl.DataFrame(schema=types)
    return frame.select(expression.cast(types[name]).alias(name) for name, expression in zip(target.group, keys, strict=True))


def from_the_beginning(groups: pl.DataFrame) -> pl.DataFrame:
    """Add a null `since`: the groups are recomputed from the beginning of their history."""
    return groups.with_columns(pl.lit(None, TIME).alias(SINCE))


def no_groups(target: Table) -> pl.DataFrame:
    """Return an empty frame of groups with `since`."""
    return pl.DataFrame(schema={**group_schema(target), SINCE: TIME})


def to_blocks(kind: str, frame: pl.DataFrame, bucket: int = -1) -> list[Block]:
    """Return the frame as a block; no block when it is empty."""
    return [Block(kind, bucket, frame.to_arrow())] if frame.height else []


def to_buckets(kind: str, frame: pl.DataFrame, hashes: pl.Series, buckets: int) -> list[Block]:
    """Split a frame into blocks by the bucket of each row's group hash."""
    if buckets == 1:
        return to_blocks(kind, frame, 0)
    split = frame.with_columns((hashes % buckets).alias("__bucket")).partition_by("__bucket", as_dict=True, include_key=False)
    return [block for key, part in split.items() for block in to_blocks(kind, part, int(str(key[0])))]


def frames_of(blocks: Blocks, kind: str, bucket: int | None = None) -> list[pl.DataFrame]:
    """Return the blocks of a kind, and of a bucket, as frames."""
    frames = [pl.from_arrow(table) for table in blocks.of(kind, bucket)]
    return [frame for frame in frames if isinstance(frame, pl.DataFrame)]
