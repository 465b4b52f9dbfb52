"""Counting what came before: windows over the histories of entities, exact to the bit.

Everything is counted from prefix sums of whole numbers and found by binary search, so that a row's figures depend
only on the earlier rows of its own entity: never on which other rows were computed with it. Divisions are single
IEEE operations on exact operands, for the same reason. Times are microseconds since 1970, amounts are cents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
NEVER = 2**62
"""A moment later than all others: when something that never happened was known."""


def microseconds(times: pl.Series, missing: int = NEVER) -> Ints:
    """Moments as whole microseconds; `missing` where there is none."""
    return times.dt.cast_time_unit("us").cast(pl.Int64).fill_null(missing).to_numpy().astype(np.int64)


def codes(*columns: pl.Series) -> list[Ints]:
    """The same number for the same text in all columns, -1 for none. The numbers themselves mean nothing."""
    texts = pl.concat([column.cast(pl.String).alias("value") for column in columns])
    numbers = texts.cast(pl.Categorical).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    return np.split(numbers, np.cumsum([len(column) for column in columns])[:-1]) if len(columns) > 1 else [numbers]


def sums_before(values: npt.NDArray[Any]) -> Ints:
    """sums[i]: the sum of the first i values; it may wrap around, differences do not."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def quotient(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Floats:
    """numerator / denominator; NaN where the denominator is not positive."""
    top, bottom = numerator.astype(np.float64), denominator.astype(np.float64)
    positive = bottom > 0
    return np.where(positive, top / np.where(positive, bottom, 1.0), np.nan)


def occurrences(*keys: Ints) -> Ints:
    """For each row: how many earlier rows have the same keys."""
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
    """The greatest of values[start:stop], per pair of bounds; NaN for none."""
    length = stop - start
    result = np.full(len(start), np.nan)
    level, span = values, 1
    while len(level) and np.any(length >= span):
        chosen = np.flatnonzero((length >= span) & (length < 2 * span))
        result[chosen] = np.fmax(level[start[chosen]], level[stop[chosen] - span])
        level, span = np.fmax(level[:-span], level[span:]) if len(level) > span else level[:0], 2 * span
    return result


def first_below(values: Ints, start: Ints, stop: Ints, limit: Ints) -> Ints:
    """Per (start, stop, limit): the first place from start to before stop whose value is under the limit; stop for none."""
    if len(values) == 0:
        return stop
    levels, span = [values], 1
    while 2 * span <= len(values):
        levels.append(np.minimum(levels[-1][:-span], levels[-1][span:]))
        span *= 2
    place = start
    for least in reversed(levels):
        # the places that are passed over are a sum of falling powers of two
        passed = (place + span <= stop) & (least[np.minimum(place, len(least) - 1)] >= limit)
        place, span = place + span * passed, span // 2
    return place


@dataclass(frozen=True)
class Moments:
    """Rows of entities in the order of time, to be asked how many came before a moment."""

    code: Ints
    time: Ints

    @cached_property
    def times(self) -> Ints:
        """All times, sorted."""
        return np.sort(self.time)

    @cached_property
    def _places(self) -> Ints:
        return self.code * (len(self.time) + 1) + np.searchsorted(self.times, self.time, side="left")

    def before(self, code: Ints, moment: Ints) -> Ints:
        """Per (entity, moment): how many rows lie in earlier entities, or in this one earlier than the moment."""
        return np.searchsorted(self._places, code * (len(self.time) + 1) + np.searchsorted(self.times, moment, side="left"))

    @staticmethod
    def arranged(code: Ints, time: Ints) -> tuple[Moments, Ints]:
        """Moments of rows in any order, and the order that arranges them; equal moments keep their order."""
        order = np.lexsort((time, code))
        return Moments(code[order], time[order]), order


