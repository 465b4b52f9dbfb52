"""Versions and current rows of a bronze table, whatever the order and number of deliveries.

Bronze has one row per delivered change. `_source_position` orders the changes of a source row; `_op` is their kind:
'r' a snapshot read, 'd' a delete, 'fix' a correction of the row at the same position, 't' a truncate. A 't' at the start of
an epoch (see `pipelines.sources.epochs`) is that epoch's marker: it deletes the keys that the new snapshot did not find.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import polars as pl

from lakehouse.step import Parsed
from pipelines.bronze.name_list import escaped, split_names
from pipelines.sources.epochs import epoch_prefix_of, is_epoch_marker

_POSITION = pl.col("_source_position")
_BOOKKEEPING = frozenset({"_op", "_source_position", "_source_time", "_ingested_at"})


def row_versions(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return every version of every row once, in source order within its key, including deletes.

    Repeated deliveries are removed, and a correction replaces the row it corrects. A column that an update did not send
    (named in `_unchanged`) has the value of the previous version. Truncates and epoch markers become deletes of the keys
    that they end.
    """
    versions = _one_per_version(_with_deletes(bronze, key), key).sort([*key, "_source_position"])
    return _fill_unchanged(versions, key)


def current_rows(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return the newest version of every live key, with all columns.

    Keys that were deleted, truncated, or not found by the snapshot of a new epoch are excluded. `_unchanged` columns are
    filled as in `row_versions`.
    """
    bronze = since_truncate(bronze, key)
    if "_unchanged" in bronze.columns and bronze["_unchanged"].null_count() < bronze.height:
        # only keys with a partial version need their history
        partial = bronze.filter(pl.col("_unchanged").is_not_null()).select(key).unique()
        filled = _newest(row_versions(bronze.join(partial, on=list(key), how="semi"), key), key)
        newest = pl.concat([_newest(bronze.join(partial, on=list(key), how="anti"), key), filled])
    else:
        newest = _newest(bronze, key)
    return newest.filter(pl.col("_op") != "d")


def since_truncate(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return the rows after the last truncate and, of keys that the snapshot of a new epoch did not find, after its marker."""
    resets = bronze.filter(pl.col("_op") == "t")
    if resets.is_empty():
        return bronze
    rows = bronze.filter(pl.col("_op") != "t")
    truncated_at = resets.filter(~is_epoch_marker(_POSITION))["_source_position"].max()
    if truncated_at is not None:
        rows = rows.filter(pl.col("_source_position") > truncated_at)
    missing = _missing_in_new_epochs(rows, resets, key)
    if missing.is_empty():
        return rows
    last = missing.group_by(key).agg(_POSITION.max().alias("_ended"))
    rows = rows.join(last, on=list(key), how="left", nulls_equal=True)
    return rows.filter(pl.col("_ended").is_null() | (pl.col("_ended") < _POSITION)).drop("_ended")


def one_per_position(rows: pl.DataFrame, identity: Sequence[str], tie_break: pl.Expr) -> pl.DataFrame:
    """Return one effective row per `identity`: the last ingested correction, else the original.

    tie_break: decides between corrections that were ingested at the same time; it must depend on their content alone.
    """
    if (rows["_op"] != "fix").all():
        return rows.unique(subset=identity, keep="any")
    ingested_at = pl.col("_ingested_at") if "_ingested_at" in rows.columns else pl.lit(0)
    rank = {"_is_fix": pl.col("_op").eq("fix"), "_fixed_at": ingested_at, "_tie_break": tie_break}
    ranked = rows.with_columns(**rank).sort(list(rank), nulls_last=False)
    return ranked.unique(subset=identity, keep="last", maintain_order=True).drop(list(rank))


def unreadable_rows(bronze: pl.DataFrame, limits: Mapping[str, int] = MappingProxyType({})) -> Parsed:
    """Reject rows with a value that its column's type cannot represent (`_unreadable`: NaN, infinity), or of a magnitude that
    the tables downstream cannot hold, as a widened column of the source can.

    Such a row keeps its other values, with null in that column, and is in quarantine until a correction is delivered.
    `original` is the row as a JSON object, with the value as the source printed it.

    limits  by column, the magnitude from which on a number is rejected; the step reads it with `within_limit`
    """
    limits = {name: limit for name, limit in limits.items() if name in bronze.columns}
    is_unreadable = pl.col("_unreadable").is_not_null() if "_unreadable" in bronze.columns else pl.lit(False)
    for name, limit in limits.items():
        is_unreadable |= ~is_within(name, limit)
    if "_op" in bronze.columns:
        # the values of a deleted row are not used; a correction of them would make the row live again
        is_unreadable &= pl.col("_op") != "d"
    # a position is readable when any of its rows is: the correction has the position of the row it corrects
    readable = bronze.filter(~is_unreadable)["_source_position"]
    unreadable = bronze.filter(is_unreadable & ~pl.col("_source_position").is_in(readable.implode()))
    schema = {"reason": pl.String, "source_position": pl.String, "original": pl.Binary}
    rejected = pl.DataFrame(_rejections(unreadable, limits), schema=schema, orient="row")
    return Parsed(rows=bronze, rejected=rejected, parsed_positions=readable)


def is_within(name: str, limit: int) -> pl.Expr:
    """Return whether the magnitude of a number is below the limit; true for null."""
    return pl.col(name).is_between(-limit, limit, closed="none").fill_null(True)


def within_limit(name: str, limit: int) -> pl.Expr:
    """Return the number where its magnitude is below the limit, else null: such a row is in quarantine."""
    return pl.when(is_within(name, limit)).then(pl.col(name)).alias(name)


def _rejections(unreadable: pl.DataFrame, limits: Mapping[str, int]) -> list[tuple[str, str, bytes]]:
    """Return reason, position and original of each row."""
    if unreadable.is_empty():
        return []
    columns = [name for name in unreadable.columns if not name.startswith("_")]
    marks = [name for name in ("_source_position", "_unreadable") if name in unreadable.columns]
    rejections = []
    for row in unreadable.select(*columns, *marks).unique().iter_rows(named=True):
        too_large = {name: str(row[name]) for name, limit in limits.items() if row[name] is not None and abs(row[name]) >= limit}
        values = json.loads(row.get("_unreadable") or "{}") | too_large
        original = {name: None if row[name] is None else str(row[name]) for name in columns} | values
        reason = f"{', '.join(sorted(values))}: a value that the column's type cannot hold"
        text = json.dumps(original, ensure_ascii=False, sort_keys=True)
        rejections.append((reason, row["_source_position"], text.encode()))
    return rejections


def _with_deletes(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Replace truncates and epoch markers by deletes of the keys that they end."""
    resets = bronze.filter(pl.col("_op") == "t")
    if resets.is_empty():
        return bronze
    rows = bronze.filter(pl.col("_op") != "t")
    truncates = resets.filter(~is_epoch_marker(_POSITION))
    deletes = pl.concat([_keys_before(rows, truncates, key), _missing_in_new_epochs(rows, resets, key)])
    return pl.concat([rows, deletes.with_columns(pl.lit("d").alias("_op"))], how="diagonal")


def _keys_before(rows: pl.DataFrame, resets: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return each pair of a reset and a key seen before it, with position and time of the reset."""
    moments = resets.select("_source_position", *(["_source_time"] if "_source_time" in resets.columns else []))
    return (
        rows.group_by(key)
        .agg(_POSITION.min().alias("_first"))
        .join(moments.unique("_source_position"), how="cross")
        .filter(pl.col("_first") < _POSITION)
        .drop("_first")
    )


def _missing_in_new_epochs(rows: pl.DataFrame, resets: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return each pair of an epoch marker and a key seen before it that the epoch's snapshot did not find."""
    known = _keys_before(rows, resets.filter(is_epoch_marker(_POSITION)), key)
    if known.is_empty():
        return known
    snapshot = rows.filter(pl.col("_op") == "r").select(*key, epoch_prefix_of(_POSITION).alias("_source_position"))
    found = snapshot.drop_nulls("_source_position")
    return known.join(found, on=[*key, "_source_position"], how="anti", nulls_equal=True)


def _newest(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return the row with the greatest position per key."""
    newest = bronze.filter(pl.col("_source_position") == pl.col("_source_position").max().over(list(key)))
    return _one_per_version(newest, key)


def _one_per_version(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Return one effective row per key and position."""
    content = [name for name in bronze.columns if name not in _BOOKKEEPING]
    return one_per_position(bronze, [*key, "_source_position"], pl.struct(content).hash(seed=0))


def _fill_unchanged(versions: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Fill the columns that an update did not send. versions: sorted by key and position."""
    if "_unchanged" not in versions.columns or versions["_unchanged"].null_count() == versions.height:
        return versions
    unsent = versions["_unchanged"].str.split(",").explode().drop_nulls().unique()
    columns = [name for text in unsent for name in split_names(text) if name in versions.columns and name not in key]
    numbered = versions.with_row_index("_row")
    for name in sorted(columns):
        source_row = (
            pl.when(pl.col("_unchanged").str.split(",").list.contains(escaped(name)).fill_null(False))
            .then(None)
            .otherwise(pl.col("_row"))
            .forward_fill()
            .over(list(key))
        )
        numbered = numbered.with_columns(pl.col(name).gather(source_row))
    return numbered.drop("_row")
