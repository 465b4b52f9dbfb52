"""The difference between the rows that a table has and the rows it must have: pure, on frames."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.reader import FILE, POS
from lakehouse.table import DELETED, GROUP_HASH, Table


@dataclass(frozen=True)
class RowDiff:
    """Positions to delete (`_file`, `_pos`) and rows to write (declared columns, `_deleted` where tombstones are kept)."""

    deleted: pl.DataFrame
    written: pl.DataFrame

    @property
    def empty(self) -> bool:
        """Return whether nothing changes."""
        return self.deleted.height == 0 and self.written.height == 0


def row_diff(table: Table, old: pl.DataFrame, wanted: pl.DataFrame) -> RowDiff:
    """Compare the stored rows with the wanted rows.

    old     declared columns, `_file`, `_pos`, and `_deleted` where the table keeps tombstones
    wanted  declared columns

    Raises ShopSphereError when two wanted rows have the same key.
    """
    columns = [item.name for item in table.columns]
    _check_unique(table, wanted)
    wanted = wanted.select(columns)
    if old.height == 0:
        return RowDiff(old.select(FILE, POS), with_deleted_flag(table, wanted, False))
    live = old.filter(~pl.col(DELETED)) if table.keeps_tombstones else old
    changed, unchanged = _split(table, live, wanted)
    stale = live.join(unchanged.select(table.key), on=list(table.key), how="anti", nulls_equal=True)
    deleted, written = stale.select(FILE, POS), with_deleted_flag(table, changed, False)
    if not table.keeps_tombstones:
        return RowDiff(deleted, written)

    identity = [*table.key, *(name for name in table.tracked if name not in table.key)]
    tombstones = stale.select(columns).join(changed.select(identity), on=identity, how="anti", nulls_equal=True)
    written = pl.concat([written, with_deleted_flag(table, tombstones, True)])
    replaced = old.filter(pl.col(DELETED)).join(written.select(identity), on=identity, how="semi", nulls_equal=True)
    return RowDiff(pl.concat([deleted, replaced.select(FILE, POS)]), written)


def _check_unique(table: Table, wanted: pl.DataFrame) -> None:
    repeated = wanted.select(table.key).is_duplicated()
    if repeated.any():
        key = dict(zip(table.key, wanted.filter(repeated).select(table.key).head(1).row(0), strict=True))
        raise ShopSphereError(
            f"{table.name}: the step's transform returned two rows with the key {key}, expected one row per key."
        )


def _split(table: Table, live: pl.DataFrame, wanted: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the wanted rows that differ from the stored rows, and those that equal one."""
    key = list(table.key)
    # when stored rows share a key (the key had more columns before), none of them is the wanted row
    once = live.filter(~live.select(key).is_duplicated())
    others = [item.name for item in table.columns if item.name not in key]
    matched = wanted.join(once, on=key, how="left", nulls_equal=True, suffix="__old", maintain_order="left")
    equal = pl.all_horizontal([pl.col(name).eq_missing(pl.col(f"{name}__old")) for name in others]) if others else pl.lit(True)
    same = matched.select(pl.col(POS).is_not_null() & equal).to_series()
    return wanted.filter(~same), wanted.filter(same)


def with_current_hashes(diff: RowDiff, old: pl.DataFrame, table: Table) -> RowDiff:
    """Also rewrite the unchanged rows that are stored with another hash than their group has now."""
    stale = old.filter(old[GROUP_HASH] != group_hash(old, table.group)).join(diff.deleted, on=[FILE, POS], how="anti")
    return RowDiff(
        pl.concat([diff.deleted, stale.select(diff.deleted.columns)]),
        pl.concat([diff.written, stale.select(diff.written.columns)]),
    )


def with_deleted_flag(table: Table, rows: pl.DataFrame, deleted: bool) -> pl.DataFrame:
    """Add the `_deleted` column, where the table keeps tombstones."""
    return rows.with_columns(pl.lit(deleted).alias(DELETED)) if table.keeps_tombstones else rows
