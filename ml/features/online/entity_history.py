"""The orders of one entity in memory, and the features that they contribute to an order.

Counterpart of the order histories in `ml/features/compute.py`: a feature of an entity group that is computed there must be
computed in `EntityHistory.append_features` too, and named, at the same position, in `entity_feature_names`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from ml.features.declarations import ENTITIES, RISK_WINDOWS, WINDOWS, FeatureGroup
from ml.features.groups.customer import (
    CUSTOMER,
    FIRST_USES,
    GREATEST_RATIO_WINDOWS,
    RECENT_MEAN_WINDOWS,
    UNUSUAL_WINDOWS,
)
from ml.features.groups.device import DEVICE
from ml.features.groups.entity import PLURAL, UNUSUAL_RATIO
from ml.features.online.arithmetic import NAN, Value, quotient, wrap_int64
from ml.features.online.orders import PlacedOrder
from ml.features.windows import MINUTE, NEVER

BLOCK = 128
"""Number of consecutive orders whose greatest ratio is kept."""


class EntityHistory:
    """The orders of one entity, sorted by (placed, order_id), with prefix sums: sums[i] covers the first i orders."""

    __slots__ = (
        "amounts",
        "block_maxima",
        "delay",
        "fraud_counts",
        "fraud_placed",
        "fraud_times",
        "group",
        "ids",
        "last_genuine",
        "pending",
        "placed",
        "priced_counts",
        "ratios",
        "rows",
        "seen",
        "seen_counts",
        "squares",
        "streak_start",
        "unexplained_orders",
        "unexplained_placed",
        "unexplained_times",
        "unusual",
        "usual_amounts",
        "usual_counts",
    )  # fmt: skip

    def __init__(self, group: FeatureGroup, delay: int, rows: Iterator[PlacedOrder]) -> None:
        """Take the entity's orders, sorted by (placed, order_id). delay: label delay in microseconds."""
        self.group, self.delay = group, delay
        self._reset(list(rows))

    def _reset(self, rows: list[PlacedOrder]) -> None:
        self.rows: list[PlacedOrder] = []
        self.pending: list[PlacedOrder] = []
        self.ids: set[str] = set()
        self.placed: list[int] = []
        self.amounts, self.priced_counts, self.squares = [0], [0], [0]
        self.ratios: list[float] = []
        self.block_maxima: list[float] = []
        self.seen: dict[str, dict[str, int]] = {other: {} for other in self.group.needs if other in ENTITIES}
        self.seen_counts: dict[str, list[int]] = {other: [0] for other in self.group.seen_with}
        self.fraud_times: list[int] = []
        self.fraud_placed: list[int] = []
        self.unexplained_times: list[int] = []
        self.unexplained_placed: list[int] = []
        self.unexplained_orders: list[tuple[int, int]] = []
        self.usual_amounts, self.usual_counts = [0], [0]
        self.unusual: list[int] = []
        self.last_genuine = [-1]
        self.fraud_counts = [0]
        self.streak_start: list[int] = []
        for row in rows:
            self._append(row)

    def add(self, row: PlacedOrder) -> None:
        """Add an order. It replaces an order with the same id."""
        self.remove(row.order_id)
        if self.pending or (self.rows and (self.placed[-1], self.rows[-1].order_id) >= (row.placed, row.order_id)):
            self.pending.append(row)
            self.ids.add(row.order_id)
        else:
            self._append(row)

    def remove(self, order_id: str) -> None:
        """Remove an order, if it is present."""
        if order_id in self.ids:
            self._insert_pending()
            place = next(n for n in range(len(self.rows) - 1, -1, -1) if self.rows[n].order_id == order_id)
            for row in self._truncate(place)[1:]:
                self._append(row)

    def _insert_pending(self) -> None:
        """Insert the orders that arrived out of order: all at once, on the next read."""
        if self.pending:
            pending, self.pending = sorted(self.pending, key=lambda row: (row.placed, row.order_id)), []
            rows = [*self._truncate(self.place_of(pending[0])), *pending]
            for row in sorted(rows, key=lambda row: (row.placed, row.order_id)):
                self._append(row)

    def _truncate(self, place: int) -> list[PlacedOrder]:
        """Remove and return the orders from a place on."""
        rows = self.rows[place:]
        if any(row.reported < NEVER for row in rows):  # reports are in the order of their own times
            self._reset(self.rows[:place])
            return rows
        for values in (self.rows, self.placed, self.ratios, self.streak_start):
            del values[place:]
        sums = (
            self.amounts,
            self.squares,
            self.priced_counts,
            self.usual_amounts,
            self.usual_counts,
            self.last_genuine,
            self.fraud_counts,
        )
        for counts in (*sums, *self.seen_counts.values()):
            del counts[place + 1 :]
        del self.unusual[bisect_left(self.unusual, place) :]
        del self.block_maxima[place // BLOCK :]
        if place % BLOCK:
            self.block_maxima.append(max(self.ratios[place - place % BLOCK :]))
        self.ids.difference_update(row.order_id for row in rows)
        for other, firsts in self.seen.items():
            for row in rows:
                name = row.entities[other]
                if name is not None and firsts.get(name, -1) >= place:
                    del firsts[name]
        return rows

    def _append(self, row: PlacedOrder) -> None:
        place = len(self.rows)
        self._append_amount(row, place)
        self._append_label(row, place)
        self.rows.append(row)
        self.ids.add(row.order_id)
        self.placed.append(row.placed)
        for other, firsts in self.seen.items():
            name = row.entities[other]
            if name is not None:
                firsts.setdefault(name, place)
        for other, counts in self.seen_counts.items():
            name = row.entities[other]
            counts.append(counts[-1] + (name is not None and self.seen[other][name] == place))

    def _append_amount(self, row: PlacedOrder, place: int) -> None:
        cents = row.amount or 0
        ratio = _ratio(row.amount, self.amounts[place], self.priced_counts[place])
        if _ratio(row.amount, self.usual_amounts[place], self.usual_counts[place]) >= UNUSUAL_RATIO:
            self.unusual.append(place)
        usual = row.amount is not None and not ratio >= UNUSUAL_RATIO
        self.usual_amounts.append(self.usual_amounts[-1] + (cents if usual else 0))
        self.usual_counts.append(self.usual_counts[-1] + usual)
        self.ratios.append(ratio)
        if place % BLOCK == 0:
            self.block_maxima.append(ratio)
        elif ratio > self.block_maxima[-1]:
            self.block_maxima[-1] = ratio
        self.amounts.append(self.amounts[-1] + cents)
        self.squares.append(self.squares[-1] + cents * cents)
        self.priced_counts.append(self.priced_counts[-1] + (row.amount is not None))

    def _append_label(self, row: PlacedOrder, place: int) -> None:
        fraud = row.reported - row.placed <= self.delay
        self.last_genuine.append(self.last_genuine[-1] if fraud else place)
        self.fraud_counts.append(self.fraud_counts[-1] + fraud)
        # a fraud's streak begins after the last genuine order
        starts = place == 0 or self.fraud_counts[place] == self.fraud_counts[place - 1]
        self.streak_start.append((place if starts else self.streak_start[-1]) if fraud else place + 1)
        if row.reported < NEVER:
            reported = max(row.reported, row.placed)
            _insert_report(self.fraud_times, self.fraud_placed, reported, row.placed)
            if not (row.ratio is not None and row.ratio >= UNUSUAL_RATIO):
                _insert_report(self.unexplained_times, self.unexplained_placed, reported, row.placed)
                self.unexplained_orders.append((row.placed, reported))

    def place_of(self, order: PlacedOrder) -> int:
        """Return the index of an order, or the index at which it would be inserted."""
        place = bisect_left(self.placed, order.placed)
        while place < len(self.rows) and self.placed[place] == order.placed and self.rows[place].order_id < order.order_id:
            place += 1
        return place

    def append_features(self, order: PlacedOrder, values: list[Value]) -> None:
        """Append the group's features of an order of this entity, in the order of `entity_feature_names`."""
        self._insert_pending()
        group, now, placed, amounts = self.group, order.placed, self.placed, self.amounts
        at = self.place_of(order)
        for window in group.windows:
            start = bisect_left(placed, now - WINDOWS[window])
            values.append(float(at - start))
            values.append((amounts[at] - amounts[start]) / 100.0)
        values.append(float(at))
        values.append((now - placed[0]) / MINUTE if at else NAN)
        values.append((now - placed[at - 1]) / MINUTE if at else NAN)
        if group is CUSTOMER:
            self._append_own_history(order, at, values)
        elif group is DEVICE:
            values.append(quotient(float(amounts[at]), float(self.priced_counts[at])) / 100.0)
        for other in group.seen_with:
            values.append(float(self.seen_counts[other][at]))
        reported = bisect_left(self.fraud_times, now)
        values.append(float(reported))
        for window in group.fraud_windows:
            values.append(float(reported - bisect_left(self.fraud_times, now - RISK_WINDOWS[window])))
        values.append((now - self.fraud_placed[reported - 1]) / MINUTE if reported else NAN)
        self._append_risk(now, reported, values)
        if group.last_labels:
            self._append_last_labels(now, values)
        if group.unexplained_windows:
            self._append_unexplained(now, values)

    def _append_own_history(self, order: PlacedOrder, at: int, values: list[Value]) -> None:
        count, total = float(self.priced_counts[at]), float(self.amounts[at])
        mean = quotient(total, count)
        spread = count * float(wrap_int64(self.squares[at])) - total * total
        variance = quotient(max(spread, 0.0), count * (count - 1.0))
        deviation = NAN if math.isnan(variance) else math.sqrt(variance)
        cents = NAN if order.amount is None else float(order.amount)
        over = cents - mean
        values.append(mean / 100.0)
        values.append(deviation / 100.0)
        values.append(quotient(cents, mean))
        values.append(NAN if math.isnan(over) else quotient(over, deviation))
        for window in RECENT_MEAN_WINDOWS:
            start = bisect_left(self.placed, order.placed - WINDOWS[window])
            amount, orders = self.amounts[at] - self.amounts[start], self.priced_counts[at] - self.priced_counts[start]
            values.append(quotient(cents, quotient(float(amount), float(orders))))
        for window in GREATEST_RATIO_WINDOWS:
            start = bisect_left(self.placed, order.placed - WINDOWS[window])
            greatest = self._greatest_ratio(start, at)
            values.append(NAN if greatest == -math.inf else greatest)
        self._append_outliers(order, at, cents, values)
        for other in FIRST_USES:
            name = order.entities[other]
            values.append(NAN if name is None else float(self.seen[other].get(name, at) >= at))

    def _greatest_ratio(self, start: int, stop: int) -> float:
        """Return the greatest ratio of the orders in [start, stop); minus infinity for an empty range."""
        first, last = -(-start // BLOCK), stop // BLOCK
        if first >= last:
            return max(self.ratios[start:stop], default=-math.inf)
        edges = max((*self.ratios[start : first * BLOCK], *self.ratios[last * BLOCK : stop]), default=-math.inf)
        return max(edges, *self.block_maxima[first:last])

    def _append_outliers(self, order: PlacedOrder, at: int, cents: float, values: list[Value]) -> None:
        placed, unusual = self.placed, self.unusual
        usual = quotient(float(self.usual_amounts[at]), float(self.usual_counts[at]))
        values.append(usual / 100.0)
        values.append(quotient(cents, usual))
        before = bisect_left(unusual, at)
        for window in UNUSUAL_WINDOWS:
            start = bisect_left(placed, order.placed - WINDOWS[window])
            values.append(float(before - bisect_left(unusual, start)))
        values.append((order.placed - placed[unusual[before - 1]]) / MINUTE if before else NAN)
        first = bisect_left(unusual, bisect_left(placed, order.placed - WINDOWS["14d"]))
        values.append((order.placed - placed[unusual[first]]) / MINUTE if first < before else NAN)

    def _append_risk(self, now: int, reported: int, values: list[Value]) -> None:
        placed = self.placed
        for window in self.group.risk_windows:
            size = RISK_WINDOWS[window]
            orders = bisect_left(placed, now - self.delay) - bisect_left(placed, now - (self.delay + size))
            values.append(float(orders))
            values.append(quotient(float(reported - bisect_left(self.fraud_times, now - size)), float(orders)))

    def _append_last_labels(self, now: int, values: list[Value]) -> None:
        placed = self.placed
        stop = bisect_left(placed, now - self.delay)
        for last in self.group.last_labels:
            values.append(float(self.fraud_counts[stop] - self.fraud_counts[max(stop - last, 0)]))
        start = self.streak_start[stop - 1] if stop else stop
        values.append(float(stop - start))
        values.append((now - placed[start]) / MINUTE if stop > start else NAN)
        values.append((now - placed[self.last_genuine[stop]]) / MINUTE if self.last_genuine[stop] >= 0 else NAN)
        min_amount = min((self.rows[n].amount or 0 for n in range(start, stop)), default=None)
        values.append(NAN if min_amount is None else float(min_amount) / 100.0)

    def _append_unexplained(self, now: int, values: list[Value]) -> None:
        reported = bisect_left(self.unexplained_times, now)
        for window in self.group.unexplained_windows:
            values.append(float(reported - bisect_left(self.unexplained_times, now - RISK_WINDOWS[window])))
        values.append((now - self.unexplained_placed[reported - 1]) / MINUTE if reported else NAN)
        values.append(self._minutes_since_unexplained_began(now))

    def _minutes_since_unexplained_began(self, now: int) -> float:
        first = bisect_left(self.unexplained_orders, (now - (self.delay + RISK_WINDOWS["28d"]),))
        for placed, reported in self.unexplained_orders[first:]:
            if placed >= now:
                break
            if reported < now:
                return (now - placed) / MINUTE
        return NAN


def entity_feature_names(group: FeatureGroup) -> list[str]:
    """Return the names of the features that `EntityHistory.append_features` appends for a group, in order."""
    kind = group.key
    names = [f"{kind}_{figure}_{window}" for window in group.windows for figure in ("orders", "amount")]
    names += [f"{kind}_orders_ever", f"{kind}_minutes_since_first", f"{kind}_minutes_since_last"]
    if kind == CUSTOMER.key:
        names += _own_history_names()
    elif kind == DEVICE.key:
        names.append("device_mean")
    names += [f"{kind}_{PLURAL[other]}_ever" for other in group.seen_with]
    names += [f"{kind}_frauds_ever", *(f"{kind}_frauds_{window}" for window in group.fraud_windows)]
    names.append(f"{kind}_minutes_since_fraud")
    names += [f"{kind}_{figure}_{window}" for window in group.risk_windows for figure in ("settled", "risk")]
    if group.last_labels:
        names += [f"{kind}_frauds_of_last_{last}" for last in group.last_labels]
        names += [f"{kind}_{figure}" for figure in ("run_frauds", "run_minutes", "minutes_since_genuine", "run_least")]
    if group.unexplained_windows:
        names += [f"{kind}_unexplained_{window}" for window in group.unexplained_windows]
        names += [f"{kind}_minutes_since_unexplained", f"{kind}_minutes_since_unexplained_began"]
    return names


def _own_history_names() -> list[str]:
    return [
        *("customer_mean", "customer_deviation", "customer_ratio", "customer_z"),
        *(f"customer_ratio_{window}" for window in RECENT_MEAN_WINDOWS),
        *(f"customer_greatest_ratio_{window}" for window in GREATEST_RATIO_WINDOWS),
        *("customer_usual_mean", "customer_usual_ratio"),
        *(f"customer_unusual_{window}" for window in UNUSUAL_WINDOWS),
        *("customer_minutes_since_unusual", "customer_minutes_since_unusual_began"),
        *(f"new_{other}" for other in FIRST_USES),
    ]


def _ratio(amount: int | None, total: int, count: int) -> float:
    """Return an amount relative to a mean; minus infinity, less than any ratio, if either is unknown."""
    mean = float(total) / float(count) if count else 0.0
    return float(amount) / mean if amount is not None and mean > 0 else -math.inf


def _insert_report(times: list[int], placed: list[int], time: int, order_placed: int) -> None:
    """Insert a fraud by the time of its report; equal times stay in the order of their orders."""
    place = len(times)
    while place and times[place - 1] > time:
        place -= 1
    times.insert(place, time)
    placed.insert(place, order_placed)
