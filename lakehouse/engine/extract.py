"""Extraction: read the new rows of one upstream table, and find the groups that they affect.

An incremental extraction returns the keys of the affected groups; the merge then reads all rows of these groups. A full
extraction, and one of a `Delta` read, returns the rows themselves, spread over buckets of groups.

Kinds of blocks, with the name of the read where it matters:
    rows:NAME      rows for the merge, by bucket; bucket -1: for every bucket
    keys           affected groups, with `since`
    resolve:NAME   source records whose earlier rows name the affected groups
    count:NAME     how many rows were read
    rejected:NAME  rows that cannot be parsed
    fixed:NAME     source positions of corrections
    truncated      one row or more if the source table was emptied, which affects every group
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from lakehouse.engine.frames import SINCE, TIME, from_the_beginning, group_keys, to_blocks, to_buckets, unique_names
from lakehouse.engine.upstream_table import UpstreamTable, newer_than
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.reader import live_rows
from lakehouse.parallel import Block
from lakehouse.step import Delta, Grouped, Parsed, Read, Step, root_names


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """One task of the extraction: some files of one read of a step.

    since             read the rows of later commits; None: all rows
    positions         source positions to read again whatever their commit
    full              every group is recomputed
    buckets           number of merge tasks
    shared_records    source records whose rows go to every bucket, see `records_of_several_groups`
    """

    step: Step
    read_name: str
    upstream: UpstreamTable
    since: int | None
    positions: tuple[str, ...]
    full: bool
    buckets: int
    shared_records: pl.DataFrame | None = None

    @property
    def read(self) -> Read:
        """Return the declaration of the read."""
        return self.step.reads[self.read_name]


def extract(task: Extraction) -> list[Block]:
    """Read new rows and return the blocks listed above."""
    if isinstance(task.read, Delta):
        return _extract_delta(task, task.read)
    assert isinstance(task.read, Grouped)
    return _extract_groups(task, task.read)


def _extract_delta(task: Extraction, read: Delta) -> list[Block]:
    upstream, target = task.upstream, task.step.target
    predicate = live_rows(upstream.table, newer_than(task.since, task.positions))
    raw = upstream.reader.read(upstream.files, upstream.existing(read.columns), predicate)
    parsed = read.parse(raw)
    return [
        *to_buckets(f"rows:{task.read_name}", parsed.rows, group_hash(parsed.rows, target.group), task.buckets),
        *to_blocks("keys", from_the_beginning(parsed.rows.select(target.group).unique())),
        *_parse_report(task.read_name, raw, parsed),
    ]


def _extract_groups(task: Extraction, read: Grouped) -> list[Block]:
    upstream, name = task.upstream, task.read_name
    # a tombstone names the groups that lost a row
    predicate = live_rows(upstream.table, newer_than(task.since, task.positions), tombstones=not task.full)
    raw = upstream.reader.read(upstream.files, _columns(task, read), predicate)
    report = _parse_report(name, raw, read.parse(raw)) if read.parse and raw.height else [_row_count(name, raw)]
    if task.full:
        return [*_rows_by_bucket(task, read, raw), *report]
    truncations = raw.filter(pl.col("_op") == "t").select("_op") if upstream.can_be_truncated else raw.clear()
    return [*_affected_keys(task, read, raw), *report, *to_blocks("truncated", truncations)]


def _columns(task: Extraction, read: Grouped) -> list[str]:
    """Return the columns to read: all that the step wants where the rows themselves are needed, else those of the keys."""
    keys = root_names(*(e for keys in read.keys for e in keys), read.always)
    order = [task.step.ordered_by] if task.step.ordered_by else []
    rows = task.upstream.existing(read.columns) if task.full or read.parse else []
    operation = ["_op"] if task.upstream.can_be_truncated else []
    return unique_names(*rows, *keys, *read.resolve, *order, *operation)


def _affected_keys(task: Extraction, read: Grouped, raw: pl.DataFrame) -> list[Block]:
    target, order = task.step.target, task.step.ordered_by
    since = pl.Series(SINCE, raw[order]) if order else pl.Series(SINCE, [None] * raw.height, dtype=TIME)
    blocks = []
    for keys in read.keys:
        frame = group_keys(raw, keys, target).with_columns(since).drop_nulls(list(target.group))
        blocks += to_blocks("keys", frame.group_by(target.group).agg(pl.col(SINCE).min()))
    if read.resolve:
        blocks += to_blocks(f"resolve:{task.read_name}", raw.select(read.resolve).drop_nulls().unique())
    return blocks


def _rows_by_bucket(task: Extraction, read: Grouped, raw: pl.DataFrame) -> list[Block]:
    """Spread rows over the buckets of their groups; a row of several groups goes to the bucket of each."""
    kind, target = f"rows:{task.read_name}", task.step.target
    if task.buckets == 1:
        return to_blocks(kind, raw, 0)
    everywhere = _for_every_bucket(task, read, raw)
    number = pl.int_range(raw.height, dtype=pl.UInt32, eager=True)
    frames = []
    for keys in read.keys:
        groups = group_keys(raw, keys, target)
        named = ~groups.select(pl.any_horizontal(pl.col(target.group).is_null())).to_series() & ~everywhere
        frames.append(pl.DataFrame({"n": number, "b": group_hash(groups, target.group) % task.buckets}).filter(named))
    blocks = to_blocks(kind, raw.filter(everywhere), -1)
    for key, part in pl.concat(frames).unique(maintain_order=True).partition_by("b", as_dict=True).items():
        blocks += to_blocks(kind, raw[part["n"]], int(str(key[0])))
    return blocks


def _for_every_bucket(task: Extraction, read: Grouped, raw: pl.DataFrame) -> pl.Series:
    """Return which rows every bucket needs: truncations, and rows of the shared source records."""
    everywhere = pl.repeat(False, raw.height, eager=True)
    if task.upstream.can_be_truncated:
        everywhere = (raw["_op"] == "t").fill_null(False)
    if read.resolve and task.shared_records is not None:
        records = raw.select(read.resolve).with_row_index("n")
        shared = records.join(task.shared_records, on=list(read.resolve), how="semi", nulls_equal=True)
        everywhere |= pl.int_range(raw.height, dtype=pl.UInt32, eager=True).is_in(shared["n"].implode())
    return everywhere


def _parse_report(name: str, raw: pl.DataFrame, parsed: Parsed) -> list[Block]:
    blocks = [_row_count(name, raw)]
    if parsed.rejected is not None:
        blocks += to_blocks(f"rejected:{name}", parsed.rejected)
    if "_op" in raw.columns:
        blocks += to_blocks(f"fixed:{name}", raw.filter(pl.col("_op") == "fix").select("_source_position"))
    return blocks


def _row_count(name: str, raw: pl.DataFrame) -> Block:
    return Block(f"count:{name}", -1, pa.table({"rows": [raw.height]}))


def records_of_several_groups(read: Read, upstream: UpstreamTable, step: Step) -> pl.DataFrame | None:
    """Return the source records whose rows belong to several groups, or name none: a bucketed full extraction sends their
    rows to every bucket. None where the read resolves no records."""
    if not isinstance(read, Grouped) or not read.resolve:
        return None
    target = step.target
    rows = upstream.read(unique_names(*read.resolve, *root_names(*read.keys[0])))
    keyed = pl.concat([rows.select(read.resolve), group_keys(rows, read.keys[0], target)], how="horizontal")
    return (
        keyed.group_by(read.resolve)
        .agg(
            pl.struct(target.group).n_unique().alias("n"),
            pl.any_horizontal(pl.col(target.group).is_null().any()).alias("nameless"),
        )
        .filter((pl.col("n") > 1) | pl.col("nameless"))
        .select(read.resolve)
    )
