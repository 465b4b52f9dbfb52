"""The merge of one bucket of groups: gather upstream rows, transform, evaluate expectations, compare with the stored rows,
write files. Nothing is committed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import polars as pl
from pyiceberg.manifest import DataFile

from lakehouse.engine.audit import can_be_staged
from lakehouse.engine.frames import conform, conform_groups, frames_of, from_the_beginning, group_keys, stamp, unique_names
from lakehouse.engine.gather import gather
from lakehouse.engine.quarantine import quarantine_rows
from lakehouse.engine.row_diff import row_diff, with_current_hashes
from lakehouse.engine.stored_rows import StoredRows
from lakehouse.engine.upstream_table import UpstreamTable
from lakehouse.expectations import EvaluatedRows, ExpectationResult, count_violations, evaluate
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.writer import FileWriter
from lakehouse.parallel import Blocks
from lakehouse.step import Broadcast, Context, Delta, Grouped, Lookup, Step
from lakehouse.table import DELETED


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One task of the merge.

    groups     the groups of this bucket; None when every group is recomputed
    upstream   by the name of the read
    old        the stored rows of the table
    redefined  the stored group hashes may be those of an earlier definition
    """

    step: Step
    bucket: int
    buckets: int
    groups: pl.DataFrame | None
    upstream: Mapping[str, UpstreamTable]
    old: UpstreamTable
    writer: FileWriter
    sequence: int
    context: Context
    redefined: bool = False

    @property
    def full(self) -> bool:
        """Return whether every group is recomputed."""
        return self.groups is None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The files that a merge wrote, and counts.

    rows_deleted       rows replaced or deleted
    live_rows          of these groups, afterwards
    live_rows_before   of these groups, before
    violations_before  by expectation, among the rows that these groups had before
    quarantined        rows for quarantine; None for a table that quarantines none
    groups             the groups that were evaluated, where rows may be quarantined
    """

    files: tuple[DataFile, ...] = ()
    rows_read: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    results: tuple[ExpectationResult, ...] = ()
    live_rows: int = 0
    live_rows_before: int = 0
    violations_before: Mapping[str, int] = field(default_factory=dict)
    quarantined: pl.DataFrame | None = None
    groups: pl.DataFrame | None = None


def merge(task: Merge, extracted: Blocks) -> MergeResult:
    """Recompute the groups of one bucket and write the difference to the stored rows."""
    step, target = task.step, task.step.target
    frames = _upstream_frames(task, extracted)
    groups = task.groups if task.groups is not None else _all_groups(task, frames)
    frames |= _looked_up_frames(task, frames)
    stored = StoredRows(task.old, bucket=task.bucket, buckets=task.buckets, full=task.full, redefined=task.redefined)
    old, opening = stored.of_groups(groups, step.ordered_by)
    rows_read = sum(frame.height for frame in (*frames.values(), old)) + (opening.height if opening is not None else 0)

    declared = [column.name for column in target.columns]
    live = old.filter(~pl.col(DELETED)) if target.keeps_tombstones else old
    # a full merge reads everything upstream again: the stored rows are not an input
    known = live.clear() if task.full else live
    frames["old"], frames["groups"] = known.select(declared), groups
    if step.ordered_by:
        frames["opening"] = opening.select(declared) if opening is not None else live.select(declared).clear()
    wanted = conform(step.transform(frames, task.context), target)
    wanted = wanted.join(groups, on=list(target.group), how="semi", nulls_equal=True)
    evaluation = evaluate(target.name, target.rules, wanted, target.named_by or target.key)
    result = MergeResult(
        rows_read=rows_read,
        results=evaluation.results,
        live_rows=evaluation.accepted.height,
        live_rows_before=live.height,
        violations_before={} if task.full else count_violations(target.rules, known.select(declared)),
        quarantined=quarantine_rows(target, evaluation.quarantined) if target.quarantines else None,
        groups=groups.select(target.group) if target.quarantines else None,
    )
    return _with_files(task, result, evaluation, old)


def _with_files(task: Merge, result: MergeResult, evaluation: EvaluatedRows, old: pl.DataFrame) -> MergeResult:
    """Write the difference between the stored and the wanted rows, unless the expectations forbid even staging it."""
    target = task.step.target
    if evaluation.failed and not can_be_staged(target, evaluation.results):
        return result
    diff = row_diff(target, old, evaluation.accepted)
    if task.redefined:
        diff = with_current_hashes(diff, old, target)
    if diff.empty:
        return result
    written = task.writer.write(stamp(target, diff.written, task.sequence))
    deletes = task.writer.write_deletes(task.old.files, diff.deleted)
    return replace(result, files=(*written, *deletes), rows_written=diff.written.height, rows_deleted=diff.deleted.height)


def _upstream_frames(task: Merge, extracted: Blocks) -> dict[str, pl.DataFrame]:
    """Return the rows of all reads but `Lookup`, by the name of the read."""
    frames: dict[str, pl.DataFrame] = {}
    for name, read in task.step.reads.items():
        upstream = task.upstream[name]
        if isinstance(read, Broadcast):
            frames[name] = upstream.read(upstream.existing(read.columns))
        elif isinstance(read, Delta) or (isinstance(read, Grouped) and task.full):
            parts = frames_of(extracted, f"rows:{name}", task.bucket)
            frames[name] = pl.concat(parts, how="vertical_relaxed") if parts else _no_rows(read, upstream)
        elif isinstance(read, Grouped):
            assert task.groups is not None
            frames[name] = gather(read, upstream, task.groups, task.step.target, task.step.ordered_by)
    return frames


def _looked_up_frames(task: Merge, frames: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """Return the rows of the `Lookup` reads, whose values may come from lookups declared before them."""
    found = dict(frames)
    for name, read in task.step.reads.items():
        if isinstance(read, Lookup):
            upstream = task.upstream[name]
            values = read.values(found).unique()
            columns = unique_names(*upstream.existing(read.columns), read.on)
            found[name] = upstream.read(columns, pl.col(read.on).is_in(values.implode()))
    return found


def _no_rows(read: Grouped | Delta, upstream: UpstreamTable) -> pl.DataFrame:
    rows = upstream.reader.read((), upstream.existing(read.columns))
    return read.parse(rows).rows if isinstance(read, Delta) else rows


def _all_groups(task: Merge, frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return every group of this bucket: of the upstream rows, and of the stored rows, which may have to go."""
    target = task.step.target
    parts = []
    for name, read in task.step.reads.items():
        if isinstance(read, Grouped):
            parts += [group_keys(frames[name], keys, target).drop_nulls() for keys in read.keys]
        elif isinstance(read, Delta):
            parts.append(conform_groups(frames[name], target))
    parts.append(conform_groups(task.old.reader.read(task.old.files, target.group), target))
    groups = pl.concat(parts).unique()
    if task.buckets > 1:
        groups = groups.filter(group_hash(groups, target.group) % task.buckets == task.bucket)
    return from_the_beginning(groups)
