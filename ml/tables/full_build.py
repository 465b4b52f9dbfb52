"""The first build of silver.order_features, and every rebuild: entity by entity, in parallel, in bounded memory.

Three rounds of tasks, none of which holds more than one block of rows:
1. read a block of orders (or events), and send each entity's rows to the entity's bucket;
2. per feature group and bucket: compute the group's features, and send them back to the block of their orders;
3. per block: join the groups' features side by side, and write them.

The result equals that of `compute`, bit for bit: both call `compute_group`, whose values depend on an entity's own rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import polars as pl

from lakehouse.engine.commit import commit_full_build
from lakehouse.engine.engine import Engine
from lakehouse.engine.fingerprint import definition_fingerprint
from lakehouse.engine.frames import conform, stamp
from lakehouse.engine.step_result import StepResult, Stopwatch
from lakehouse.engine.upstream_table import UpstreamTable, batch_files, open_upstream
from lakehouse.expectations import ExpectationResult, evaluate
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.snapshot_properties import FINGERPRINT
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.iceberg.writer import FileWriter
from lakehouse.parallel import Block, Blocks
from lakehouse.retry import retry_commit
from lakehouse.step import Step, upstream_tables
from lakehouse.table import DELETED
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
"""Number of the block that an order was read in, and its row there."""

ENTITY_GROUPS = tuple(group for group in FEATURE_GROUPS if group is not ORDER)


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """A task of the first round: a block of files of orders or of events."""

    number: int
    upstream: UpstreamTable
    events: bool
    buckets: int
    categories: pl.DataFrame
    ratios: UpstreamTable


@dataclass(frozen=True)
class ComputeTask:
    """A task of the second round: one feature group for the entities in one bucket."""

    group: FeatureGroup
    bucket: int
    delay: timedelta


@dataclass(frozen=True)
class WrittenBlock:
    """ExpectationResult of a task of the third round."""

    files: tuple[Any, ...]
    """Iceberg data files, as FileWriter returns them."""
    rows: int
    results: tuple[ExpectationResult, ...]


@dataclass(frozen=True)
class BuildPlan:
    """The tasks of the first round, the number of buckets, and the number of rows to read."""

    read_tasks: tuple[ReadTask, ...]
    buckets: int
    rows: int
    parallel: bool


def needs_build(engine: Engine, step: Step) -> bool:
    """Whether the step's table was never filled, or was filled with other features or another label delay."""
    target = engine.lake.load(step.target)
    fingerprint = definition_fingerprint(step, engine.context)
    return ORDER_ENTITIES.name not in target.positions or target.snapshot_property(FINGERPRINT) != fingerprint


def build(engine: Engine, step: Step, delay: timedelta) -> StepResult:
    """Compute all rows of the step's table and replace its content, with the positions that the step would store."""
    return retry_commit(lambda: _build(engine, step, delay))


def _build(engine: Engine, step: Step, delay: timedelta) -> StepResult:
    watch = Stopwatch()
    target = engine.lake.load(step.target)
    handles = {table.name: engine.lake.load(table) for table in upstream_tables(step)}
    plan = _plan(engine, handles)
    read = engine.pool.extract(read_block, plan.read_tasks, parallel=plan.parallel)
    compute_tasks = [ComputeTask(group, number, delay) for number in range(plan.buckets) for group in ENTITY_GROUPS]
    computed = engine.pool.transform(compute_bucket, compute_tasks, read, parallel=plan.parallel)
    blocks = Blocks(local=[*read.local, *computed.local], refs=[*read.refs, *computed.refs])
    numbers = [task.number for task in plan.read_tasks if not task.events]
    write = WriteBlock(target.writer, target.next_sequence)
    written, worker_cpu = engine.pool.map(write, numbers, blocks, parallel=plan.parallel)
    worker_cpu += read.cpu_seconds + computed.cpu_seconds
    files = [file for block in written for file in block.files]
    count = sum(block.rows for block in written)
    snapshot, results = commit_full_build(
        step,
        engine.context,
        target,
        handles,
        files=files,
        rows=count,
        results=(result for block in written for result in block.results),
    )
    return StepResult(
        step.target.name,
        "rebuilt" if target.snapshot else "changed",
        rows_read=plan.rows,
        rows_changed=count,
        rows_written=count,
        bytes_written=sum(file.file_size_in_bytes for file in files),
        seconds=watch.seconds,
        cpu_seconds=watch.cpu_seconds + worker_cpu,
        worker_cpu_seconds=worker_cpu,
        parallel=plan.parallel,
        snapshot=snapshot,
        results=results,
    )


def _plan(engine: Engine, handles: Mapping[str, TableHandle]) -> BuildPlan:
    """Divide the files of orders and events into blocks, and the entities into buckets."""
    settings = engine.pool.settings
    orders, events = open_upstream(handles[ORDER_ENTITIES.name]), open_upstream(handles[EVENTS_CLEAN.name])
    rows = sum(file.rows for file in (*orders.files, *events.files))
    parallel = rows >= settings.inline_rows
    size = settings.rows_per_task if parallel else 10**12
    buckets = max(1, math.ceil(sum(file.rows for file in orders.files) / size))
    categories = handles[CATEGORY_AMOUNTS.name].read(CATEGORY_AMOUNTS.schema.names)
    ratios = open_upstream(handles[FRAUD_RATIOS.name])
    tasks = tuple(
        ReadTask(
            number=number,
            upstream=replace(upstream, files=files),
            events=upstream is events,
            buckets=buckets,
            categories=categories,
            ratios=ratios,
        )
        for upstream in (orders, events)
        for number, files in enumerate(batch_files(upstream.files, size))
    )
    return BuildPlan(tasks, buckets, rows, parallel)


