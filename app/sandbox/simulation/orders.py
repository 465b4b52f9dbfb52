"""Orders on the web, in stores and on marketplaces: baskets, statuses, returns and chargebacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bson import ObjectId

from app.sandbox.catalogue import decimal_text, local_price
from app.sandbox.marketplace import MarketplaceLine, contact, document, moment, object_id, order_number, plain_amount, unreadable
from app.sandbox.people import DAY, SandboxPerson
from app.sandbox.places import SHOPS_OF, STORES, WAREHOUSE_OF
from app.sandbox.simulation.browsing import BrowsingSimulation, Checkout
from app.sandbox.simulation.customers import CustomerSimulation
from app.sandbox.simulation.progress import HOUR, MINUTE, sql_time
from app.sandbox.simulation.state import PRODUCTS, Simulation
from app.sandbox.simulation.warehouse import StockSimulation, pair_quantities
from app.sandbox.sink import Value

UNREADABLE_DOCUMENTS = 0.0006
"""Share of marketplace orders that are followed by a document that breaks the contract."""

Statuses = list[tuple[int, str]]
"""(time, status) of an order, oldest first."""


@dataclass(frozen=True, kw_only=True)
class FraudDetails:
    """How a fraudulent order differs from one of the account's owner. tested: cards tried before. ring: -1 for none."""

    device: str
    ip: str
    address: str
    kind: str
    ring: int = -1
    user_id: int | None = None
    card: str | None = None
    tested: int = 0


@dataclass(frozen=True)
class OrderLife:
    """The statuses of an order, and the times at which it is cancelled, shipped and returned."""

    statuses: Statuses
    cancelled: int | None
    shipped: int
    returned: int | None


@dataclass(frozen=True, kw_only=True)
class OrderHeader:
    """The columns of a row of `orders` that do not follow from its lines and statuses."""

    order_id: int
    user_id: int | None
    source: str
    store_id: str | None
    payment_method: str
    card: str | None = None
    ip: str | None = None
    device: str | None = None
    address: str | None = None


