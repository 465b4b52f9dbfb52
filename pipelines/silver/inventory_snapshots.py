"""silver.inventory_snapshots: the stock ledger, one row per stock event and store, with the stock levels after it."""

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
    doc="The stock ledger: stock levels of a product in a store after each stock event, in the order of occurrence.",
    columns=(
        column("store_id", pa.string(), "Store id of the store or warehouse.", required=True),
        column("product_id", pa.string(), "Product id.", required=True),
        column("occurred_at", TIMESTAMP, "When the event happened (UTC).", required=True),
        column("event_id", pa.string(), "Event id.", required=True),
        column("leg", pa.int32(), "1 for the receiving store of a transfer, else 0.", required=True),
        column("event_type", pa.string(), "Kind of stock event.", required=True),
        column("quantity", pa.int32(), "Units stated by the event.", required=True),
        column(
            "on_hand",
            pa.int64(),
            "Units in the store; negative when more units left than are known to have arrived.",
            required=True,
        ),
        column("reserved", pa.int64(), "Units reserved for customers.", required=True),
        column("incoming", pa.int64(), "Units announced by suppliers and not yet received.", required=True),
        column("safety_stock", pa.int64(), "Units kept as safety stock.", required=True),
        column("available_to_promise", pa.int64(), "on_hand - reserved - safety_stock.", required=True),
        column("expected_on_hand", pa.int64(), "For a count: units expected by the ledger; null for other events."),
        column(
            "shrinkage",
            pa.int64(),
            "For a count: expected units minus counted units, negative for a surplus; null for other events.",
        ),
        column("purchase_order", pa.string(), "Purchase order of incoming or received units; null for other events."),
        column("reason", pa.string(), "Reason of an adjustment: damage, theft, found or correction; null for other events."),
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
    """Return the ledger of the affected stores and products, from each one's `since` on (null: from the start).

    `events` must have every stock event from `since` on, and every stock_incoming before it: the announced purchase orders
    are the only state that the last row before `since` (`opening`) does not have.
    """
    groups = frames["groups"].select(*STORE_PRODUCT, "since").with_row_index("group")
    rows = pl.concat([_openings(groups, frames.get("opening")), _legs(frames["events"], groups)], how="diagonal")
    rows = rows.sort("group", *LEDGER_ORDER, nulls_last=False)
    # events may be read twice; equal rows are adjacent
    is_repeated = pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ("group", *LEDGER_ORDER)])
    rows = rows.filter(~is_repeated)
    rows = rows.with_columns(announced=_announced(rows))
    names = INVENTORY_SNAPSHOTS.schema.names
    return _with_stock_levels(rows).select(*names, "live").filter("live").select(names)


def as_of(ledger: pl.DataFrame | pl.LazyFrame, at: datetime) -> pl.DataFrame:
    """Return the last ledger row of each store and product at or before `at` (in UTC without a time zone)."""
    moment = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return (
        ledger.lazy()
        .filter(pl.col("occurred_at") <= moment)
        .sort(*STORE_PRODUCT, *LEDGER_ORDER)
        .unique(STORE_PRODUCT, keep="last", maintain_order=True)
        .collect()
    )


def _openings(groups: pl.DataFrame, opening: pl.DataFrame | None) -> pl.DataFrame:
    """Return a row per group that sorts before its events and sets every level to its value before `since`."""
    if opening is None or opening.is_empty():
        return groups.select(
            "group", *STORE_PRODUCT, *(pl.lit(0, pl.Int64).alias(name) for name in STOCK_LEVELS), opens=True, live=False
        )
    known = groups.join(opening.select(*STORE_PRODUCT, *STOCK_LEVELS), on=STORE_PRODUCT, how="left")
    return known.select(
        "group", *STORE_PRODUCT, *(pl.col(name).cast(pl.Int64).fill_null(0) for name in STOCK_LEVELS), opens=True, live=False
    )


def _legs(events: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """Return a row per stock event and affected store; `live` from the `since` of its group on."""
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
    """Return whether each row (in order) is a receipt for a purchase order that an earlier row announced."""
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


def _with_stock_levels(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the stock levels after each row. rows: in order, each group preceded by its opening row.

    A level is the sum of its movements plus a base, which changes wherever an event sets the level.
    """
    kind, quantity = pl.col("event_type"), pl.col("quantity").cast(pl.Int64)
    is_safety_stock_set = (kind == "safety_stock_set") & pl.col("live")
    sums = _with_movements(rows).with_columns(
        on_hand_base=(
            pl.when("opens")
            .then(pl.col("on_hand") - pl.col("on_hand_movement"))
            .when("counted")
            .then(quantity - pl.col("on_hand_movement"))
            .forward_fill()
        ),
        reserved_base=pl.when("opens").then(pl.col("reserved") - pl.col("reserved_movement")).forward_fill(),
        incoming_base=pl.when("opens").then(pl.col("incoming") - pl.col("incoming_movement")).forward_fill(),
        safety_stock=pl.when("opens").then("safety_stock").when(is_safety_stock_set).then(quantity).forward_fill(),
    )
    return sums.with_columns(
        expected_on_hand=pl.when("counted").then(pl.col("on_hand_movement") + pl.col("on_hand_base").shift(1)),
        on_hand=pl.col("on_hand_movement") + pl.col("on_hand_base"),
        reserved=pl.col("reserved_movement") + pl.col("reserved_base"),
        incoming=pl.col("incoming_movement") + pl.col("incoming_base"),
    ).with_columns(
        available_to_promise=pl.col("on_hand") - pl.col("reserved") - pl.col("safety_stock"),
        shrinkage=pl.col("expected_on_hand") - pl.when("counted").then(quantity),
    )


def _with_movements(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the cumulative movements of on_hand, reserved and incoming, and `counted`: whether the row is a count."""
    kind, quantity = pl.col("event_type"), pl.col("quantity").cast(pl.Int64)

    def cumulative(*effects: tuple[pl.Expr, pl.Expr]) -> pl.Expr:
        effect_of_row: pl.Expr = pl.lit(0)
        for condition, effect in reversed(effects):
            effect_of_row = pl.when(condition).then(effect).otherwise(effect_of_row)
        return pl.when("live").then(effect_of_row).otherwise(0).cum_sum()

    return rows.with_columns(
        on_hand_movement=cumulative(
            (kind.is_in(["stock_received", "stock_returned"]), quantity),
            (kind == "stock_sold", -quantity),
            (kind == "stock_adjusted", quantity * pl.col("sign").cast(pl.Int64)),
            (kind == "stock_transferred", pl.when(pl.col("leg") == 0).then(-quantity).otherwise(quantity)),
        ),
        reserved_movement=cumulative(
            (kind == "stock_reserved", quantity),
            (kind == "reservation_released", -quantity),
            ((kind == "stock_sold") & pl.col("from_reserved"), -quantity),
        ),
        incoming_movement=cumulative((kind == "stock_incoming", quantity), (pl.col("announced"), -quantity)),
        counted=(kind == "stock_counted") & pl.col("live"),
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
