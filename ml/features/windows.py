"""Counts, sums and means over the histories of entities within time windows, exact to the bit.

All results come from prefix sums of integers and binary searches, so the values of a row depend only on the earlier rows of
its own entity, never on which other rows are computed with it. For the same reason every division is a single IEEE operation
on exact operands. Times are microseconds since 1970, amounts are cents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MICROSECOND = timedelta(microseconds=1)
MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
NEVER = 2**62
"""A time later than all others: when something that never happened was reported."""


def microseconds(times: pl.Series, missing: int = NEVER) -> Ints:
    """Return times as integer microseconds since 1970; `missing` for null."""
    return times.dt.cast_time_unit("us").cast(pl.Int64).fill_null(missing).to_numpy().astype(np.int64)


def codes(*columns: pl.Series) -> list[Ints]:
    """Return an integer code per value, equal for equal texts in all columns, -1 for null. The codes have no meaning or order."""
    texts = pl.concat([column.cast(pl.String).alias("value") for column in columns])
    numbers = texts.cast(pl.Categorical).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    return np.split(numbers, np.cumsum([len(column) for column in columns])[:-1]) if len(columns) > 1 else [numbers]


def sums_before(values: npt.NDArray[Any]) -> Ints:
    """Return the prefix sums: sums[i] is the sum of the first i values. Sums may overflow; their differences stay exact."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def quotient(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Floats:
    """Return numerator / denominator; NaN where the denominator is not positive."""
    top, bottom = numerator.astype(np.float64), denominator.astype(np.float64)
    positive = bottom > 0
    return np.where(positive, top / np.where(positive, bottom, 1.0), np.nan)


def occurrences(*keys: Ints) -> Ints:
    """Return for each row how many earlier rows have the same keys."""
    if len(keys[0]) == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort(keys[::-1])
    changes = np.zeros(len(order), dtype=np.bool_)
    changes[0] = True
    for key in keys:
        changes[1:] |= np.diff(key[order]) != 0
    place = np.arange(len(order))
    result = np.empty(len(order), dtype=np.int64)
    result[order] = place - np.maximum.accumulate(np.where(changes, place, 0))
    return result


def range_max(values: Floats, start: Ints, stop: Ints) -> Floats:
    """Return the maximum of values[start:stop] per pair of bounds; NaN for an empty range."""
    length = stop - start
    result = np.full(len(start), np.nan)
    level, span = values, 1
    while len(level) and np.any(length >= span):
        chosen = np.flatnonzero((length >= span) & (length < 2 * span))
        result[chosen] = np.fmax(level[start[chosen]], level[stop[chosen] - span])
        level, span = np.fmax(level[:-span], level[span:]) if len(level) > span else level[:0], 2 * span
    return result


def first_below(values: Ints, start: Ints, stop: Ints, limit: Ints) -> Ints:
    """Return per (start, stop, limit) the first index in [start, stop) whose value is below the limit; stop if there is none."""
    if len(values) == 0:
        return stop
    levels, span = [values], 1
    while 2 * span <= len(values):
        levels.append(np.minimum(levels[-1][:-span], levels[-1][span:]))
        span *= 2
    place = start
    for least in reversed(levels):
        # the number of skipped values is a sum of decreasing powers of two
        skipped = (place + span <= stop) & (least[np.minimum(place, len(least) - 1)] >= limit)
        place, span = place + span * skipped, span // 2
    return place


@dataclass(frozen=True)
class SortedTimes:
    """Times of entities' rows, sorted by (entity, time), for counting the rows before a time."""

    code: Ints
    time: Ints

    @cached_property
    def times(self) -> Ints:
        """All times of all entities, sorted."""
        return np.sort(self.time)

    @cached_property
    def _places(self) -> Ints:
        return self.code * (len(self.time) + 1) + np.searchsorted(self.times, self.time, side="left")

    def before(self, code: Ints, time: Ints) -> Ints:
        """Return per (entity, time) the number of rows of smaller entities, and of this entity before the time."""
        return np.searchsorted(self._places, code * (len(self.time) + 1) + np.searchsorted(self.times, time, side="left"))

    @staticmethod
    def of(code: Ints, time: Ints) -> tuple[SortedTimes, Ints]:
        """Sort the times of rows in any order; return also the sorting permutation, which is stable."""
        order = np.lexsort((time, code))
        return SortedTimes(code[order], time[order]), order


