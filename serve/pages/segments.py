"""Distributions over all customers: RFM grids and cohort retention."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from datetime import date, datetime

import polars as pl

from pipelines.gold.customer_360 import FREQUENCY_BINS, MONETARY_BINS

RECENCY_BINS = (31, 91, 181, 366)
"""Days since the last purchase at which the recency bands 2, 3, 4, 5 start; 1 is the most recent."""
SCORES = (1, 2, 3, 4, 5)
RFM_READS = ("last_order_at", "frequency_score", "monetary_score")
RETENTION_READS = ("cohort_month", "months_since", "customers", "active_customers", "retention")


@dataclass(frozen=True)
class RfmSegments:
    """The number of customers with a purchase per cell; empty cells are absent.

    recency    by (recency band, frequency score)
    monetary   by (monetary score, frequency score)
    customers  customers with a purchase
    without    customers without a purchase
    """

    recency: dict[tuple[int, int], int]
    monetary: dict[tuple[int, int], int]
    customers: int
    without: int


@dataclass(frozen=True)
class Cohort:
    """The customers who first bought in a month. retention: active customers and their share (0 to 1) by month since then."""

    month: date
    customers: int
    retention: tuple[tuple[int, float], ...]


def recency_band(days: float) -> int:
    """Return the recency band, 1 (most recent) to 5."""
    return bisect_right(RECENCY_BINS, int(days)) + 1


def rfm(customers: pl.DataFrame, now: datetime) -> RfmSegments:
    """Return the RFM grids. customers: rows of gold.customer_360 with RFM_READS."""
    buyers = customers.filter(pl.col("frequency_score").is_not_null())
    days = (pl.lit(now).dt.cast_time_unit("us") - pl.col("last_order_at")).dt.total_days().clip(lower_bound=0)
    banded = buyers.with_columns(
        sum(((days >= first).cast(pl.Int32) for first in RECENCY_BINS), start=pl.lit(1, dtype=pl.Int32)).alias("recency_band")
    )

    def cells(rows: str) -> dict[tuple[int, int], int]:
        counts = banded.group_by(rows, "frequency_score").len()
        return {(row, column): count for row, column, count in counts.iter_rows()}

    return RfmSegments(cells("recency_band"), cells("monetary_score"), buyers.height, customers.height - buyers.height)


def cohorts(rows: pl.DataFrame) -> list[Cohort]:
    """Return the cohorts, newest first. rows: of gold.cohort_retention with RETENTION_READS."""
    found = []
    for (month,), frame in rows.sort("months_since").group_by("cohort_month", maintain_order=True):
        retention = tuple(frame.select("active_customers", "retention").iter_rows())
        assert isinstance(month, date)
        found.append(Cohort(month, frame["customers"][0], retention))
    return sorted(found, key=lambda cohort: cohort.month, reverse=True)


def band_names(bins: tuple[int, ...], lowest: int) -> tuple[str, ...]:
    """Return the names of bands of integers, such as '1', '2–3', '4+' for bins (2, 4) and lowest 1."""
    bounds = tuple(zip((lowest, *bins), bins, strict=False))
    names = tuple(f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}" for low, high in bounds)
    return (*names, f"{bins[-1]:,}+")


FREQUENCY_NAMES = band_names(FREQUENCY_BINS, 1)
MONETARY_NAMES = (f"under {MONETARY_BINS[0]:,}", *band_names(MONETARY_BINS, 0)[1:])
RECENCY_NAMES = band_names(RECENCY_BINS, 0)
