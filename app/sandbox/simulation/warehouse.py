"""Stock that moves: reservations, sales and returns of orders, and purchases, counts, thefts, adjustments and transfers."""

from __future__ import annotations

from app.sandbox.catalogue import NOMINAL, decimal_text
from app.sandbox.marketplace import MarketplaceLine, moment
from app.sandbox.people import DAY
from app.sandbox.places import STORES, WAREHOUSE_OF
from app.sandbox.simulation.messages import Messages
from app.sandbox.simulation.progress import HOUR, draw_poisson, sql_time
from app.sandbox.simulation.state import PRODUCTS, Simulation

THEFTS_PER_DAY, ADJUSTMENTS_PER_DAY, TRANSFERS_PER_DAY = 1.5, 1.2, 2.0
"""Of a source with 50 orders a day or more."""

PairQuantities = list[list[int]]
"""[pair of store and product, quantity] of each line. A list, because scheduled actions are stored as JSON."""


def pair_quantities(store: int, lines: list[MarketplaceLine]) -> PairQuantities:
    """Return the pairs and quantities of an order's lines."""
    return [[store * PRODUCTS + line.product, line.quantity] for line in lines]


class StockSimulation:
    """Keeps the stock and sends its events."""

    def __init__(self, simulation: Simulation, messages: Messages) -> None:
        self.simulation, self.messages, self.stock = simulation, messages, simulation.stock

    def open(self, start: int) -> None:
        """Receive the opening stock before the first day."""
        for pair in range(len(self.stock.book)):
            time = start - 12 * HOUR + pair
            self.stock.receive(pair, self.stock.opening(pair))
            self.messages.stock_event(time, "stock_received", pair, self.stock.opening(pair), {"reason": "opening"})
            self.messages.stock_event(time + HOUR, "safety_stock_set", pair, self.stock.safety(pair), {})

    def plan_day(self, start: int) -> None:
        """Schedule today's counts, thefts, adjustments, transfers and price changes."""
        simulation, random = self.simulation, self.simulation.random
        pairs, per_day = len(self.stock.book), simulation.now.per_day
        for _ in range(draw_poisson(random, min(40.0, max(0.2, 0.3 * per_day)))):
            # a stride without a common divisor visits every shelf
            self.stock.counted = (self.stock.counted + 379) % pairs
            simulation.at(start + random.randrange(5 * HOUR, 7 * HOUR), "count", self.stock.counted)
        busy = min(1.0, per_day / 50)
        for _ in range(draw_poisson(random, THEFTS_PER_DAY * busy)):
            time = start + random.randrange(9 * HOUR, 21 * HOUR)
            simulation.at(time, "theft", random.randrange(pairs), random.randrange(1, 4))
        for _ in range(draw_poisson(random, ADJUSTMENTS_PER_DAY * busy)):
            simulation.at(start + random.randrange(8 * HOUR, 20 * HOUR), "adjust", random.randrange(pairs))
        for _ in range(draw_poisson(random, TRANSFERS_PER_DAY * busy)):
            simulation.at(start + random.randrange(4 * HOUR, 8 * HOUR), "transfer", random.randrange(PRODUCTS))
        if random.random() < 0.5 * busy:
            simulation.at(start + 3 * HOUR, "price", random.randrange(PRODUCTS))

    # OrderSimulation

    def deliver_express(self, time: int, pair: int, quantity: int) -> None:
        """Receive units that an order needs at once."""
        self.stock.receive(pair, quantity)
        self.messages.stock_event(time, "stock_received", pair, quantity, {"reason": "express"})

    def reserve(self, time: int, order: str, pairs: PairQuantities, cancelled: int | None, shipped: int) -> None:
        """Reserve the lines of an order, and schedule their sale, or their release when it is cancelled."""
        for offset, (pair, quantity) in enumerate(pairs):
            self.stock.reserved[pair] += quantity
            self.messages.stock_event(time + offset, "stock_reserved", pair, quantity, {"order_ref": order})
        if cancelled is not None:
            self.simulation.at(cancelled, "release", order, pairs)
        else:
            self.simulation.at(shipped, "ship", order, pairs)

    def release(self, time: int, order: str, pairs: PairQuantities) -> None:
        """Release the reservations of a cancelled order."""
        for offset, (pair, quantity) in enumerate(pairs):
            self.stock.reserved[pair] -= quantity
            self.messages.stock_event(time + offset, "reservation_released", pair, quantity, {"order_ref": order})

    def ship(self, time: int, order: str, pairs: PairQuantities) -> None:
        """Sell reserved units. Units stolen in the meantime are replaced first."""
        for offset, (pair, quantity) in enumerate(pairs):
            missing = quantity - self.stock.there[pair]
            if missing > 0 or self.stock.book[pair] < quantity:
                self.deliver_express(time + offset - 5, pair, max(missing, 0) + 12)
            self.stock.reserved[pair] -= quantity
            self._take(pair, quantity)
            self.messages.stock_event(time + offset, "stock_sold", pair, quantity, {"reserved": True, "order_ref": order})
            self._reorder(time + offset, pair)

    def sell(self, time: int, order: str, pairs: PairQuantities) -> None:
        """Sell units over the counter."""
        for offset, (pair, quantity) in enumerate(pairs):
            self._take(pair, quantity)
            self.messages.stock_event(time + offset, "stock_sold", pair, quantity, {"order_ref": order}, "pos")
            self._reorder(time + offset, pair)

    def take_back(self, time: int, order: str, pairs: PairQuantities) -> None:
        """Receive the units of a returned order."""
        for offset, (pair, quantity) in enumerate(pairs):
            self.stock.receive(pair, quantity)
            self.messages.stock_event(time + offset, "stock_returned", pair, quantity, {"order_ref": order})

    def _take(self, pair: int, quantity: int) -> None:
        self.stock.book[pair] -= quantity
        self.stock.there[pair] -= quantity

    # Purchases, counts, thefts

    def _reorder(self, time: int, pair: int) -> None:
        quantity = self.stock.wants(pair)
        if not quantity:
            return
        simulation = self.simulation
        simulation.now.purchases += 1
        purchase = f"PO-{simulation.now.purchases}"
        self.stock.incoming[pair] += quantity
        self.messages.stock_event(time + 60_000, "stock_incoming", pair, quantity, {"purchase_order": purchase})
        simulation.at(time + simulation.random.randrange(2 * DAY, 8 * DAY), "receive", pair, quantity, purchase)

    def receive(self, time: int, pair: int, quantity: int, purchase: str) -> None:
        """Receive the units of a purchase order."""
        self.stock.incoming[pair] -= quantity
        self.stock.receive(pair, quantity)
        self.messages.stock_event(time, "stock_received", pair, quantity, {"purchase_order": purchase})

    def count(self, time: int, pair: int) -> None:
        """Count the units on a shelf; the books follow the count."""
        found = self.stock.there[pair]
        if found > 0:
            self.stock.book[pair] = found
            self.messages.stock_event(time, "stock_counted", pair, found, {})

    def steal(self, time: int, pair: int, quantity: int) -> None:
        """Remove units without an event; only the ground truth has them."""
        if self.stock.there[pair] - self.stock.reserved[pair] >= quantity:
            self.stock.there[pair] -= quantity
            store, product = self.stock.place(pair)
            product_id = self.simulation.catalogue[product].product_id
            self.simulation.sink.add_truth("thefts", store, product_id, quantity, moment(time))

    def adjust(self, time: int, pair: int) -> None:
        """Correct the stock by one unit: damage, known theft, a found unit, a correction."""
        random = self.simulation.random
        reason, sign = random.choice((("damage", -1), ("damage", -1), ("theft", -1), ("found", 1), ("correction", 1)))
        if sign < 0 and self.stock.free(pair) < 1:
            return
        self.stock.receive(pair, sign)
        self.messages.stock_event(time, "stock_adjusted", pair, 1, {"sign": sign, "reason": reason})

    def transfer(self, time: int, product: int) -> None:
        """Move units from a warehouse to a store of the same country."""
        random, stock = self.simulation.random, self.stock
        store = random.randrange(3, len(STORES))
        source, target = WAREHOUSE_OF[STORES[store].country] * PRODUCTS + product, store * PRODUCTS + product
        quantity = min(random.randrange(1, 6), stock.free(source))
        if quantity > 0:
            stock.receive(source, -quantity)
            stock.receive(target, quantity)
            details = {"to_store_id": STORES[store].store_id}
            self.messages.stock_event(time, "stock_transferred", source, quantity, details)
            self._reorder(time, source)

    def change_price(self, time: int, product: int) -> None:
        """Change the list price of a product by 5 or 10 percent."""
        simulation = self.simulation
        if time <= simulation.now.live_from:
            return
        nominal = NOMINAL.get(simulation.now.base_currency, 1.0)
        price = simulation.catalogue[product].dollars * nominal * simulation.random.choice((0.9, 0.95, 1.05, 1.1))
        simulation.sink.change(
            "UPDATE products SET list_price=%s, updated_at=%s WHERE product_id=%s",
            decimal_text(round(price * 100), 2),
            sql_time(time),
            simulation.catalogue[product].product_id,
        )