class OrderSimulation:
    """Writes orders, and the events and stock movements that belong to them."""

    def __init__(
        self, simulation: Simulation, customers: CustomerSimulation, browsing: BrowsingSimulation, warehouse: StockSimulation
    ) -> None:
        self.simulation, self.customers, self.browsing, self.warehouse = simulation, customers, browsing, warehouse

    # The web shop

    def order_on_web(self, time: int, person: SandboxPerson, fraud: FraudDetails | None = None) -> None:
        """Write an order on the web with the session before it. fraud: for an order that the person did not place."""
        simulation, random = self.simulation, self.simulation.random
        profile = simulation.profile(person, time)
        user = self._web_account(time, person, fraud.user_id if fraud else None)
        device = fraud.device if fraud else random.choice(person.devices)
        ip = fraud.ip if fraud else (person.ip if random.random() < 0.85 else simulation.draw_ip())
        card = (fraud.card if fraud else None) or random.choice(person.cards)
        address = fraud.address if fraud else profile.address
        if fraud is None and random.random() < 0.04:
            address = simulation.person(random.randrange(simulation.now.people_by_day[0])).first_profile.address
        store = WAREHOUSE_OF[person.country.code]
        lines = self._basket(time, store, person, expensive=fraud is not None)
        life = self._draw_life(time, 0.1 if fraud else 0.06, 0.0 if fraud else 0.06)
        order_id, order = self._next_order()
        self.browsing.checkout_session(
            Checkout(
                time=time,
                order=order,
                user=user,
                device=device,
                ip=ip,
                card=card,
                lines=lines,
                tested=fraud.tested if fraud else 0,
            )
        )
        method = "card" if fraud or random.random() < 0.65 else random.choice(("wallet", "bank_transfer"))
        header = OrderHeader(
            order_id=order_id,
            user_id=user,
            source="web",
            store_id=None,
            payment_method=method,
            card=card if method == "card" else None,
            ip=ip,
            device=device,
            address=address,
        )
        self._write_order(time, header, person, lines, life)
        self._fulfil(time, order, store, lines, life)
        self._schedule_chargeback(time, order, life.cancelled, fraud)

    def _web_account(self, time: int, person: SandboxPerson, user_id: int | None) -> int:
        """Return the account that an order is placed with: 30 percent use their second one, where they have one."""
        user = user_id or person.web or 0
        if (
            user == person.web
            and person.second is not None
            and person.second in self.customers.user_ids(person, time)
            and self.simulation.random.random() < 0.3
        ):
            return person.second
        return user

    def _next_order(self) -> tuple[int, str]:
        """Return the id of the next order in PostgreSQL, as a number and as text."""
        self.simulation.now.postgres_orders += 1
        return self.simulation.now.postgres_orders, str(self.simulation.now.postgres_orders)

    # Stores

    def order_in_store(self, time: int, person: SandboxPerson | None) -> None:
        """Write a sale in a store: paid and taken away at once. person: None for an unknown buyer."""
        simulation, random = self.simulation, self.simulation.random
        buyer = person or self._draw_local_person()
        store = random.choice(SHOPS_OF[buyer.country.code])
        lines = self._basket(time, store, buyer)
        returned = time + random.randrange(2 * DAY, 14 * DAY) if random.random() < 0.04 else None
        statuses = [(time, "delivered")] + ([(returned, "returned")] if returned else [])
        order_id, order = self._next_order()
        method = random.choice(("cash", "card", "card", "wallet"))
        header = OrderHeader(
            order_id=order_id,
            user_id=person.card if person else None,
            source="pos",
            store_id=STORES[store].store_id,
            payment_method=method,
            card=random.choice(person.cards) if person and method == "card" else None,
        )
        self._write_order(time, header, buyer, lines, OrderLife(statuses, None, time, returned))
        self.warehouse.sell(time, order, pair_quantities(store, lines))
        if returned is not None:
            simulation.at(returned, "stock_back", order, pair_quantities(store, lines))

    def _draw_local_person(self) -> SandboxPerson:
        """Return a person whose country has a store."""
        while True:
            person = self.simulation.person(self.simulation.random.randrange(self.simulation.now.people_by_day[-2]))
            if SHOPS_OF[person.country.code]:
                return person

    # Marketplaces

    def order_on_marketplace(self, time: int, person: SandboxPerson) -> None:
        """Write an order as a document. Old documents have one product name instead of a list of items."""
        simulation, random, now = self.simulation, self.simulation.random, self.simulation.now
        platform = random.choice(person.platforms)
        store = WAREHOUSE_OF[person.country.code]
        old = time // DAY < now.new_things_from - 20 and random.random() < 0.35
        lines = self._basket(time, store, person)
        if old:
            lines = [MarketplaceLine(lines[0].product, 1, lines[0].price)]
        life = self._draw_life(time, 0.05, 0.0 if old else 0.04)
        status, since, rest = self._current_status(time, life.statuses)
        now.marketplace_orders += 1
        number = order_number(platform, now.marketplace_orders)
        identifier = object_id(simulation.seed, time, now.marketplace_orders)
        buyer = contact(random, person, simulation.profile(person, time), platform)
        content = document(
            *(random, identifier, platform, number, buyer, lines, simulation.catalogue, person.country, status, time, since, old)
        )
        returned_items = self._returned_items(lines, person)
        if status == "returned":
            content["items"] = content["items"] + returned_items
        simulation.sink.document(content)
        order = f"{platform}:{number}"
        simulation.sink.add_truth("people", person.key, f"order:{order}")
        for at, later in rest:
            simulation.at(at, "document", str(identifier), later, returned_items if later == "returned" else [])
        self._fulfil(time, order, store, lines, life)
        self._schedule_chargeback(time, order, life.cancelled, None)
        if random.random() < UNREADABLE_DOCUMENTS:
            self._write_unreadable_document(time)

    def _returned_items(self, lines: list[MarketplaceLine], person: SandboxPerson) -> list[dict[str, Any]]:
        return [
            {
                "product_id": self.simulation.catalogue[line.product].product_id,
                "product_name": self.simulation.catalogue[line.product].name,
                "quantity": -line.quantity,
                "price": plain_amount(line.price, person.country),
            }
            for line in lines
        ]

    def _write_unreadable_document(self, time: int) -> None:
        simulation, number = self.simulation, self.simulation.now.marketplace_orders
        content = unreadable(simulation.random, object_id(simulation.seed, time, 0x80000000 + number), number, time)
        simulation.sink.document(content)
        if "mp_order_id" in content:
            simulation.sink.add_truth("people", f"nobody-{number}", f"order:{content['platform']}:{content['mp_order_id']}")

    def change_document(self, time: int, identifier: str, status: str, returned_items: list[dict[str, Any]]) -> None:
        """Change the status of a marketplace order, and add returned items."""
        fields = {"status": status, "updated_at": moment(time)}
        self.simulation.sink.change_document(ObjectId(identifier), fields, returned_items)

    # Baskets and statuses

    def _basket(self, time: int, store: int, person: SandboxPerson, expensive: bool = False) -> list[MarketplaceLine]:
        """Return lines that the store has in stock, one per product."""
        simulation, random, stock = self.simulation, self.simulation.random, self.simulation.stock
        size = 1 if random.random() < 0.62 else 2 if random.random() < 0.65 else random.randrange(3, 6)
        lines: list[MarketplaceLine] = []
        chosen: set[int] = set()
        for _ in range(size):
            quantity = 1 if random.random() < 0.8 else random.randrange(2, 4)
            product = simulation.draw_product(expensive)
            for _ in range(4):
                if product not in chosen and stock.free(store * PRODUCTS + product) >= quantity:
                    break
                product = simulation.draw_product(expensive)
            if product in chosen:
                continue
            chosen.add(product)
            pair = store * PRODUCTS + product
            if stock.free(pair) < quantity:
                self.warehouse.deliver_express(time - 5, pair, quantity + 10 + int(10 * stock.daily[pair]))
            price = local_price(simulation.catalogue[product].dollars, person.country)
            if random.random() < 0.15:
                step = person.country.step
                price = max(step, price * 9 // 10 // step * step)
            lines.append(MarketplaceLine(product, quantity, price))
        return lines

    def _draw_life(self, time: int, cancel_share: float, return_share: float) -> OrderLife:
        random = self.simulation.random
        paid, shipped = time + random.randrange(20_000, 5 * MINUTE), time + random.randrange(6 * HOUR, 3 * DAY)
        statuses = [(time, "placed")]
        draw = random.random()
        if draw < cancel_share:
            cancelled = time + random.randrange(10 * MINUTE, 5 * HOUR)
            if draw < cancel_share / 2:
                statuses.append((paid, "paid"))
            cancelled = max(cancelled, paid + 1)
            return OrderLife([*statuses, (cancelled, "cancelled")], cancelled, shipped, None)
        delivered = shipped + random.randrange(DAY, 4 * DAY)
        statuses += [(paid, "paid"), (shipped, "shipped"), (delivered, "delivered")]
        if random.random() < return_share:
            returned = delivered + random.randrange(2 * DAY, 14 * DAY)
            return OrderLife([*statuses, (returned, "returned")], None, shipped, returned)
        return OrderLife(statuses, None, shipped, None)

    def _current_status(self, time: int, statuses: Statuses) -> tuple[str, int, Statuses]:
        """Return the status to write for an order placed at `time`, its time, and the changes still to come."""
        written_at = max(time, self.simulation.now.live_from)
        past = [change for change in statuses if change[0] <= written_at] or statuses[:1]
        return past[-1][1], past[-1][0], statuses[len(past) :]

    def _fulfil(self, time: int, order: str, store: int, lines: list[MarketplaceLine], life: OrderLife) -> None:
        """Reserve the lines, and schedule their sale or release, and their return."""
        self.warehouse.reserve(time + 300, order, pair_quantities(store, lines), life.cancelled, life.shipped)
        if life.returned is not None:
            self.simulation.at(life.returned, "stock_back", order, pair_quantities(store, lines))

    # Rows in PostgreSQL

    def _write_order(
        self, time: int, header: OrderHeader, buyer: SandboxPerson, lines: list[MarketplaceLine], life: OrderLife
    ) -> None:
        sink, country = self.simulation.sink, buyer.country
        status, since, rest = self._current_status(time, life.statuses)
        total = sum(line.quantity * line.price for line in lines)
        sink.row(
            "orders",
            *(header.order_id, header.user_id, header.source, header.store_id, status),
            *(country.currency, decimal_text(total, country.digits), header.payment_method),
            *(header.card, header.ip, header.device, header.address, sql_time(time), sql_time(since)),
            *self._delivery_method(header),
        )
        written: list[list[Any]] = [
            [self.simulation.catalogue[line.product].product_id, line.quantity, decimal_text(line.price, country.digits)]
            for line in lines
        ]
        for number, (product, quantity, price) in enumerate(written, 1):
            sink.row("order_items", header.order_id, number, product, quantity, price)
        if status == "returned":
            self._write_returned_lines(header.order_id, written)
        for at, later in rest:
            self.simulation.at(at, "status", header.order_id, later, written if at == life.returned else [])

    def _delivery_method(self, header: OrderHeader) -> tuple[Value, ...]:
        """Return the value of the column that `orders` gets half-way, or () before."""
        if not self.simulation.now.added_columns.get("orders"):
            return ()
        return ("pickup" if header.source == "pos" else "express" if header.order_id % 5 == 0 else "standard",)

    def _write_returned_lines(self, order_id: int, written: list[list[Any]]) -> None:
        for number, (product, quantity, price) in enumerate(written, 1 + len(written)):
            self.simulation.sink.row("order_items", order_id, number, product, -quantity, price)

    def change_status(self, time: int, order_id: int, status: str, returned_lines: list[list[Any]]) -> None:
        """Change the status of an order, and add its returned lines."""
        statement = "UPDATE orders SET status=%s, updated_at=%s WHERE order_id=%s"
        self.simulation.sink.change(statement, status, sql_time(time), order_id)
        if returned_lines:
            self._write_returned_lines(order_id, returned_lines)

    # Chargebacks

    def _schedule_chargeback(self, time: int, order: str, cancelled: int | None, fraud: FraudDetails | None) -> None:
        """Record fraud in the ground truth, and schedule its report, or one of the rare other complaints."""
        simulation, random = self.simulation, self.simulation.random
        if fraud is not None:
            simulation.sink.add_truth("fraud", order, fraud.kind, fraud.ring)
            if cancelled is None and random.random() < 0.9:
                simulation.at(time + random.randrange(10 * DAY, 45 * DAY), "chargeback", order, "fraud")
        elif cancelled is None and random.random() < 0.004:
            reason = random.choice(("not_received", "not_received", "not_as_described", "other"))
            simulation.at(time + random.randrange(12 * DAY, 60 * DAY), "chargeback", order, reason)

    def write_chargeback(self, time: int, order: str, reason: str) -> None:
        """Write a chargeback."""
        self.simulation.now.chargebacks += 1
        self.simulation.sink.row("chargebacks", self.simulation.now.chargebacks, order, reason, sql_time(time))
