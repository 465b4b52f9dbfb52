"""A simulated retailer, one day after the other.

`Shop.day` simulates a day: customers join, browse, and order on the web, in stores and on marketplaces; orders change
status; stock is reserved, sold, purchased, counted and stolen; fraud is committed. Everything is written to a `Sink` as
it happens. Future actions wait in `Simulation.later`, which reaches a few months ahead at most, so memory follows the
size of a day and not the length of history. People are computed from their number, not stored (`people.py`).

Rows are written as of `live_from`. Later changes become an UPDATE, DELETE or replaced document. While history is
loaded, `live_from` is two days before its end; in a step it is the step's beginning.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

from app.sandbox.catalogue import NOMINAL, decimal_text, rates
from app.sandbox.people import DAY
from app.sandbox.places import SHOPS_OF, STORES
from app.sandbox.simulation.browsing import BrowsingSimulation
from app.sandbox.simulation.customers import CustomerSimulation
from app.sandbox.simulation.fraud import FraudSimulation
from app.sandbox.simulation.messages import Messages
from app.sandbox.simulation.orders import OrderSimulation
from app.sandbox.simulation.progress import HOUR, MINUTE, ShopProgress, as_date, draw_poisson, draw_time, sql_time
from app.sandbox.simulation.state import Action, Simulation
from app.sandbox.simulation.warehouse import StockSimulation
from app.sandbox.sink import Sink
from app.sandbox.stock import StoreStock

PEOPLE_PER_ORDER = 0.2
PEOPLE_BEFORE_FIRST_DAY = 0.25
"""Share of all customers who joined before the first day."""


class Shop:
    """The simulation's parts, wired, and the course of a day."""

    def __init__(
        self, progress: ShopProgress, sink: Sink, stock: StoreStock | None = None, later: dict[int, list[Action]] | None = None
    ) -> None:
        self.simulation = Simulation(progress, sink, stock, later)
        messages = Messages(self.simulation)
        self.customers = CustomerSimulation(self.simulation, messages)
        self.warehouse = StockSimulation(self.simulation, messages)
        self.browsing = BrowsingSimulation(self.simulation, messages)
        self.orders = OrderSimulation(self.simulation, self.customers, self.browsing, self.warehouse)
        self.fraud = FraudSimulation(self.simulation, messages, self.customers, self.orders)
        self.actions: dict[str, Callable[..., None]] = {
            "join": self.customers.join,
            "second": self.customers.open_second_account,
            "change": self.customers.change_profile,
            "leave": self.customers.leave,
            "browse": self.browsing.browse,
            "send": messages.resend,
            "order": self._place_order,
            "status": self.orders.change_status,
            "document": self.orders.change_document,
            "chargeback": self.orders.write_chargeback,
            "ring_account": self.fraud.open_ring_account,
            "ring_order": self.fraud.place_ring_order,
            "release": self.warehouse.release,
            "ship": self.warehouse.ship,
            "stock_back": self.warehouse.take_back,
            "receive": self.warehouse.receive,
            "count": self.warehouse.count,
            "theft": self.warehouse.steal,
            "adjust": self.warehouse.adjust,
            "transfer": self.warehouse.transfer,
            "price": self.warehouse.change_price,
        }

    @property
    def progress(self) -> ShopProgress:
        """The state to keep until the next step."""
        return self.simulation.now

    def open(self, expected_orders: int) -> None:
        """Write products, stores, opening stock and the customers who joined before the first day."""
        simulation, now = self.simulation, self.simulation.now
        start = now.first_day * DAY
        opened = sql_time(start - 30 * DAY)
        factor = NOMINAL.get(now.base_currency, 1.0)
        for product in simulation.catalogue:
            price = decimal_text(round(product.dollars * factor * 100), 2)
            names = (product.product_id, product.name, product.category, product.brand)
            simulation.sink.row("products", *names, price, now.base_currency, opened)
        for store in STORES:
            simulation.sink.row("stores", store.store_id, store.name, store.kind, store.city, store.country, opened)
        now.old_people = max(10, int(expected_orders * PEOPLE_PER_ORDER * PEOPLE_BEFORE_FIRST_DAY))
        self._write_rates(now.first_day - 1)
        simulation.random = Random(f"{simulation.seed}/open")
        self.warehouse.open(start)
        now.people_by_day.append(now.old_people)
        for number in range(now.old_people):
            self.customers.join(0, number)

    def day(self, orders: int) -> None:
        """Simulate the day after `today`, with this many orders."""
        simulation, now = self.simulation, self.simulation.now
        simulation.begin_day()
        if now.today == now.new_things_from:
            simulation.add_column("orders", "delivery_method", "text")
        self._write_rates(now.today)
        simulation.load_agenda()
        self._plan_day(orders)
        while simulation.agenda:
            time, _, kind, arguments = heapq.heappop(simulation.agenda)
            self.actions[kind](time, *arguments)
        now.orders += orders
        if simulation.sink.full():
            simulation.sink.flush()

    def _plan_day(self, orders: int) -> None:
        """Schedule today's new customers, orders, sessions and stock movements."""
        simulation, now, random = self.simulation, self.simulation.now, self.simulation.random
        start = now.today * DAY
        left = orders - self._plan_new_customers(start, orders)
        if random.random() < now.per_day * 0.001 and left >= 4:
            left -= self.fraud.plan_ring(start, left)
        for _ in range(left):
            simulation.at(draw_time(random, start), "order", -1)
        for _ in range(draw_poisson(random, orders * 0.12)):
            simulation.at(draw_time(random, start), "browse")
        self.warehouse.plan_day(start)

    def _plan_new_customers(self, start: int, orders: int) -> int:
        """Schedule the customers who join today; most of them order at once. Return the number of their orders."""
        simulation, now, random = self.simulation, self.simulation.now, self.simulation.random
        known = now.people_by_day[-1]
        joining = round((now.orders + orders) * PEOPLE_PER_ORDER * (1 - PEOPLE_BEFORE_FIRST_DAY)) + now.old_people - known
        now.people_by_day.append(known + max(0, joining))
        first_orders = 0
        for number in range(known, known + joining):
            joined = simulation.person(number).joined
            simulation.at(joined, "join", number)
            if first_orders < orders and random.random() < 0.9:
                first_orders += 1
                simulation.at(min(joined + random.randrange(MINUTE, 3 * HOUR), start + DAY - MINUTE), "order", number)
        return first_orders

    def _place_order(self, time: int, number: int) -> None:
        """Place the order of a person, or of a drawn buyer (number -1), in a drawn channel."""
        simulation, random = self.simulation, self.simulation.random
        if number < 0 and random.random() < 0.09:
            self.orders.order_in_store(time, None)
            return
        person = simulation.person(number) if number >= 0 else simulation.draw_buyer()
        has_left = person.leaves is not None and person.leaves <= max(time, simulation.now.live_from)
        web = 0.62 if person.web is not None and not has_left else 0.0
        store = 0.42 if person.card is not None and not has_left and SHOPS_OF[person.country.code] else 0.0
        draw = random.random() * (web + store + 0.34)
        if draw < web:
            if number < 0 and random.random() < 0.006:
                self.fraud.order_with_stolen_account(time, person)
            else:
                self.orders.order_on_web(time, person)
        elif draw < web + store:
            self.orders.order_in_store(time, person)
        else:
            self.orders.order_on_marketplace(time, person)

    def _write_rates(self, day: int) -> None:
        """Write the exchange rates of a working day."""
        now, when = self.simulation.now, as_date(day)
        if when.weekday() < 5 or day < now.first_day:
            for currency, rate in rates(self.simulation.seed, day, now.base_currency):
                self.simulation.sink.row("exchange_rates", when.isoformat(), currency, rate)
