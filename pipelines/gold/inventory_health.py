"""gold.inventory_health: where stock stands now, how fast it goes, and what counts found missing."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column, references
from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.settings import BusinessSettings
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS, LEDGER_ORDER, STORE_PRODUCT

SALES_DAYS = 28
"""Days up to the last event over which the sales rate is taken: four whole weeks, so that weekends weigh alike."""

LONG_DAYS = 90

INVENTORY_HEALTH = Table(
    "gold.inventory_health",
    doc="Stock of each product in each store after its last event. Windows of days end at the pair's own last event, not today: "
    "the table is the same whenever it is computed.",
    columns=(
        column("store_id", pa.string(), "Store or warehouse.", required=True),
        column("product_id", pa.string(), "Product.", required=True),
        column("on_hand", pa.int64(), "Units in the store; negative when more left than ever came.", required=True),
        column("reserved", pa.int64(), "Units promised to customers.", required=True),
        column("incoming", pa.int64(), "Units announced and not received.", required=True),
        column("safety_stock", pa.int64(), "Units that are not to be promised.", required=True),
        column("available_to_promise", pa.int64(), "on_hand - reserved - safety_stock.", required=True),
        column("last_event_at", TIMESTAMP, "The last stock event of the pair.", required=True),
        column("last_counted_at", TIMESTAMP, "The last count; null when it was never counted."),
        column("sold_28d", pa.int64(), "Units sold in the 28 days up to last_event_at.", required=True),
        column("sold_90d", pa.int64(), "Units sold in the 90 days up to last_event_at.", required=True),
        column("daily_sales", pa.float64(), "sold_28d per day (28, or fewer since the first event).", required=True),
        column("days_of_cover", pa.float64(), "Days that available_to_promise lasts at that rate; null: nothing is sold."),
        column(
            "low_stock", pa.bool_(), "Nothing left to promise, or days_of_cover below the setting low_stock_days.", required=True
        ),
        column("counts", pa.int64(), "How often it was counted.", required=True),
        column("shrinkage_units", pa.int64(), "Units that counts found missing, less those they found too many.", required=True),
        column("shrinkage_rate", pa.float64(), "shrinkage_units per unit that counts expected; null when they expected none."),
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


DAYS_PER_MICROSECOND = 1 / 86_400_000_000
"""To multiply by: polars divides by a literal in two ways, depending on the number of rows."""


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The ledgers of the touched stores and products -> one row each."""
    ledger = frames["ledger"].unique(list(INVENTORY_SNAPSHOTS.key), keep="any")
    spans = ledger.group_by(STORE_PRODUCT).agg(
        last_event_at=pl.col("occurred_at").max(),
        first_event_at=pl.col("occurred_at").min(),
        last_counted_at=pl.col("occurred_at").filter(pl.col("shrinkage").is_not_null()).max(),
        counts=pl.col("shrinkage").count().cast(pl.Int64),
        shrinkage_units=pl.col("shrinkage").sum(),
        expected_units=pl.when(pl.col("shrinkage").is_not_null()).then(pl.col("on_hand") + pl.col("shrinkage")).sum(),
    )
    # few rows happened at the last moment: only they need sorting
    last = (
        ledger.join(spans.select(*STORE_PRODUCT, occurred_at="last_event_at"), on=[*STORE_PRODUCT, "occurred_at"], how="semi")
        .sort(LEDGER_ORDER)
        .unique(STORE_PRODUCT, keep="last", maintain_order=True)
        .select(*STORE_PRODUCT, "on_hand", "reserved", "incoming", "safety_stock")
    )
    stock = spans.join(last, on=STORE_PRODUCT).join(_sold(ledger, spans), on=STORE_PRODUCT, how="left")
    observed = (pl.col("last_event_at") - pl.col("first_event_at")).dt.total_microseconds() * DAYS_PER_MICROSECOND
    shown = pl.col("available_to_promise")
    return (
        stock.with_columns(
            pl.col("sold_28d", "sold_90d").fill_null(0),
            available_to_promise=pl.col("on_hand") - pl.col("reserved") - pl.col("safety_stock"),
        )
        .with_columns(daily_sales=pl.col("sold_28d") / observed.clip(1.0, float(SALES_DAYS)))
        .with_columns(
            days_of_cover=pl.when(pl.col("daily_sales") > 0).then(shown.clip(lower_bound=0) / pl.col("daily_sales")),
            shrinkage_rate=pl.when(pl.col("expected_units") > 0).then(pl.col("shrinkage_units") / pl.col("expected_units")),
        )
        .with_columns(low_stock=(shown <= 0) | (pl.col("days_of_cover") < context.low_stock_days).fill_null(False))
        .select(INVENTORY_HEALTH.schema.names)
    )


def _sold(ledger: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Units sold in the days before each pair's last event."""
    age = pl.col("last_event_at") - pl.col("occurred_at")
    quantity = pl.col("quantity").cast(pl.Int64)
    return (
        ledger.filter(pl.col("event_type") == "stock_sold")
        .select(*STORE_PRODUCT, "occurred_at", "quantity")
        .join(spans.select(*STORE_PRODUCT, "last_event_at"), on=STORE_PRODUCT)
        .filter(age < pl.duration(days=LONG_DAYS))
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
