"""gold.inventory_health: current stock, sales rate, days of cover and shrinkage per store and product."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column, references
from pipelines.durations import days
from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.settings import BusinessSettings
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS, LEDGER_ORDER, STORE_PRODUCT

SALES_DAYS = 28
"""Days up to the last event over which the sales rate is measured: whole weeks, so that each weekday counts equally."""

LONG_SALES_DAYS = 90

INVENTORY_HEALTH = Table(
    "gold.inventory_health",
    doc="Stock of each product in each store after its last event. Time windows end at the last event of the store and product, "
    "not today, so the table does not depend on when it is computed.",
    columns=(
        column("store_id", pa.string(), "Store id of the store or warehouse.", required=True),
        column("product_id", pa.string(), "Product id.", required=True),
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
        column("last_event_at", TIMESTAMP, "Last stock event of the store and product (UTC).", required=True),
        column("last_counted_at", TIMESTAMP, "Last stock count (UTC); null when never counted."),
        column("sold_28d", pa.int64(), "Units sold in the 28 days up to last_event_at.", required=True),
        column("sold_90d", pa.int64(), "Units sold in the 90 days up to last_event_at.", required=True),
        column(
            "daily_sales",
            pa.float64(),
            "Units sold per day: sold_28d / 28, or / days since the first event when fewer.",
            required=True,
        ),
        column("days_of_cover", pa.float64(), "Days that available_to_promise lasts at daily_sales; null without sales."),
        column(
            "low_stock",
            pa.bool_(),
            "Whether available_to_promise is 0 or less, or days_of_cover is below the setting low_stock_days.",
            required=True,
        ),
        column("counts", pa.int64(), "Number of stock counts.", required=True),
        column("shrinkage_units", pa.int64(), "Units found missing by counts, minus surplus units found.", required=True),
        column("shrinkage_rate", pa.float64(), "shrinkage_units / units expected by counts; null when no units were expected."),
    ),
    key=("store_id", "product_id"),
    sort_by=("store_id", "product_id"),
    references=(
        references("store_id", DIM_STORES),
        references("product_id", DIM_PRODUCTS),
    ),
    owner="supply chain",
    expectations=(
        within("sold_28d", 0, None, severity="warn"),
        within("days_of_cover", 0, None),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return one row per affected store and product, from its ledger."""
    ledger = frames["ledger"].unique(list(INVENTORY_SNAPSHOTS.key), keep="any")
    spans = ledger.group_by(STORE_PRODUCT).agg(
        last_event_at=pl.col("occurred_at").max(),
        first_event_at=pl.col("occurred_at").min(),
        last_counted_at=pl.col("occurred_at").filter(pl.col("shrinkage").is_not_null()).max(),
        counts=pl.col("shrinkage").count().cast(pl.Int64),
        shrinkage_units=pl.col("shrinkage").sum(),
        expected_units=pl.when(pl.col("shrinkage").is_not_null()).then(pl.col("on_hand") + pl.col("shrinkage")).sum(),
    )
    # only the few rows at the time of the last event need sorting
    last = (
        ledger.join(spans.select(*STORE_PRODUCT, occurred_at="last_event_at"), on=[*STORE_PRODUCT, "occurred_at"], how="semi")
        .sort(LEDGER_ORDER)
        .unique(STORE_PRODUCT, keep="last", maintain_order=True)
        .select(*STORE_PRODUCT, "on_hand", "reserved", "incoming", "safety_stock")
    )
    stock = spans.join(last, on=STORE_PRODUCT).join(_sold(ledger, spans), on=STORE_PRODUCT, how="left")
    observed_days = days(pl.col("last_event_at") - pl.col("first_event_at"))
    available = pl.col("available_to_promise")
    return (
        stock.with_columns(
            pl.col("sold_28d", "sold_90d").fill_null(0),
            available_to_promise=pl.col("on_hand") - pl.col("reserved") - pl.col("safety_stock"),
        )
        .with_columns(daily_sales=pl.col("sold_28d") / observed_days.clip(1.0, float(SALES_DAYS)))
        .with_columns(
            days_of_cover=pl.when(pl.col("daily_sales") > 0).then(available.clip(lower_bound=0) / pl.col("daily_sales")),
            shrinkage_rate=pl.when(pl.col("expected_units") > 0).then(pl.col("shrinkage_units") / pl.col("expected_units")),
        )
        .with_columns(low_stock=(available <= 0) | (pl.col("days_of_cover") < context.low_stock_days).fill_null(False))
        .select(INVENTORY_HEALTH.schema.names)
    )


def _sold(ledger: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Return the units sold in the days before the last event of each store and product."""
    age = pl.col("last_event_at") - pl.col("occurred_at")
    quantity = pl.col("quantity").cast(pl.Int64)
    return (
        ledger.filter(pl.col("event_type") == "stock_sold")
        .select(*STORE_PRODUCT, "occurred_at", "quantity")
        .join(spans.select(*STORE_PRODUCT, "last_event_at"), on=STORE_PRODUCT)
        .filter(age < pl.duration(days=LONG_SALES_DAYS))
        .group_by(STORE_PRODUCT)
        .agg(sold_28d=quantity.filter(age < pl.duration(days=SALES_DAYS)).sum(), sold_90d=quantity.sum())
    )


STEP = Step(
    target=INVENTORY_HEALTH,
    reads={
        "ledger": Grouped(
            INVENTORY_SNAPSHOTS,
            keys=((pl.col("store_id"), pl.col("product_id")),),
            columns=(
                *INVENTORY_SNAPSHOTS.key,
                "event_type",
                "quantity",
                "on_hand",
                "reserved",
                "incoming",
                "safety_stock",
                "shrinkage",
            ),
        )
    },
    transform=transform,
)