class Timeline:
    """The orders of the entities of one kind, sorted by entity and (placed_at, order_id).

    The methods return one value per requested row that has an entity; `chosen` has the numbers of these rows.
    """

    def __init__(self, *, code: Ints, placed: Ints, amount: Ints, priced: Flags, reported: Ints, requested: Flags) -> None:
        """Take the columns of all orders, sorted by (placed_at, order_id).

        code: the entity, -1 for none; priced: whether the amount is known; reported: when it was reported as fraud, or NEVER."""
        present = np.flatnonzero(code >= 0)
        order = present[np.argsort(code[present], kind="stable")]
        self.order = order
        self.code, self.placed, self.amount, self.reported = code[order], placed[order], amount[order], reported[order]
        self.priced = priced[order]
        self.at = np.flatnonzero(requested[order])
        self.chosen = order[self.at]
        self.entity, self.now = self.code[self.at], self.placed[self.at]
        self.times = SortedTimes(self.code, self.placed)
        self.first_of_row = np.searchsorted(self.code, self.code, side="left")
        self._amounts, self._prices = sums_before(self.amount), sums_before(self.priced)

    @property
    def first(self) -> Ints:
        """The index of the first order of each entity."""
        return self.first_of_row[self.at]

    def since(self, window: int, *, until: int = 0) -> tuple[Ints, Ints]:
        """Return start and stop index of the entity's earlier orders in [now - until - window, now - until)."""
        start = self.times.before(self.entity, self.now - (until + window))
        return start, self.at if until == 0 else self.times.before(self.entity, self.now - until)

    def amounts(self, start: Ints, stop: Ints) -> Ints:
        """Return the total amount of the orders in [start, stop), in cents."""
        return self._amounts[stop] - self._amounts[start]

    def prices(self, start: Ints, stop: Ints) -> Ints:
        """Return how many of the orders in [start, stop) have a known amount."""
        return self._prices[stop] - self._prices[start]

    @cached_property
    def earlier(self) -> Ints:
        """The number of earlier orders of the entity."""
        return self.at - self.first

    @cached_property
    def means(self) -> tuple[Floats, Floats]:
        """Mean and sample standard deviation of the entity's earlier amounts, in cents, for every sorted row."""
        count = self._prices[:-1] - self._prices[self.first_of_row]
        total = self._amounts[:-1] - self._amounts[self.first_of_row]
        squares = sums_before(self.amount * self.amount)
        squared = squares[:-1] - squares[self.first_of_row]
        n, s = count.astype(np.float64), total.astype(np.float64)
        spread = n * squared.astype(np.float64) - s * s
        return quotient(total, count), np.sqrt(quotient(np.maximum(spread, 0.0), n * (n - 1.0)))

    def mean_where(self, chosen: Flags) -> Floats:
        """Return for every sorted row the mean of the entity's earlier amounts among the chosen (sorted) rows, in cents."""
        count, total = sums_before(chosen), sums_before(np.where(chosen, self.amount, 0))
        return quotient(total[:-1] - total[self.first_of_row], count[:-1] - count[self.first_of_row])

    def minutes_since_marked(self, marks: Flags, stop: Ints) -> Floats:
        """Return the minutes since the entity's last marked (sorted) row with an index below `stop`; NaN if there is none."""
        latest = np.concatenate([[-1], np.maximum.accumulate(np.where(marks, np.arange(len(marks)), -1))])[stop]
        if len(self.placed) == 0:
            return np.full(len(stop), np.nan)
        return self.minutes_since(self.placed[np.maximum(latest, 0)], latest >= self.first)

    def minutes_since_first_marked(self, marks: Flags, window: int) -> Floats:
        """Return the minutes since the entity's first marked (sorted) row within the window; NaN if there is none."""
        places = np.where(marks, np.arange(len(marks)), len(marks))
        following = np.append(np.minimum.accumulate(places[::-1])[::-1], len(marks))
        start, stop = self.since(window)
        first = following[start]
        if len(self.placed) == 0:
            return np.full(len(stop), np.nan)
        return self.minutes_since(self.placed[np.minimum(first, len(marks) - 1)], first < stop)

    def minutes_since_first(self) -> Floats:
        """Return the minutes since the entity's first order; NaN for that order itself."""
        return self.minutes_since(self.placed[self.first], self.earlier > 0)

    def minutes_since_last(self) -> Floats:
        """Return the minutes since the entity's previous order; NaN if there is none."""
        return self.minutes_since(self.placed[np.maximum(self.at - 1, 0)], self.earlier > 0)

    def minutes_since(self, time: Ints, exists: Flags) -> Floats:
        """Return the minutes since a time per requested row; NaN where it does not exist."""
        return np.where(exists, (self.now - time).astype(np.float64) / float(MINUTE), np.nan)

    def distinct(self, others: Ints) -> Ints:
        """Return the number of distinct others (codes by row, -1 for none) seen with the entity before."""
        other = others[self.order]
        return self._before(sums_before((occurrences(self.code, other) == 0) & (other >= 0)))

    def is_new(self, others: Ints) -> Floats:
        """Return 1 if the entity was never seen with this other before, 0 if it was, NaN if the order has no other."""
        other = others[self.order]
        unseen = np.where(other >= 0, (occurrences(self.code, other) == 0).astype(np.float64), np.nan)
        return unseen[self.at]

    def _before(self, sums: Ints) -> Ints:
        return sums[self.at] - sums[self.first]

    # Reported frauds: each counts from its report on

    @cached_property
    def _frauds(self) -> tuple[SortedTimes, Ints]:
        rows = np.flatnonzero(self.reported < NEVER)
        # an order cannot be reported before it is placed
        times, order = SortedTimes.of(self.code[rows], np.maximum(self.reported[rows], self.placed[rows]))
        return times, rows[order]

    def reported_frauds(self, window: int | None = None) -> Ints:
        """Return the number of frauds reported before now; with `window`, only those reported within it."""
        times, _ = self._frauds
        start = np.full(len(self.now), -NEVER) if window is None else self.now - window
        return times.before(self.entity, self.now) - times.before(self.entity, start)

    def minutes_since_fraud(self) -> Floats:
        """Return the minutes since the order whose fraud was reported last; NaN if none was reported."""
        times, rows = self._frauds
        stop = times.before(self.entity, self.now)
        exists = stop > times.before(self.entity, np.full(len(stop), -NEVER))
        if len(rows) == 0:
            return np.full(len(stop), np.nan)
        return self.minutes_since(self.placed[rows[np.maximum(stop - 1, 0)]], exists)

    def minutes_since_first_fraud(self, window: int) -> Floats:
        """Return the minutes since the first order placed within the window that is reported by now; NaN if there is none."""
        rows = np.flatnonzero(self.reported < NEVER)
        if len(rows) == 0:
            return np.full(len(self.now), np.nan)
        placed, reported = SortedTimes(self.code[rows], self.placed[rows]), np.maximum(self.reported[rows], self.placed[rows])
        start, stop = placed.before(self.entity, self.now - window), placed.before(self.entity, self.now)
        first = first_below(reported, start, stop, self.now)
        return self.minutes_since(self.placed[rows[np.minimum(first, len(rows) - 1)]], first < stop)

    # Mature labels: those of orders so old that a fraud would have been reported

    def mature_labels(self, delay: int) -> MatureLabels:
        """Return the labels of the orders older than `delay`."""
        return MatureLabels(self, delay)


