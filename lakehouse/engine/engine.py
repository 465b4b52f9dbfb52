"""The incremental engine: sources into bronze, steps into silver and gold.

A refresh of a step:
1. load the target, then everything upstream (so that a commit in between makes ours fail);
2. compare the target's positions with upstream: nothing newer, nothing to do;
3. extract: the keys that new rows touch (everything is touched when the target was never filled, or on rebuild);
4. merge, bucket by bucket of keys: gather all rows of the touched groups, `transform`, compare with what is there,
   write data files and position deletes;
5. commit once, with the positions. A gold table's commit goes to a branch, is audited there, and published
   when its expectations hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.engine.row_diff import RowDiff, row_diff
from lakehouse.errors import CommitConflict, UnknownColumn
from lakehouse.expectations import (
    REASON,
    ExpectationsFailed,
    Fresh,
    OfRows,
    Result,
    RowCountDrift,
    Unique,
    as_text,
    drift,
    freshness,
    from_text,
    joined,
    judge,
    standing_after,
    violations,
    with_standing,
)
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.reader import FILE, POS, File, FileReader, live_rows
from lakehouse.iceberg.schema import polars_schema
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS, FINGERPRINT, POSITIONS, ROWS, ROWS_CHANGED, VIOLATIONS
from lakehouse.iceberg.table_handle import AUDIT_BRANCH, TableHandle
from lakehouse.iceberg.writer import FileWriter
from lakehouse.parallel import Block, Blocks, TaskPool
from lakehouse.source import Plan, Reached, Rows, Source, Task
from lakehouse.source import resnapshot as begun_anew
from lakehouse.step import Broadcast, Context, Delta, Grouped, Lookup, Parsed, Read, ReadRows, Step
from lakehouse.table import DELETED, GROUP_HASH, SEQUENCE, Table

ATTEMPTS = 6
REJECTED: dict[str, Any] = {
    "source_table": pl.String,
    "reason": pl.String,
    "source_position": pl.String,
    "original": pl.Binary,
    "_source_time": pl.Datetime("us", "UTC"),
}
"""The columns of a rejected row, with the table it is from."""
Done = TypeVar("Done")
OnArrival = Callable[[str, pa.Table], pa.Table]
"""on_arrival(table, rows of a source) -> as many rows with the same columns, as they are stored: picklable."""
SINCE = "since"


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    table: str
    status: str
    rows_read: int = 0
    rows_changed: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    worker_cpu_seconds: float = 0.0
    parallel: bool = False
    snapshot: int | None = None
    results: tuple[Result, ...] = ()
    """How the table's expectations came out; empty where nothing was judged."""


@dataclass(frozen=True)
class UpstreamTable:
    """A table that a step reads, as one snapshot of it: picklable."""

    table: Table
    reader: FileReader
    files: tuple[File, ...]

    def read(self, columns: Sequence[str], predicate: pl.Expr | None = None, *, positions: bool = False) -> pl.DataFrame:
        """Living rows for which `predicate` holds."""
        return self.reader.read(self.files, columns, live_rows(self.table, predicate), positions=positions)

    @property
    def columns(self) -> list[str]:
        """All columns but the engine's."""
        return [name for name in self.reader.schema.names if name not in (SEQUENCE, GROUP_HASH, DELETED)]


@dataclass(frozen=True)
class Extraction:
    """One piece of reading what is new in one upstream table, for one read of a step."""

    step: Step
    name: str
    upstream: UpstreamTable
    since: int | None
    positions: tuple[str, ...]
    full: bool
    buckets: int
    split_documents: pl.DataFrame | None = None


