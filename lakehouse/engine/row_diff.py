"""What must be written so that a table's rows become the wanted ones: pure, on frames."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.reader import FILE, POS
from lakehouse.table import DELETED, Table


@dataclass(frozen=True)
class RowDiff:
    """Positions to delete (`_file`, `_pos`) and rows to write (declared columns, `_deleted` where kept)."""

    deleted: pl.DataFrame
    written: pl.DataFrame

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return self.deleted.height == 0 and self.written.height == 0


def row_diff(table: Table, old: pl.DataFrame, wanted: pl.DataFrame) -> RowDiff:
    """Compare the rows a table has with the rows it must have.

    old     declared columns, `_file`, `_pos`, and `_deleted` where the table keeps tombstones
    wanted  declared columns; the key must be unique
    """
    columns, key = [item.name for item in table.columns], list(table.key)
    if wanted.select(key).is_duplicated().any():
        twice = wanted.filter(wanted.select(key).is_duplicated()).select(key).head(1).row(0)
        raise ShopSphereError(
            f"{table.name}: two rows for key {dict(zip(key, twice, strict=True))}. The step that fills it must give one."
        )
    if old.height == 0:
        return RowDiff(old.select(FILE, POS), with_mark(table, wanted.select(columns), False))
    tombs = old.filter(pl.col(DELETED)) if table.keeps_tombstones else old.clear()
    live = old.filter(~pl.col(DELETED)) if table.keeps_tombstones else old

    # rows that repeat under the key (one of fewer columns than before) are none of them what is wanted
    once = live.filter(~live.select(key).is_duplicated())
    others = [name for name in columns if name not in key]
    wanted = wanted.select(columns)
    matched = wanted.join(once, on=key, how="left", nulls_equal=True, suffix="__old", maintain_order="left")
    same = matched.select(
        pl.col(POS).is_not_null()
        & (pl.all_horizontal([pl.col(name).eq_missing(pl.col(f"{name}__old")) for name in others]) if others else pl.lit(True))
    ).to_series()
    changed = wanted.filter(~same)
    unchanged = wanted.filter(same)
    stale = live.join(unchanged.select(key), on=key, how="anti", nulls_equal=True)
    deleted = stale.select(FILE, POS)
    written = with_mark(table, changed, False)
    if not table.keeps_tombstones:
        return RowDiff(deleted, written)

    identity = [*key, *(name for name in table.tracked if name not in key)]
    buried = stale.select(columns).join(changed.select(identity), on=identity, how="anti", nulls_equal=True)
    written = pl.concat([written, with_mark(table, buried, True)])
    outdated = tombs.join(written.select(identity), on=identity, how="semi", nulls_equal=True)
    return RowDiff(pl.concat([deleted, outdated.select(FILE, POS)]), written)


def with_mark(table: Table, rows: pl.DataFrame, deleted: bool) -> pl.DataFrame:
    """The rows with the tombstone mark, where the table keeps one."""
    return rows.with_columns(pl.lit(deleted).alias(DELETED)) if table.keeps_tombstones else rows
