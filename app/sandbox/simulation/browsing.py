"""Sessions on the web site: those that end in an order, and those that do not."""

from __future__ import annotations

from dataclasses import dataclass

from app.sandbox.marketplace import MarketplaceLine
from app.sandbox.simulation.messages import Messages
from app.sandbox.simulation.progress import MINUTE
from app.sandbox.simulation.state import Simulation


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """An order on the web, as the session before it needs it. tested: number of cards that were declined before."""

    time: int
    order: str
    user: int
    device: str
    ip: str
    card: str
    lines: list[MarketplaceLine]
    tested: int = 0


class BrowsingSimulation:
    """Sends the events of sessions."""

    def __init__(self, simulation: Simulation, messages: Messages) -> None:
        self.simulation, self.messages = simulation, messages

    def browse(self, time: int) -> None:
        """Send a session without an order; half of the visitors are not logged in."""
        simulation, person = self.simulation, self.simulation.draw_buyer()
        random = simulation.random
        user = person.web if random.random() < 0.5 else None
        visitor = (user, simulation.next_session(), random.choice(person.devices), person.ip, "web")
        for step in range(random.randrange(1, 5)):
            product = simulation.draw_product(False)
            kind = "view_product" if step % 2 == 0 else "click"
            self.messages.behaviour_event(time + step * 20_000, kind, visitor, self._product_metadata(product))

    def checkout_session(self, checkout: Checkout) -> None:
        """Send the session that ends in an order."""
        simulation, random, send = self.simulation, self.simulation.random, self.messages.behaviour_event
        time, lines = checkout.time, checkout.lines
        visitor = (checkout.user, simulation.next_session(), checkout.device, checkout.ip, "web")
        earliest, latest = (2 * MINUTE, 6 * MINUTE) if checkout.tested else (4 * MINUTE, 25 * MINUTE)
        at = time - random.randrange(earliest, latest)
        pause = max(1000, (time - at) // (6 + 2 * len(lines)))
        if random.random() < 0.5:
            send(at, "login_failed" if random.random() < 0.04 else "login", visitor)
        if random.random() < 0.3:
            at += pause
            word = simulation.catalogue[lines[0].product].name.split(" ")[1].lower()
            send(at, "search", visitor, f'{{"query":"{word}"}}')
        for line in lines:
            at += pause
            send(at, "view_product", visitor, self._product_metadata(line.product))
            at += pause // 2
            product_id = simulation.catalogue[line.product].product_id
            send(at, "add_to_cart", visitor, f'{{"product_id":"{product_id}","quantity":{line.quantity}}}')
        if random.random() < 0.35:
            product_id = simulation.catalogue[simulation.draw_product(False)].product_id
            send(at + pause // 3, "click", visitor, f'{{"product_id":"{product_id}"}}')
        if simulation.now.today >= simulation.now.new_things_from and random.random() < 0.1:
            send(at + pause // 4, "wishlist_added", visitor, self._product_metadata(simulation.draw_product(False)))
        at = max(at + pause, time - 40_000)
        send(at, "checkout_started", visitor, f'{{"order_ref":"{checkout.order}"}}')
        self._payments(at, checkout, visitor)

    def _payments(self, at: int, checkout: Checkout, visitor: tuple[int, str, str, str, str]) -> None:
        random = self.simulation.random
        declined = checkout.tested if checkout.tested else 1 if random.random() < 0.03 else 0
        for attempt in range(declined):
            card = f"card-{random.getrandbits(48):012x}" if checkout.tested else checkout.card
            metadata = f'{{"order_ref":"{checkout.order}","outcome":"declined","card_fingerprint":"{card}"}}'
            self.messages.behaviour_event(at + 4000 * (attempt + 1), "payment_attempted", visitor, metadata)
        metadata = f'{{"order_ref":"{checkout.order}","outcome":"approved","card_fingerprint":"{checkout.card}"}}'
        self.messages.behaviour_event(checkout.time + 1500, "payment_attempted", visitor, metadata)

    def _product_metadata(self, product: int) -> str:
        """Return the metadata of a product view. Half-way an unannounced field for an experiment appears."""
        product_id = f'"product_id":"{self.simulation.catalogue[product].product_id}"'
        if self.simulation.now.today < self.simulation.now.new_things_from:
            return f"{{{product_id}}}"
        return f'{{{product_id},"experiment":{{"name":"gallery","variant":"{"AB"[product % 2]}"}}}}'
