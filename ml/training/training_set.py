"""The training set: orders with their features, the labels known at a cut-off, and splits by time.

    |-- train --|<- delay ->|-- validation --|<- delay ->|-- test --|<- delay ->| cut-off
    |----------------- known ----------------|

An order's label is what was known at the cut-off. Orders younger than the label delay have none yet, and are left
out. Between two splits lies the delay too: whatever a model learned from was known when the split began on which it is
tried. `known` is all that may be learned from before the test window begins.
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
"""What a training frame has, besides `label`."""

NARROW = tuple(f.name for f in FEATURES if f.type != "category" and f.name != "amount")
"""Features that a training frame holds as the 32-bit floats that XGBoost sees."""


class TrainingSetError(ShopSphereError):
    """There are not enough labelled orders to train on."""


@dataclass(frozen=True)
class SplitSettings:
    """How labelled orders are split."""

    test: float = 0.25
    """Share of the labelled orders, the newest, on which models are judged."""
    validation: float = 0.15
    """Share of the labelled orders, before those, from which threshold and rounds are chosen."""
    delay: timedelta = LABEL_DELAY
    """How long after an order its fraud is reported, at most."""

    def __post_init__(self) -> None:
        if self.test <= 0 or self.validation <= 0 or self.test + self.validation >= 1 or self.delay < timedelta(0):
            raise SettingsError(
                f"split.test is {self.test:g}, split.validation {self.validation:g}, split.delay {self.delay.days} days: "
                "expected shares over 0 that leave something to train on, and a delay of 0 or more."
            )


@dataclass(frozen=True)
class TrainingSet:
    """Frames in the order of time (COLUMNS and `label`, 1 for fraud), and where they come from.

    known       all orders whose label was due when the test window began: train, validation and the gap between them
    unlabelled  orders that are too young to have a label at the cut-off
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
        """How many orders each frame has."""
        return {name: getattr(self, name).height for name in ("train", "validation", "known", "test")}


@dataclass(frozen=True)
class Portion:
    """One task: some files of silver.order_features, and which of their orders are wanted."""

    upstream: UpstreamTable
    since: datetime | None
    until: datetime
    known: pl.DataFrame
    cutoff: datetime


def training_set(
    lake: Lake, pool: TaskPool, cutoff: datetime | None = None, settings: SplitSettings | None = None
) -> TrainingSet:
    """The training set known at `cutoff` (None: the newest moment that the tables tell of), from silver.order_features,
    which must be up to date (`order_features.refresh`).

    Raises TrainingSetError when there is too little history, or a frame without fraud.
    """
    settings = settings or SplitSettings()
    features, entities = lake.load(ORDER_FEATURES), lake.load(ORDER_ENTITIES)
    cutoff = cutoff or newest_moment(entities)
    labelled = labelled_orders(features, entities, pool, until=cutoff - settings.delay, cutoff=cutoff)
    unlabelled = entities.read(["placed_at"], pl.col("placed_at").is_between(cutoff - settings.delay, cutoff, closed="right"))
    reports = entities.read(["order_id", "known_at"], pl.col("known_at") <= cutoff)
    train, validation, known, test = split(labelled, reports, settings)
    _check(labelled, {"training": train, "validation": validation, "test": test}, cutoff, settings)
    return TrainingSet(train, validation, known, test, unlabelled.height, cutoff, snapshots(lake))


def split(
    labelled: pl.DataFrame, reports: pl.DataFrame, settings: SplitSettings
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """train, validation, known, test of labelled orders in the order of time.

    reports: order_id and known_at. What is learned from has the labels known when it was learned from.
    """
    nothing = labelled.clear()
    test = labelled.tail(round(labelled.height * settings.test))
    if test.is_empty():
        return nothing, nothing, nothing, test
    known = _learned(labelled, reports, test["placed_at"][0], settings.delay)
    validation = known.tail(min(round(labelled.height * settings.validation), known.height))
    if validation.is_empty():
        return nothing, validation, known, test
    return _learned(labelled, reports, validation["placed_at"][0], settings.delay), validation, known, test


def _learned(labelled: pl.DataFrame, reports: pl.DataFrame, moment: datetime, delay: timedelta) -> pl.DataFrame:
    """The orders whose label was due at a moment, with the label known then."""
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
                f"The {name} orders are {frame.height}, with {frauds} known frauds: both frauds and others are needed. "
                f"{labelled.height} orders{since}, have a label at {cutoff:%Y-%m-%d}, and a delay of {settings.delay.days} days "
                "lies between the splits. Wait for more orders, or change the cut-off, the shares or the delay."
            )


def newest_moment(entities: TableHandle) -> datetime:
    """The newest order or report that silver.order_entities tells of. Raises TrainingSetError when it has none."""
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
    """The orders placed after `since` and not after `until`, in the order of time, with the labels known at `cutoff`."""
    known = entities.read(["order_id", "known_at"], pl.col("known_at") <= cutoff)
    files = features.files()
    portions = [
        Portion(UpstreamTable(ORDER_FEATURES, features.reader, group), since, until, known, cutoff)
        for group in batch_files(files, pool.settings.rows_per_task)
    ]
    pieces = pool.extract(read_portion, portions, parallel=sum(file.rows for file in files) >= 4 * pool.settings.inline_rows)
    return _gathered(pieces).sort("placed_at", "order_id")


def read_portion(portion: Portion) -> list[Block]:
    """The wanted orders of some files, with labels."""
    wanted = pl.col("placed_at") <= portion.until
    if portion.since is not None:
        wanted &= pl.col("placed_at") > portion.since
    rows = portion.upstream.read(COLUMNS, wanted).with_columns(pl.col(NARROW).cast(pl.Float32))
    return [Block("orders", -1, _with_labels(rows, portion.known, portion.cutoff).to_arrow())]


def _gathered(pieces: Blocks) -> pl.DataFrame:
    tables: list[pa.Table] = list(pieces.of("orders"))
    if not tables:
        own = {"order_id": pl.String(), "placed_at": TIME, "customer": pl.String()}
        types = {f.name: pl.Float32() if f.name in NARROW else f.dtype for f in FEATURES}
        return pl.DataFrame(schema={**own, **types, "label": pl.Int8()})
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame


def snapshots(lake: Lake) -> dict[str, int]:
    """The snapshot of every table that features and labels come from."""
    handles = {
        table.name: lake.load(table) for table in (ORDER_FEATURES, ORDER_ENTITIES, CATEGORY_AMOUNTS, FRAUD_RATIOS, EVENTS_CLEAN)
    }
    return {name: handle.snapshot.snapshot_id for name, handle in handles.items() if handle.snapshot}
