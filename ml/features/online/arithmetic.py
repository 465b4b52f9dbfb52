"""Scalar arithmetic with exactly the results of the array operations in `ml/features/windows.py`."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from ml.features.windows import MICROSECOND

NAN = math.nan
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Value = float | str | None
"""Value of a feature: NaN where `compute` has null."""


def quotient(numerator: float, denominator: float) -> float:
    """Return numerator / denominator; NaN if the denominator is not positive."""
    return numerator / denominator if denominator > 0 else NAN


def wrap_int64(number: int) -> int:
    """Return an integer as 64 bits store it: wrapped around on overflow."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def to_microseconds(time: datetime) -> int:
    """Return a time as microseconds since 1970."""
    return (time - EPOCH) // MICROSECOND