@dataclass(frozen=True)
class Merge:
    """One bucket of a step's merge. regrouped: the stored group hashes may be those of an earlier declaration."""

    step: Step
    bucket: int
    buckets: int
    full: bool
    groups: pl.DataFrame | None
    upstream: Mapping[str, UpstreamTable]
    old: UpstreamTable
    writer: FileWriter
    sequence: int
    context: Context
    regrouped: bool = False


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, not yet committed."""

    files: tuple[DataFile, ...] = ()
    rows_read: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    results: tuple[Result, ...] = ()
    rows: int = 0
    """Living rows of these groups now."""
    rows_before: int = 0
    violations_before: Mapping[str, int] = field(default_factory=dict)
    """Of the rows that these groups had, how many broke each expectation."""
    held: pl.DataFrame | None = None
    """Rows for quarantine; None for a table that holds none back."""
    groups: pl.DataFrame | None = None
    """The groups that were judged, where rows may be held back."""


def living_after(before: int | None, merged: Sequence[MergeResult], full: bool) -> int | None:
    """Living rows of a table after its groups were merged; None when nobody knows how many there were."""
    now = sum(part.rows for part in merged)
    return now if full else None if before is None else before + now - sum(part.rows_before for part in merged)


def standing_of(
    target: TableHandle, merged: Sequence[MergeResult], results: Iterable[Result], full: bool
) -> dict[str, int] | None:
    """How many rows of the whole table break each expectation, now that some groups, or all, were judged."""
    stored = target.snapshot_property(VIOLATIONS)
    before = {} if full or target.snapshot is None else json.loads(stored) if stored is not None else None
    gone: Counter[str] = Counter()
    for part in merged:
        gone.update(part.violations_before)
    return standing_after(before, gone, results)


def waits(target: TableHandle, positions: Mapping[str, Any], shape: str) -> bool:
    """Whether a build with these positions waits to be published, and continues the table as it is."""
    build = target.staged
    if build is None or target.staged_is_stale:
        return False
    told = build.summary.additional_properties if build.summary else {}
    return told.get(POSITIONS) == json.dumps(dict(positions), sort_keys=True) and told.get(FINGERPRINT) == shape


def drop_passed_over(target: TableHandle) -> None:
    """Drop a refused build when the table has gone on without it: its rows were corrected to what the table has."""
    if target.staged is not None and target.staged_is_stale:
        target.discard_staged()


def of_groups(positions: pl.Series, table: Table, groups: Sequence[pl.DataFrame]) -> pl.Series:
    """Those of the positions (keys as JSON) that belong to one of the groups."""
    if not positions.len() or not groups:
        return positions.clear()
    types = pl.Struct(dict.fromkeys(table.group, pl.String))
    decoded = pl.DataFrame({"key": positions}).with_columns(pl.col("key").str.json_decode(types).alias("group")).unnest("group")
    touched = pl.concat(groups).select(pl.col(name).cast(pl.String) for name in table.group)
    return decoded.join(touched, on=list(table.group), how="semi", nulls_equal=True)["key"]


def key_frame(frame: pl.DataFrame, keys: tuple[pl.Expr, ...], target: Table) -> pl.DataFrame:
    """The target's group columns for each row of `frame`, with the target's types."""
    types = polars_schema(target.schema)
    return (
        frame.select(expression.cast(types[name]).alias(name) for name, expression in zip(target.group, keys, strict=True))
        if frame.height
        else pl.DataFrame(schema={name: types[name] for name in target.group})
    )


def roots(*expressions: pl.Expr | None) -> list[str]:
    """The columns that expressions read."""
    return list(dict.fromkeys(name for e in expressions if e is not None for name in e.meta.root_names()))


def to_pieces(kind: str, frame: pl.DataFrame, bucket: int = -1) -> list[Block]:
    """A frame as pieces; none when it is empty."""
    return [Block(kind, bucket, frame.to_arrow())] if frame.height else []


def by_bucket(kind: str, frame: pl.DataFrame, hashes: pl.Series, buckets: int) -> list[Block]:
    """A frame split by the bucket of its group."""
    if buckets == 1:
        return to_pieces(kind, frame, 0)
    split = frame.with_columns((hashes % buckets).alias("__bucket")).partition_by("__bucket", as_dict=True, include_key=False)
    return [piece for key, part in split.items() for piece in to_pieces(kind, part, int(str(key[0])))]


def newer(since: int | None, positions: tuple[str, ...]) -> pl.Expr | None:
    """The predicate for rows later than `since`, or at one of the given source positions."""
    if since is None:
        return None
    late = pl.col(SEQUENCE) > since
    return late | pl.col("_source_position").is_in(list(positions)) if positions else late


def extract(work: Extraction) -> list[Block]:
    """Read what is new: keys or rows, rejected rows, and how much was read."""
    read, target = work.step.reads[work.name], work.step.target
    upstream, table = work.upstream, work.upstream.table
    predicate = newer(work.since, work.positions)
    if isinstance(read, Delta):
        raw = upstream.reader.read(upstream.files, _wanted(read.columns, upstream), live_rows(table, predicate))
        parsed = read.parse(raw)
        hashes = group_hash(parsed.rows, target.group)
        return [
            *by_bucket(f"rows:{work.name}", parsed.rows, hashes, work.buckets),
            *_keys_of_rows(parsed.rows, target),
            *_reported(work.name, raw, parsed),
        ]
    assert isinstance(read, Grouped)
    needed = roots(*(e for keys in read.keys for e in keys), read.always)
    extra = [*read.resolve, *([work.step.ordered_by] if work.step.ordered_by else [])]
    if work.full or read.parse:
        columns = list(dict.fromkeys([*_wanted(read.columns, upstream), *needed, *extra]))
    else:
        columns = list(dict.fromkeys([*needed, *extra]))
    # a tombstone is news: it names the groups that lost a row
    predicate = live_rows(table, predicate, tombstones=not work.full)
    if truncates(upstream) and "_op" not in columns:
        columns.append("_op")
    raw = upstream.reader.read(upstream.files, columns, predicate)
    reported = (
        _reported(work.name, raw, read.parse(raw))
        if read.parse and raw.height
        else [Block(f"count:{work.name}", -1, pa.table({"rows": [raw.height]}))]
    )
    if not work.full:
        emptied = raw.filter(pl.col("_op") == "t").select("_op") if truncates(upstream) else raw.clear()
        return [*_touched_keys(work, read, raw), *reported, *to_pieces("truncated", emptied)]
    return [*_spread_rows(work, read, raw), *reported]


def truncates(upstream: UpstreamTable) -> bool:
    """Whether the table may hold rows that say its source was emptied (`_op` 't'): they concern every group."""
    return upstream.table.layer == "bronze" and "_op" in upstream.reader.schema.names


def _wanted(columns: tuple[str, ...], upstream: UpstreamTable) -> list[str]:
    present = set(upstream.columns)
    return [name for name in (columns or upstream.columns) if name in present]


def _keys_of_rows(rows: pl.DataFrame, target: Table) -> list[Block]:
    return to_pieces("keys", rows.select(target.group).unique().with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(SINCE)))


def _touched_keys(work: Extraction, read: Grouped, raw: pl.DataFrame) -> list[Block]:
    order = work.step.ordered_by
    moment = pl.Series(SINCE, raw[order]) if order else pl.Series(SINCE, [None] * raw.height, dtype=pl.Datetime("us", "UTC"))
    pieces = []
    for keys in read.keys:
        frame = key_frame(raw, keys, work.step.target).with_columns(moment)
        frame = frame.drop_nulls(list(work.step.target.group)).group_by(work.step.target.group).agg(pl.col(SINCE).min())
        pieces += to_pieces("keys", frame)
    if read.resolve:
        pieces += to_pieces(f"resolve:{work.name}", raw.select(read.resolve).drop_nulls().unique())
    return pieces


def _spread_rows(work: Extraction, read: Grouped, raw: pl.DataFrame) -> list[Block]:
    kind, group = f"rows:{work.name}", work.step.target.group
    if work.buckets == 1:
        return to_pieces(kind, raw, 0)
    pieces: list[Block] = []
    everywhere = (raw["_op"] == "t").fill_null(False) if truncates(work.upstream) else pl.repeat(False, raw.height, eager=True)
    if read.resolve and work.split_documents is not None:
        marked = (
            raw.select(read.resolve)
            .with_row_index("n")
            .join(work.split_documents, on=list(read.resolve), how="semi", nulls_equal=True)
        )
        everywhere |= pl.int_range(raw.height, dtype=pl.UInt32, eager=True).is_in(marked["n"].implode())
    pieces += to_pieces(kind, raw.filter(everywhere), -1)
    frames = []
    for keys in read.keys:
        frame = key_frame(raw, keys, work.step.target)
        known = ~frame.select(pl.any_horizontal(pl.col(group).is_null())).to_series() & ~everywhere
        frames.append(
            pl.DataFrame(
                {"n": pl.int_range(raw.height, dtype=pl.UInt32, eager=True), "b": group_hash(frame, group) % work.buckets}
            ).filter(known)
        )
    spread = pl.concat(frames).unique(maintain_order=True)
    for key, part in spread.partition_by("b", as_dict=True).items():
        pieces += to_pieces(kind, raw[part["n"]], int(str(key[0])))
    return pieces


def _reported(name: str, raw: pl.DataFrame, parsed: Parsed) -> list[Block]:
    pieces = [Block(f"count:{name}", -1, pa.table({"rows": [raw.height]}))]
    if parsed.rejected is not None:
        pieces += to_pieces(f"rejected:{name}", parsed.rejected)
    if "_op" in raw.columns:
        pieces += to_pieces(f"fixed:{name}", raw.filter(pl.col("_op") == "fix").select("_source_position"))
    return pieces


def _frames(pieces: Blocks, kind: str, bucket: int | None = None) -> list[pl.DataFrame]:
    frames = [pl.from_arrow(table) for table in pieces.of(kind, bucket)]
    return [frame for frame in frames if isinstance(frame, pl.DataFrame)]


def gather(read: Grouped, upstream: UpstreamTable, groups: pl.DataFrame, target: Table, ordered_by: str) -> pl.DataFrame:
    """All living rows of `upstream` that belong to one of `groups` (for histories: from each group's `since` on)."""
    wanted = _wanted(read.columns, upstream)
    needed = roots(*(e for keys in read.keys for e in keys), read.always)
    columns = list(dict.fromkeys([*wanted, *needed, *read.resolve, *([ordered_by] if ordered_by else [])]))
    types = polars_schema(target.schema)
    candidates = pl.lit(False)
    for keys in read.keys:
        hit = pl.lit(True)
        for name, expression in zip(target.group, keys, strict=True):
            hit &= expression.cast(types[name]).is_in(groups[name].unique().implode())
        candidates |= hit
    if ordered_by and (first := groups[SINCE].min()) is not None and groups[SINCE].null_count() == 0:
        recent = pl.col(ordered_by) >= first
        candidates &= recent if read.always is None else (recent | read.always)
    emptied = pl.col("_op").eq_missing(pl.lit("t")) if truncates(upstream) else pl.lit(False)
    if truncates(upstream):
        candidates |= emptied
        columns = list(dict.fromkeys([*columns, "_op"]))
    frame = upstream.read(columns, candidates, positions=True)
    frame = frame.filter(_members(frame, read, groups, target, ordered_by) | frame.select(emptied).to_series())
    if read.resolve and frame.height:
        shared = pl.all_horizontal([pl.col(name).is_in(frame[name].drop_nulls().unique().implode()) for name in read.resolve])
        frame = pl.concat([frame, upstream.read(columns, shared, positions=True)]).unique([FILE, POS], maintain_order=True)
    return frame.select(wanted)


def _members(frame: pl.DataFrame, read: Grouped, groups: pl.DataFrame, target: Table, ordered_by: str) -> pl.Series:
    member = pl.repeat(False, frame.height, eager=True)
    for keys in read.keys:
        keyed = key_frame(frame, keys, target).with_row_index("__n")
        joined = keyed.join(groups, on=list(target.group), how="inner")
        if ordered_by:
            rows = frame.select(
                pl.col(ordered_by).alias("__at"), (read.always if read.always is not None else pl.lit(False)).alias("__always")
            ).with_row_index("__n")
            joined = joined.join(rows, on="__n").filter(
                pl.col(SINCE).is_null() | (pl.col("__at") >= pl.col(SINCE)) | pl.col("__always")
            )
        member |= pl.int_range(frame.height, dtype=pl.UInt32, eager=True).is_in(joined["__n"].unique().implode())
    return member


def merge(work: Merge, pieces: Blocks) -> MergeResult:
    """Fill one bucket: gather, fill, compare with what is there, write."""
    step, target = work.step, work.step.target
    frames: dict[str, pl.DataFrame] = {}
    groups = work.groups
    for name, read in step.reads.items():
        if isinstance(read, Broadcast):
            frames[name] = work.upstream[name].read(_wanted(read.columns, work.upstream[name]))
        elif isinstance(read, Delta) or (isinstance(read, Grouped) and work.full):
            parts = _frames(pieces, f"rows:{name}", work.bucket)
            frames[name] = pl.concat(parts, how="vertical_relaxed") if parts else _empty(read, work.upstream[name])
        elif isinstance(read, Grouped):
            assert groups is not None
            frames[name] = gather(read, work.upstream[name], groups, target, step.ordered_by)
    rows_read = sum(frame.height for frame in frames.values())
    if work.full:
        groups = _all_groups(work, frames)
    assert groups is not None
    for name, read in step.reads.items():
        if isinstance(read, Lookup):
            values = read.values(frames).unique()
            upstream = work.upstream[name]
            columns = list(dict.fromkeys([*_wanted(read.columns, upstream), read.on]))
            frames[name] = upstream.read(columns, pl.col(read.on).is_in(values.implode()))
            rows_read += frames[name].height
    old, opening = existing(work, groups)
    rows_read += old.height + (opening.height if opening is not None else 0)
    declared = [column.name for column in target.columns]
    alive = old.filter(~pl.col(DELETED)) if target.keeps_tombstones else old
    # everything is read again: what the table held is no evidence
    known = alive.clear() if work.full else alive
    frames["old"], frames["groups"] = known.select(declared), groups
    if step.ordered_by:
        frames["opening"] = opening.select(declared) if opening is not None else alive.select(declared).clear()
    wanted = conform(step.transform(frames, work.context), target)
    wanted = wanted.join(groups, on=list(target.group), how="semi", nulls_equal=True)
    judged = judge(target.name, target.rules, wanted, target.named_by or target.key)
    done = MergeResult(
        rows_read=rows_read,
        results=judged.results,
        rows=judged.kept.height,
        rows_before=alive.height,
        violations_before={} if work.full else violations(target.rules, known.select(declared)),
        held=held_back(target, judged.held) if target.quarantines else None,
        groups=groups.select(target.group) if target.quarantines else None,
    )
    if judged.failed and not may_be_looked_at(target, judged.results):
        return done
    change = row_diff(target, old, judged.kept)
    if work.regrouped:
        change = rehashed(change, old, target)
    if change.empty:
        return done
    stamped = stamp(target, change.written, work.sequence)
    return replace(
        done,
        files=(*work.writer.write(stamped), *work.writer.write_deletes(work.old.files, change.deleted)),
        rows_written=change.written.height,
        rows_deleted=change.deleted.height,
    )


def may_be_looked_at(table: Table, results: Iterable[Result]) -> bool:
    """Whether a build that breaks its expectations can be written at all: to a branch, and with one row a key."""
    twice = str(Unique(table.key))
    return table.layer == "gold" and not any(r.outcome == "fail" and r.expectation == twice for r in results)


def held_back(table: Table, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that break an expectation as quarantine has them: the key as JSON for a position, the row as JSON."""
    declared = [column.name for column in table.columns]
    found = rows.select(
        pl.lit(table.name).alias("source_table"),
        pl.col(REASON).alias("reason"),
        in_json(table.key).alias("source_position"),
        in_json(declared).cast(pl.Binary).alias("original"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("_source_time"),
    )
    # two rows of one key: one of them stands for both
    return found.sort("source_position", "original").unique("source_position", keep="first", maintain_order=True)


def in_json(columns: Sequence[str]) -> pl.Expr:
    """The columns as one JSON object of texts."""
    return pl.struct(pl.col(name).cast(pl.String) for name in columns).struct.json_encode()


def rehashed(change: RowDiff, old: pl.DataFrame, table: Table) -> RowDiff:
    """The change, and the rows beside it that are stored with another hash than their group has now: written anew."""
    stale = old.filter(old[GROUP_HASH] != group_hash(old, table.group)).join(change.deleted, on=[FILE, POS], how="anti")
    return RowDiff(
        pl.concat([change.deleted, stale.select(change.deleted.columns)]),
        pl.concat([change.written, stale.select(change.written.columns)]),
    )


def stamp(table: Table, rows: pl.DataFrame, sequence: int) -> pl.DataFrame:
    """The rows in the table's order, with the engine's columns."""
    order = list(table.sort_by or table.key)
    return rows.with_columns(pl.lit(sequence, pl.Int64).alias(SEQUENCE), group_hash(rows, table.group)).sort(
        order, nulls_last=True
    )


def conform(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The declared columns with their declared types; a value that does not fit is an error."""
    return frame.select(pl.col(name).cast(dtype) for name, dtype in polars_schema(table.schema).items())


def _empty(read: Read, upstream: UpstreamTable) -> pl.DataFrame:
    if isinstance(read, Delta):
        return read.parse(upstream.reader.read((), _wanted(read.columns, upstream))).rows
    return upstream.reader.read((), _wanted(read.columns, upstream)) if isinstance(read, Grouped) else pl.DataFrame()


def _all_groups(work: Merge, frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    target = work.step.target
    parts = []
    for name, read in work.step.reads.items():
        if isinstance(read, Grouped):
            parts += [key_frame(frames[name], keys, target).drop_nulls() for keys in read.keys]
        elif isinstance(read, Delta):
            parts.append(conform_groups(frames[name], target))
    parts.append(conform_groups(work.old.reader.read(work.old.files, target.group), target))
    groups = pl.concat(parts).unique()
    if work.buckets > 1:
        groups = groups.filter(group_hash(groups, target.group) % work.buckets == work.bucket)
    return groups.with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(SINCE))


def conform_groups(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The group columns with their declared types."""
    types = polars_schema(table.schema)
    return frame.select(pl.col(name).cast(types[name]) for name in table.group).unique()


def existing(work: Merge, groups: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """The target's own rows of the groups with where they lie (tombstones too); for histories, those from `since`
    on, and the last row of each group before it."""
    target, old, order = work.step.target, work.old, work.step.ordered_by
    columns = [*(column.name for column in target.columns), *([DELETED] if target.keeps_tombstones else [])]
    if work.regrouped:
        columns.append(GROUP_HASH)
    if not old.files:
        return old.reader.read((), columns, positions=True), None
    member: pl.Expr | None = None
    if work.regrouped:
        pass  # the stored hashes tell nothing: every bucket looks at all rows
    elif not work.full:
        member = pl.col(GROUP_HASH).is_in(group_hash(groups, target.group).implode())
    elif work.buckets > 1:
        member = pl.col(GROUP_HASH) % work.buckets == work.bucket
    if order and not work.full and groups[SINCE].null_count() == 0:
        return _history(work, groups, columns, member)
    rows = declared(old.reader.read(old.files, columns, member, positions=True), target)
    return rows.join(groups, on=list(target.group), how="semi", nulls_equal=True), None


def declared(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The declared columns with their declared types, where they are stored with wider ones."""
    types = {name: dtype for name, dtype in polars_schema(table.schema).items() if name in frame.columns}
    return frame.cast({name: dtype for name, dtype in types.items() if frame.schema[name] != dtype})


def _history(work: Merge, groups: pl.DataFrame, columns: list[str], member: pl.Expr | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    target, old, order = work.step.target, work.old, work.step.ordered_by
    hashed = groups.with_columns(group_hash(groups, target.group)).group_by(GROUP_HASH).agg(pl.col(SINCE).min())
    # two groups may share a hash, and what was last may be a tombstone: the last living row of each group is wanted
    marks = [DELETED] if target.keeps_tombstones else []
    read = [GROUP_HASH, *target.group, order, *marks]
    narrow = old.reader.read(old.files, read, member, positions=True).join(hashed, on=GROUP_HASH)
    before = narrow.filter(pl.col(order) < pl.col(SINCE))
    before = before.filter(~pl.col(DELETED)) if marks else before
    last = before.filter(pl.col(order) == pl.col(order).max().over(list(target.group)))
    positions = pl.concat([narrow.filter(pl.col(order) >= pl.col(SINCE)), last]).select(FILE, POS)
    rows = declared(old.reader.read_at(old.files, columns, positions), target)
    rows = rows.join(groups, on=list(target.group), how="inner", nulls_equal=True)
    current = rows.filter(pl.col(order) >= pl.col(SINCE)).drop(SINCE)
    opening = rows.filter(pl.col(order) < pl.col(SINCE)).drop(SINCE).sort(target.key)
    if target.keeps_tombstones:
        opening = opening.filter(~pl.col(DELETED))
    return current, opening.unique(list(target.group), keep="last", maintain_order=True)


def changed_rows(read: Broadcast | Lookup, handle: TableHandle, since: int) -> pl.DataFrame:
    """The rows of a table that changed after a sequence, tombstones too. Of a small table only those that changed in the
    columns that are read: another price of a product concerns nobody who reads its category."""
    table = read.table
    mark = [DELETED] if table.keeps_tombstones else []
    columns = [n for n in handle.reader.schema.names if n not in (SEQUENCE, GROUP_HASH, DELETED)]
    new = handle.reader.read(handle.files(since=since), [*columns, *mark], newer(since, ()))
    before = handle.snapshot_id_of(since)
    seen = list(read.columns)
    if isinstance(read, Lookup) or before is None or not new.height or not set(table.key) <= set(seen) or not table.key:
        return new.select(columns)
    try:
        old = handle.reader.read(handle.files(snapshot_id=before), seen, live_rows(table, None))
    except OSError:
        return new.select(columns)  # maintenance has just taken that snapshot away: everything new counts
    numbered = new.with_row_index("__n")
    same = numbered.join(old, on=seen, how="semi", nulls_equal=True)["__n"]
    gone = pl.col(DELETED).fill_null(False) if mark else pl.lit(False)
    return numbered.filter(gone | ~pl.col("__n").is_in(same.implode())).select(columns)


def chunks(files: Sequence[File], rows: int) -> list[tuple[File, ...]]:
    """Files in groups of about `rows` rows."""
    result: list[tuple[File, ...]] = []
    group: list[File] = []
    for file in files:
        if group and sum(item.rows for item in group) + file.rows > rows:
            result.append(tuple(group))
            group = []
        group.append(file)
    return [*result, tuple(group)] if group else result


@dataclass
class Engine:
    """Runs sources and steps against a lake."""

    lake: Lake
    pool: TaskPool
    context: Context
    quarantine: Table
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    begun: Callable[[Step, TableHandle, Mapping[str, TableHandle]], None] = field(default=lambda step, target, upstream: None)
    """Called when a step has something to do, before it does it."""
    arrivals: Callable[[], OnArrival | None] = field(default=lambda: None)
    """Gives, at the beginning of each attempt to ingest, what is done with the rows before they are stored."""

    def refresh(self, step: Step, *, rebuild: bool = False, replay: Mapping[str, tuple[str, ...]] | None = None) -> StepResult:
        """Bring a step's table up to date; `replay`: by bronze table, source positions to read again."""
        return self.retried(lambda: self._refresh(step, rebuild, replay or {}))

    def ingest(self, source: Source, tables: Mapping[str, Table], *, again: frozenset[str] = frozenset()) -> list[StepResult]:
        """Read what is new at a source into its bronze tables, and tell the source once that is committed.

        again: tables to read from their beginning; their old rows stay, and silver takes each row once.
        """
        unknown: dict[str, list[pa.Field]] = {}

        def attempt() -> list[StepResult]:
            while True:
                try:
                    return self._ingest(source, tables, unknown, again)
                except UnknownColumn as error:
                    met = pa.field(error.column, error.arrow_type)
                    known = unknown.setdefault(error.table, [])
                    if met in known:
                        raise
                    known[:] = [*(f for f in known if f.name != met.name), met]

        return self.retried(attempt)

    def retried(self, attempt: Callable[[], Done]) -> Done:
        """What `attempt` gives; when another writer commits first, or takes away files that we read, it is called again, from
        what that one left."""
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except (CommitConflict, FileNotFoundError):
                if number == ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**number)
        raise AssertionError

    def _refresh(self, step: Step, rebuild: bool, replay: Mapping[str, tuple[str, ...]]) -> StepResult:
        started, cpu = time.monotonic(), time.process_time()
        target, kept = self.lake.load(step.target, evolve=True), self.lake.load(self.quarantine, evolve=True)
        handles = self._upstream_handles(step)
        stored, shape = target.positions, self.shape(step)
        since: dict[str, int | None] = {}
        made_anew = False
        for name, handle in handles.items():
            known = stored.get(name)
            same = known is not None and known["table"] == handle.position["table"]
            made_anew |= known is not None and not same
            since[name] = known["sequence"] if known is not None and same else None
        if step.target.quarantines or any(isinstance(r, Grouped | Delta) and r.parse for r in step.reads.values()):
            judged = {"table": str(kept.metadata.table_uuid), "sequence": 0}
            made_anew |= stored.get(self.quarantine.name, judged) != judged
        else:
            judged = None
        reshaped = target.snapshot is not None and target.snapshot_property(FINGERPRINT) not in (None, shape)
        made_anew |= reshaped
        replayed = any(replay.get(name) for name in handles)
        stale = [name for name, handle in handles.items() if since[name] is None or handle.data_sequence > (since[name] or 0)]
        triggers = {read.table.name for read in step.reads.values() if isinstance(read, Grouped | Delta)}
        full = rebuild or made_anew or any(since[name] is None for name in triggers if handles[name].data_sequence)
        if (
            not rebuild
            and not replayed
            and not made_anew
            and (not stale or all(handles[name].data_sequence == 0 for name in handles))
        ):
            drop_passed_over(target)
            return StepResult(
                step.target.name, "unchanged", seconds=time.monotonic() - started, cpu_seconds=time.process_time() - cpu
            )
        positions = {name: handle.position for name, handle in handles.items()}
        if judged is not None:
            positions[self.quarantine.name] = judged
        if not rebuild and not replayed and waits(target, positions, shape):
            # what an audit has refused, or a run left when it was killed: nothing has come since, so it is not built again
            results = self.audited(target)
            self.begun(step, target, handles)
            published = target.publish()
            return StepResult(
                step.target.name,
                "changed",
                rows_written=int(target.snapshot_property(ROWS_CHANGED) or 0),
                seconds=time.monotonic() - started,
                cpu_seconds=time.process_time() - cpu,
                snapshot=published,
                results=(*results, *self.freshnesses(target)),
            )
        self.begun(step, target, handles)
        if target.snapshot is None and step.target.layer == "gold":
            # a branch begins at a snapshot: readers of a first build that is refused have an empty table
            target.commit(positions={}, changes_rows=False, properties={ROWS: "0"})
        merged, changed, elsewhere, parallel, pieces = self._rows(step, target, handles, since, full, replay, reshaped)
        if not full and any(True for _ in pieces.of("truncated")):
            full = True
            merged, changed, elsewhere, parallel, pieces = self._rows(step, target, handles, since, True, replay, reshaped)
        results = joined(result for part in merged for result in part.results)
        files = [file for part in merged for file in part.files]
        rows_written = sum(part.rows_written for part in merged)
        rows_deleted = sum(part.rows_deleted for part in merged)
        before = int(told) if (told := target.snapshot_property(ROWS)) is not None else 0 if target.snapshot is None else None
        rows = living_after(before, merged, full)
        standing = standing_of(target, merged, results, full)
        results = tuple(with_standing(result, standing) for result in results)
        if not may_be_looked_at(step.target, results):
            results = self.settled(step.target, results, before, rows)
        self._quarantine(step, handles, pieces, kept, full or replayed, merged, full)
        snapshot = target.snapshot.snapshot_id if target.snapshot else None
        uncounted = standing is not None and target.snapshot_property(VIOLATIONS) is None
        if files or positions != stored or target.snapshot_property(FINGERPRINT) != shape or uncounted:
            properties = {ROWS_CHANGED: str(rows_written), FINGERPRINT: shape}
            if rows is not None:
                properties[ROWS] = str(rows)
            if standing is not None:
                properties[VIOLATIONS] = json.dumps(standing, sort_keys=True)
            # rows that break a new expectation may be there already: then the build is one without files
            refused = any(result.outcome == "fail" for result in results)
            if audits := (bool(files) or refused) and step.target.layer == "gold":
                properties[EXPECTATIONS] = as_text(results)
            snapshot = target.commit(
                files,
                positions=positions,
                changes_rows=bool(files),
                properties=properties,
                branch=AUDIT_BRANCH if audits else None,
            )
            if audits:
                results = self.audited(target)
                target.publish()
            else:
                drop_passed_over(target)
        results = (*results, *self.freshnesses(target))
        return StepResult(
            step.target.name,
            "rebuilt" if rebuild else "changed" if files else "read",
            rows_read=sum(part.rows_read for part in merged) + (0 if full else changed),
            rows_changed=changed,
            rows_written=rows_written,
            rows_deleted=rows_deleted,
            bytes_written=sum(file.file_size_in_bytes for file in files),
            seconds=time.monotonic() - started,
            cpu_seconds=time.process_time() - cpu + elsewhere,
            worker_cpu_seconds=elsewhere,
            parallel=parallel,
            snapshot=snapshot,
            results=results,
        )

    def audited(self, target: TableHandle) -> tuple[Result, ...]:
        """Audit the build that waits on the table's branch, by what its snapshot says of itself: results of all its
        expectations but freshness. Raises ExpectationsFailed."""
        build, main = target.staged, target.snapshot
        assert build is not None
        rows = target.snapshot_property(ROWS, build.snapshot_id)
        before = target.snapshot_property(ROWS, main.snapshot_id) if main else None
        of_rows = from_text(target.snapshot_property(EXPECTATIONS, build.snapshot_id))
        return self.settled(
            target.table, of_rows, int(before) if before else None, int(rows) if rows else None, branch=AUDIT_BRANCH
        )

    def settled(
        self, table: Table, of_rows: Sequence[Result], before: int | None, rows: int | None, *, branch: str = ""
    ) -> tuple[Result, ...]:
        """The results of rows, and those of their number. Raises ExpectationsFailed."""
        drifts = [rule for rule in table.rules if isinstance(rule, RowCountDrift)] if of_rows else []
        results = (*of_rows, *(drift(table.name, rule, before, rows) for rule in drifts if rows is not None))
        if any(result.outcome == "fail" for result in results):
            raise ExpectationsFailed(table.name, results, branch)
        return results

    def freshnesses(self, target: TableHandle) -> tuple[Result, ...]:
        """How fresh the table is by now."""
        if not self.lake.settings.freshness:
            return ()
        rules = [rule for rule in target.table.rules if isinstance(rule, Fresh)]
        return tuple(freshness(target.table.name, rule, target.max_value(rule.columns[0]), self.clock()) for rule in rules)

    def shape(self, step: Step) -> str:
        """What shapes a table beside its rows upstream: settings and columns. Another shape: everything is recomputed."""
        columns = [(column.name, str(column.type)) for column in step.target.columns]
        layout = [step.target.key, step.target.group, step.target.tracked]
        own: list[Any] = [step.parameters] if step.parameters else []
        # what rows must be like shapes them too, and a new expectation is to be judged on all of them
        own += [str((rule, rule.severity)) for rule in step.target.rules if isinstance(rule, OfRows)]
        return hashlib.sha256(repr((asdict(self.context), columns, layout, *own)).encode()).hexdigest()[:16]

    def _upstream_handles(self, step: Step) -> dict[str, TableHandle]:
        handles: dict[str, TableHandle] = {}
        for read in step.reads.values():
            tables = [read.table, *([read.through] if isinstance(read, Broadcast | Lookup) and read.through else [])]
            for table in tables:
                if table.name not in handles and table.name != step.target.name:
                    handles[table.name] = self.lake.load(table)
        return handles

    def _rows(
        self,
        step: Step,
        target: TableHandle,
        handles: Mapping[str, TableHandle],
        since: Mapping[str, int | None],
        full: bool,
        replay: Mapping[str, tuple[str, ...]],
        reshaped: bool,
    ) -> tuple[list[MergeResult], int, float, bool, Blocks]:
        upstream = {
            name: UpstreamTable(read.table, handles[read.table.name].reader, tuple(handles[read.table.name].files()))
            for name, read in step.reads.items()
        }
        fresh: dict[str, Sequence[File]] = {}
        for name, read in step.reads.items():
            if not isinstance(read, Grouped | Delta):
                continue
            if full or replay.get(read.table.name):
                fresh[name] = upstream[name].files
            elif handles[read.table.name].data_sequence > (since[read.table.name] or 0):
                fresh[name] = handles[read.table.name].files(since=since[read.table.name] or 0)
        expected = sum(file.rows for files in fresh.values() for file in files)
        parallel = expected >= self.pool.settings.inline_rows
        buckets = 1
        if parallel and step.expand is None and (full or any(isinstance(r, Delta) for r in step.reads.values())):
            buckets = max(1, math.ceil(expected / self.pool.settings.rows_per_task))
        extractions = [
            Extraction(
                step,
                name,
                replace(upstream[name], files=group),
                None if full else since[step.reads[name].table.name] or 0,
                replay.get(step.reads[name].table.name, ()),
                full,
                buckets,
                self._split_documents(step.reads[name], upstream[name], step.target) if full and buckets > 1 else None,
            )
            for name, files in fresh.items()
            for group in chunks(files, self.pool.settings.rows_per_task if parallel else 10**12)
        ]
        pieces = self.pool.extract(
            extract, extractions, parallel=parallel and (full or expected >= 4 * self.pool.settings.inline_rows)
        )
        changed = sum(int(table["rows"][0].as_py()) for name in fresh for table in pieces.of(f"count:{name}"))
        groups = None if full else self._touched(step, handles, upstream, since, target, pieces)
        if groups is not None and groups.height == 0:
            return [], changed, pieces.cpu_seconds, parallel, pieces
        old = UpstreamTable(step.target, target.reader, tuple(target.files()))
        merges = [
            Merge(step, bucket, buckets, full, part, upstream, old, target.writer, target.next_sequence, self.context, reshaped)
            for bucket, part in self._bucketed(groups, step.target, buckets)
        ]
        merged, cpu = self.pool.map(merge, merges, pieces, parallel=parallel and (len(merges) > 1 or bool(pieces.refs)))
        return merged, changed, cpu + pieces.cpu_seconds, parallel, pieces

    def _bucketed(self, groups: pl.DataFrame | None, target: Table, buckets: int) -> Iterable[tuple[int, pl.DataFrame | None]]:
        for bucket in range(buckets):
            if groups is None or buckets == 1:
                yield bucket, groups
            else:
                part = groups.filter(group_hash(groups, target.group) % buckets == bucket)
                if part.height:
                    yield bucket, part

    def _split_documents(self, read: Read, upstream: UpstreamTable, target: Table) -> pl.DataFrame | None:
        """Source records whose rows belong to several groups, or name none: they go to every bucket."""
        if not isinstance(read, Grouped) or not read.resolve:
            return None
        needed = list(dict.fromkeys([*read.resolve, *roots(*read.keys[0])]))
        rows = upstream.read(needed)
        keyed = pl.concat([rows.select(read.resolve), key_frame(rows, read.keys[0], target)], how="horizontal")
        key = pl.struct(target.group)
        return (
            keyed.group_by(read.resolve)
            .agg(key.n_unique().alias("n"), pl.any_horizontal(pl.col(target.group).is_null().any()).alias("nameless"))
            .filter((pl.col("n") > 1) | pl.col("nameless"))
            .select(read.resolve)
        )

    def _touched(
        self,
        step: Step,
        handles: Mapping[str, TableHandle],
        upstream: Mapping[str, UpstreamTable],
        since: Mapping[str, int | None],
        target: TableHandle,
        pieces: Blocks,
    ) -> pl.DataFrame:
        group = list(step.target.group)
        types = polars_schema(step.target.schema)
        empty = pl.DataFrame(schema={**{name: types[name] for name in group}, SINCE: pl.Datetime("us", "UTC")})
        parts = [empty, *(frame.select(empty.columns) for frame in _frames(pieces, "keys"))]
        for name, read in step.reads.items():
            if isinstance(read, Grouped) and read.resolve and (found := _frames(pieces, f"resolve:{name}")):
                parts.append(self._resolved(read, upstream[name], pl.concat(found).unique(), step.target))
            if isinstance(read, Broadcast | Lookup) and read.affects:
                parts.append(self._touched_through(step, name, read, handles, since, target))
        touched = (
            pl.concat(parts)
            .group_by(group)
            .agg(pl.when(pl.col(SINCE).null_count() == 0).then(pl.col(SINCE).min()).otherwise(None).alias(SINCE))
        )
        if step.expand and touched.height:
            wide = step.expand(touched.select(group), self._lookup({**handles, step.target.name: target}), self.context)
            touched = conform_groups(wide, step.target).with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(SINCE))
        return touched

    def _resolved(self, read: Grouped, upstream: UpstreamTable, records: pl.DataFrame, target: Table) -> pl.DataFrame:
        same = pl.all_horizontal([pl.col(name).is_in(records[name].implode()) for name in read.resolve])
        rows = upstream.read(list(dict.fromkeys([*read.resolve, *roots(*read.keys[0])])), same)
        keys = key_frame(rows, read.keys[0], target).drop_nulls().unique()
        return keys.with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(SINCE))

    def _touched_through(
        self,
        step: Step,
        name: str,
        read: Broadcast | Lookup,
        handles: Mapping[str, TableHandle],
        since: Mapping[str, int | None],
        target: TableHandle,
    ) -> pl.DataFrame:
        types = polars_schema(step.target.schema)
        nothing = pl.DataFrame(schema={**{g: types[g] for g in step.target.group}, SINCE: pl.Datetime("us", "UTC")})
        handle, start = handles[read.table.name], since[read.table.name] or 0
        if handle.data_sequence <= start:
            return nothing
        new = changed_rows(read, handle, start)
        if new.height == 0:
            return nothing
        assert read.affects is not None
        through = handles[read.through.name] if read.through else target
        expressions = read.affected_keys or tuple(pl.col(n) for n in step.target.group)
        needed = roots(*expressions)
        rows = through.read(needed, read.affects(new))
        return (
            key_frame(rows, expressions, step.target)
            .drop_nulls()
            .unique()
            .with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(SINCE))
        )

    def _lookup(self, handles: Mapping[str, TableHandle]) -> ReadRows:
        """Reads the tables of a step as they were when it began."""

        def lookup(table: Table, columns: Sequence[str], predicate: pl.Expr) -> pl.DataFrame:
            handle = handles.get(table.name) or self.lake.load(table)
            return handle.read(list(columns), predicate)

        return lookup

    def _quarantine(
        self,
        step: Step,
        handles: Mapping[str, TableHandle],
        pieces: Blocks,
        kept: TableHandle,
        again: bool,
        merged: Sequence[MergeResult],
        full: bool,
    ) -> None:
        """Keep the rows that cannot be read or break an expectation, and let go of those that now can, or keep them.

        Before the target's own commit, so that a crash in between repeats it; through a handle loaded before the read,
        so that a slow copy of the job cannot bring back what another has released. again: judge anew what is there.
        full: every group of the table was judged.
        """
        member, wanted = pl.lit(False), [conform(pl.DataFrame(schema=REJECTED), self.quarantine)]
        for name, read in step.reads.items():
            if not isinstance(read, Grouped | Delta) or read.parse is None:
                continue
            source = pl.col("source_table") == read.table.name
            rejected, fixed = _frames(pieces, f"rejected:{name}"), _frames(pieces, f"fixed:{name}")
            positions = {p for f in rejected for p in f["source_position"].to_list()} | {
                p for f in fixed for p in f["_source_position"].to_list()
            }
            if again:
                positions |= set(kept.read(["source_position"], source)["source_position"].to_list())
            if positions:
                wanted.append(self._unreadable(read.parse, handles[read.table.name], sorted(positions)))
                member |= source & pl.col("source_position").is_in(sorted(positions))
        if step.target.quarantines:
            held = pl.concat(
                [
                    conform(pl.DataFrame(schema=REJECTED), self.quarantine),
                    *(conform(m.held, self.quarantine) for m in merged if m.held is not None),
                ]
            )
            own = pl.col("source_table") == step.target.name
            there = kept.read(["source_position"], own)["source_position"]
            concerned = there if full else of_groups(there, step.target, [m.groups for m in merged if m.groups is not None])
            positions = {*concerned.to_list(), *held["source_position"].to_list()}
            if positions:
                wanted.append(held)
                member |= own & pl.col("source_position").is_in(sorted(positions))
        files = kept.files()
        old = kept.reader.read(files, [*(c.name for c in self.quarantine.columns), DELETED], member, positions=True)
        change = row_diff(self.quarantine, old, pl.concat(wanted))
        if not change.empty:
            written = kept.writer.write(stamp(self.quarantine, change.written, kept.next_sequence))
            kept.commit([*written, *kept.writer.write_deletes(files, change.deleted)], positions=kept.positions)

    def _unreadable(self, parse: Callable[[pl.DataFrame], Parsed], bronze: TableHandle, positions: list[str]) -> pl.DataFrame:
        """The quarantine rows of those positions at which no row, corrections included, can be read.

        What quarantine shows is the row as it was received, not a correction that cannot be read either.
        """
        columns = [n for n in bronze.reader.schema.names if n not in (SEQUENCE, GROUP_HASH, DELETED)]
        rows = bronze.reader.read(bronze.files(), columns, pl.col("_source_position").is_in(positions))
        outcome = parse(rows)
        rejected = pl.DataFrame(schema=REJECTED) if outcome.rejected is None else outcome.rejected
        at = rejected["source_position"]
        if outcome.parsed_positions is not None:
            at = at.filter(~at.is_in(outcome.parsed_positions.implode()))
        if at.is_empty():
            return conform(pl.DataFrame(schema=REJECTED), self.quarantine)
        broken = rows.filter(pl.col("_source_position").is_in(at.implode()))
        received = pl.col("_op") != "fix"
        shown = broken.filter(received | ~received.any().over("_source_position"))
        chosen = parse(shown).rejected
        assert chosen is not None
        moments = shown.group_by("_source_position").agg(pl.col("_source_time").min())
        chosen = (
            chosen.sort("source_position", "reason", "original", nulls_last=True)
            .unique("source_position", keep="first", maintain_order=True)
            .join(moments, left_on="source_position", right_on="_source_position", how="left")
            .with_columns(source_table=pl.lit(bronze.table.name))
        )
        return conform(chosen, self.quarantine)

    def _ingest(
        self, source: Source, tables: Mapping[str, Table], unknown: Mapping[str, Sequence[pa.Field]], again: frozenset[str]
    ) -> list[StepResult]:
        started, cpu = time.monotonic(), time.process_time()
        handles = {name: self.lake.load(table) for name, table in tables.items() if name in source.tables}
        positions = {name: handle.positions.get(source.name) for name, handle in handles.items()}
        positions |= {name: begun_anew(positions[name]) for name in again & positions.keys()}
        for name, handle in handles.items():
            if unknown.get(name):
                handle.evolve_schema(pa.schema(list(unknown[name])))
        amend = self.arrivals()  # after the tables were loaded: who makes it another one commits to them afterwards
        plan = source.plan(positions, {name: _source_schema(handle) for name, handle in handles.items()})
        try:
            outcomes, elsewhere, parallel = self._extract_source(plan, handles, amend)
        finally:
            if plan.held is not None and hasattr(plan.held, "close"):
                plan.held.close()
        reports = []
        for name, handle in handles.items():
            written = [outcome[name] for outcome in outcomes if name in outcome]
            files = [file for part in written for file in part.files]
            rows = sum(part.rows_written for part in written)
            reached = next((part.position for part in reversed(written) if part.position is not None), plan.positions.get(name))
            snapshot = None
            if files or (plan.tasks and reached is not None and reached != positions[name]):
                snapshot = handle.commit(
                    files, positions={source.name: reached if reached is not None else positions[name]}, changes_rows=bool(files)
                )
            reports.append(
                StepResult(
                    name,
                    "changed" if files else "unchanged",
                    rows,
                    rows,
                    rows,
                    0,
                    sum(file.file_size_in_bytes for file in files),
                    time.monotonic() - started,
                    time.process_time() - cpu + elsewhere,
                    elsewhere,
                    parallel,
                    snapshot,
                )
            )
            started, cpu, elsewhere = time.monotonic(), time.process_time(), 0.0
        if plan.tasks:
            source.acknowledge(plan)
        return reports

    def _extract_source(
        self, plan: Plan, handles: Mapping[str, TableHandle], amend: OnArrival | None
    ) -> tuple[list[dict[str, Written]], float, bool]:
        for name, handle in handles.items():
            if name in plan.schemas:
                handle.evolve_schema(plan.schemas[name])
        if not plan.tasks:
            return [], 0.0, False
        targets = {name: (handle.writer, handle.next_sequence) for name, handle in handles.items()}
        parallel = len(plan.tasks) > 1 and (plan.rows is None or plan.rows >= self.pool.settings.inline_rows)
        function = partial(write_source_rows, targets=targets, at=self.clock(), amend=amend)
        outcomes, cpu = self.pool.map(function, plan.tasks, Blocks(), parallel=parallel)
        return outcomes, cpu, parallel


