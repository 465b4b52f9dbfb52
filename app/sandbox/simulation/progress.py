"""The state that a simulation keeps between two steps, and how orders are spread over time."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from random import Random

MINUTE, HOUR = 60_000, 3_600_000
EPOCH = date(1970, 1, 1)
LAST_DAY = (date(2026, 1, 31) - EPOCH).days
HOURS = (2, 1, 1, 1, 1, 2, 4, 6, 8, 10, 11, 12, 12, 11, 10, 10, 11, 12, 14, 16, 16, 13, 9, 5)
MONTHS = (0.85, 0.82, 0.92, 0.95, 0.98, 1.0, 0.96, 0.94, 0.98, 1.04, 1.28, 1.35)
WEEKDAYS = (0.92, 0.90, 0.92, 0.96, 1.08, 1.18, 1.04)
"""Orders by hour of the day, month and weekday, relative to each other."""
PEAK_DAYS = ((11, 11), (12, 12))
_CUMULATIVE_HOURS = tuple(sum(HOURS[: hour + 1]) for hour in range(24))


@dataclass(kw_only=True)
class ShopProgress:
    """Everything that the simulation keeps between two steps. Days count from 1970, times are milliseconds since then."""

    seed: int
    base_currency: str
    per_day: float
    first_day: int
    today: int
    new_things_from: int
    """The day from which the sources have a new column and new kinds of events."""
    live_from: int
    """The time from which changes are written as UPDATE, DELETE or replaced document."""
    orders: int = 0
    orders_planned: float = 0.0
    postgres_orders: int = 0
    marketplace_orders: int = 0
    chargebacks: int = 0
    sessions: int = 0
    purchases: int = 0
    rings: int = 0
    ring_accounts: int = 0
    order: int = 0
    """The number of actions scheduled so far: the order of actions at the same time."""
    old_people: int = 0
    """Customers who joined before the first day."""
    steps: int = 0
    people_by_day: list[int] = field(default_factory=list)
    """The number of customers: before the first day, then at the end of each day."""
    added_columns: dict[str, list[str]] = field(default_factory=dict)


def day_weight(day: int) -> float:
    """Return the expected orders of a day relative to an average day."""
    when = as_date(day)
    peak = 1.9 if (when.month, when.day) in PEAK_DAYS else 1.0
    return WEEKDAYS[when.weekday()] * MONTHS[when.month - 1] * peak


def as_date(day: int) -> date:
    """Return the date of a day since 1970."""
    return date.fromordinal(day + EPOCH.toordinal())


def sql_time(time: int) -> str:
    """Return a time as PostgreSQL reads it."""
    return datetime.fromtimestamp(time // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.") + f"{time % 1000:03d}+00"


def iso_time(time: int) -> str:
    """Return a time in ISO 8601."""
    return datetime.fromtimestamp(time // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time % 1000:03d}Z"


def draw_time(random: Random, start: int) -> int:
    """Return a time of the day that starts at `start`; busy hours are more likely."""
    hour = bisect.bisect_right(_CUMULATIVE_HOURS, random.random() * _CUMULATIVE_HOURS[-1])
    return start + hour * HOUR + random.randrange(HOUR)


def draw_poisson(random: Random, mean: float) -> int:
    """Return a Poisson-distributed count; for large means from the normal distribution."""
    if mean <= 0:
        return 0
    if mean > 30:
        return max(0, round(random.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, random.random()
    while product > limit:
        product *= random.random()
        count += 1
    return count
