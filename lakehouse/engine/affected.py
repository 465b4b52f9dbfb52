"""The groups that new upstream rows affect: directly, through an earlier row of the same record, or through a table that is
broadcast or looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from lakehouse.engine.frames import (
    SINCE,
    conform_groups,
    frames_of,
    from_the_beginning,
    group_keys,
    no_groups,
    unique_names,
)
from lakehouse.engine.plan import RefreshPlan
from lakehouse.engine.step_tables import StepTables
from lakehouse.engine.upstream_table import UpstreamTable, newer_than
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.reader import live_rows
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.parallel import Blocks
from lakehouse.step import Broadcast, Context, Grouped, Lookup, ReadRows, root_names
from lakehouse.table import BOOKKEEPING, DELETED, Table


@dataclass(frozen=True, kw_only=True)
class AffectedGroups:
    """Finds the groups that an incremental refresh recomputes.

    upstream  by the name of the read
    """

    tables: StepTables
    upstream: Mapping[str, UpstreamTable]
    plan: RefreshPlan
    lake: Lake
    context: Context

    def find(self, extracted: Blocks) -> pl.DataFrame:
        """Return the affected groups with `since`: null unless every change to the group names a time."""
        target, step = self.tables.step.target, self.tables.step
        empty = no_groups(target)
        parts = [empty, *(frame.select(empty.columns) for frame in frames_of(extracted, "keys"))]
        for name, read in step.reads.items():
            if isinstance(read, Grouped) and read.resolve and (records := frames_of(extracted, f"resolve:{name}")):
                parts.append(self._of_records(read, self.upstream[name], pl.concat(records).unique()))
            if isinstance(read, Broadcast | Lookup) and read.affects:
                parts.append(self._through(read))
        groups = (
            pl.concat(parts)
            .group_by(list(target.group))
            .agg(pl.when(pl.col(SINCE).null_count() == 0).then(pl.col(SINCE).min()).otherwise(None).alias(SINCE))
        )
        if step.expand and groups.height:
            expanded = step.expand(groups.select(target.group), self._reader(), self.context)
            groups = from_the_beginning(conform_groups(expanded, target))
        return groups

    def _of_records(self, read: Grouped, upstream: UpstreamTable, records: pl.DataFrame) -> pl.DataFrame:
        """Return the groups of all rows of these source records."""
        same = pl.all_horizontal([pl.col(name).is_in(records[name].implode()) for name in read.resolve])
        rows = upstream.read(unique_names(*read.resolve, *root_names(*read.keys[0])), same)
        return from_the_beginning(group_keys(rows, read.keys[0], self.tables.step.target).drop_nulls().unique())

    def _through(self, read: Broadcast | Lookup) -> pl.DataFrame:
        """Return the groups that changed rows of a broadcast or looked-up table affect."""
        target = self.tables.step.target
        handle, since = self.tables.upstream[read.table.name], self.plan.since[read.table.name] or 0
        if handle.data_sequence <= since:
            return no_groups(target)
        changed = changed_rows(read, handle, since)
        if changed.height == 0:
            return no_groups(target)
        assert read.affects is not None
        through = self.tables.upstream[read.through.name] if read.through else self.tables.target
        keys = read.affected_keys or tuple(pl.col(name) for name in target.group)
        rows = through.read(root_names(*keys), read.affects(changed))
        return from_the_beginning(group_keys(rows, keys, target).drop_nulls().unique())

    def _reader(self) -> ReadRows:
        """Return a function that reads tables as they were when the refresh began."""
        handles = {**self.tables.upstream, self.tables.target.table.name: self.tables.target}

        def read_rows(table: Table, columns: Sequence[str], predicate: pl.Expr) -> pl.DataFrame:
            handle = handles.get(table.name) or self.lake.load(table)
            return handle.read(list(columns), predicate)

        return read_rows


def changed_rows(read: Broadcast | Lookup, handle: TableHandle, since: int) -> pl.DataFrame:
    """Return the rows of a table that changed after a sequence, tombstones included.

    Of a broadcast table, only those that changed in the columns that are read: a new price of a product does not affect a
    step that reads its category.
    """
    table = read.table
    mark = [DELETED] if table.keeps_tombstones else []
    columns = [name for name in handle.reader.schema.names if name not in BOOKKEEPING]
    new = handle.reader.read(handle.files(since=since), [*columns, *mark], newer_than(since))
    before = handle.snapshot_id_of(since)
    seen = list(read.columns)
    if isinstance(read, Lookup) or before is None or not new.height or not set(table.key) <= set(seen) or not table.key:
        return new.select(columns)
    try:
        old = handle.reader.read(handle.files(snapshot_id=before), seen, live_rows(table, None))
    except OSError:
        return new.select(columns)  # maintenance has just expired that snapshot: every new row counts as changed
    numbered = new.with_row_index("__n")
    same = numbered.join(old, on=seen, how="semi", nulls_equal=True)["__n"]
    deleted = pl.col(DELETED).fill_null(False) if mark else pl.lit(False)
    return numbered.filter(deleted | ~pl.col("__n").is_in(same.implode())).select(columns)
