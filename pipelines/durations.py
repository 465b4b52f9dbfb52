"""Durations in days."""

from __future__ import annotations

import polars as pl

MICROSECONDS_PER_DAY = 86_400_000_000

_DAYS_PER_MICROSECOND = 1 / MICROSECONDS_PER_DAY
"""A factor, since polars divides by a literal in two ways, depending on the number of rows."""


def days(duration: pl.Expr) -> pl.Expr:
    """Return a duration in days, as a float."""
    return duration.dt.total_microseconds() * _DAYS_PER_MICROSECOND