class Timeline:
    """The orders of the entities of one kind, arranged by entity and (placed_at, order_id).

    rows   all orders, sorted by (placed_at, order_id)
    code   the entity of each row, -1 for none
    asked  which rows are wanted: the answers of every method are for these, `chosen` says which rows they are
    """

    def __init__(self, code: Ints, placed: Ints, amount: Ints, priced: Flags, known: Ints, asked: Flags) -> None:
        present = np.flatnonzero(code >= 0)
        order = present[np.argsort(code[present], kind="stable")]
        self.order = order
        self.code, self.placed, self.amount, self.known = code[order], placed[order], amount[order], known[order]
        self.priced = priced[order]
        self.at = np.flatnonzero(asked[order])
        self.chosen = order[self.at]
        self.entity, self.now = self.code[self.at], self.placed[self.at]
        self._moments = Moments(self.code, self.placed)
        self._first = np.searchsorted(self.code, self.code, side="left")
        self._amounts, self._prices = sums_before(self.amount), sums_before(self.priced)

    @property
    def first(self) -> Ints:
        """The place of each entity's first order."""
        return self._first[self.at]

    def since(self, window: int, *, until: int = 0) -> tuple[Ints, Ints]:
        """The places of the orders in [now - until - window, now - until), earlier than the one asked about."""
        start = self._moments.before(self.entity, self.now - (until + window))
        return start, self.at if until == 0 else self._moments.before(self.entity, self.now - until)

    def amounts(self, start: Ints, stop: Ints) -> Ints:
        """Cents of the orders in places start to stop."""
        return self._amounts[stop] - self._amounts[start]

    def prices(self, start: Ints, stop: Ints) -> Ints:
        """How many of the orders in places start to stop have a known amount."""
        return self._prices[stop] - self._prices[start]

    @cached_property
    def earlier(self) -> Ints:
        """How many orders the entity had before."""
        return self.at - self.first

    @cached_property
    def means(self) -> tuple[Floats, Floats]:
        """For every arranged row: mean and sample deviation of the entity's earlier amounts, in cents."""
        count = self._prices[:-1] - self._prices[self._first]
        total = self._amounts[:-1] - self._amounts[self._first]
        squares = sums_before(self.amount * self.amount)
        squared = squares[:-1] - squares[self._first]
        n, s = count.astype(np.float64), total.astype(np.float64)
        spread = n * squared.astype(np.float64) - s * s
        return quotient(total, count), np.sqrt(quotient(np.maximum(spread, 0.0), n * (n - 1.0)))

    def mean_where(self, chosen: Flags) -> Floats:
        """For every arranged row: the mean of the entity's earlier amounts among the rows chosen (arranged), in cents."""
        count, total = sums_before(chosen), sums_before(np.where(chosen, self.amount, 0))
        return quotient(total[:-1] - total[self._first], count[:-1] - count[self._first])

    def minutes_since_marked(self, marks: Flags, stop: Ints) -> Floats:
        """Minutes since the entity's last order among those marked (arranged), in a place before `stop`; NaN for none."""
        latest = np.concatenate([[-1], np.maximum.accumulate(np.where(marks, np.arange(len(marks)), -1))])[stop]
        there = latest >= self.first
        if len(self.placed) == 0:
            return np.full(len(stop), np.nan)
        return self._minutes(self.placed[np.maximum(latest, 0)], there)

    def minutes_since_first_marked(self, marks: Flags, window: int) -> Floats:
        """Minutes since the entity's first order within the window among those marked (arranged); NaN when there is none."""
        places = np.where(marks, np.arange(len(marks)), len(marks))
        following = np.append(np.minimum.accumulate(places[::-1])[::-1], len(marks))
        start, stop = self.since(window)
        first = following[start]
        if len(self.placed) == 0:
            return np.full(len(stop), np.nan)
        return self._minutes(self.placed[np.minimum(first, len(marks) - 1)], first < stop)

    def minutes_since_first(self) -> Floats:
        """Minutes since the entity's first order; NaN when this is it."""
        return self._minutes(self.placed[self.first], self.earlier > 0)

    def minutes_since_last(self) -> Floats:
        """Minutes since the entity's previous order; NaN when there is none."""
        return self._minutes(self.placed[np.maximum(self.at - 1, 0)], self.earlier > 0)

    def _minutes(self, moment: Ints, there: Flags) -> Floats:
        return np.where(there, (self.now - moment).astype(np.float64) / float(MINUTE), np.nan)

    def distinct(self, others: Ints) -> Ints:
        """How many different others (codes by row, -1 for none) the entity was seen with before."""
        other = others[self.order]
        return self._before(sums_before((occurrences(self.code, other) == 0) & (other >= 0)))

    def is_new(self, others: Ints) -> Floats:
        """1 when the entity was never seen with this other one, 0 when it was, NaN when there is no other."""
        other = others[self.order]
        unseen = np.where(other >= 0, (occurrences(self.code, other) == 0).astype(np.float64), np.nan)
        return unseen[self.at]

    def _before(self, sums: Ints) -> Ints:
        return sums[self.at] - sums[self.first]

    # Known frauds: each counts from the moment on at which it was known

    @cached_property
    def _frauds(self) -> tuple[Moments, Ints]:
        there = np.flatnonzero(self.known < NEVER)
        # nothing is known of an order before it is placed
        moments, order = Moments.arranged(self.code[there], np.maximum(self.known[there], self.placed[there]))
        return moments, there[order]

    def known_frauds(self, window: int | None = None) -> Ints:
        """How many frauds became known before now (with `window`: within it)."""
        moments, _ = self._frauds
        moment = np.full(len(self.now), -NEVER) if window is None else self.now - window
        return moments.before(self.entity, self.now) - moments.before(self.entity, moment)

    def minutes_since_fraud(self) -> Floats:
        """Minutes since the fraud that became known last was placed; NaN when none is known."""
        moments, places = self._frauds
        stop = moments.before(self.entity, self.now)
        there = stop > moments.before(self.entity, np.full(len(stop), -NEVER))
        if len(places) == 0:
            return np.full(len(stop), np.nan)
        return self._minutes(self.placed[places[np.maximum(stop - 1, 0)]], there)

    def minutes_since_first_fraud(self, window: int) -> Floats:
        """Minutes since the first order placed within the window that is known to be a fraud by now; NaN when there is none."""
        there = np.flatnonzero(self.known < NEVER)
        if len(there) == 0:
            return np.full(len(self.now), np.nan)
        placed, known = Moments(self.code[there], self.placed[there]), np.maximum(self.known[there], self.placed[there])
        start, stop = placed.before(self.entity, self.now - window), placed.before(self.entity, self.now)
        first = first_below(known, start, stop, self.now)
        return self._minutes(self.placed[there[np.minimum(first, len(there) - 1)]], first < stop)

    # Labels that have come due: of orders so old that a fraud would be known

    def settled(self, delay: int) -> Settled:
        """What is known of the orders older than `delay`."""
        return Settled(self, delay)


