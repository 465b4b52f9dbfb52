"""The features of one order from memory, in microseconds: what `features.compute` gives, bit for bit.

A server cannot afford a data frame per request. Here every entity's history is a few sorted lists of whole numbers, and
a window is two binary searches. The features are still those declared in `ml/features/features.py`, in that order; a test deals
out shops at random and compares every value with `compute`.

Histories are kept as columns (`Orders`), sorted once; the lists of an entity are made when it is first asked about.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from ml.features.features import (
    CHANNELS,
    CUSTOMER,
    DEVICE,
    ENTITIES,
    EVENT_COLUMNS,
    EVENT_WINDOWS,
    FEATURE_GROUPS,
    LAST_LABELS,
    METHODS,
    MISSING,
    ORDER_COLUMNS,
    OTHER,
    RATIO_WINDOWS,
    RISK_WINDOWS,
    UNUSUAL,
    UNUSUAL_WINDOWS,
    WEEKDAYS,
    WINDOWS,
    FeatureError,
    FeatureGroup,
    OrderHistory,
    arranged,
    conform,
)
from ml.features.windows import MINUTE, NEVER, Ints, microseconds

NAN = math.nan
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
BLOCK = 128
"""Orders of which the greatest ratio is kept."""
ENTITY_PARTS: Mapping[str, FeatureGroup] = {part.key: part for part in FEATURE_GROUPS if part.key in ENTITIES and not part.events}
EVENT_NOUNS = ("events", "failed_logins", "failed_payments", "changes")
NOUN_OF = {"login_failed": "failed_logins", "payment_failed": "failed_payments", "account_changed": "changes"}

Value = float | str | None


def quotient(top: float, bottom: float) -> float:
    """top / bottom; NaN where the bottom is not positive."""
    return top / bottom if bottom > 0 else NAN


def wrapped(number: int) -> int:
    """A whole number as 64 bits hold it."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


@dataclass(frozen=True, slots=True)
class Placed:
    """An order as histories keep it. placed, known: microseconds since 1970; amount: cents, None when unknown."""

    order_id: str
    placed: int
    amount: int | None
    known: int
    entities: Mapping[str, str | None]
    ratio: float | None


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """An order to describe: its history columns, and what only its own row is needed for."""

    order: Placed
    account: int | None = None
    account_created: int = NEVER
    channel: str | None = None
    payment_method: str | None = None
    category: str | None = None

    @staticmethod
    def of(row: Mapping[str, Any]) -> FeatureRequest:
        """From a row with (some of) ORDER_COLUMNS. Raises FeatureError without order_id or placed_at."""
        if row.get("order_id") is None or row.get("placed_at") is None:
            raise FeatureError("An order without order_id or placed_at has no features. Give both.")
        created = row.get("account_created_at")
        order = Placed(
            row["order_id"],
            moment(row["placed_at"]),
            row.get("amount"),
            NEVER if row.get("known_at") is None else moment(row["known_at"]),
            {kind: row.get(kind) for kind in ENTITIES},
            row.get("ratio"),
        )
        return FeatureRequest(
            order,
            row.get("account"),
            NEVER if created is None else moment(created),
            row.get("channel"),
            row.get("payment_method"),
            row.get("category"),
        )


def moment(at: datetime) -> int:
    """Microseconds since 1970."""
    return (at - EPOCH) // MICROSECOND