class MatureLabels:
    """The labels of an entity's orders older than the label delay: fraud if it was reported within the delay."""

    def __init__(self, line: Timeline, delay: int) -> None:
        self.line, self.delay = line, delay
        self.fraud = line.reported - line.placed <= delay
        self.stop = line.times.before(line.entity, line.now - delay)
        self._sums = sums_before(self.fraud)

    def orders(self, window: int) -> Ints:
        """Return how many labels became mature within the window."""
        start, stop = self.line.since(window, until=self.delay)
        return stop - start

    def minutes_since_genuine(self) -> Floats:
        """Return the minutes since the newest order with a mature label that is not fraud; NaN if there is none."""
        return self.line.minutes_since_marked(~self.fraud, self.stop)

    def frauds_of_last(self, count: int) -> Ints:
        """Return how many of the last `count` mature labels are fraud."""
        start = np.maximum(self.stop - count, self.line.first)
        return self._sums[self.stop] - self._sums[start]

    def fraud_streak(self) -> tuple[Ints, Floats, Floats]:
        """Return length, minutes since the first order, and smallest amount (in units) of the consecutive frauds up to the
        newest mature label; 0, NaN and NaN if the newest label is not fraud."""
        line = self.line
        place = np.arange(len(line.code))
        # the start of each row's streak: after the last genuine order, within the entity
        begin = np.maximum(np.maximum.accumulate(np.where(self.fraud, -1, place)) + 1, line.first_of_row) if len(place) else place
        last = self.stop - 1
        exists = last >= line.first
        start = np.where(exists, begin[np.maximum(last, 0)], self.stop) if len(place) else self.stop
        length = self.stop - start
        min_amount = -range_max(-line.amount.astype(np.float64), start, self.stop) / 100.0
        first = line.placed[np.minimum(start, max(len(place) - 1, 0))] if len(place) else start
        return length, line.minutes_since(first, length > 0), min_amount


def scattered(values: npt.NDArray[Any], chosen: Ints, height: int) -> Floats:
    """Return an array of `height` with the values at the chosen rows, NaN elsewhere."""
    result = np.full(height, np.nan)
    result[chosen] = values
    return result


def category_of(values: pl.Series, names: Sequence[str], other: str, missing: str) -> pl.Series:
    """Return each text as one of `names`: `missing` for null, `other` for a text that is not among them."""
    known = pl.when(values.is_in(list(names))).then(values).otherwise(pl.lit(other))
    return pl.select(pl.when(values.is_null()).then(pl.lit(missing)).otherwise(known)).to_series()
