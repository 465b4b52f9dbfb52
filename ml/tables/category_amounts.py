"""silver.category_amounts: number and amount of the orders per category and month."""

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
    doc="Orders and amounts per main category and calendar month (UTC), which orders of the following month are compared with. "
    "With whole months, a late order affects the features of others only if it arrives after the end of its month.",
    columns=(
        column("category", pa.string(), "Main category of the orders.", required=True),
        column("month", pa.date32(), "First day of the month in which they were placed.", required=True),
        column("orders", pa.int64(), "Orders with a known amount.", required=True),
        column("amount", pa.int64(), "Total amount of these orders, in cents of the base currency.", required=True),
    ),
    key=("category", "month"),
    owner="risk",
    expectations=(within("orders", 0, None),),
)

MONTH = pl.col("placed_at").dt.month_start().dt.date()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the totals of the affected categories and months."""
    return totals(frames["orders"].unique("order_id"))


def totals(orders: pl.DataFrame) -> pl.DataFrame:
    """Return the totals per category and month of distinct orders."""
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
