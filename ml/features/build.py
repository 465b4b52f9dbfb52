"""The first build of silver.order_features, and every rebuild: entity by entity, in parallel, in bounded memory.

Three rounds of tasks, none of which holds more than a block of rows:
1. read a block of orders (or events), and send each entity's rows to the bucket of the entity;
2. per kind of entity and bucket: compute that part's features, and send them back to the block of their orders;
3. per block: put the parts side by side, and write.

The result is bit by bit what `features.compute` gives: both call `features.compute_part`, whose answers depend on an
entity's own rows alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import polars as pl

from lakehouse.engine.engine import Engine, StepResult, UpstreamTable, chunks, conform, stamp
from lakehouse.expectations import Result, joined, judge, standing_after
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.snapshot_properties import FINGERPRINT, ROWS, VIOLATIONS
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.iceberg.writer import FileWriter
from lakehouse.parallel import Block, Blocks
from lakehouse.step import Read, Step
from lakehouse.table import DELETED, Table
from ml.features.compute import compute_group
from ml.features.declarations import FeatureGroup, OrderHistory
from ml.features.groups import FEATURE_GROUPS
from ml.features.groups.order import ORDER
from ml.tables.category_amounts import CATEGORY_AMOUNTS
from ml.tables.fraud_ratios import FRAUD_RATIOS
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import EVENT_READS, ORDER_FEATURES, account_events
from pipelines.silver.events_clean import EVENTS_CLEAN

BLOCK, ROW = "_block", "_row"
"""Where an order was read: the number of its block, its place there."""

ENTITY_PARTS = tuple(part for part in FEATURE_GROUPS if part is not ORDER)


@dataclass(frozen=True)
class BuildBucket:
    """One task of the first round: some files of orders or of events."""

    number: int
    upstream: UpstreamTable
    events: bool
    buckets: int
    categories: pl.DataFrame
    ratios: UpstreamTable


@dataclass(frozen=True)
class Bucket:
    """One task of the second round: the entities of one kind whose hash falls here."""

    part: FeatureGroup
    number: int
    delay: timedelta


@dataclass(frozen=True)
class BuildResult:
    """What a task of the third round wrote."""

    files: tuple[Any, ...]
    """Iceberg data files, as FileWriter gives them."""
    rows: int
    results: tuple[Result, ...]


def must_be_built(engine: Engine, step: Step) -> bool:
    """Whether the step's table was never filled, or for other features or another label delay."""
    target = engine.lake.load(step.target)
    return ORDER_ENTITIES.name not in target.positions or target.snapshot_property(FINGERPRINT) != engine.shape(step)


def build(engine: Engine, step: Step, delay: timedelta) -> StepResult:
    """Compute the table from nothing, and put it in the place of what is there, with positions as the step keeps them."""
    return engine.retried(lambda: _build(engine, step, delay))


def _build(engine: Engine, step: Step, delay: timedelta) -> StepResult:
    started, cpu = time.monotonic(), time.process_time()
    target = engine.lake.load(step.target)
    handles = {name: engine.lake.load(table) for name, table in _tables(step.reads.values()).items()}
    settings = engine.pool.settings
    orders, events = _upstream(handles[ORDER_ENTITIES.name]), _upstream(handles[EVENTS_CLEAN.name])
    rows = sum(file.rows for file in (*orders.files, *events.files))
    parallel = rows >= settings.inline_rows
    size = settings.rows_per_task if parallel else 10**12
    buckets = max(1, math.ceil(sum(file.rows for file in orders.files) / size))
    categories = handles[CATEGORY_AMOUNTS.name].read(CATEGORY_AMOUNTS.schema.names)
    ratios = _upstream(handles[FRAUD_RATIOS.name])
    blocks = [
        BuildBucket(number, replace(upstream, files=files), upstream is events, buckets, categories, ratios)
        for upstream in (orders, events)
        for number, files in enumerate(chunks(upstream.files, size))
    ]
    spread = engine.pool.extract(spread_rows, blocks, parallel=parallel)
    tasks = [Bucket(part, number, delay) for number in range(buckets) for part in ENTITY_PARTS]
    parts = engine.pool.transform(compute_bucket, tasks, spread, parallel=parallel)
    both = Blocks(local=[*spread.local, *parts.local], refs=[*spread.refs, *parts.refs])
    writing = Assembly(target.writer, target.next_sequence)
    written, elsewhere = engine.pool.map(writing, [block.number for block in blocks if not block.events], both, parallel=parallel)
    files = [file for item in written for file in item.files]
    count = sum(item.rows for item in written)
    before = target.snapshot_property(ROWS)
    of_rows = joined(result for item in written for result in item.results)
    results = engine.settled(step.target, of_rows, int(before) if before else None, count)
    snapshot = target.commit(
        files,
        positions={name: handle.position for name, handle in handles.items()},
        removed_paths=frozenset(file.path for file in target.files()),
        properties={
            FINGERPRINT: engine.shape(step),
            ROWS: str(count),
            VIOLATIONS: json.dumps(standing_after({}, {}, of_rows), sort_keys=True),
        },
    )
    elsewhere += spread.cpu_seconds + parts.cpu_seconds
    return StepResult(
        step.target.name,
        "rebuilt" if target.snapshot else "changed",
        rows_read=rows,
        rows_changed=count,
        rows_written=count,
        bytes_written=sum(file.file_size_in_bytes for file in files),
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu + elsewhere,
        worker_cpu_seconds=elsewhere,
        parallel=parallel,
        snapshot=snapshot,
        results=results,
    )


