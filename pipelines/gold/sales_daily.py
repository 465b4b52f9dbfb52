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
from pipelines.sales import line_revenue
from pipelines.settings import BusinessSettings
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.products import PRODUCTS

NO_COUNTRY = "ZZ"

SALES_DAILY = Table(
    "gold.sales_daily",
    doc="Sales per day, channel, store, country and product category, from the lines of all orders, exact to 0.0001 of the base "
    "currency. Nothing is left out: a line without store, country or category counts under "
    f"'{NO_STORE}', '{NO_COUNTRY}' (ISO 3166: unknown) or '{UNCATEGORISED}', "
    "a line without an exchange rate under unconverted_lines.",
    columns=(
        column("order_date", pa.date32(), "UTC day on which the order was placed.", required=True),
        column("channel", pa.string(), "web, pos, marketplace.", required=True),
        column("store_id", pa.string(), f"Store; '{NO_STORE}' for orders of no store.", required=True),
        column("country", pa.string(), f"Country, ISO 3166-1 alpha-2; '{NO_COUNTRY}' when unknown.", required=True),
        column("category", pa.string(), f"Product category today; '{UNCATEGORISED}' when there is none.", required=True),
        column(
            "orders",
            pa.int64(),
            "Orders, not cancelled, with a line here. An order with lines of two categories counts in both rows: "
            "count orders over categories in fact_orders.",
            required=True,
        ),
        column(
            "cancelled_orders",
            pa.int64(),
            "Cancelled orders with a line here; they add nothing to the other figures.",
            required=True,
        ),
        column("units", pa.int64(), "Units sold, returned units subtracted.", required=True),
        column("gross_revenue", MONEY, "Sum of the positive lines, base currency.", required=True),
        column("returns_revenue", MONEY, "What negative lines took off, as a positive amount, base currency.", required=True),
        column("net_revenue", MONEY, "gross_revenue - returns_revenue, base currency.", required=True),
        column("unconverted_lines", pa.int32(), "Lines left out of the revenue for want of an exchange rate.", required=True),
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
    """The touched days, added up."""
    categories = frames["products"].select("product_id", "category")
    sells = pl.col("counts_as_sale")
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
            pl.col("order_id").filter(sells).n_unique().cast(pl.Int64).alias("orders"),
            pl.col("order_id").filter(~sells).n_unique().cast(pl.Int64).alias("cancelled_orders"),
            pl.when(sells).then(pl.col("quantity").cast(pl.Int64)).sum().alias("units"),
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
