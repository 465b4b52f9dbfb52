"""The rows that a table has of some groups, with their file positions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import polars as pl

from lakehouse.engine.frames import SINCE, cast_declared
from lakehouse.engine.upstream_table import UpstreamTable
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.reader import FILE, POS
from lakehouse.table import DELETED, GROUP_HASH


@dataclass(frozen=True)
class StoredRows:
    """The stored rows of one bucket of a step's own table.

    full       every group of the bucket is recomputed
    redefined  the stored group hashes may be those of an earlier definition, so that they select nothing
    """

    table: UpstreamTable
    _: KW_ONLY
    bucket: int
    buckets: int
    full: bool
    redefined: bool

    def of_groups(self, groups: pl.DataFrame, ordered_by: str) -> tuple[pl.DataFrame, pl.DataFrame | None]:
        """Return the stored rows of the groups with `_file` and `_pos`, tombstones included.

        For histories (`ordered_by`) that change from a time on: the rows from `since` on, and the last live row of each
        group before it.
        """
        old, target = self.table, self.table.table
        if not old.files:
            return old.reader.read((), self._columns, positions=True), None
        predicate = self._predicate(groups)
        if ordered_by and not self.full and groups[SINCE].null_count() == 0:
            return self._histories(groups, predicate, ordered_by)
        rows = cast_declared(old.reader.read(old.files, self._columns, predicate, positions=True), target)
        return rows.join(groups, on=list(target.group), how="semi", nulls_equal=True), None

    @property
    def _columns(self) -> list[str]:
        target = self.table.table
        tombstones = [DELETED] if target.keeps_tombstones else []
        hashes = [GROUP_HASH] if self.redefined else []
        return [*(column.name for column in target.columns), *tombstones, *hashes]

    def _predicate(self, groups: pl.DataFrame) -> pl.Expr | None:
        """Return a predicate for the rows that can belong to the groups, by their stored hashes; None: any row can."""
        if self.redefined:
            return None
        if not self.full:
            return pl.col(GROUP_HASH).is_in(group_hash(groups, self.table.table.group).implode())
        return pl.col(GROUP_HASH) % self.buckets == self.bucket if self.buckets > 1 else None

    def _histories(self, groups: pl.DataFrame, predicate: pl.Expr | None, order: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        old, target = self.table, self.table.table
        positions = self._history_positions(groups, predicate, order)
        rows = cast_declared(old.reader.read_at(old.files, self._columns, positions), target)
        rows = rows.join(groups, on=list(target.group), how="inner", nulls_equal=True)
        current = rows.filter(pl.col(order) >= pl.col(SINCE)).drop(SINCE)
        opening = rows.filter(pl.col(order) < pl.col(SINCE)).drop(SINCE).sort(target.key)
        if target.keeps_tombstones:
            opening = opening.filter(~pl.col(DELETED))
        return current, opening.unique(list(target.group), keep="last", maintain_order=True)

    def _history_positions(self, groups: pl.DataFrame, predicate: pl.Expr | None, order: str) -> pl.DataFrame:
        """Return the positions of the rows from `since` on, and of the last live row of each group before it.

        Two groups may share a hash, and the last row may be a tombstone, so the last row is found by group.
        """
        old, target = self.table, self.table.table
        hashed = groups.with_columns(group_hash(groups, target.group)).group_by(GROUP_HASH).agg(pl.col(SINCE).min())
        tombstones = [DELETED] if target.keeps_tombstones else []
        columns = [GROUP_HASH, *target.group, order, *tombstones]
        rows = old.reader.read(old.files, columns, predicate, positions=True).join(hashed, on=GROUP_HASH)
        before = rows.filter(pl.col(order) < pl.col(SINCE))
        before = before.filter(~pl.col(DELETED)) if tombstones else before
        last = before.filter(pl.col(order) == pl.col(order).max().over(list(target.group)))
        return pl.concat([rows.filter(pl.col(order) >= pl.col(SINCE)), last]).select(FILE, POS)
