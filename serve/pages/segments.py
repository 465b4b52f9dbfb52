"""How all customers are spread: by recency, frequency and monetary value, and by how long the cohorts stay."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from datetime import date, datetime

import polars as pl

from pipelines.gold.customer_360 import FREQUENCY_BINS, MONETARY_BINS

RECENCY_BINS = (31, 91, 181, 366)
"""Days since the last purchase from which on the recency band is 2, 3, 4, 5; 1 is the most recent."""
SCORES = (1, 2, 3, 4, 5)
RFM_READS = ("last_order_at", "frequency_score", "monetary_score")
RETENTION_READS = ("cohort_month", "months_since", "customers", "active_customers", "retention")


@dataclass(frozen=True)
class RfmSegments:
    """How many customers with a purchase are in each cell; a cell that is not there has none.

    recency    by (recency band, frequency score)
    monetary   by (monetary score, frequency score)
    customers  with a purchase; without: those that have none
    """

    recency: dict[tuple[int, int], int]
    monetary: dict[tuple[int, int], int]
    customers: int
    without: int


@dataclass(frozen=True)
class Cohort:
    """The customers of a month and, by months since, how many bought and which share of the cohort (0 to 1) that is."""

    month: date
    customers: int
    retention: tuple[tuple[int, float], ...]


def recency_band(days: float) -> int:
    """1 (most recent) to 5."""
    return bisect_right(RECENCY_BINS, int(days)) + 1


def rfm(customers: pl.DataFrame, now: datetime) -> RfmSegments:
    """The grid, from rows of gold.customer_360 (RFM_READS)."""
    bought = customers.filter(pl.col("frequency_score").is_not_null())
    days = (pl.lit(now).dt.cast_time_unit("us") - pl.col("last_order_at")).dt.total_days().clip(lower_bound=0)
    counted = bought.with_columns(
        sum(((days >= first).cast(pl.Int32) for first in RECENCY_BINS), start=pl.lit(1, dtype=pl.Int32)).alias("recency_band")
    )

    def cells(rows: str) -> dict[tuple[int, int], int]:
        found = counted.group_by(rows, "frequency_score").len()
        return {(row, column): count for row, column, count in found.iter_rows()}

    return RfmSegments(cells("recency_band"), cells("monetary_score"), bought.height, customers.height - bought.height)


def cohorts(rows: pl.DataFrame) -> list[Cohort]:
    """Cohorts, newest first, from rows of gold.cohort_retention (RETENTION_READS)."""
    found = []
    for (month,), frame in rows.sort("months_since").group_by("cohort_month", maintain_order=True):
        figures = tuple(frame.select("active_customers", "retention").iter_rows())
        assert isinstance(month, date)
        found.append(Cohort(month, frame["customers"][0], figures))
    return sorted(found, key=lambda cohort: cohort.month, reverse=True)


def band_names(bins: tuple[int, ...], least: int) -> tuple[str, ...]:
    """Names of the bands between whole numbers: (2, 4) from 1 -> '1', '2–3', '4+'."""
    ends = tuple(zip((least, *bins), bins, strict=False))
    between = tuple(f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}" for low, high in ends)
    return (*between, f"{bins[-1]:,}+")


FREQUENCY_NAMES = band_names(FREQUENCY_BINS, 1)
MONETARY_NAMES = (f"under {MONETARY_BINS[0]:,}", *band_names(MONETARY_BINS, 0)[1:])
RECENCY_NAMES = band_names(RECENCY_BINS, 0)
