"""silver.inventory_snapshots: the stock ledger, one row per stock event and store, with the figures after it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, row_count_drift, within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.settings import BusinessSettings
from pipelines.silver.events_clean import EVENTS_CLEAN, STOCK_EVENTS

INVENTORY_SNAPSHOTS = Table(
    "silver.inventory_snapshots",
    doc="The stock ledger: the figures of a product in a store after each stock event, in the order in which they happened.",
    columns=(
        column("store_id", pa.string(), "Store or warehouse.", required=True),
        column("product_id", pa.string(), "Product.", required=True),
        column("occurred_at", TIMESTAMP, "When the event happened.", required=True),
        column("event_id", pa.string(), "The event.", required=True),
        column("leg", pa.int32(), "0; 1 for the receiving side of a transfer.", required=True),
        column("event_type", pa.string(), "Kind of stock event.", required=True),
        column("quantity", pa.int32(), "Units the event names.", required=True),
        column("on_hand", pa.int64(), "Units in the store; negative when more left than ever came.", required=True),
        column("reserved", pa.int64(), "Units promised to customers.", required=True),
        column("incoming", pa.int64(), "Units announced and not received.", required=True),
        column("safety_stock", pa.int64(), "Units that are not to be promised.", required=True),
        column("available_to_promise", pa.int64(), "on_hand - reserved - safety_stock.", required=True),
        column("expected_on_hand", pa.int64(), "On a count: units that should have been there."),
        column("shrinkage", pa.int64(), "On a count: expected less counted units; negative when more was found."),
        column("purchase_order", pa.string(), "Purchase order of incoming or received units."),
        column("reason", pa.string(), "Reason of an adjustment: damage, theft, found, correction."),
    ),
    key=("store_id", "product_id", "occurred_at", "event_id", "leg"),
    group=("store_id", "product_id"),
    tracked=("event_type",),
    sort_by=("store_id", "product_id", "occurred_at"),
    owner="supply chain",
    expectations=(
        accepted("leg", {0, 1}),
        within("safety_stock", 0, None, severity="warn"),
        row_count_drift(0.5),
    ),
)

STORE_PRODUCT = ["store_id", "product_id"]
LEDGER_ORDER = ["occurred_at", "event_id", "leg"]
STOCK_LEVELS = ["on_hand", "reserved", "incoming", "safety_stock"]
EVENT_COLUMNS = (
    "event_id",
    "event_type",
    "occurred_at",
    "store_id",
    "product_id",
    "quantity",
    "to_store_id",
    "purchase_order",
    "reserved",
    "sign",
    "reason",
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The ledger of the touched stores and products, from each one's `since` on (null: all of it).

    `events` must hold every stock event from `since` on, and every stock_incoming before it: which purchase orders
    were announced is the only thing that the last row before `since` (`opening`) does not say.
    """
    groups = frames["groups"].select(*STORE_PRODUCT, "since").with_row_index("group")
    rows = pl.concat([_openings(groups, frames.get("opening")), _legs(frames["events"], groups)], how="diagonal")
    rows = rows.sort("group", *LEDGER_ORDER, nulls_last=False)
    # an event that was gathered twice has its neighbour for a twin
    again = pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ("group", *LEDGER_ORDER)])
    rows = rows.filter(~again)
    rows = rows.with_columns(announced=_announced(rows))
    names = INVENTORY_SNAPSHOTS.schema.names
    return _figures(rows).select(*names, "live").filter("live").select(names)


def as_of(ledger: pl.DataFrame | pl.LazyFrame, at: datetime) -> pl.DataFrame:
    """The last ledger row of each store and product at or before `at` (without a zone: UTC)."""
    moment = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return (
        ledger.lazy()
        .filter(pl.col("occurred_at") <= moment)
        .sort(*STORE_PRODUCT, *LEDGER_ORDER)
        .unique(STORE_PRODUCT, keep="last", maintain_order=True)
        .collect()
    )


def _openings(groups: pl.DataFrame, opening: pl.DataFrame | None) -> pl.DataFrame:
    """A row per group that sorts before its events and sets every figure to what it was before `since`."""
    if opening is None or opening.is_empty():
        return groups.select(
            "group", *STORE_PRODUCT, *(pl.lit(0, pl.Int64).alias(name) for name in STOCK_LEVELS), opens=True, live=False
        )
    known = groups.join(opening.select(*STORE_PRODUCT, *STOCK_LEVELS), on=STORE_PRODUCT, how="left")
    return known.select(
        "group", *STORE_PRODUCT, *(pl.col(name).cast(pl.Int64).fill_null(0) for name in STOCK_LEVELS), opens=True, live=False
    )


