"""Gathering: read all upstream rows of the affected groups."""

from __future__ import annotations

import polars as pl

from lakehouse.engine.frames import SINCE, group_keys, group_schema, unique_names
from lakehouse.engine.upstream_table import UpstreamTable
from lakehouse.iceberg.reader import FILE, POS
from lakehouse.step import Grouped, root_names
from lakehouse.table import Table


def gather(read: Grouped, upstream: UpstreamTable, groups: pl.DataFrame, target: Table, ordered_by: str) -> pl.DataFrame:
    """Return all live rows of `upstream` that belong to one of `groups`, and all rows that say the source was emptied.

    For histories (`ordered_by`): the rows from each group's `since` on, and those that are `always` read.
    """
    wanted = upstream.existing(read.columns)
    keys = root_names(*(e for keys in read.keys for e in keys), read.always)
    order, operation = [ordered_by] if ordered_by else [], ["_op"] if upstream.can_be_truncated else []
    columns = unique_names(*wanted, *keys, *read.resolve, *order, *operation)
    truncation = pl.col("_op").eq_missing(pl.lit("t")) if upstream.can_be_truncated else pl.lit(False)
    candidates = _candidates(read, groups, target, ordered_by)
    if upstream.can_be_truncated:
        candidates |= truncation
    frame = upstream.read(columns, candidates, positions=True)
    frame = frame.filter(_members(frame, read, groups, target, ordered_by) | frame.select(truncation).to_series())
    if read.resolve and frame.height:
        shared = pl.all_horizontal([pl.col(name).is_in(frame[name].drop_nulls().unique().implode()) for name in read.resolve])
        frame = pl.concat([frame, upstream.read(columns, shared, positions=True)]).unique([FILE, POS], maintain_order=True)
    return frame.select(wanted)


def _candidates(read: Grouped, groups: pl.DataFrame, target: Table, ordered_by: str) -> pl.Expr:
    """Return a predicate for a superset of the rows, cheap enough to be pushed down to the files: it compares the group
    columns one by one."""
    types = group_schema(target)
    candidates = pl.lit(False)
    for keys in read.keys:
        match = pl.lit(True)
        for name, expression in zip(target.group, keys, strict=True):
            match &= expression.cast(types[name]).is_in(groups[name].unique().implode())
        candidates |= match
    if ordered_by and (first := groups[SINCE].min()) is not None and groups[SINCE].null_count() == 0:
        recent = pl.col(ordered_by) >= first
        candidates &= recent if read.always is None else (recent | read.always)
    return candidates


def _members(frame: pl.DataFrame, read: Grouped, groups: pl.DataFrame, target: Table, ordered_by: str) -> pl.Series:
    """Return which rows belong to one of the groups."""
    member = pl.repeat(False, frame.height, eager=True)
    for keys in read.keys:
        keyed = group_keys(frame, keys, target).with_row_index("__n")
        joined = keyed.join(groups, on=list(target.group), how="inner")
        if ordered_by:
            always = read.always if read.always is not None else pl.lit(False)
            rows = frame.select(pl.col(ordered_by).alias("__at"), always.alias("__always")).with_row_index("__n")
            joined = joined.join(rows, on="__n").filter(
                pl.col(SINCE).is_null() | (pl.col("__at") >= pl.col(SINCE)) | pl.col("__always")
            )
        member |= pl.int_range(frame.height, dtype=pl.UInt32, eager=True).is_in(joined["__n"].unique().implode())
    return member
