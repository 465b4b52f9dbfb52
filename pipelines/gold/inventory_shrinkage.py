"""gold.inventory_shrinkage: what each stock count found missing, and what it was worth."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift, within
from lakehouse.step import Broadcast, Grouped, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column, references
from pipelines.affected_rows import rows_with
from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.parsing.amounts import line_amounts, to_base_currency
from pipelines.settings import BusinessSettings
from pipelines.silver.exchange_rates import EXCHANGE_RATES, with_rates
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS, STORE_PRODUCT
from pipelines.silver.products import PRODUCTS

INVENTORY_SHRINKAGE = Table(
    "gold.inventory_shrinkage",
    doc="One row per stock count: what should have been there, what was, and the difference at today's list price. "
    "Known losses (adjustments for theft or damage) lower what a count expects, so they are no shrinkage.",
    columns=(
        column("store_id", pa.string(), "Store or warehouse.", required=True),
        column("product_id", pa.string(), "Product.", required=True),
        column("counted_at", TIMESTAMP, "When it was counted.", required=True),
        column("event_id", pa.string(), "The event of the count.", required=True),
        column("expected_units", pa.int64(), "Units that should have been there.", required=True),
        column("counted_units", pa.int64(), "Units that were there.", required=True),
        column("shrinkage_units", pa.int64(), "expected_units - counted_units; negative when more was found.", required=True),
        column("cumulative_shrinkage_units", pa.int64(), "Shrinkage of this and all earlier counts of the pair.", required=True),
        column("days_since_previous_count", pa.float64(), "Days since the count before; null for the first."),
        column("list_price", pa.decimal128(18, 2), "List price of the product now, in `currency`; null when it is unknown."),
        column("currency", pa.string(), "Currency of the list price."),
        column("shrinkage_value_base", MONEY, "Shrinkage at list price in the base currency (rate of that day); null: unknown."),
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


DAYS_PER_MICROSECOND = 1 / 86_400_000_000
"""To multiply by: polars divides by a literal in two ways, depending on the number of rows."""


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The counts of the touched stores and products, in order, with their worth."""
    counts = (
        frames["ledger"]
        .filter(pl.col("event_type") == "stock_counted")
        .unique(list(INVENTORY_SNAPSHOTS.key), keep="any")
        .sort(*STORE_PRODUCT, "occurred_at", "event_id")
        .with_columns(
            cumulative_shrinkage_units=pl.col("shrinkage").cum_sum().over(STORE_PRODUCT),
            days_since_previous_count=pl.col("occurred_at").diff().over(STORE_PRODUCT).dt.total_microseconds()
            * DAYS_PER_MICROSECOND,
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


def _of_rates(changed: pl.DataFrame) -> pl.Expr:
    """Counts valued in a currency whose rate of their day, or of a day before, changed."""
    first = changed.drop_nulls(["currency", "rate_date"]).group_by("currency").agg(pl.col("rate_date").min()).sort("currency")
    counted_on = pl.col("counted_at").dt.date()
    hits = [(pl.col("currency") == code) & (counted_on >= day) for code, day in first.select("currency", "rate_date").rows()]
    return pl.any_horizontal(hits) if hits else pl.lit(False)


_COUNTED = pl.col("event_type") == "stock_counted"

STEP = Step(
    target=INVENTORY_SHRINKAGE,
    reads={
        # no group for other rows of the ledger: they say nothing here, and need not be read
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
        "rates": Broadcast(EXCHANGE_RATES, affects=_of_rates),
    },
    transform=transform,
)