class EntityHistory:
    """The orders of one entity by (placed, order_id), with running sums: sums[i] is of the first i orders."""

    __slots__ = (
        "amounts",
        "delay",
        "fraud_placed",
        "fraud_times",
        "genuine",
        "ids",
        "late",
        "met",
        "part",
        "peaks",
        "placed",
        "prices",
        "ratios",
        "rows",
        "run_start",
        "seen",
        "settled",
        "squares",
        "strange_orders",
        "strange_placed",
        "strange_times",
        "unusual",
        "usual_amounts",
        "usual_prices",
    )  # fmt: skip

    def __init__(self, part: FeatureGroup, delay: int, rows: Iterator[Placed]) -> None:
        """rows: in the order of (placed, order_id)."""
        self.part, self.delay = part, delay
        self._begin(list(rows))

    def _begin(self, rows: list[Placed]) -> None:
        self.rows: list[Placed] = []
        self.late: list[Placed] = []
        self.ids: set[str] = set()
        self.placed: list[int] = []
        self.amounts, self.prices, self.squares = [0], [0], [0]
        self.ratios: list[float] = []
        self.peaks: list[float] = []
        self.seen: dict[str, dict[str, int]] = {other: {} for other in self.part.needs if other in ENTITIES}
        self.met: dict[str, list[int]] = {other: [0] for other in self.part.seen_with}
        self.fraud_times: list[int] = []
        self.fraud_placed: list[int] = []
        self.strange_times: list[int] = []
        self.strange_placed: list[int] = []
        self.strange_orders: list[tuple[int, int]] = []
        self.usual_amounts, self.usual_prices = [0], [0]
        self.unusual: list[int] = []
        self.genuine = [-1]
        self.settled = [0]
        self.run_start: list[int] = []
        for row in rows:
            self._append(row)

    def add(self, row: Placed) -> None:
        """One more order; one with an id that is there takes its place."""
        self.remove(row.order_id)
        if self.late or (self.rows and (self.placed[-1], self.rows[-1].order_id) >= (row.placed, row.order_id)):
            self.late.append(row)
            self.ids.add(row.order_id)
        else:
            self._append(row)

    def remove(self, order_id: str) -> None:
        """Leave an order out, if it is there."""
        if order_id in self.ids:
            self._settle()
            place = next(n for n in range(len(self.rows) - 1, -1, -1) if self.rows[n].order_id == order_id)
            for one in self._cut(place)[1:]:
                self._append(one)

    def _settle(self) -> None:
        """Put orders that came late in their places: all at once, when somebody looks."""
        if self.late:
            late, self.late = sorted(self.late, key=lambda one: (one.placed, one.order_id)), []
            rows = [*self._cut(self.place_of(late[0])), *late]
            for one in sorted(rows, key=lambda one: (one.placed, one.order_id)):
                self._append(one)

    def _cut(self, place: int) -> list[Placed]:
        """Take off the orders from a place on."""
        rows = self.rows[place:]
        if any(row.known < NEVER for row in rows):  # the lists of reports are in another order
            self._begin(self.rows[:place])
            return rows
        for values in (self.rows, self.placed, self.ratios, self.run_start):
            del values[place:]
        sums = (self.amounts, self.squares, self.prices, self.usual_amounts, self.usual_prices, self.genuine, self.settled)
        for counts in (*sums, *self.met.values()):
            del counts[place + 1 :]
        del self.unusual[bisect_left(self.unusual, place) :]
        del self.peaks[place // BLOCK :]
        if place % BLOCK:
            self.peaks.append(max(self.ratios[place - place % BLOCK :]))
        self.ids.difference_update(row.order_id for row in rows)
        for other, firsts in self.seen.items():
            for row in rows:
                name = row.entities[other]
                if name is not None and firsts.get(name, -1) >= place:
                    del firsts[name]
        return rows

    def _append(self, row: Placed) -> None:
        place, cents = len(self.rows), row.amount or 0
        fraud = row.known - row.placed <= self.delay
        ratio = _ratio(row.amount, self.amounts[place], self.prices[place])
        if _ratio(row.amount, self.usual_amounts[place], self.usual_prices[place]) >= UNUSUAL:
            self.unusual.append(place)
        usual = row.amount is not None and not ratio >= UNUSUAL
        self.usual_amounts.append(self.usual_amounts[-1] + (cents if usual else 0))
        self.usual_prices.append(self.usual_prices[-1] + usual)
        self.ratios.append(ratio)
        if place % BLOCK == 0:
            self.peaks.append(ratio)
        elif ratio > self.peaks[-1]:
            self.peaks[-1] = ratio
        self.genuine.append(self.genuine[-1] if fraud else place)
        self.rows.append(row)
        self.ids.add(row.order_id)
        self.placed.append(row.placed)
        self.amounts.append(self.amounts[-1] + cents)
        self.squares.append(self.squares[-1] + cents * cents)
        self.prices.append(self.prices[-1] + (row.amount is not None))
        self.settled.append(self.settled[-1] + fraud)
        # the unbroken row of frauds that a fraud belongs to begins after the last genuine order
        broken = place == 0 or self.settled[place] == self.settled[place - 1]
        self.run_start.append((place if broken else self.run_start[-1]) if fraud else place + 1)
        for other, firsts in self.seen.items():
            name = row.entities[other]
            if name is not None:
                firsts.setdefault(name, place)
        for other, counts in self.met.items():
            name = row.entities[other]
            counts.append(counts[-1] + (name is not None and self.seen[other][name] == place))
        if row.known < NEVER:
            known = max(row.known, row.placed)
            _insert(self.fraud_times, self.fraud_placed, known, row.placed)
            if not (row.ratio is not None and row.ratio >= UNUSUAL):
                _insert(self.strange_times, self.strange_placed, known, row.placed)
                self.strange_orders.append((row.placed, known))

    def place_of(self, order: Placed) -> int:
        """Where the order stands, or would."""
        place = bisect_left(self.placed, order.placed)
        while place < len(self.rows) and self.placed[place] == order.placed and self.rows[place].order_id < order.order_id:
            place += 1
        return place

    def features(self, order: Placed, found: list[Value]) -> None:
        """Append the part's features of an order of this entity."""
        self._settle()
        part, now, placed, amounts = self.part, order.placed, self.placed, self.amounts
        at = self.place_of(order)
        for window in part.windows:
            start = bisect_left(placed, now - WINDOWS[window])
            found.append(float(at - start))
            found.append((amounts[at] - amounts[start]) / 100.0)
        found.append(float(at))
        found.append((now - placed[0]) / MINUTE if at else NAN)
        found.append((now - placed[at - 1]) / MINUTE if at else NAN)
        if part is CUSTOMER:
            self._against_own(order, at, found)
        elif part is DEVICE:
            found.append(quotient(float(amounts[at]), float(self.prices[at])) / 100.0)
        for other in part.seen_with:
            found.append(float(self.met[other][at]))
        until = bisect_left(self.fraud_times, now)
        found.append(float(until))
        for window in part.fraud_windows:
            found.append(float(until - bisect_left(self.fraud_times, now - RISK_WINDOWS[window])))
        found.append((now - self.fraud_placed[until - 1]) / MINUTE if until else NAN)
        if part.risk_windows or part.labels:
            self._labels(now, until, found)
        if part.unexplained:
            until = bisect_left(self.strange_times, now)
            for window in part.unexplained:
                found.append(float(until - bisect_left(self.strange_times, now - RISK_WINDOWS[window])))
            found.append((now - self.strange_placed[until - 1]) / MINUTE if until else NAN)
            found.append(self._minutes_since_strange_began(now))

    def _minutes_since_strange_began(self, now: int) -> float:
        first = bisect_left(self.strange_orders, (now - (self.delay + RISK_WINDOWS["28d"]),))
        for placed, known in self.strange_orders[first:]:
            if placed >= now:
                break
            if known < now:
                return (now - placed) / MINUTE
        return NAN

    def _against_own(self, order: Placed, at: int, found: list[Value]) -> None:
        count, total = float(self.prices[at]), float(self.amounts[at])
        mean = quotient(total, count)
        spread = count * float(wrapped(self.squares[at])) - total * total
        deviation = math.sqrt(value) if (value := quotient(max(spread, 0.0), count * (count - 1.0))) == value else NAN
        cents = NAN if order.amount is None else float(order.amount)
        over = cents - mean
        found.append(mean / 100.0)
        found.append(deviation / 100.0)
        found.append(quotient(cents, mean))
        found.append(NAN if over != over else quotient(over, deviation))
        for window in ("7d", "30d"):
            start = bisect_left(self.placed, order.placed - WINDOWS[window])
            recent = quotient(float(self.amounts[at] - self.amounts[start]), float(self.prices[at] - self.prices[start]))
            found.append(quotient(cents, recent))
        for window in RATIO_WINDOWS:
            start = bisect_left(self.placed, order.placed - WINDOWS[window])
            greatest = self._greatest(start, at)
            found.append(NAN if greatest == -math.inf else greatest)
        self._outliers(order, at, cents, found)
        for other in ("card", "device", "address"):
            name = order.entities[other]
            found.append(NAN if name is None else float(self.seen[other].get(name, at) >= at))

    def _greatest(self, start: int, stop: int) -> float:
        """The greatest ratio of the orders start to stop; minus infinity without any."""
        first, last = -(-start // BLOCK), stop // BLOCK
        if first >= last:
            return max(self.ratios[start:stop], default=-math.inf)
        edges = max((*self.ratios[start : first * BLOCK], *self.ratios[last * BLOCK : stop]), default=-math.inf)
        return max(edges, *self.peaks[first:last])

    def _outliers(self, order: Placed, at: int, cents: float, found: list[Value]) -> None:
        placed, unusual = self.placed, self.unusual
        usual = quotient(float(self.usual_amounts[at]), float(self.usual_prices[at]))
        found.append(usual / 100.0)
        found.append(quotient(cents, usual))
        before = bisect_left(unusual, at)
        for window in UNUSUAL_WINDOWS:
            start = bisect_left(placed, order.placed - WINDOWS[window])
            found.append(float(before - bisect_left(unusual, start)))
        found.append((order.placed - placed[unusual[before - 1]]) / MINUTE if before else NAN)
        first = bisect_left(unusual, bisect_left(placed, order.placed - WINDOWS["14d"]))
        found.append((order.placed - placed[unusual[first]]) / MINUTE if first < before else NAN)

    def _labels(self, now: int, known: int, found: list[Value]) -> None:
        part, placed = self.part, self.placed
        stop = bisect_left(placed, now - self.delay)
        for window in part.risk_windows:
            size = RISK_WINDOWS[window]
            orders = stop - bisect_left(placed, now - (self.delay + size))
            found.append(float(orders))
            found.append(quotient(float(known - bisect_left(self.fraud_times, now - size)), float(orders)))
        if not part.labels:
            return
        for last in LAST_LABELS:
            found.append(float(self.settled[stop] - self.settled[max(stop - last, 0)]))
        start = self.run_start[stop - 1] if stop else stop
        found.append(float(stop - start))
        found.append((now - placed[start]) / MINUTE if stop > start else NAN)
        found.append((now - placed[self.genuine[stop]]) / MINUTE if self.genuine[stop] >= 0 else NAN)
        least = min((self.rows[n].amount or 0 for n in range(start, stop)), default=None)
        found.append(NAN if least is None else float(least) / 100.0)


def _ratio(amount: int | None, total: int, count: int) -> float:
    """An amount against a mean; minus infinity where either is unknown: less than any."""
    mean = float(total) / float(count) if count else 0.0
    return float(amount) / mean if amount is not None and mean > 0 else -math.inf


def _insert(times: list[int], placed: list[int], time: int, of: int) -> None:
    """Keep frauds in the order in which they became known; equal moments in the order of their orders."""
    place = len(times)
    while place and times[place - 1] > time:
        place -= 1
    times.insert(place, time)
    placed.insert(place, of)


@dataclass(frozen=True)
class Orders:
    """Orders as columns, sorted by (placed_at, order_id), with the rows of every entity: made once, read by slices."""

    order_id: pl.Series
    placed: Ints
    amount: pl.Series
    known: Ints
    ratio: pl.Series
    entities: Mapping[str, pl.Series]
    rows: Mapping[str, Ints]
    spans: Mapping[str, Mapping[str, tuple[int, int]]]
    hashes: Ints
    """Of the ids, sorted; `hashed` are their rows."""
    hashed: Ints

    @staticmethod
    def of(orders: pl.DataFrame) -> Orders:
        """From a frame with (some of) ORDER_COLUMNS."""
        known = conform(orders, ORDER_COLUMNS)
        frame = arranged(known.clear(), known)
        rows, spans = {}, {}
        for kind in ENTITIES:
            rows[kind], spans[kind] = _grouped(frame[kind])
        hashes = np.fromiter(map(hash, frame["order_id"]), np.int64, frame.height)
        hashed = np.argsort(hashes)
        return Orders(
            frame["order_id"],
            microseconds(frame["placed_at"]),
            frame["amount"],
            microseconds(frame["known_at"]),
            frame["ratio"],
            {kind: frame[kind] for kind in ENTITIES},
            rows,
            spans,
            hashes[hashed],
            hashed,
        )

    def of_id(self, order_id: str) -> Placed | None:
        """The order of an id."""
        wanted = hash(order_id)
        for place in range(int(self.hashes.searchsorted(wanted)), len(self.hashes)):
            if self.hashes[place] != wanted:
                break
            (found,) = self._at(self.hashed[place : place + 1])
            if found.order_id == order_id:
                return found
        return None

    def of_entity(self, kind: str, name: str) -> Iterator[Placed]:
        """The orders of an entity, in order."""
        start, stop = self.spans[kind].get(name, (0, 0))
        return self._at(self.rows[kind][start:stop])

    def _at(self, rows: Ints) -> Iterator[Placed]:
        columns = [
            self.order_id.gather(rows).to_list(),
            self.placed[rows].tolist(),
            self.amount.gather(rows).to_list(),
            self.known[rows].tolist(),
            self.ratio.gather(rows).to_list(),
            *(self.entities[other].gather(rows).to_list() for other in ENTITIES),
        ]
        for order_id, placed, amount, known, ratio, *names in zip(*columns, strict=True):
            yield Placed(order_id, placed, amount, known, dict(zip(ENTITIES, names, strict=True)), ratio)


def _grouped(names: pl.Series) -> tuple[Ints, dict[Any, tuple[int, int]]]:
    """Rows by name, those of a name in their order, and from where to where each name's are."""
    frame = names.alias("name").to_frame().with_row_index("row").drop_nulls("name").sort("name", "row")
    counts = frame.group_by("name", maintain_order=True).len()
    stops = counts["len"].cum_sum()
    spans = {
        name: (stop - count, stop)
        for name, count, stop in zip(counts["name"].to_list(), counts["len"].to_list(), stops.to_list(), strict=True)
    }
    return frame["row"].to_numpy().astype(np.int64), spans


@dataclass
class EventHistory:
    """The account events of one account or device: sorted moments, of all and of each kind that is counted."""

    times: dict[str, list[int]] = field(default_factory=lambda: {noun: [] for noun in EVENT_NOUNS})

    def add(self, kind: str, at: int) -> None:
        """One more event; late ones go to their place."""
        for noun in ("events", NOUN_OF.get(kind)):
            if noun is not None:
                times = self.times[noun]
                if times and times[-1] > at:
                    times.insert(bisect_left(times, at), at)
                else:
                    times.append(at)

    def remove(self, kind: str, at: int) -> None:
        """One event less, if it is there."""
        for noun in ("events", NOUN_OF.get(kind)):
            if noun is not None:
                times = self.times[noun]
                place = bisect_left(times, at)
                if place < len(times) and times[place] == at:
                    del times[place]

    def counts(self, noun: str, now: int, windows: tuple[str, ...]) -> Iterator[float]:
        """How many there were in each window before now."""
        times = self.times[noun]
        stop = bisect_left(times, now)
        for window in windows:
            yield float(stop - bisect_left(times, now - WINDOWS[window]))

    def minutes_since(self, noun: str, now: int) -> float:
        """Since the last one; NaN when there is none."""
        stop = bisect_left(self.times[noun], now)
        return (now - self.times[noun][stop - 1]) / MINUTE if stop else NAN


@dataclass(frozen=True)
class AccountEvents:
    """Account events as columns, sorted by time, with the rows of every account or device."""

    at: Ints
    kind: pl.Series
    rows: Ints
    spans: Mapping[Any, tuple[int, int]]

    @staticmethod
    def of(events: pl.DataFrame, key: str) -> AccountEvents:
        """From a frame with EVENT_COLUMNS, sorted by time. key: account or device."""
        return AccountEvents(microseconds(events["occurred_at"]), events["kind"], *_grouped(events[key]))

    def of_name(self, name: int | str) -> EventHistory:
        """The events of an account or device."""
        start, stop = self.spans.get(name, (0, 0))
        rows, found = self.rows[start:stop], EventHistory()
        for kind, at in zip(self.kind.gather(rows).to_list(), self.at[rows].tolist(), strict=True):
            found.add(kind, at)
        return found


class OnlineFeatures:
    """Everything that features need, in memory: a history as of some moment, and what was observed since."""

    def __init__(self, history: OrderHistory) -> None:
        """history: whole, as `features.compute` takes it."""
        self.delay = history.delay // MICROSECOND
        self.orders = Orders.of(history.orders)
        self.usual: dict[tuple[str, date], float] = {
            (category, month): quotient(float(amount or 0), float(orders or 0))
            for category, month, orders, amount in history.categories.select("category", "month", "orders", "amount").iter_rows()
        }
        self._entities: dict[str, dict[str, EntityHistory]] = {kind: {} for kind in ENTITIES}
        self._observed: dict[str, Placed] = {}
        self._left_out: set[str] = set()
        """Orders of the history that another version took the place of, or that were forgotten."""
        self._of_account: dict[int | str, EventHistory] = {}
        self._of_device: dict[int | str, EventHistory] = {}
        events = conform(history.events, EVENT_COLUMNS).drop_nulls("occurred_at").sort("occurred_at")
        self._account_events = AccountEvents.of(events, "account")
        self._device_events = AccountEvents.of(events.filter(pl.col("kind") != "visit"), "device")

    def observe_event(self, account: int | None, device: str | None, kind: str, at: int) -> None:
        """An account event has happened. kind: one of EVENT_KINDS; at: microseconds since 1970."""
        for history in self._concerned(account, device, kind):
            history.add(kind, at)

    def forget_event(self, account: int | None, device: str | None, kind: str, at: int) -> None:
        """An account event turned out to be another."""
        for history in self._concerned(account, device, kind):
            history.remove(kind, at)

    def _concerned(self, account: int | None, device: str | None, kind: str) -> Iterator[EventHistory]:
        if account is not None:
            yield _events_of(account, self._of_account, self._account_events)
        if device is not None and kind != "visit":
            yield _events_of(device, self._of_device, self._device_events)

    def observe(self, order: Placed) -> Placed | None:
        """An order was placed: it is history to those after it. One with the id of an earlier one takes its place; that
        one is given."""
        before = self.forget(order.order_id)
        for kind, name in order.entities.items():
            if name is not None:
                self._history(kind, name).add(order)
        self._observed[order.order_id] = order
        return before

    def forget(self, order_id: str) -> Placed | None:
        """An order does not count any more. Gives what counted, if it did."""
        known = self._observed.pop(order_id, None)
        if known is None and order_id not in self._left_out:
            known = self.orders.of_id(order_id)
            if known is not None:
                self._left_out.add(order_id)
        if known is not None:
            for kind, name in known.entities.items():
                if name is not None:
                    self._history(kind, name).remove(order_id)
        return known

    def features(self, asked: FeatureRequest) -> list[Value]:
        """The features of an order in the order of FEATURES; NaN where `compute` has null. It may have been observed:
        an order is no history to itself."""
        order, found = asked.order, self._own(asked)
        for part in FEATURE_GROUPS[1:]:
            if part.events:
                self._events(part, asked, found)
                continue
            name = order.entities[part.key]
            if name is None:
                found += [NAN] * len(part.features)
            else:
                self._history(part.key, name).features(order, found)
        return found

    def _history(self, kind: str, name: str) -> EntityHistory:
        known = self._entities[kind].get(name)
        if known is None:
            rows = (row for row in self.orders.of_entity(kind, name) if row.order_id not in self._left_out)
            known = EntityHistory(ENTITY_PARTS[kind], self.delay, rows)
            self._entities[kind][name] = known
        return known

    def _own(self, asked: FeatureRequest) -> list[Value]:
        order, now = asked.order, asked.order.placed
        placed = EPOCH + now * MICROSECOND
        cents = NAN if order.amount is None else float(order.amount)
        before = (placed.date().replace(day=1) - timedelta(days=1)).replace(day=1)
        mean = self.usual.get((asked.category, before), NAN) if asked.category is not None else NAN
        return [
            cents / 100.0,
            _rank(CHANNELS, asked.channel),
            _rank(METHODS, asked.payment_method),
            float(placed.hour),
            WEEKDAYS[placed.weekday()],
            (now - asked.account_created) / MINUTE if asked.account_created <= now else NAN,
            quotient(cents, mean),
        ]

    def _events(self, part: FeatureGroup, asked: FeatureRequest, found: list[Value]) -> None:
        now, name = asked.order.placed, asked.account if part.key == "account" else asked.order.entities["device"]
        if name is None:
            found += [NAN] * len(part.features)
            return
        if part.key == "account":
            history = _events_of(name, self._of_account, self._account_events)
            found += history.counts("events", now, EVENT_WINDOWS)
            found += history.counts("failed_logins", now, ("1h", "24h"))
            found += history.counts("failed_payments", now, ("1h", "24h"))
            found.append(history.minutes_since("failed_logins", now))
            found.append(history.minutes_since("changes", now))
        else:
            history = _events_of(name, self._of_device, self._device_events)
            found += history.counts("failed_logins", now, ("1h", "24h"))
            found += history.counts("failed_payments", now, ("1h", "24h"))


def _events_of(name: int | str, met: dict[int | str, EventHistory], events: AccountEvents) -> EventHistory:
    """The events of an account or device, read out when it is first asked about."""
    found = met.get(name)
    if found is None:
        found = met[name] = events.of_name(name)
    return found


def _rank(names: tuple[str, ...], value: str | None) -> str:
    return MISSING if value is None else value if value in names else OTHER
