"""The training set: orders with their features, the labels known at a cut-off, and splits by time.

    |-- train --|<- delay ->|-- validation --|<- delay ->|-- test --|<- delay ->| cut-off
    |----------------- known ----------------|

The label of an order is whether it was reported as fraud at the cut-off. Orders younger than the label delay are left out:
their labels are not yet mature. Splits are separated by the delay too, so everything that a model learns from was known when
the split that evaluates it began. `known` has all orders that can be learned from before the test window begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl
import pyarrow as pa

from lakehouse.engine.upstream_table import UpstreamTable, batch_files
from lakehouse.errors import SettingsError, ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.parallel import Block, Blocks, TaskPool
from ml.features.declarations import LABEL_DELAY, TIME
from ml.features.groups import FEATURE_NAMES, FEATURES
from ml.tables.category_amounts import CATEGORY_AMOUNTS
from ml.tables.fraud_ratios import FRAUD_RATIOS
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES
from pipelines.silver.events_clean import EVENTS_CLEAN

COLUMNS = ("order_id", "placed_at", "customer", *FEATURE_NAMES)
"""Columns of a training frame besides `label`."""

NARROW = tuple(f.name for f in FEATURES if f.type != "category" and f.name != "amount")
"""Features that a training frame has as 32-bit floats, as XGBoost reads them."""


class TrainingSetError(ShopSphereError):
    """There are not enough labelled orders for a training."""


@dataclass(frozen=True)
class SplitSettings:
    """Shares of the splits, and the delay between them."""

    test: float = 0.25
    """Share of the labelled orders, the newest, that models are evaluated on."""
    validation: float = 0.15
    """Share of the labelled orders, before the test orders, that determine threshold and rounds."""
    delay: timedelta = LABEL_DELAY
    """Maximum time between an order and its fraud report."""

    def __post_init__(self) -> None:
        if self.test <= 0 or self.validation <= 0 or self.test + self.validation >= 1 or self.delay < timedelta(0):
            raise SettingsError(
                f"split.test is {self.test:g}, split.validation {self.validation:g}, split.delay {self.delay.days} days: "
                "expected shares over 0 with a sum below 1, and a delay of 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Frames sorted by time (COLUMNS and `label`, 1 for fraud), and their origin.

    known       all orders whose label was mature when the test window began: train, validation and the gap between them
    unlabelled  number of orders whose label is not yet mature at the cut-off
    snapshots   Iceberg snapshot of each table that was read
    """

    train: pl.DataFrame
    validation: pl.DataFrame
    known: pl.DataFrame
    test: pl.DataFrame
    unlabelled: int
    cutoff: datetime
    snapshots: Mapping[str, int]

    @property
    def rows(self) -> dict[str, int]:
        """Number of orders in each frame."""
        return {name: getattr(self, name).height for name in ("train", "validation", "known", "test")}


@dataclass(frozen=True, kw_only=True)
class ReadLabelledTask:
    """A task: some files of silver.order_features, and the selection of their orders.

    reports: order_id and known_at of the orders reported up to `cutoff`."""

    upstream: UpstreamTable
    since: datetime | None
    until: datetime
    reports: pl.DataFrame
    cutoff: datetime


def training_set(
    lake: Lake, pool: TaskPool, cutoff: datetime | None = None, settings: SplitSettings | None = None
) -> TrainingSet:
    """Return the training set as of `cutoff` (None: the newest order or report) from silver.order_features, which must be
    up to date (`feature_tables.refresh`).

    Raises TrainingSetError when there is too little history, or a frame has no frauds.
    """
    settings = settings or SplitSettings()
    features, entities = lake.load(ORDER_FEATURES), lake.load(ORDER_ENTITIES)
    cutoff = cutoff or newest_moment(entities)
    labelled = labelled_orders(features, entities, pool, until=cutoff - settings.delay, cutoff=cutoff)
    unlabelled = entities.read(["placed_at"], pl.col("placed_at").is_between(cutoff - settings.delay, cutoff, closed="right"))
    reports = entities.read(["order_id", "known_at"], pl.col("known_at") <= cutoff)
    train, validation, known, test = split(labelled, reports, settings)
    _check(labelled, {"training": train, "validation": validation, "test": test}, cutoff, settings)
    return TrainingSet(
        train=train,
        validation=validation,
        known=known,
        test=test,
        unlabelled=unlabelled.height,
        cutoff=cutoff,
        snapshots=snapshots(lake),
    )


