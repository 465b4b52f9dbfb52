"""silver.category_amounts: how many orders of what amount a category had in a month."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import Table, column
from ml.tables.order_entities import ORDER_ENTITIES
from pipelines.settings import BusinessSettings

CATEGORY_AMOUNTS = Table(
    "silver.category_amounts",
    doc="Orders and amounts per main category and calendar month (UTC): what an order of the month after is measured against. "
    "Whole months, so that an order that arrives late moves others only when it is late by a month's end.",
    columns=(
        column("category", pa.string(), "Main category of the orders.", required=True),
        column("month", pa.date32(), "First day of the month in which they were placed.", required=True),
        column("orders", pa.int64(), "Orders with a known amount.", required=True),
        column("amount", pa.int64(), "Their amounts, cents of the base currency.", required=True),
    ),
    key=("category", "month"),
    owner="risk",
    expectations=(within("orders", 0, None),),
)

MONTH = pl.col("placed_at").dt.month_start().dt.date()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Totals of the touched categories and months."""
    return totals(frames["orders"].unique("order_id"))


def totals(orders: pl.DataFrame) -> pl.DataFrame:
    """Totals per category and month of orders (each once)."""
    priced = orders.filter(pl.col("amount").is_not_null() & pl.col("category").is_not_null())
    return priced.group_by("category", MONTH.alias("month")).agg(
        pl.len().cast(pl.Int64).alias("orders"), pl.col("amount").sum().alias("amount")
    )


STEP = Step(
    target=CATEGORY_AMOUNTS,
    reads={
        "orders": Grouped(
            ORDER_ENTITIES, keys=((pl.col("category"), MONTH),), columns=("order_id", "placed_at", "category", "amount")
        )
    },
    transform=transform,
)