class Settled:
    """The labels of an entity's orders older than the label delay: fraud when it was known within the delay."""

    def __init__(self, line: Timeline, delay: int) -> None:
        self.line, self.delay = line, delay
        self.fraud = line.known - line.placed <= delay
        self.stop = line._moments.before(line.entity, line.now - delay)
        self._sums = sums_before(self.fraud)

    def orders(self, window: int) -> Ints:
        """How many orders came due within the window."""
        start, stop = self.line.since(window, until=self.delay)
        return stop - start

    def minutes_since_genuine(self) -> Floats:
        """Minutes since the newest order whose label came due without a fraud was placed; NaN when there is none."""
        return self.line.minutes_since_marked(~self.fraud, self.stop)

    def frauds_of_last(self, count: int) -> Ints:
        """How many of the last `count` labels that came due are frauds."""
        start = np.maximum(self.stop - count, self.line.first)
        return self._sums[self.stop] - self._sums[start]

    def run(self) -> tuple[Ints, Floats, Floats]:
        """The frauds in an unbroken row up to the newest label: how many, minutes since the first of them was
        placed, and the smallest of their amounts in units; 0, NaN and NaN when the newest label is no fraud."""
        line = self.line
        place = np.arange(len(line.code))
        # where the run that a row belongs to begins: after the last genuine order, within the entity
        begin = np.maximum(np.maximum.accumulate(np.where(self.fraud, -1, place)) + 1, line._first) if len(place) else place
        last = self.stop - 1
        there = last >= line.first
        safe = np.maximum(last, 0)
        start = np.where(there, begin[safe], self.stop) if len(place) else self.stop
        length = self.stop - start
        least = -range_max(-line.amount.astype(np.float64), start, self.stop) / 100.0
        first = line.placed[np.minimum(start, max(len(place) - 1, 0))] if len(place) else start
        return length, line._minutes(first, length > 0), least


def scattered(values: npt.NDArray[Any], chosen: Ints, height: int) -> Floats:
    """Values put at their rows; NaN elsewhere."""
    result = np.full(height, np.nan)
    result[chosen] = values
    return result


def rank_of(names: Sequence[str], values: pl.Series, unknown: str, missing: str) -> pl.Series:
    """Text as one of `names`: `missing` for none, `unknown` for a text that is not among them."""
    known = pl.when(values.is_in(list(names))).then(values).otherwise(pl.lit(unknown))
    return pl.select(pl.when(values.is_null()).then(pl.lit(missing)).otherwise(known)).to_series()
