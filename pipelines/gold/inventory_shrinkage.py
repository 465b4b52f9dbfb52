"""gold.inventory_shrinkage: units that each stock count found missing, and their value."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift, within
from lakehouse.step import Broadcast, Grouped, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column, references
from pipelines.affected_rows import rows_priced_since, rows_with
from pipelines.durations import days
from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.parsing.amounts import line_amounts, to_base_currency
from pipelines.settings import BusinessSettings
from pipelines.silver.exchange_rates import EXCHANGE_RATES, with_rates
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS, STORE_PRODUCT
from pipelines.silver.products import PRODUCTS

INVENTORY_SHRINKAGE = Table(
    "gold.inventory_shrinkage",
    doc="One row per stock count: expected units, counted units, and the difference valued at the current list price. "
    "Known losses (adjustments for theft or damage) lower the expected units, so they are not shrinkage.",
    columns=(
        column("store_id", pa.string(), "Store id of the store or warehouse.", required=True),
        column("product_id", pa.string(), "Product id.", required=True),
        column("counted_at", TIMESTAMP, "Time of the count (UTC).", required=True),
        column("event_id", pa.string(), "Event id of the count.", required=True),
        column("expected_units", pa.int64(), "Units expected by the ledger before the count.", required=True),
        column("counted_units", pa.int64(), "Units counted.", required=True),
        column("shrinkage_units", pa.int64(), "expected_units - counted_units; negative for a surplus.", required=True),
        column(
            "cumulative_shrinkage_units",
            pa.int64(),
            "Sum of shrinkage_units of this and all earlier counts of the store and product.",
            required=True,
        ),
        column("days_since_previous_count", pa.float64(), "Days since the previous count; null for the first."),
        column("list_price", pa.decimal128(18, 2), "Current list price of the product, in `currency`; null when unknown."),
        column("currency", pa.string(), "Currency of list_price, ISO 4217 code; null when unknown."),
        column(
            "shrinkage_value_base",
            MONEY,
            "shrinkage_units x list_price in the base currency at the rate of the day; null when price or rate is unknown.",
        ),
    ),
    key=("store_id", "product_id", "counted_at", "event_id"),
    group=("store_id", "product_id"),
    sort_by=("store_id", "product_id", "counted_at"),
    references=(
        references("store_id", DIM_STORES),
        references("product_id", DIM_PRODUCTS),
    ),
    owner="supply chain",
    expectations=(
        within("counted_units", 0, None, severity="warn"),
        row_count_drift(0.5),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the counts of the affected stores and products with their value."""
    counts = (
        frames["ledger"]
        .filter(pl.col("event_type") == "stock_counted")
        .unique(list(INVENTORY_SNAPSHOTS.key), keep="any")
        .sort(*STORE_PRODUCT, "occurred_at", "event_id")
        .with_columns(
            cumulative_shrinkage_units=pl.col("shrinkage").cum_sum().over(STORE_PRODUCT),
            days_since_previous_count=days(pl.col("occurred_at").diff().over(STORE_PRODUCT)),
        )
    )
    prices = frames["products"].select("product_id", "list_price", pl.col("currency").str.strip_chars().str.to_uppercase())
    priced = counts.join(prices, on="product_id", how="left").with_columns(order_date=pl.col("occurred_at").dt.date())
    rated = with_rates(priced, frames["rates"], context.base_currency)
    return rated.with_columns(
        shrinkage_value_base=to_base_currency(line_amounts(rated["shrinkage"], rated["list_price"]), rated["exchange_rate"])
    ).select(
        *STORE_PRODUCT,
        pl.col("occurred_at").alias("counted_at"),
        "event_id",
        pl.col("expected_on_hand").alias("expected_units"),
        pl.col("on_hand").alias("counted_units"),
        pl.col("shrinkage").alias("shrinkage_units"),
        "cumulative_shrinkage_units",
        "days_since_previous_count",
        "list_price",
        "currency",
        "shrinkage_value_base",
    )


_COUNTED = pl.col("event_type") == "stock_counted"

STEP = Step(
    target=INVENTORY_SHRINKAGE,
    reads={
        # only counts have a group: a change of other ledger rows affects nothing
        "ledger": Grouped(
            INVENTORY_SNAPSHOTS,
            keys=((pl.when(_COUNTED).then(pl.col("store_id")), pl.when(_COUNTED).then(pl.col("product_id"))),),
            columns=(*INVENTORY_SNAPSHOTS.key, "event_type", "on_hand", "expected_on_hand", "shrinkage"),
        ),
        "products": Broadcast(
            PRODUCTS,
            columns=("product_id", "list_price", "currency"),
            affects=rows_with("product_id"),
        ),
        "rates": Broadcast(EXCHANGE_RATES, affects=rows_priced_since(pl.col("counted_at").dt.date())),
    },
    transform=transform,
)
