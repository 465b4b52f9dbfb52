"""gold.sales_daily: sales per day, channel, store, country and category, in the base currency."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, fresh, row_count_drift, within
from lakehouse.step import Broadcast, Grouped, Step
from lakehouse.table import MONEY, Table, column, references, year
from pipelines.affected_rows import rows_with
from pipelines.gold.dim_date import DIM_DATE
from pipelines.gold.dim_products import UNCATEGORISED
from pipelines.gold.dim_stores import DIM_STORES, NO_STORE
from pipelines.sales import line_revenue, units_sold
from pipelines.settings import BusinessSettings
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.products import PRODUCTS

NO_COUNTRY = "ZZ"

SALES_DAILY = Table(
    "gold.sales_daily",
    doc="Sales per day, channel, store, country and product category, from the lines of all orders, exact to 0.0001 of the base "
    "currency. Every line is included: a line without store, country or category is counted under "
    f"'{NO_STORE}', '{NO_COUNTRY}' (ISO 3166: unknown) or '{UNCATEGORISED}', "
    "a line without an exchange rate in unconverted_lines.",
    columns=(
        column("order_date", pa.date32(), "Day on which the orders were placed (UTC).", required=True),
        column("channel", pa.string(), "Sales channel: web, pos or marketplace.", required=True),
        column("store_id", pa.string(), f"Store id; '{NO_STORE}' for orders without a store.", required=True),
        column(
            "country", pa.string(), f"Country of the sale, ISO 3166-1 alpha-2 code; '{NO_COUNTRY}' when unknown.", required=True
        ),
        column("category", pa.string(), f"Current category of the product; '{UNCATEGORISED}' when it has none.", required=True),
        column(
            "orders",
            pa.int64(),
            "Orders that are not cancelled and have a line in this row. An order with lines of two categories is counted in both "
            "rows: to count orders across categories, use fact_orders.",
            required=True,
        ),
        column(
            "cancelled_orders",
            pa.int64(),
            "Cancelled orders with a line in this row; no other column includes them, except unconverted_lines.",
            required=True,
        ),
        column("units", pa.int64(), "Pieces sold, returned pieces subtracted.", required=True),
        column("gross_revenue", MONEY, "Sum of the positive lines, base currency.", required=True),
        column("returns_revenue", MONEY, "Sum of the negative lines as a positive amount, base currency.", required=True),
        column("net_revenue", MONEY, "gross_revenue - returns_revenue, base currency.", required=True),
        column(
            "unconverted_lines",
            pa.int32(),
            "Order lines excluded from revenue because their exchange rate is unknown.",
            required=True,
        ),
    ),
    key=("order_date", "channel", "store_id", "country", "category"),
    group=("order_date",),
    partition_by=(year("order_date"),),
    sort_by=("order_date",),
    references=(
        references("order_date", DIM_DATE, to="date"),
        references("store_id", DIM_STORES),
    ),
    owner="commerce",
    expectations=(
        within("orders", 0, None),
        within("gross_revenue", 0, None),
        within("returns_revenue", 0, None),
        accepted("channel", {"web", "pos", "marketplace"}, severity="warn"),
        fresh("order_date", hours=48),
        row_count_drift(0.5),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the sums of the affected days."""
    categories = frames["products"].select("product_id", "category")
    is_sale = pl.col("counts_as_sale")
    return (
        frames["lines"]
        .join(categories, on="product_id", how="left")
        .with_columns(
            pl.col("store_id").fill_null(NO_STORE),
            pl.col("country").fill_null(NO_COUNTRY),
            pl.col("category").fill_null(UNCATEGORISED),
        )
        .group_by(SALES_DAILY.key)
        .agg(
            pl.col("order_id").filter(is_sale).n_unique().cast(pl.Int64).alias("orders"),
            pl.col("order_id").filter(~is_sale).n_unique().cast(pl.Int64).alias("cancelled_orders"),
            units_sold(),
            *line_revenue(),
        )
        .select(SALES_DAILY.schema.names)
        .sort(SALES_DAILY.key)
    )


STEP = Step(
    target=SALES_DAILY,
    reads={
        "lines": Grouped(
            ORDER_ITEMS_UNIFIED,
            keys=((pl.col("order_date"),),),
            columns=(
                "order_date",
                "channel",
                "store_id",
                "country",
                "product_id",
                "order_id",
                "quantity",
                "net_base",
                "counts_as_sale",
            ),
        ),
        "products": Broadcast(
            PRODUCTS,
            columns=("product_id", "category"),
            affects=rows_with("product_id"),
            through=ORDER_ITEMS_UNIFIED,
            affected_keys=(pl.col("order_date"),),
        ),
    },
    transform=transform,
)