@dataclass(frozen=True)
class Written:
    """What one task wrote for one bronze table."""

    files: tuple[DataFile, ...] = ()
    rows_written: int = 0
    position: Any = None


def _source_schema(handle: TableHandle) -> pa.Schema:
    """The columns of a bronze table as its source gives them."""
    return pa.schema([f for f in handle.arrow_schema if f.name not in (SEQUENCE, "_ingested_at")])


def write_source_rows(
    task: Task, pieces: Blocks, *, targets: Mapping[str, tuple[FileWriter, int]], at: datetime, amend: OnArrival | None = None
) -> dict[str, Written]:
    """Run a task of a source and write what it gives; batches of a table are joined to files of useful size."""
    result: dict[str, Written] = {}
    waiting: dict[str, list[pa.Table]] = {}

    def flush(name: str) -> None:
        rows = pa.concat_tables(waiting.pop(name), promote_options="permissive")
        rows = amend(name, rows) if amend is not None else rows
        writer, sequence = targets[name]
        table = _stamped_source_rows(rows, writer.schema, sequence, at)
        files = writer.write(table)
        before = result.get(name, Written())
        result[name] = replace(before, files=(*before.files, *files), rows_written=before.rows_written + rows.num_rows)

    for item in task.read():
        if isinstance(item, Reached):
            result[item.table] = replace(result.get(item.table, Written()), position=item.position)
        elif isinstance(item, Rows) and item.rows.num_rows:
            waiting.setdefault(item.table, []).append(item.rows)
            if sum(rows.num_rows for rows in waiting[item.table]) >= 250_000:
                flush(item.table)
    for name in list(waiting):
        flush(name)
    return result


def _stamped_source_rows(rows: pa.Table, schema: pa.Schema, sequence: int, at: datetime) -> pa.Table:
    columns = []
    for f in schema:
        if f.name == SEQUENCE:
            columns.append(pa.repeat(pa.scalar(sequence, f.type), rows.num_rows))
        elif f.name == "_ingested_at":
            columns.append(pa.repeat(pa.scalar(at, f.type), rows.num_rows))
        elif f.name in rows.schema.names:
            columns.append(rows.column(f.name).cast(f.type))
        else:
            columns.append(pa.nulls(rows.num_rows, f.type))
    return pa.table(columns, schema=schema)
