"""gold.cohort_retention: share of each month's new customers who bought again, month by month."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import MONEY, Table, column
from pipelines.parsing.amounts import AMOUNT
from pipelines.sales import ZERO, is_cancelled, is_purchase
from pipelines.settings import BusinessSettings
from pipelines.silver.orders_unified import ORDERS_UNIFIED

ALL_COHORTS = "all"

COHORT_RETENTION = Table(
    "gold.cohort_retention",
    doc="Customers grouped by the month of their first purchase (their cohort), and how many of them bought again in each later "
    "month. A purchase is an order that is neither cancelled nor a credit note. Each cohort has one row per month up to the "
    "newest month with a purchase; a month without a purchase of the cohort is a row with 0. Anonymous sales belong to no "
    "cohort.",
    columns=(
        column(
            "scope",
            pa.string(),
            f"Always '{ALL_COHORTS}': one order can move a customer from any cohort to any other, "
            "so all cohorts are recomputed together.",
            required=True,
        ),
        column("cohort_month", pa.date32(), "First day of the month of the first purchase.", required=True),
        column("months_since", pa.int32(), "Months since cohort_month; 0 is cohort_month itself.", required=True),
        column("customers", pa.int64(), "Customers (master users) in the cohort.", required=True),
        column("active_customers", pa.int64(), "Customers of the cohort with a purchase in the month.", required=True),
        column("retention", pa.float64(), "active_customers / customers, 0 to 1.", required=True),
        column("orders", pa.int64(), "Purchases of the cohort in the month.", required=True),
        column(
            "order_value",
            MONEY,
            "Sum of the order totals in the month, in the base currency: cancelled orders excluded, credit notes subtracted. "
            "Returns that are booked as order lines are not subtracted; for revenue after returns see customer_360.",
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
    """Return all cohorts."""
    monthly = _monthly_purchases(frames["orders"])
    active = monthly.filter(pl.col("orders") > 0)
    first_months = active.group_by("master_user_id").agg(pl.col("month").min().alias("cohort"))
    activity = _activity(monthly, first_months)
    return (
        _cohort_months(first_months, newest=active["month"].max())
        .join(activity, on=["cohort", "months_since"], how="left")
        .with_columns(
            pl.lit(ALL_COHORTS).alias("scope"),
            pl.date(pl.col("cohort") // 12, pl.col("cohort") % 12 + 1, 1).alias("cohort_month"),
            pl.col("active_customers", "orders").fill_null(0),
            pl.col("order_value").fill_null(ZERO),
        )
        .with_columns((pl.col("active_customers") / pl.col("customers")).alias("retention"))
        .select(COHORT_RETENTION.schema.names)
        .sort(COHORT_RETENTION.key)
    )


def _monthly_purchases(orders: pl.DataFrame) -> pl.DataFrame:
    """Return purchases and order value per customer and month. Months are counted from year 0."""
    date = pl.col("order_date").dt
    month = (date.year() * 12 + date.month().cast(pl.Int32) - 1).alias("month")
    return (
        orders.filter(pl.col("master_user_id").is_not_null() & ~is_cancelled())
        .group_by("master_user_id", month)
        .agg(
            is_purchase().sum().cast(pl.Int64).alias("orders"),
            pl.col("total_base").sum().cast(AMOUNT).alias("order_value"),
        )
    )


def _activity(monthly: pl.DataFrame, first_months: pl.DataFrame) -> pl.DataFrame:
    """Return active customers, orders and order value per cohort and month since."""
    months_since = (pl.col("month") - pl.col("cohort")).cast(pl.Int32).alias("months_since")
    return (
        monthly.join(first_months, on="master_user_id")
        .filter(pl.col("month") >= pl.col("cohort"))
        .group_by("cohort", months_since)
        .agg(
            (pl.col("orders") > 0).sum().cast(pl.Int64).alias("active_customers"),
            pl.col("orders").sum(),
            pl.col("order_value").sum().cast(AMOUNT),
        )
    )


def _cohort_months(first_months: pl.DataFrame, newest: object) -> pl.DataFrame:
    """Return cohort, customers and one row per month from the cohort's own to the newest month with a purchase."""
    sizes = first_months.group_by("cohort").agg(pl.len().cast(pl.Int64).alias("customers"))
    months = pl.int_ranges(0, pl.lit(newest, dtype=pl.Int32) - pl.col("cohort") + 1, dtype=pl.Int32)
    return sizes.with_columns(months.alias("months_since")).explode("months_since")


STEP = Step(
    target=COHORT_RETENTION,
    reads={
        "orders": Grouped(
            ORDERS_UNIFIED,
            # not a bare literal, which would be one value however many rows there are
            keys=((pl.when(pl.col("order_date").is_not_null()).then(pl.lit(ALL_COHORTS)),),),
            columns=("master_user_id", "order_date", "status", "total_amount", "total_base"),
        )
    },
    transform=transform,
)