def _tables(reads: Iterable[Read]) -> dict[str, Table]:
    return {read.table.name: read.table for read in reads}


def _upstream(handle: TableHandle) -> UpstreamTable:
    return UpstreamTable(handle.table, handle.reader, tuple(handle.files()))


def spread_rows(block: BuildBucket) -> list[Block]:
    """Round one: the rows of a block, each to the buckets of its entities."""
    if block.events:
        return _spread_events(block)
    orders = block.upstream.read(ORDER_ENTITIES.schema.names).sort("placed_at", "order_id")
    orders = orders.with_columns(pl.lit(block.number, pl.Int32).alias(BLOCK), pl.int_range(pl.len(), dtype=pl.Int32).alias(ROW))
    frauds = orders.filter(pl.col("known_at").is_not_null())["order_id"]
    ratios = block.ratios.read(["order_id", "ratio"], pl.col("order_id").is_in(frauds.implode()))
    orders = orders.join(ratios, on="order_id", how="left", maintain_order="left")
    rows = orders.with_columns(requested=pl.lit(True))
    own = pl.concat(
        [
            orders.select("order_id", "placed_at", "customer"),
            compute_group(ORDER, rows, OrderHistory(categories=block.categories)),
        ],
        how="horizontal",
    )
    pieces = [Block(ORDER.name, block.number, own.to_arrow())]
    for part in ENTITY_PARTS:
        more = () if part.events else ("order_id", "amount", "known_at", *(("ratio",) if part.unexplained_windows else ()))
        columns = list(dict.fromkeys([part.key, "placed_at", *more, *part.needs]))
        pieces += _by_bucket(f"orders:{part.name}", orders.select(*columns, BLOCK, ROW), part.key, block.buckets)
    return pieces


def _spread_events(block: BuildBucket) -> list[Block]:
    events = account_events(block.upstream.read(EVENT_READS))
    pieces: list[Block] = []
    for part in ENTITY_PARTS:
        if part.events:
            wanted = events if part.key == "account" else events.filter(pl.col("kind") != "visit")
            pieces += _by_bucket(f"events:{part.name}", wanted.select(part.key, "occurred_at", "kind"), part.key, block.buckets)
    return pieces


def _by_bucket(kind: str, rows: pl.DataFrame, key: str, buckets: int) -> list[Block]:
    rows = rows.filter(pl.col(key).is_not_null())
    if buckets == 1:
        return [Block(kind, 0, rows.to_arrow())] if rows.height else []
    split = rows.with_columns((group_hash(rows, [key]) % buckets).alias("_bucket"))
    parts = split.partition_by("_bucket", as_dict=True, include_key=False)
    return [Block(kind, int(str(key_[0])), part.to_arrow()) for key_, part in parts.items()]


def compute_bucket(bucket: Bucket, pieces: Blocks) -> list[Block]:
    """Round two: the features of one part for the entities of a bucket, each back to its order's block."""
    part = bucket.part
    found = _frame(pieces, f"orders:{part.name}", bucket.number)
    if found is None:
        return []
    events = _frame(pieces, f"events:{part.name}", bucket.number) if part.events else None
    history = OrderHistory(delay=bucket.delay) if events is None else OrderHistory(events=events, delay=bucket.delay)
    rows = found.sort("placed_at") if part.events else found.sort("placed_at", "order_id")
    rows = rows.with_columns(requested=pl.lit(True))
    values = pl.concat([rows.select(BLOCK, ROW), compute_group(part, rows, history)], how="horizontal")
    return [
        Block(part.name, int(str(key[0])), of_block.to_arrow())
        for key, of_block in values.partition_by(BLOCK, as_dict=True, include_key=False).items()
    ]


def _frame(pieces: Blocks, kind: str, bucket: int) -> pl.DataFrame | None:
    frames = [frame for table in pieces.of(kind, bucket) if isinstance(frame := pl.from_arrow(table), pl.DataFrame)]
    return pl.concat(frames) if frames else None


@dataclass(frozen=True)
class Assembly:
    """Round three: the parts of a block side by side, written to data files that nothing refers to yet."""

    writer: FileWriter
    sequence: int

    def __call__(self, block: int, pieces: Blocks) -> BuildResult:
        own = _frame(pieces, ORDER.name, block)
        assert own is not None
        columns = [own, *(_placed(part, _frame(pieces, part.name, block), own.height) for part in ENTITY_PARTS)]
        rows = conform(pl.concat(columns, how="horizontal"), ORDER_FEATURES)
        judged = judge(ORDER_FEATURES.name, ORDER_FEATURES.rules, rows, ORDER_FEATURES.key)
        marked = rows.with_columns(pl.lit(False).alias(DELETED))
        return BuildResult(tuple(self.writer.write(stamp(ORDER_FEATURES, marked, self.sequence))), rows.height, judged.results)


def _placed(part: FeatureGroup, values: pl.DataFrame | None, height: int) -> pl.DataFrame:
    """A part's features at the places of their orders; null for an order without that entity."""
    if values is None:
        return pl.DataFrame({f.name: pl.repeat(None, height, dtype=pl.Float64, eager=True) for f in part.features})
    source = pl.repeat(None, height, dtype=pl.UInt32, eager=True).scatter(
        values[ROW].cast(pl.UInt32), pl.int_range(values.height, dtype=pl.UInt32, eager=True)
    )
    return values.select(pl.col(f.name).gather(source) for f in part.features)
