"""A seeded shop, one simulated day after the other.

`Shop.day` plays a day: people join, look around, buy on the web, in stores and on marketplaces; orders move
on; stock is reserved, sold, ordered, counted and stolen; fraudsters come by. Everything goes to a `Sink` as
it happens. What has to happen later waits in `later`, which reaches a few months ahead at most, so memory
follows the size of a day, not the length of history. People are computed, not kept (`people.py`).

Rows are written as they stand at `live_from`; what happens after that is made as an UPDATE, DELETE or
replaced document. Loading history, `live_from` is two days before its end; in a step it is its beginning.
"""

from __future__ import annotations

import bisect
import heapq
import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from random import Random
from typing import Any

from bson import ObjectId

from app.sandbox.catalogue import NOMINAL, Product, decimal_text, local_price, products, rates
from app.sandbox.marketplace import MarketplaceLine, contact, document, moment, object_id, order_number, plain_amount, unreadable
from app.sandbox.people import (
    DAY,
    FIRST_USER_ID,
    USERS_PER_PERSON,
    PersonProfile,
    SandboxPerson,
    activity,
    change_time,
    changed_field,
    changes_until,
    make_person,
    profile_at,
    spelled_phone,
)
from app.sandbox.places import SHOPS_OF, STORES, WAREHOUSE_OF
from app.sandbox.sink import Sink, Value
from app.sandbox.stock import StoreStock

MINUTE, HOUR = 60_000, 3_600_000
LAST_DAY = (date(2026, 1, 31) - date(1970, 1, 1)).days
PRODUCTS = 120
PEOPLE_PER_ORDER = 0.2
OLD_PEOPLE = 0.25
LATE, TWICE, BROKEN = 0.012, 0.010, 0.0003
BROKEN_DOCUMENTS = 0.0006
THEFTS_PER_DAY = 1.5
MAX_CACHED_PEOPLE = 20_000
# Orders by hour of the day, and by month and weekday.
HOURS = (2, 1, 1, 1, 1, 2, 4, 6, 8, 10, 11, 12, 12, 11, 10, 10, 11, 12, 14, 16, 16, 13, 9, 5)
MONTHS = (0.85, 0.82, 0.92, 0.95, 0.98, 1.0, 0.96, 0.94, 0.98, 1.04, 1.28, 1.35)
WEEKDAYS = (0.92, 0.90, 0.92, 0.96, 1.08, 1.18, 1.04)
_CUMULATED_HOURS = tuple(sum(HOURS[: hour + 1]) for hour in range(24))
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOW = tuple(_BASE32[n >> 10] + _BASE32[n >> 5 & 31] + _BASE32[n & 31] for n in range(1 << 15))

Action = tuple[int, int, str, list[Any]]


@dataclass
class ShopProgress:
    """Everything the shop has to remember between two steps."""

    seed: int
    base_currency: str
    per_day: float
    first_day: int
    today: int
    new_things_from: int
    live_from: int
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
    old_people: int = 0
    steps: int = 0
    people_by_day: list[int] = field(default_factory=list)
    added_columns: dict[str, list[str]] = field(default_factory=dict)


def weight(day: int) -> float:
    """Orders on a day relative to an average day: the week and the year."""
    when = date.fromordinal(day + date(1970, 1, 1).toordinal())
    peak = 1.9 if (when.month, when.day) in ((11, 11), (12, 12)) else 1.0
    return WEEKDAYS[when.weekday()] * MONTHS[when.month - 1] * peak


