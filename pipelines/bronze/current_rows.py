"""The newest version of each row of a PostgreSQL bronze table, and the versions behind it."""

from __future__ import annotations

import json

import polars as pl

from lakehouse.step import Parsed
from pipelines.sources.epochs import epoch_prefix_of, is_epoch_marker

_FIX = "_is_fix"
_ROW = "_row"
_POSITION = pl.col("_source_position")
_BOOKKEEPING = frozenset({"_op", "_source_position", "_source_time", "_ingested_at"})


def row_versions(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Every version of every row once, in source order within its key; deletes included.

    Versions come twice when they were delivered twice: one stays. A correction (`_op` 'fix') stands in the place of
    the row it corrects. Columns that an update did not send (named in `_unchanged`) have the value of the version
    before. A TRUNCATE (`_op` 't') is a delete of every key known before it; the marker of a new generation is one of
    every key known before it that the new read did not find.
    """
    versions = _distinct_versions(_with_deletes(bronze, key), key).sort([*key, "_source_position"])
    return _with_unchanged(versions, key)


def current_rows(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """One row per living key: its newest version in source order, whatever the order and number of deliveries.

    Deleted keys, and those from before a TRUNCATE or that a new generation did not find, are left out. `_unchanged`
    columns are filled as in `row_versions`. All columns are kept.
    """
    bronze = since_truncate(bronze, key)
    if "_unchanged" in bronze.columns and bronze["_unchanged"].null_count() < bronze.height:
        # only the keys with such a version need their history
        partial = bronze.filter(pl.col("_unchanged").is_not_null()).select(key).unique()
        filled = _newest(row_versions(bronze.join(partial, on=list(key), how="semi"), key), key)
        newest = pl.concat([_newest(bronze.join(partial, on=list(key), how="anti"), key), filled])
    else:
        newest = _newest(bronze, key)
    return newest.filter(pl.col("_op") != "d")


def since_truncate(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """The rows after the last TRUNCATE (`_op` 't') of the source's table; of a key that a new generation did not find,
    those after its marker."""
    ends = bronze.filter(pl.col("_op") == "t")
    if ends.is_empty():
        return bronze
    rows = bronze.filter(pl.col("_op") != "t")
    truncated = ends.filter(~is_epoch_marker(_POSITION))["_source_position"].max()
    if truncated is not None:
        rows = rows.filter(pl.col("_source_position") > truncated)
    missed = _missed(rows, ends, key)
    if missed.is_empty():
        return rows
    last = missed.group_by(key).agg(_POSITION.max().alias("_ended"))
    rows = rows.join(last, on=list(key), how="left", nulls_equal=True)
    return rows.filter(pl.col("_ended").is_null() | (pl.col("_ended") < _POSITION)).drop("_ended")


def unreadable_rows(bronze: pl.DataFrame) -> Parsed:
    """Which of these rows hold a value that its column's type cannot hold (`_unreadable`: NaN, infinity).

    The rest of such a row is good: it stays, with null there; quarantine says so until a correction comes.
    `original` is the row as a JSON object, with the value as the source printed it.
    """
    has = pl.col("_unreadable").is_not_null() if "_unreadable" in bronze.columns else pl.lit(False)
    if "_op" in bronze.columns:
        has &= pl.col("_op") != "d"  # the values of a deleted row are of no use; corrected, it would live again
    read = bronze.filter(~has)["_source_position"]
    # a position is read when any row there is: a correction, beside the row that it corrects
    bad = bronze.filter(has & ~pl.col("_source_position").is_in(read.implode()))
    columns = [name for name in bronze.columns if not name.startswith("_")]
    rejected = []
    for row in bad.select(*columns, "_source_position", "_unreadable").unique().iter_rows(named=True) if bad.height else ():
        values = json.loads(row["_unreadable"])
        original = {name: None if row[name] is None else str(row[name]) for name in columns} | values
        reason = f"{', '.join(sorted(values))}: a value that the column's type cannot hold"
        rejected.append((reason, row["_source_position"], json.dumps(original, ensure_ascii=False, sort_keys=True).encode()))
    schema = {"reason": pl.String, "source_position": pl.String, "original": pl.Binary}
    return Parsed(rows=bronze, rejected=pl.DataFrame(rejected, schema=schema, orient="row"), parsed_positions=read)


def _with_deletes(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Each TRUNCATE and marker replaced by deletes of the keys that it ends."""
    ends = bronze.filter(pl.col("_op") == "t")
    if ends.is_empty():
        return bronze
    rows = bronze.filter(pl.col("_op") != "t")
    truncates = ends.filter(~is_epoch_marker(_POSITION))
    deletes = pl.concat([_known_before(rows, truncates, key), _missed(rows, ends, key)])
    return pl.concat([rows, deletes.with_columns(pl.lit("d").alias("_op"))], how="diagonal")


def _known_before(rows: pl.DataFrame, ends: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Every pair of an end and a key known before it, with the end's position and time."""
    moments = ends.select("_source_position", *(["_source_time"] if "_source_time" in ends.columns else []))
    return (
        rows.group_by(key)
        .agg(_POSITION.min().alias("_first"))
        .join(moments.unique("_source_position"), how="cross")
        .filter(pl.col("_first") < _POSITION)
        .drop("_first")
    )


def _missed(rows: pl.DataFrame, ends: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """As `_known_before`, of the markers alone, without the keys that the new read (`_op` 'r') of the marker found."""
    known = _known_before(rows, ends.filter(is_epoch_marker(_POSITION)), key)
    if known.is_empty():
        return known
    read = rows.filter(pl.col("_op") == "r").select(*key, epoch_prefix_of(_POSITION).alias("_source_position"))
    found = read.drop_nulls("_source_position")
    return known.join(found, on=[*key, "_source_position"], how="anti", nulls_equal=True)


def _newest(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """The row with the greatest position per key."""
    at_last = bronze.filter(pl.col("_source_position") == pl.col("_source_position").max().over(list(key)))
    return _distinct_versions(at_last, key)


def _distinct_versions(bronze: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """One row per key and position; a correction before the original, a later correction before an earlier one."""
    identity = [*key, "_source_position"]
    if (bronze["_op"] != "fix").all():
        return bronze.unique(subset=identity, keep="any")
    content = [name for name in bronze.columns if name not in _BOOKKEEPING]
    later = pl.col("_ingested_at") if "_ingested_at" in bronze.columns else pl.lit(0)
    ranked = bronze.with_columns(
        pl.col("_op").eq("fix").alias(_FIX), later.alias("_at"), pl.struct(content).hash(seed=0).alias("_content")
    )
    order = [_FIX, "_at", "_content"]
    return ranked.sort(order, nulls_last=False).unique(subset=identity, keep="last", maintain_order=True).drop(order)


def _with_unchanged(versions: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """Fill the columns that an update did not send; `versions` sorted by key and position."""
    if "_unchanged" not in versions.columns or versions["_unchanged"].null_count() == versions.height:
        return versions
    unsent = versions["_unchanged"].str.split(",")
    columns = [name for name in unsent.explode().drop_nulls().unique().to_list() if name in versions.columns and name not in key]
    numbered = versions.with_row_index(_ROW)
    for name in sorted(columns):
        source = (
            pl.when(pl.col("_unchanged").str.split(",").list.contains(name).fill_null(False))
            .then(None)
            .otherwise(pl.col(_ROW))
            .forward_fill()
            .over(list(key))
        )
        numbered = numbered.with_columns(pl.col(name).gather(source))
    return numbered.drop(_ROW)