def split(
    labelled: pl.DataFrame, reports: pl.DataFrame, settings: SplitSettings
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return train, validation, known and test of labelled orders that are sorted by time.

    reports: order_id and known_at. Training orders have the labels that were known at the time of training.
    """
    empty = labelled.clear()
    test = labelled.tail(round(labelled.height * settings.test))
    if test.is_empty():
        return empty, empty, empty, test
    known = _learned(labelled, reports, test["placed_at"][0], settings.delay)
    validation = known.tail(min(round(labelled.height * settings.validation), known.height))
    if validation.is_empty():
        return empty, validation, known, test
    return _learned(labelled, reports, validation["placed_at"][0], settings.delay), validation, known, test


def _learned(labelled: pl.DataFrame, reports: pl.DataFrame, moment: datetime, delay: timedelta) -> pl.DataFrame:
    """Return the orders whose label was mature at a moment, with the label known then."""
    return _with_labels(labelled.filter(pl.col("placed_at") < moment - delay), reports, moment)


def _with_labels(orders: pl.DataFrame, reports: pl.DataFrame, moment: datetime) -> pl.DataFrame:
    frauds = reports.filter(pl.col("known_at") <= moment)["order_id"]
    return orders.with_columns(label=pl.col("order_id").is_in(frauds.implode()).cast(pl.Int8))


def _check(labelled: pl.DataFrame, frames: Mapping[str, pl.DataFrame], cutoff: datetime, settings: SplitSettings) -> None:
    for name, frame in frames.items():
        frauds = int(frame["label"].sum() or 0)
        if frauds == 0 or frauds == frame.height:
            since = f", the first of {labelled['placed_at'][0]:%Y-%m-%d}" if labelled.height else ""
            raise TrainingSetError(
                f"The {frame.height} {name} orders have {frauds} known frauds: both frauds and honest orders are needed. "
                f"{labelled.height} orders{since}, have a label at {cutoff:%Y-%m-%d}, and the splits are separated by a delay of "
                f"{settings.delay.days} days. Wait for more orders, or change the cut-off, the shares or the delay."
            )


def newest_moment(entities: TableHandle) -> datetime:
    """Return the time of the newest order or report in silver.order_entities. Raises TrainingSetError when it has none."""
    moments = entities.read(["placed_at", "known_at"])
    newest = [moment for name in ("placed_at", "known_at") if isinstance(moment := moments[name].max(), datetime)]
    if not newest:
        raise TrainingSetError(f"{ORDER_ENTITIES.name} has no orders. Run `python -m app run` first.")
    return max(newest)


def labelled_orders(
    features: TableHandle,
    entities: TableHandle,
    pool: TaskPool,
    *,
    until: datetime,
    cutoff: datetime,
    since: datetime | None = None,
) -> pl.DataFrame:
    """Return the orders placed after `since`, up to `until`, sorted by time, with the labels known at `cutoff`."""
    reports = entities.read(["order_id", "known_at"], pl.col("known_at") <= cutoff)
    files = features.files()
    tasks = [
        ReadLabelledTask(
            upstream=UpstreamTable(ORDER_FEATURES, features.reader, group),
            since=since,
            until=until,
            reports=reports,
            cutoff=cutoff,
        )
        for group in batch_files(files, pool.settings.rows_per_task)
    ]
    blocks = pool.extract(read_labelled, tasks, parallel=sum(file.rows for file in files) >= 4 * pool.settings.inline_rows)
    return _concatenated(blocks).sort("placed_at", "order_id")


def read_labelled(task: ReadLabelledTask) -> list[Block]:
    """Return the selected orders of some files, with labels."""
    selected = pl.col("placed_at") <= task.until
    if task.since is not None:
        selected &= pl.col("placed_at") > task.since
    rows = task.upstream.read(COLUMNS, selected).with_columns(pl.col(NARROW).cast(pl.Float32))
    return [Block("orders", -1, _with_labels(rows, task.reports, task.cutoff).to_arrow())]


def _concatenated(blocks: Blocks) -> pl.DataFrame:
    tables: list[pa.Table] = list(blocks.of("orders"))
    if not tables:
        own = {"order_id": pl.String(), "placed_at": TIME, "customer": pl.String()}
        types = {f.name: pl.Float32() if f.name in NARROW else f.dtype for f in FEATURES}
        return pl.DataFrame(schema={**own, **types, "label": pl.Int8()})
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame


def snapshots(lake: Lake) -> dict[str, int]:
    """Return the snapshot of each table that features and labels are read from."""
    handles = {
        table.name: lake.load(table) for table in (ORDER_FEATURES, ORDER_ENTITIES, CATEGORY_AMOUNTS, FRAUD_RATIOS, EVENTS_CLEAN)
    }
    return {name: handle.snapshot.snapshot_id for name, handle in handles.items() if handle.snapshot}