def sql_time(time: int) -> str:
    """Milliseconds since 1970 as PostgreSQL reads it."""
    return datetime.fromtimestamp(time // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.") + f"{time % 1000:03d}+00"


class Shop:
    """The simulation. `later` holds what is to happen, by day."""

    def __init__(
        self, progress: ShopProgress, sink: Sink, stock: StoreStock | None = None, later: dict[int, list[Action]] | None = None
    ) -> None:
        self.now = progress
        self.seed = progress.seed
        self.sink = sink
        self.catalogue: tuple[Product, ...] = products(progress.seed, PRODUCTS)
        self.stock = stock or StoreStock.expecting(self.catalogue, progress.per_day)
        self.later: dict[int, list[Action]] = later or {}
        self.agenda: list[Action] = []
        self.random = Random(progress.seed)
        self.people: OrderedDict[int, SandboxPerson] = OrderedDict()
        self.popular = _cumulated([product.popularity for product in self.catalogue])
        for table, columns in progress.added_columns.items():
            self.sink.columns[table].extend(columns)

    # The first day

    def open(self, expected_orders: int) -> None:
        """Products, stores, opening stock and the customers there are before the first day."""
        now, start = self.now, self.now.first_day * DAY
        opened = sql_time(start - 30 * DAY)
        factor = NOMINAL.get(now.base_currency, 1.0)
        for product in self.catalogue:
            price = decimal_text(round(product.dollars * factor * 100), 2)
            self.sink.row(
                "products", product.product_id, product.name, product.category, product.brand, price, now.base_currency, opened
            )
        for store in STORES:
            self.sink.row("stores", store.store_id, store.name, store.kind, store.city, store.country, opened)
        now.old_people = max(10, int(expected_orders * PEOPLE_PER_ORDER * OLD_PEOPLE))
        self._rates(now.first_day - 1)
        self.random = Random(f"{self.seed}/open")
        for pair in range(len(self.stock.book)):
            moment_ = start - 12 * HOUR + pair
            self.stock.receive(pair, self.stock.opening(pair))
            self._stock_event(moment_, "stock_received", pair, self.stock.opening(pair), {"reason": "opening"})
            self._stock_event(moment_ + HOUR, "safety_stock_set", pair, self.stock.safety(pair), {})
        now.people_by_day.append(now.old_people)
        for number in range(now.old_people):
            self._join(self.person(number))

    # A day

    def day(self, orders: int) -> None:
        """Play the day after `today`, with this many orders."""
        now = self.now
        now.today += 1
        today, start = now.today, now.today * DAY
        self.random = random = Random(f"{self.seed}/day/{today}")
        if today == now.new_things_from:
            self._add_column("orders", "delivery_method", "text")
        self._rates(today)
        self.agenda += self.later.pop(today, [])
        heapq.heapify(self.agenda)
        known = now.people_by_day[-1]
        joining = round((now.orders + orders) * PEOPLE_PER_ORDER * (1 - OLD_PEOPLE)) + now.old_people - known
        now.people_by_day.append(known + max(0, joining))
        left = orders
        for number in range(known, known + joining):
            person = self.person(number)
            self.at(person.joined, "join", number)
            if left and random.random() < 0.9:
                left -= 1
                self.at(min(person.joined + random.randrange(MINUTE, 3 * HOUR), start + DAY - MINUTE), "order", number)
        if random.random() < now.per_day * 0.001 and left >= 4:
            left -= self._plan_ring(start, left)
        for _ in range(left):
            self.at(self._time(start), "order", -1)
        for _ in range(_poisson(random, orders * 0.12)):
            self.at(self._time(start), "browse")
        self._plan_stock(start)
        while self.agenda:
            time, _, kind, arguments = heapq.heappop(self.agenda)
            getattr(self, f"_do_{kind}")(time, *arguments)
        now.orders += orders
        if self.sink.full():
            self.sink.flush()

    def at(self, time: int, kind: str, *arguments: Any) -> None:
        """Something happens at a time, today or later."""
        self.now.order += 1
        action = (time, self.now.order, kind, list(arguments))
        if time // DAY <= self.now.today:
            heapq.heappush(self.agenda, action)
        else:
            self.later.setdefault(time // DAY, []).append(action)

    def _time(self, start: int) -> int:
        hour = bisect.bisect_right(_CUMULATED_HOURS, self.random.random() * _CUMULATED_HOURS[-1])
        return start + hour * HOUR + self.random.randrange(HOUR)

    def _rates(self, day: int) -> None:
        when = date.fromordinal(day + date(1970, 1, 1).toordinal())
        if when.weekday() < 5 or day < self.now.first_day:
            for currency, rate in rates(self.seed, day, self.now.base_currency):
                self.sink.row("exchange_rates", when.isoformat(), currency, rate)

    def _add_column(self, table: str, column: str, kind: str) -> None:
        self.sink.add_column(table, column, kind)
        self.now.added_columns.setdefault(table, []).append(column)

    # People

    def person(self, number: int) -> SandboxPerson:
        """The person of a number."""
        found = self.people.get(number)
        if found is None:
            index = bisect.bisect_right(self.now.people_by_day, number)
            draw = Random((self.seed << 33) ^ number)
            first = self.now.first_day * DAY
            joined = (
                first - draw.randrange(1, 500 * DAY)
                if index == 0
                else first + (index - 1) * DAY + draw.randrange(8 * HOUR, 20 * HOUR)
            )
            found = make_person(self.seed, number, joined)
            self.people[number] = found
            if len(self.people) > MAX_CACHED_PEOPLE:
                self.people.popitem(last=False)
        return found

    def profile(self, person: SandboxPerson, time: int) -> PersonProfile:
        """What the person says of themselves at a time."""
        return person.first_profile if person.first_change is None else profile_at(self.seed, person, time)

    def _do_join(self, _time: int, number: int) -> None:
        self._join(self.person(number))

    def _join(self, person: SandboxPerson) -> None:
        seen = max(person.joined, self.now.live_from)
        if person.leaves is not None and person.leaves <= seen:
            return
        for user_id in (person.web, person.card):
            if user_id is not None:
                self._user(person, user_id, seen)
        if person.second is not None:
            self.at(max(person.joined + 30 * DAY, self.now.first_day * DAY), "second", person.number)
        if person.leaves is not None:
            self.at(person.leaves, "leave", person.number)
        if person.first_change is not None:
            count = changes_until(person, seen) + 1
            self.at(change_time(person, count) or 0, "change", person.number, count)

    def _do_second(self, time: int, number: int) -> None:
        person = self.person(number)
        seen = max(time, self.now.live_from)
        if person.second is not None and (person.leaves is None or person.leaves > seen):
            self._user(person, person.second, seen)

    def _user(self, person: SandboxPerson, user_id: int, time: int) -> None:
        values = self._user_values(person, user_id, time)
        self.sink.row("users", user_id, *values, *self._consent(user_id))
        self.sink.know("people", person.key, f"user:{user_id}")

    def _consent(self, user_id: int) -> tuple[Value, ...]:
        """The value of the column that `users` gets with the first step, once it is there."""
        return ("t" if user_id % 3 == 0 else "f",) if self.now.added_columns.get("users") else ()

    def _user_values(self, person: SandboxPerson, user_id: int, time: int) -> tuple[Value, ...]:
        """The columns of a users row after `user_id`, as they are at a time."""
        profile = self.profile(person, time)
        spelling = Random(f"{self.seed}/user/{user_id}/{profile.phone}")
        phone = profile.phone if spelling.random() < 0.6 else spelled_phone(spelling, profile.phone, person.country)
        count = changes_until(person, time)
        updated = max(person.joined, change_time(person, count) or 0) if count else person.joined
        created = person.joined
        place = (profile.street, profile.city, person.country.code)
        linked = person.card is not None and person.number % 10 < 7
        if user_id == person.web:
            said = profile.phone if person.phone_verified else phone
            phone_shown = said if person.phone_given else None
            verified = ("t" if person.email_verified else "f", phone_shown, "t" if person.phone_verified else "f")
            loyalty = person.loyalty_id if linked else None
            return (profile.email, *verified, person.name, *place, loyalty, sql_time(created), sql_time(updated))
        if user_id == person.second:
            created = max(person.joined + 30 * DAY, self.now.first_day * DAY)
            name = f"{person.first[0]}. {person.last}" if person.number % 2 else person.name
            times = (sql_time(created), sql_time(max(created, updated)))
            return (person.other_email, "t", phone, "t" if person.phone_verified else "f", name, *place, None, *times)
        by_phone = person.own_phone and (person.web is None or linked or person.phone_given)
        show_email = person.card_shows in (1, 2) or not by_phone
        shown = (profile.email if show_email else None, "f", phone if by_phone and person.card_shows != 2 else None, "f")
        name = person.name.upper() if person.number % 3 == 0 else person.name
        return (*shown, name, *place, person.loyalty_id, sql_time(created), sql_time(updated))

    def _user_ids(self, person: SandboxPerson, time: int) -> list[int]:
        ids = [user_id for user_id in (person.web, person.card) if user_id is not None]
        if person.second is not None and max(person.joined + 30 * DAY, self.now.first_day * DAY) < time:
            ids.append(person.second)
        return ids

    def _do_change(self, time: int, number: int, count: int) -> None:
        person = self.person(number)
        if person.leaves is not None and person.leaves <= time:
            return
        next_time = change_time(person, count + 1)
        if next_time is not None:
            self.at(next_time, "change", number, count + 1)
        if person.web is not None:
            metadata = f'{{"field":"{changed_field(self.seed, person, count)}"}}'
            self._event(
                time + 1000, "account_changed", person.web, f"s-{self._session()}", person.devices[0], person.ip, "web", metadata
            )
        if time <= self.now.live_from:
            return
        for user_id in self._user_ids(person, time):
            self.sink.change(
                "UPDATE users SET email=%s, email_verified=%s, phone_number=%s, phone_verified=%s, name=%s, address=%s, city=%s, "
                "country=%s, loyalty_id=%s, created_at=%s, updated_at=%s WHERE user_id=%s",
                *self._user_values(person, user_id, time),
                user_id,
            )

    def _do_leave(self, time: int, number: int) -> None:
        if time > self.now.live_from:
            for user_id in self._user_ids(self.person(number), time):
                self.sink.change("DELETE FROM users WHERE user_id=%s", user_id)

    def _buyer(self, time: int) -> SandboxPerson:
        """Somebody who has joined; faithful customers come more often, and recent ones."""
        random, people = self.random, self.now.people_by_day[-2]
        number = 0
        for _ in range(8):
            draw = random.random()
            number = int(people * (1 - draw * draw if random.random() < 0.5 else draw))
            if number < people and random.random() < activity(self.seed, number):
                break
        return self.person(min(number, people - 1))

    # Orders

    def _do_order(self, time: int, number: int) -> None:
        random = self.random
        if number < 0 and random.random() < 0.09:
            self._store_order(time, None)
            return
        person = self.person(number) if number >= 0 else self._buyer(time)
        gone = person.leaves is not None and person.leaves <= max(time, self.now.live_from)
        web = 0.62 if person.web is not None and not gone else 0.0
        store = 0.42 if person.card is not None and not gone and SHOPS_OF[person.country.code] else 0.0
        draw = random.random() * (web + store + 0.34)
        if draw < web:
            if number < 0 and random.random() < 0.006:
                self._taken_over_order(time, person)
            else:
                self._web_order(time, person)
        elif draw < web + store:
            self._store_order(time, person)
        else:
            self._marketplace_order(time, person)

    def _basket(self, time: int, store: int, person: SandboxPerson, dear: bool = False) -> list[MarketplaceLine]:
        """Lines that the store has in stock, one per product."""
        random, stock = self.random, self.stock
        wanted = 1 if random.random() < 0.62 else 2 if random.random() < 0.65 else random.randrange(3, 6)
        lines: list[MarketplaceLine] = []
        chosen: set[int] = set()
        for _ in range(wanted):
            quantity = 1 if random.random() < 0.8 else random.randrange(2, 4)
            product = self._product(dear)
            for _ in range(4):
                if product not in chosen and stock.free(store * PRODUCTS + product) >= quantity:
                    break
                product = self._product(dear)
            if product in chosen:
                continue
            chosen.add(product)
            pair = store * PRODUCTS + product
            if stock.free(pair) < quantity:
                units = quantity + 10 + int(10 * stock.daily[pair])
                stock.receive(pair, units)
                self._stock_event(time - 5, "stock_received", pair, units, {"reason": "express"})
            price = local_price(self.catalogue[product].dollars, person.country)
            if random.random() < 0.15:
                step = person.country.step
                price = max(step, price * 9 // 10 // step * step)
            lines.append(MarketplaceLine(product, quantity, price))
        return lines

    def _product(self, dear: bool) -> int:
        random = self.random
        if not dear:
            return bisect.bisect_right(self.popular, random.random() * self.popular[-1])
        return max((random.randrange(PRODUCTS) for _ in range(8)), key=lambda product: self.catalogue[product].dollars)

    def _fulfil(
        self, time: int, order: str, store: int, lines: list[MarketplaceLine], cancelled: int | None, shipped: int
    ) -> None:
        """Reserve the lines now, and sell or release them later."""
        pairs = [[store * PRODUCTS + line.product, line.quantity] for line in lines]
        for at, (pair, quantity) in enumerate(pairs):
            self.stock.reserved[pair] += quantity
            self._stock_event(time + at, "stock_reserved", pair, quantity, {"order_ref": order})
        if cancelled is not None:
            self.at(cancelled, "release", order, pairs)
        else:
            self.at(shipped, "ship", order, pairs)

    def _do_release(self, time: int, order: str, pairs: list[list[int]]) -> None:
        for at, (pair, quantity) in enumerate(pairs):
            self.stock.reserved[pair] -= quantity
            self._stock_event(time + at, "reservation_released", pair, quantity, {"order_ref": order})

    def _do_ship(self, time: int, order: str, pairs: list[list[int]]) -> None:
        for at, (pair, quantity) in enumerate(pairs):
            # What was stolen meanwhile cannot be shipped: the warehouse notices, and somebody fetches another one.
            missing = quantity - self.stock.there[pair]
            if missing > 0 or self.stock.book[pair] < quantity:
                units = max(missing, 0) + 12
                self.stock.receive(pair, units)
                self._stock_event(time + at - 5, "stock_received", pair, units, {"reason": "express"})
            self.stock.reserved[pair] -= quantity
            self.stock.book[pair] -= quantity
            self.stock.there[pair] -= quantity
            self._stock_event(time + at, "stock_sold", pair, quantity, {"reserved": True, "order_ref": order})
            self._order_more(time + at, pair)

    def _do_stock_back(self, time: int, order: str, pairs: list[list[int]]) -> None:
        for at, (pair, quantity) in enumerate(pairs):
            self.stock.receive(pair, quantity)
            self._stock_event(time + at, "stock_returned", pair, quantity, {"order_ref": order})

    def _life(self, time: int, cancel: float, give_back: float) -> tuple[list[tuple[int, str]], int | None, int, int | None]:
        """(statuses with their times, when cancelled, when shipped, when returned) of an order."""
        random = self.random
        paid, shipped = time + random.randrange(20_000, 5 * MINUTE), time + random.randrange(6 * HOUR, 3 * DAY)
        life = [(time, "placed")]
        draw = random.random()
        if draw < cancel:
            cancelled = time + random.randrange(10 * MINUTE, 5 * HOUR)
            if draw < cancel / 2:
                life.append((paid, "paid"))
            return [*life, (max(cancelled, paid + 1), "cancelled")], max(cancelled, paid + 1), shipped, None
        delivered = shipped + random.randrange(DAY, 4 * DAY)
        life += [(paid, "paid"), (shipped, "shipped"), (delivered, "delivered")]
        if random.random() < give_back:
            returned = delivered + random.randrange(2 * DAY, 14 * DAY)
            return [*life, (returned, "returned")], None, shipped, returned
        return life, None, shipped, None

    def _status(self, time: int, life: list[tuple[int, str]]) -> tuple[str, int, list[tuple[int, str]]]:
        """(status to write, since when, the changes still to come) of an order placed at `time`."""
        seen = max(time, self.now.live_from)
        past = [step for step in life if step[0] <= seen] or life[:1]
        return past[-1][1], past[-1][0], life[len(past) :]

    def _web_order(
        self,
        time: int,
        person: SandboxPerson,
        *,
        user_id: int | None = None,
        device: str | None = None,
        ip: str | None = None,
        card: str | None = None,
        address: str | None = None,
        tested: int = 0,
        fraud: tuple[str, int] | None = None,
    ) -> None:
        """An order on the web, with the session before it; the keywords are what a fraudster does differently."""
        now, random = self.now, self.random
        profile = self.profile(person, time)
        user = user_id or person.web or 0
        if (
            user == person.web
            and person.second is not None
            and person.second in self._user_ids(person, time)
            and random.random() < 0.3
        ):
            user = person.second
        device = device or random.choice(person.devices)
        ip = ip or (person.ip if random.random() < 0.85 else self._some_ip())
        card = card or random.choice(person.cards)
        address = address or profile.address
        if fraud is None and random.random() < 0.04:
            address = self.person(random.randrange(now.people_by_day[0])).first_profile.address
        store = WAREHOUSE_OF[person.country.code]
        lines = self._basket(time, store, person, dear=fraud is not None)
        life, cancelled, shipped, returned = self._life(time, 0.1 if fraud else 0.06, 0.0 if fraud else 0.06)
        now.postgres_orders += 1
        order = str(now.postgres_orders)
        self._browse(time, user, device, ip, lines, order, card, tested)
        method = "card" if fraud or random.random() < 0.65 else random.choice(("wallet", "bank_transfer"))
        who = (user, "web", None)
        how = (method, card if method == "card" else None, ip, device, address)
        self._order_rows(time, now.postgres_orders, who, how, person, lines, life, returned)
        self._fulfil(time + 300, order, store, lines, cancelled, shipped)
        if returned is not None:
            self.at(returned, "stock_back", order, [[store * PRODUCTS + line.product, line.quantity] for line in lines])
        self._complaint(time, order, cancelled, fraud)

    def _order_rows(
        self,
        time: int,
        order_id: int,
        who: tuple[int | None, str, str | None],
        how: tuple[str, str | None, str | None, str | None, str | None],
        person: SandboxPerson,
        lines: list[MarketplaceLine],
        life: list[tuple[int, str]],
        returned: int | None,
    ) -> None:
        sink, country = self.sink, person.country
        status, since, rest = self._status(time, life)
        total = sum(line.quantity * line.price for line in lines)
        values = (
            order_id,
            *who,
            status,
            country.currency,
            decimal_text(total, country.digits),
            *how,
            sql_time(time),
            sql_time(since),
        )
        extra: tuple[Value, ...] = ()
        if self.now.added_columns.get("orders"):
            extra = ("pickup" if who[1] == "pos" else "express" if order_id % 5 == 0 else "standard",)
        sink.row("orders", *values, *extra)
        written: list[list[Any]] = [
            [self.catalogue[line.product].product_id, line.quantity, decimal_text(line.price, country.digits)] for line in lines
        ]
        for number, (product, quantity, price) in enumerate(written, 1):
            sink.row("order_items", order_id, number, product, quantity, price)
        if status == "returned":
            self._negative_lines(order_id, written)
        for at, later in rest:
            self.at(at, "status", order_id, later, written if at == returned else [])

    def _negative_lines(self, order_id: int, written: list[list[Any]]) -> None:
        for number, (product, quantity, price) in enumerate(written, 1 + len(written)):
            self.sink.row("order_items", order_id, number, product, -quantity, price)

    def _do_status(self, time: int, order_id: int, status: str, back: list[list[Any]]) -> None:
        self.sink.change("UPDATE orders SET status=%s, updated_at=%s WHERE order_id=%s", status, sql_time(time), order_id)
        if back:
            self._negative_lines(order_id, back)

    def _store_order(self, time: int, person: SandboxPerson | None) -> None:
        """A sale in a store: paid and taken away; the buyer may be unknown."""
        now, random = self.now, self.random
        somebody = person or self._local()
        store = random.choice(SHOPS_OF[somebody.country.code])
        lines = self._basket(time, store, somebody)
        returned = time + random.randrange(2 * DAY, 14 * DAY) if random.random() < 0.04 else None
        life = [(time, "delivered")] + ([(returned, "returned")] if returned else [])
        now.postgres_orders += 1
        order = str(now.postgres_orders)
        paid_by = random.choice(("cash", "card", "card", "wallet"))
        card = random.choice(person.cards) if person and paid_by == "card" else None
        who = (person.card if person else None, "pos", STORES[store].store_id)
        self._order_rows(time, now.postgres_orders, who, (paid_by, card, None, None, None), somebody, lines, life, returned)
        for at, line in enumerate(lines):
            pair = store * PRODUCTS + line.product
            self.stock.book[pair] -= line.quantity
            self.stock.there[pair] -= line.quantity
            self._stock_event(time + at, "stock_sold", pair, line.quantity, {"order_ref": order}, "pos")
            self._order_more(time + at, pair)
        if returned is not None:
            self.at(returned, "stock_back", order, [[store * PRODUCTS + line.product, line.quantity] for line in lines])

    def _local(self) -> SandboxPerson:
        """Somebody whose country has a store, to be the unknown buyer of a sale."""
        while True:
            person = self.person(self.random.randrange(self.now.people_by_day[-2]))
            if SHOPS_OF[person.country.code]:
                return person

    def _marketplace_order(self, time: int, person: SandboxPerson) -> None:
        now, random = self.now, self.random
        platform = random.choice(person.platforms)
        store = WAREHOUSE_OF[person.country.code]
        old = time // DAY < now.new_things_from - 20 and random.random() < 0.35
        lines = self._basket(time, store, person)
        if old:
            lines = [MarketplaceLine(lines[0].product, 1, lines[0].price)]
        life, cancelled, shipped, returned = self._life(time, 0.05, 0.0 if old else 0.04)
        status, since, rest = self._status(time, life)
        now.marketplace_orders += 1
        number = order_number(platform, now.marketplace_orders)
        identifier = object_id(self.seed, time, now.marketplace_orders)
        buyer = contact(random, person, self.profile(person, time), platform)
        made = document(
            *(random, identifier, platform, number, buyer, lines, self.catalogue, person.country, status, time, since, old)
        )
        back = [
            {
                "product_id": self.catalogue[line.product].product_id,
                "product_name": self.catalogue[line.product].name,
                "quantity": -line.quantity,
                "price": plain_amount(line.price, person.country),
            }
            for line in lines
        ]
        if status == "returned":
            made["items"] = made["items"] + back
        self.sink.document(made)
        order = f"{platform}:{number}"
        self.sink.know("people", person.key, f"order:{order}")
        for at, later in rest:
            self.at(at, "document", str(identifier), later, back if later == "returned" else [])
        self._fulfil(time + 300, order, store, lines, cancelled, shipped)
        if returned is not None:
            self.at(returned, "stock_back", order, [[store * PRODUCTS + line.product, line.quantity] for line in lines])
        self._complaint(time, order, cancelled, None)
        if random.random() < BROKEN_DOCUMENTS:
            broken = object_id(self.seed, time, 0x80000000 + now.marketplace_orders)
            bad = unreadable(random, broken, now.marketplace_orders, time)
            self.sink.document(bad)
            if "mp_order_id" in bad:
                self.sink.know("people", f"nobody-{now.marketplace_orders}", f"order:{bad['platform']}:{bad['mp_order_id']}")

    def _do_document(self, time: int, identifier: str, status: str, back: list[dict[str, Any]]) -> None:
        self.sink.change_document(ObjectId(identifier), {"status": status, "updated_at": moment(time)}, back)

    # Complaints and fraud

    def _complaint(self, time: int, order: str, cancelled: int | None, fraud: tuple[str, int] | None) -> None:
        random = self.random
        if fraud is not None:
            self.sink.know("fraud", order, *fraud)
            if cancelled is None and random.random() < 0.9:
                self.at(time + random.randrange(10 * DAY, 45 * DAY), "chargeback", order, "fraud")
        elif cancelled is None and random.random() < 0.004:
            reason = random.choice(("not_received", "not_received", "not_as_described", "other"))
            self.at(time + random.randrange(12 * DAY, 60 * DAY), "chargeback", order, reason)

    def _do_chargeback(self, time: int, order: str, reason: str) -> None:
        self.now.chargebacks += 1
        self.sink.row("chargebacks", self.now.chargebacks, order, reason, sql_time(time))

    def _taken_over_order(self, time: int, person: SandboxPerson) -> None:
        """A stranger logs in as the person after some tries, changes the address, and buys what sells well."""
        random, user = self.random, person.web or 0
        device, ip = f"d-{random.getrandbits(44):011x}", self._some_ip()
        session = f"s-{self._session()}"
        start = time - random.randrange(10 * MINUTE, 40 * MINUTE)
        for attempt in range(random.randrange(2, 6)):
            self._event(start + attempt * 9000, "login_failed", user, session, device, ip, "web", "{}")
        self._event(start + 70_000, "account_changed", user, session, device, ip, "web", '{"field":"address"}')
        drop = f"Parcel box {random.randrange(100, 999)}, {random.choice(person.country.cities)}"
        self._web_order(time, person, device=device, ip=ip, address=drop, fraud=("takeover", -1))

    def _plan_ring(self, start: int, most: int) -> int:
        """Accounts made today by one group, their tested cards and their orders; returns how many orders."""
        now, random = self.now, self.random
        now.rings += 1
        ring = now.rings
        devices = [f"d-{random.getrandbits(44):011x}" for _ in range(random.randrange(1, 3))]
        cards = [f"card-{random.getrandbits(48):012x}" for _ in range(random.randrange(1, 3))]
        cards += [random.choice(self.person(random.randrange(now.people_by_day[0])).cards)]
        network = self._some_ip().rsplit(".", 1)[0]
        drop = f"Unit {random.randrange(1, 60)}, Depot Road {random.randrange(1, 90)}"
        begin = start + random.randrange(0, 16 * HOUR)
        orders = min(most, random.randrange(5, 9))
        accounts = random.randrange(3, 6)
        for member in range(accounts):
            now.ring_accounts += 1
            user_id = FIRST_USER_ID + now.ring_accounts * USERS_PER_PERSON + 3
            self.at(begin + member * 6 * MINUTE, "ring_account", ring, user_id, now.ring_accounts, drop)
        first = now.ring_accounts - accounts + 1
        for count in range(orders):
            member = first + count % accounts
            time = begin + 40 * MINUTE + count * random.randrange(4 * MINUTE, 25 * MINUTE)
            place = (random.choice(devices), f"{network}.{random.randrange(1, 255)}", random.choice(cards), drop)
            self.at(
                min(time, start + DAY - MINUTE), "ring_order", ring, member, *place, random.randrange(1, 5) if count < 3 else 0
            )
        return orders

    def _ring_member(self, member: int) -> SandboxPerson:
        return make_person(self.seed + 99_991, member, 0)

    def _do_ring_account(self, time: int, ring: int, user_id: int, member: int, drop: str) -> None:
        person = self._ring_member(member)
        email = f"{person.first.lower()[:3]}{self.random.randrange(10_000)}{member:x}@mail.example"
        place = (drop, person.country.cities[0], person.country.code)
        when = sql_time(time)
        self.sink.row("users", user_id, email, "f", None, "f", person.name, *place, None, when, when, *self._consent(user_id))
        self.sink.know("people", f"ring-{ring}-{member}", f"user:{user_id}")

    def _do_ring_order(self, time: int, ring: int, member: int, device: str, ip: str, card: str, drop: str, tested: int) -> None:
        person = self._ring_member(member)
        user_id = FIRST_USER_ID + member * USERS_PER_PERSON + 3
        address = f"{drop}, {person.country.cities[0]}"
        self._web_order(
            *(time, person),
            user_id=user_id,
            device=device,
            ip=ip,
            card=card,
            address=address,
            tested=tested,
            fraud=("ring", ring),
        )

    # Behaviour

    def _session(self) -> int:
        self.now.sessions += 1
        return self.now.sessions

    def _some_ip(self) -> str:
        random = self.random
        return (
            f"{random.choice((45, 91, 185, 198, 203))}.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        )

    def _browse(
        self,
        time: int,
        user: int,
        device: str,
        ip: str,
        lines: list[MarketplaceLine],
        order: str,
        card: str | None,
        tested: int = 0,
    ) -> None:
        """The session that ends in an order."""
        random, session = self.random, f"s-{self._session()}"
        who = (user, session, device, ip, "web")
        at = time - random.randrange(2 * MINUTE, 6 * MINUTE) if tested else time - random.randrange(4 * MINUTE, 25 * MINUTE)
        pause = max(1000, (time - at) // (6 + 2 * len(lines)))
        if random.random() < 0.5:
            self._event(at, "login_failed" if random.random() < 0.04 else "login", *who, "{}")
        if random.random() < 0.3:
            at += pause
            word = self.catalogue[lines[0].product].name.split(" ")[1].lower()
            self._event(at, "search", *who, f'{{"query":"{word}"}}')
        for line in lines:
            at += pause
            self._event(at, "view_product", *who, self._seen(line.product))
            at += pause // 2
            self._event(
                at,
                "add_to_cart",
                *who,
                f'{{"product_id":"{self.catalogue[line.product].product_id}","quantity":{line.quantity}}}',
            )
        if random.random() < 0.35:
            self._event(at + pause // 3, "click", *who, f'{{"product_id":"{self.catalogue[self._product(False)].product_id}"}}')
        if self.now.today >= self.now.new_things_from and random.random() < 0.1:
            self._event(at + pause // 4, "wishlist_added", *who, self._seen(self._product(False)))
        at = max(at + pause, time - 40_000)
        self._event(at, "checkout_started", *who, f'{{"order_ref":"{order}"}}')
        failures = tested if tested else 1 if random.random() < 0.03 else 0
        for attempt in range(failures):
            tried = f"card-{random.getrandbits(48):012x}" if tested else card
            failed = f'{{"order_ref":"{order}","outcome":"declined","card_fingerprint":"{tried}"}}'
            self._event(at + 4000 * (attempt + 1), "payment_attempted", *who, failed)
        paid = f'{{"order_ref":"{order}","outcome":"approved","card_fingerprint":"{card}"}}'
        self._event(time + 1500, "payment_attempted", *who, paid)

    def _seen(self, product: int) -> str:
        found = f'"product_id":"{self.catalogue[product].product_id}"'
        if self.now.today < self.now.new_things_from:
            return f"{{{found}}}"
        # The web team begins an experiment half-way: a field nobody announced.
        return f'{{{found},"experiment":{{"name":"gallery","variant":"{"AB"[product % 2]}"}}}}'

    def _do_browse(self, time: int) -> None:
        """Somebody only looks; half of them are not logged in."""
        random, person = self.random, self._buyer(time)
        user = person.web if random.random() < 0.5 else None
        who = (user, f"s-{self._session()}", random.choice(person.devices), person.ip, "web")
        for step in range(random.randrange(1, 5)):
            product = self._product(False)
            kind = "view_product" if step % 2 == 0 else "click"
            self._event(time + step * 20_000, kind, *who, self._seen(product))

    # Stock that moves by itself

    def _plan_stock(self, start: int) -> None:
        random, stock = self.random, self.stock
        pairs = len(stock.book)
        counts = min(40.0, max(0.2, 0.3 * self.now.per_day))
        for _ in range(_poisson(random, counts)):
            # Round and round, so that every shelf is counted some time.
            stock.counted = (stock.counted + 379) % pairs
            self.at(start + random.randrange(5 * HOUR, 7 * HOUR), "count", stock.counted)
        busy = min(1.0, self.now.per_day / 50)
        for _ in range(_poisson(random, THEFTS_PER_DAY * busy)):
            self.at(start + random.randrange(9 * HOUR, 21 * HOUR), "theft", random.randrange(pairs), random.randrange(1, 4))
        for _ in range(_poisson(random, 1.2 * busy)):
            self.at(start + random.randrange(8 * HOUR, 20 * HOUR), "adjust", random.randrange(pairs))
        for _ in range(_poisson(random, 2.0 * busy)):
            self.at(start + random.randrange(4 * HOUR, 8 * HOUR), "transfer", random.randrange(PRODUCTS))
        if random.random() < 0.5 * busy:
            self.at(start + 3 * HOUR, "price", random.randrange(PRODUCTS))

    def _order_more(self, time: int, pair: int) -> None:
        quantity = self.stock.wants(pair)
        if not quantity:
            return
        self.now.purchases += 1
        purchase = f"PO-{self.now.purchases}"
        self.stock.incoming[pair] += quantity
        self._stock_event(time + 60_000, "stock_incoming", pair, quantity, {"purchase_order": purchase})
        self.at(time + self.random.randrange(2 * DAY, 8 * DAY), "receive", pair, quantity, purchase)

    def _do_receive(self, time: int, pair: int, quantity: int, purchase: str) -> None:
        self.stock.incoming[pair] -= quantity
        self.stock.receive(pair, quantity)
        self._stock_event(time, "stock_received", pair, quantity, {"purchase_order": purchase})

    def _do_count(self, time: int, pair: int) -> None:
        found = self.stock.there[pair]
        if found > 0:
            self.stock.book[pair] = found
            self._stock_event(time, "stock_counted", pair, found, {})

    def _do_theft(self, time: int, pair: int, quantity: int) -> None:
        stock = self.stock
        if stock.there[pair] - stock.reserved[pair] >= quantity:
            stock.there[pair] -= quantity
            store, product = stock.place(pair)
            self.sink.know("thefts", store, self.catalogue[product].product_id, quantity, moment(time))

    def _do_adjust(self, time: int, pair: int) -> None:
        random, stock = self.random, self.stock
        reason, sign = random.choice((("damage", -1), ("damage", -1), ("theft", -1), ("found", 1), ("correction", 1)))
        if sign < 0 and stock.free(pair) < 1:
            return
        stock.receive(pair, sign)
        self._stock_event(time, "stock_adjusted", pair, 1, {"sign": sign, "reason": reason})

    def _do_transfer(self, time: int, product: int) -> None:
        """From a warehouse to a store of the same country."""
        random, stock = self.random, self.stock
        store = random.randrange(3, len(STORES))
        source, target = WAREHOUSE_OF[STORES[store].country] * PRODUCTS + product, store * PRODUCTS + product
        quantity = min(random.randrange(1, 6), stock.free(source))
        if quantity > 0:
            stock.receive(source, -quantity)
            stock.receive(target, quantity)
            self._stock_event(time, "stock_transferred", source, quantity, {"to_store_id": STORES[store].store_id})
            self._order_more(time, source)

    def _do_price(self, time: int, product: int) -> None:
        if time <= self.now.live_from:
            return
        price = (
            self.catalogue[product].dollars
            * NOMINAL.get(self.now.base_currency, 1.0)
            * self.random.choice((0.9, 0.95, 1.05, 1.1))
        )
        self.sink.change(
            "UPDATE products SET list_price=%s, updated_at=%s WHERE product_id=%s",
            decimal_text(round(price * 100), 2),
            sql_time(time),
            self.catalogue[product].product_id,
        )

    # Messages

    def _stock_event(
        self, time: int, kind: str, pair: int, quantity: int, more: dict[str, Any], channel: str = "warehouse"
    ) -> None:
        store, product = self.stock.place(pair)
        name = self.catalogue[product].product_id
        rest = json.dumps(more, separators=(",", ":"))[1:] if more else "}"
        metadata = f'{{"store_id":"{store}","product_id":"{name}","quantity":{quantity}{"," if more else ""}{rest}'
        value = (
            f'{{"event_id":"{self._event_id(time)}","event_type":"{kind}","timestamp":"{_iso(time)}",'
            f'"channel":"{channel}","metadata":{metadata}}}'
        )
        self._send(time, f"{store}|{name}", value)

    def _event(
        self, time: int, kind: str, user: int | None, session: str, device: str, ip: str, channel: str, metadata: str
    ) -> None:
        value = (
            f'{{"event_id":"{self._event_id(time)}","event_type":"{kind}","timestamp":"{_iso(time)}",'
            f'"user_id":{"null" if user is None else user},"session_id":"{session}","device_id":"{device}","ip_address":"{ip}",'
            f'"channel":"{channel}","metadata":{metadata}}}'
        )
        self._send(time, device if user is None else str(user), value)

    def _send(self, time: int, key: str, value: str) -> None:
        """Most messages arrive at once and once; some later, some twice, and a few are unreadable."""
        random = self.random
        draw = random.random()
        if draw < LATE:
            self.at(time + random.randrange(5 * MINUTE, 3 * DAY), "send", key, value)
            return
        self.sink.event(key, value, time)
        if draw < LATE + TWICE:
            self.at(time + random.randrange(1000, 2 * DAY), "send", key, value)
        elif draw > 1 - BROKEN:
            self.sink.event(key, _broken(random, value), time)

    def _do_send(self, time: int, key: str, value: str) -> None:
        self.sink.event(key, value, time)

    def _event_id(self, time: int) -> str:
        high = time >> 15
        return (
            f"{_LOW[high >> 30][2]}{_LOW[high >> 15 & 0x7FFF]}{_LOW[high & 0x7FFF]}{_LOW[time & 0x7FFF]}"
            f"{self.random.getrandbits(64):016X}"
        )


def _iso(time: int) -> str:
    return datetime.fromtimestamp(time // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time % 1000:03d}Z"


def _broken(random: Random, value: str) -> bytes:
    style = random.randrange(4)
    if style == 0:
        return value[: len(value) // 2].encode()
    if style == 1:
        return b"\xff\xfe\x00 not text"
    # The fields as they stand in the message before: without its id, or without its time.
    content = json.loads(value)
    content.pop("event_id" if style == 2 else "timestamp")
    return json.dumps(content).encode()


def _cumulated(weights: list[float]) -> list[float]:
    total, sums = 0.0, []
    for one in weights:
        total += one
        sums.append(total)
    return sums


def _poisson(random: Random, mean: float) -> int:
    if mean <= 0:
        return 0
    if mean > 30:
        return max(0, round(random.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, random.random()
    while product > limit:
        product *= random.random()
        count += 1
    return count
