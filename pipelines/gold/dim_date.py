"""gold.dim_date: the calendar of every year that has an order."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import Table, column
from pipelines.settings import BusinessSettings
from pipelines.silver.orders_unified import ORDERS_UNIFIED

DIM_DATE = Table(
    "gold.dim_date",
    doc="Every day of each year that has an order. Years are complete: a day without sales has a row too.",
    columns=(
        column("date", pa.date32(), "The day, UTC.", required=True),
        column("date_key", pa.int32(), "The day as yyyymmdd; fact_orders.date_key refers to it.", required=True),
        column("year", pa.int32(), "Calendar year.", required=True),
        column("quarter", pa.int32(), "Quarter, 1 to 4.", required=True),
        column("month", pa.int32(), "Month, 1 to 12.", required=True),
        column("month_name", pa.string(), "English name of the month.", required=True),
        column("month_start", pa.date32(), "First day of the month.", required=True),
        column("day_of_month", pa.int32(), "Day of the month, 1 to 31.", required=True),
        column("day_of_year", pa.int32(), "Day of the year, 1 to 366.", required=True),
        column("day_of_week", pa.int32(), "ISO day of the week, 1 (Monday) to 7 (Sunday).", required=True),
        column("day_name", pa.string(), "English name of the day of the week.", required=True),
        column("iso_year", pa.int32(), "Year of the ISO week; differs from `year` around New Year.", required=True),
        column("iso_week", pa.int32(), "ISO week, 1 to 53.", required=True),
        column("is_weekend", pa.bool_(), "Whether the day is a Saturday or Sunday.", required=True),
    ),
    key=("year", "date"),
    group=("year",),
    owner="data platform",
    expectations=(
        within("month", 1, 12),
        within("day_of_month", 1, 31),
        within("day_of_week", 1, 7),
        within("iso_week", 1, 53),
    ),
)

MONTH_NAMES = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DAY_NAMES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def date_key(name: str) -> pl.Expr:
    """Return a date column as the integer yyyymmdd."""
    day = pl.col(name).dt
    return (day.year() * 10000 + day.month().cast(pl.Int32) * 100 + day.day().cast(pl.Int32)).alias("date_key")


def name_at(position: pl.Expr, names: tuple[str, ...]) -> pl.Expr:
    """Return the name at a position counted from 1. strftime would depend on the machine's locale."""
    return position.cast(pl.Int32).replace_strict(range(1, len(names) + 1), list(names), return_dtype=pl.String)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return all days of the years of the given orders."""
    years = frames["orders"].select(pl.col("order_date").dt.year().alias("year")).drop_nulls().unique().sort("year")
    first, last = pl.date(pl.col("year"), 1, 1), pl.date(pl.col("year"), 12, 31)
    day = pl.col("date").dt
    return (
        years.select(pl.date_ranges(first, last).alias("date"))
        .explode("date")
        .with_columns(
            date_key("date"),
            day.year().alias("year"),
            day.quarter().alias("quarter"),
            day.month().alias("month"),
            name_at(day.month(), MONTH_NAMES).alias("month_name"),
            day.truncate("1mo").alias("month_start"),
            day.day().alias("day_of_month"),
            day.ordinal_day().alias("day_of_year"),
            day.weekday().alias("day_of_week"),
            name_at(day.weekday(), DAY_NAMES).alias("day_name"),
            day.iso_year().alias("iso_year"),
            day.week().alias("iso_week"),
            (day.weekday() >= 6).alias("is_weekend"),
        )
        .select(DIM_DATE.schema.names)
    )


STEP = Step(
    target=DIM_DATE,
    reads={"orders": Grouped(ORDERS_UNIFIED, keys=((pl.col("order_date").dt.year(),),), columns=("order_date",))},
    transform=transform,
)