# --- first round ---------------------------------------------------------------------------------------------------


def read_block(task: ReadTask) -> list[Block]:
    """Read a block; return the rows of each entity for its bucket, and the features of the orders themselves."""
    if task.events:
        return _read_events(task)
    orders = task.upstream.read(ORDER_ENTITIES.schema.names).sort("placed_at", "order_id")
    orders = orders.with_columns(pl.lit(task.number, pl.Int32).alias(BLOCK), pl.int_range(pl.len(), dtype=pl.Int32).alias(ROW))
    frauds = orders.filter(pl.col("known_at").is_not_null())["order_id"]
    ratios = task.ratios.read(["order_id", "ratio"], pl.col("order_id").is_in(frauds.implode()))
    orders = orders.join(ratios, on="order_id", how="left", maintain_order="left")
    own = pl.concat(
        [
            orders.select("order_id", "placed_at", "customer"),
            compute_group(ORDER, orders.with_columns(requested=pl.lit(True)), OrderHistory(categories=task.categories)),
        ],
        how="horizontal",
    )
    blocks = [Block(ORDER.name, task.number, own.to_arrow())]
    for group in ENTITY_GROUPS:
        more = () if group.events else ("order_id", "amount", "known_at", *(("ratio",) if group.unexplained_windows else ()))
        columns = list(dict.fromkeys([group.key, "placed_at", *more, *group.needs]))
        blocks += _by_bucket(f"orders:{group.name}", orders.select(*columns, BLOCK, ROW), group.key, task.buckets)
    return blocks


def _read_events(task: ReadTask) -> list[Block]:
    events = account_events(task.upstream.read(EVENT_READS))
    blocks: list[Block] = []
    for group in ENTITY_GROUPS:
        if group.events:
            counted = events if group.key == "account" else events.filter(pl.col("kind") != "visit")
            rows = counted.select(group.key, "occurred_at", "kind")
            blocks += _by_bucket(f"events:{group.name}", rows, group.key, task.buckets)
    return blocks


def _by_bucket(kind: str, rows: pl.DataFrame, key: str, buckets: int) -> list[Block]:
    rows = rows.filter(pl.col(key).is_not_null())
    if buckets == 1:
        return [Block(kind, 0, rows.to_arrow())] if rows.height else []
    numbered = rows.with_columns((group_hash(rows, [key]) % buckets).alias("_bucket"))
    by_number = numbered.partition_by("_bucket", as_dict=True, include_key=False)
    return [Block(kind, int(str(bucket)), frame.to_arrow()) for (bucket,), frame in by_number.items()]


# --- second round --------------------------------------------------------------------------------------------------


def compute_bucket(task: ComputeTask, blocks: Blocks) -> list[Block]:
    """Compute the features of one group for the entities of a bucket; return them by the block of their orders."""
    group = task.group
    orders = _frame(blocks, f"orders:{group.name}", task.bucket)
    if orders is None:
        return []
    events = _frame(blocks, f"events:{group.name}", task.bucket) if group.events else None
    history = OrderHistory(delay=task.delay) if events is None else OrderHistory(events=events, delay=task.delay)
    rows = orders.sort("placed_at") if group.events else orders.sort("placed_at", "order_id")
    rows = rows.with_columns(requested=pl.lit(True))
    values = pl.concat([rows.select(BLOCK, ROW), compute_group(group, rows, history)], how="horizontal")
    return [
        Block(group.name, int(str(number)), frame.to_arrow())
        for (number,), frame in values.partition_by(BLOCK, as_dict=True, include_key=False).items()
    ]


def _frame(blocks: Blocks, kind: str, number: int) -> pl.DataFrame | None:
    frames = [frame for table in blocks.of(kind, number) if isinstance(frame := pl.from_arrow(table), pl.DataFrame)]
    return pl.concat(frames) if frames else None


# --- third round ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteBlock:
    """Joins all groups' features of a block and writes them to data files that no snapshot refers to yet."""

    writer: FileWriter
    sequence: int

    def __call__(self, number: int, blocks: Blocks) -> WrittenBlock:
        own = _frame(blocks, ORDER.name, number)
        assert own is not None
        columns = [own, *(_aligned(group, _frame(blocks, group.name, number), own.height) for group in ENTITY_GROUPS)]
        rows = conform(pl.concat(columns, how="horizontal"), ORDER_FEATURES)
        judged = evaluate(ORDER_FEATURES.name, ORDER_FEATURES.rules, rows, ORDER_FEATURES.key)
        marked = rows.with_columns(pl.lit(False).alias(DELETED))
        files = tuple(self.writer.write(stamp(ORDER_FEATURES, marked, self.sequence)))
        return WrittenBlock(files, rows.height, judged.results)


def _aligned(group: FeatureGroup, values: pl.DataFrame | None, height: int) -> pl.DataFrame:
    """Return a group's features in the order of the block's rows; null for an order without that entity."""
    if values is None:
        return pl.DataFrame({f.name: pl.repeat(None, height, dtype=pl.Float64, eager=True) for f in group.features})
    source = pl.repeat(None, height, dtype=pl.UInt32, eager=True).scatter(
        values[ROW].cast(pl.UInt32), pl.int_range(values.height, dtype=pl.UInt32, eager=True)
    )
    return values.select(pl.col(f.name).gather(source) for f in group.features)
