"""gold.cohort_retention: how many of the customers won in a month came back, month by month."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import MONEY as MONEY_TYPE
from lakehouse.table import Table, column
from pipelines.sales import MONEY, NOTHING, is_cancelled, is_purchase
from pipelines.settings import BusinessSettings
from pipelines.silver.orders_unified import ORDERS_UNIFIED

ALL = "all"

COHORT_RETENTION = Table(
    "gold.cohort_retention",
    doc="Customers by the month of their first purchase (their cohort), and how many of them bought again so many months later. "
    "A purchase is an order that is neither cancelled nor a credit note. Each cohort has a row for every month up to the newest "
    "month with a purchase; a month in which nobody came back is a row with 0. Anonymous sales belong to no cohort.",
    columns=(
        column(
            "scope",
            pa.string(),
            f"Always '{ALL}': a first purchase anywhere can move a customer between any two cohorts, "
            "so that all cohorts are recomputed together.",
            required=True,
        ),
        column("cohort_month", pa.date32(), "First day of the month of the first purchase.", required=True),
        column("months_since", pa.int32(), "Months since cohort_month; 0 is that month itself.", required=True),
        column("customers", pa.int64(), "Customers of the cohort (master users).", required=True),
        column("active_customers", pa.int64(), "Those of them with a purchase in the month.", required=True),
        column("retention", pa.float64(), "active_customers / customers, 0 to 1.", required=True),
        column("orders", pa.int64(), "Purchases in the month.", required=True),
        column(
            "order_value",
            MONEY_TYPE,
            "Sum of the totals of orders in the month that are not cancelled, credit notes subtracted, in the "
            "base currency. These are the orders' own totals, before returns that only show as lines: see customer_360 for "
            "revenue after them.",
            required=True,
        ),
    ),
    key=("scope", "cohort_month", "months_since"),
    group=("scope",),
    owner="customer",
    expectations=(
        within("months_since", 0, None),
        within("retention", 0, 1),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """All cohorts."""
    month = pl.col("order_date").dt
    number = (month.year() * 12 + month.month().cast(pl.Int32) - 1).alias("month")
    monthly = (
        frames["orders"]
        .filter(pl.col("master_user_id").is_not_null() & ~is_cancelled())
        .group_by("master_user_id", number)
        .agg(
            is_purchase().sum().cast(pl.Int64).alias("orders"),
            pl.col("total_base").sum().cast(MONEY).alias("order_value"),
        )
    )
    bought = monthly.filter(pl.col("orders") > 0)
    first = bought.group_by("master_user_id").agg(pl.col("month").min().alias("cohort"))
    sizes = first.group_by("cohort").agg(pl.len().cast(pl.Int64).alias("customers"))
    newest = bought["month"].max()
    since = (pl.col("month") - pl.col("cohort")).cast(pl.Int32).alias("months_since")
    figures = (
        monthly.join(first, on="master_user_id")
        .filter(pl.col("month") >= pl.col("cohort"))
        .group_by("cohort", since)
        .agg(
            (pl.col("orders") > 0).sum().cast(pl.Int64).alias("active_customers"),
            pl.col("orders").sum(),
            pl.col("order_value").sum().cast(MONEY),
        )
    )
    every_month = sizes.with_columns(
        pl.int_ranges(0, pl.lit(newest, dtype=pl.Int32) - pl.col("cohort") + 1, dtype=pl.Int32).alias("months_since")
    ).explode("months_since")
    return (
        every_month.join(figures, on=["cohort", "months_since"], how="left")
        .with_columns(
            pl.lit(ALL).alias("scope"),
            pl.date(pl.col("cohort") // 12, pl.col("cohort") % 12 + 1, 1).alias("cohort_month"),
            pl.col("active_customers", "orders").fill_null(0),
            pl.col("order_value").fill_null(NOTHING),
        )
        .with_columns((pl.col("active_customers") / pl.col("customers")).alias("retention"))
        .select(COHORT_RETENTION.schema.names)
        .sort(COHORT_RETENTION.key)
    )


STEP = Step(
    target=COHORT_RETENTION,
    reads={
        "orders": Grouped(
            ORDERS_UNIFIED,
            # not a bare literal, which would be one value however many rows there are
            keys=((pl.when(pl.col("order_date").is_not_null()).then(pl.lit(ALL)),),),
            columns=("master_user_id", "order_date", "status", "total_amount", "total_base"),
        )
    },
    transform=transform,
)