def _legs(events: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """A row per stock event and touched store it concerns; `live` where its group's `since` has come."""
    stock = events.filter(pl.col("event_type").is_in(STOCK_EVENTS)).select(
        *(name for name in EVENT_COLUMNS if name not in ("reserved", "quantity")),
        "quantity",
        from_reserved=pl.col("reserved").fill_null(False),
        leg=pl.lit(0, pl.Int32),
    )
    received = stock.filter(pl.col("event_type") == "stock_transferred").with_columns(
        store_id="to_store_id", leg=pl.lit(1, pl.Int32)
    )
    return (
        pl.concat([stock, received])
        .drop("to_store_id")
        .join(groups, on=STORE_PRODUCT, how="inner")
        .with_columns(opens=False, live=pl.col("since").is_null() | (pl.col("occurred_at") >= pl.col("since")))
        .drop("since")
    )


def _announced(rows: pl.DataFrame) -> pl.Series:
    """For each row (in order): is it units received for a purchase order that an earlier row announced?"""
    numbered = (
        rows.lazy()
        .select("group", "event_type", "purchase_order", n=pl.int_range(pl.len()))
        .filter(pl.col("event_type").is_in(["stock_incoming", "stock_received"]) & pl.col("purchase_order").is_not_null())
        .with_columns(first=pl.when(pl.col("event_type") == "stock_incoming").then("n").min().over("group", "purchase_order"))
        .filter((pl.col("event_type") == "stock_received") & (pl.col("first") < pl.col("n")))
        .select("n")
        .collect()
    )
    return pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True).scatter(numbered["n"], True)


def _figures(rows: pl.DataFrame) -> pl.DataFrame:
    """The figures after each row, for rows in order, each group led by the row that opens it.

    A figure is the sum of what moved it, plus a base that is found anew wherever the figure is set.
    """
    kind, quantity = pl.col("event_type"), pl.col("quantity").cast(pl.Int64)

    def moved(*effects: tuple[pl.Expr, pl.Expr]) -> pl.Expr:
        step: pl.Expr = pl.lit(0)
        for condition, effect in reversed(effects):
            step = pl.when(condition).then(effect).otherwise(step)
        return pl.when("live").then(step).otherwise(0).cum_sum()

    counted = (kind == "stock_counted") & pl.col("live")
    sums = rows.with_columns(
        on_hand_moved=moved(
            (kind.is_in(["stock_received", "stock_returned"]), quantity),
            (kind == "stock_sold", -quantity),
            (kind == "stock_adjusted", quantity * pl.col("sign").cast(pl.Int64)),
            (kind == "stock_transferred", pl.when(pl.col("leg") == 0).then(-quantity).otherwise(quantity)),
        ),
        reserved_moved=moved(
            (kind == "stock_reserved", quantity),
            (kind == "reservation_released", -quantity),
            ((kind == "stock_sold") & pl.col("from_reserved"), -quantity),
        ),
        incoming_moved=moved((kind == "stock_incoming", quantity), (pl.col("announced"), -quantity)),
        counted=counted,
    ).with_columns(
        on_hand_base=(
            pl.when("opens")
            .then(pl.col("on_hand") - pl.col("on_hand_moved"))
            .when("counted")
            .then(quantity - pl.col("on_hand_moved"))
            .forward_fill()
        ),
        reserved_base=pl.when("opens").then(pl.col("reserved") - pl.col("reserved_moved")).forward_fill(),
        incoming_base=pl.when("opens").then(pl.col("incoming") - pl.col("incoming_moved")).forward_fill(),
        safety_stock=(
            pl.when("opens")
            .then("safety_stock")
            .when((kind == "safety_stock_set") & pl.col("live"))
            .then(quantity)
            .forward_fill()
        ),
    )
    return sums.with_columns(
        expected_on_hand=pl.when("counted").then(pl.col("on_hand_moved") + pl.col("on_hand_base").shift(1)),
        on_hand=pl.col("on_hand_moved") + pl.col("on_hand_base"),
        reserved=pl.col("reserved_moved") + pl.col("reserved_base"),
        incoming=pl.col("incoming_moved") + pl.col("incoming_base"),
    ).with_columns(
        available_to_promise=pl.col("on_hand") - pl.col("reserved") - pl.col("safety_stock"),
        shrinkage=pl.col("expected_on_hand") - pl.when("counted").then(quantity),
    )


STEP = Step(
    target=INVENTORY_SNAPSHOTS,
    reads={
        "events": Grouped(
            EVENTS_CLEAN,
            keys=((pl.col("store_id"), pl.col("product_id")), (pl.col("to_store_id"), pl.col("product_id"))),
            columns=EVENT_COLUMNS,
            always=pl.col("event_type") == "stock_incoming",
        )
    },
    transform=transform,
    ordered_by="occurred_at",
)
