"""Fraud: accounts that are taken over, and rings of new accounts with stolen cards."""

from __future__ import annotations

from app.sandbox.people import DAY, FIRST_USER_ID, USERS_PER_PERSON, SandboxPerson, make_person
from app.sandbox.simulation.customers import CustomerSimulation
from app.sandbox.simulation.messages import Messages
from app.sandbox.simulation.orders import FraudDetails, OrderSimulation
from app.sandbox.simulation.progress import HOUR, MINUTE, sql_time
from app.sandbox.simulation.state import Simulation


class FraudSimulation:
    """Places fraudulent orders."""

    def __init__(
        self, simulation: Simulation, messages: Messages, customers: CustomerSimulation, orders: OrderSimulation
    ) -> None:
        self.simulation, self.messages, self.customers, self.orders = simulation, messages, customers, orders

    def order_with_stolen_account(self, time: int, person: SandboxPerson) -> None:
        """Log in as the person after some tries, change the address, and order."""
        simulation, random = self.simulation, self.simulation.random
        device, ip = f"d-{random.getrandbits(44):011x}", simulation.draw_ip()
        visitor = (person.web or 0, simulation.next_session(), device, ip, "web")
        start = time - random.randrange(10 * MINUTE, 40 * MINUTE)
        for attempt in range(random.randrange(2, 6)):
            self.messages.behaviour_event(start + attempt * 9000, "login_failed", visitor)
        self.messages.behaviour_event(start + 70_000, "account_changed", visitor, '{"field":"address"}')
        drop = f"Parcel box {random.randrange(100, 999)}, {random.choice(person.country.cities)}"
        self.orders.order_on_web(time, person, FraudDetails(device=device, ip=ip, address=drop, kind="takeover"))

    def plan_ring(self, start: int, max_orders: int) -> int:
        """Schedule the accounts and orders of a new ring today. Return the number of orders."""
        simulation, random, now = self.simulation, self.simulation.random, self.simulation.now
        now.rings += 1
        ring = now.rings
        devices = [f"d-{random.getrandbits(44):011x}" for _ in range(random.randrange(1, 3))]
        cards = [f"card-{random.getrandbits(48):012x}" for _ in range(random.randrange(1, 3))]
        cards += [random.choice(simulation.person(random.randrange(now.people_by_day[0])).cards)]
        network = simulation.draw_ip().rsplit(".", 1)[0]
        drop = f"Unit {random.randrange(1, 60)}, Depot Road {random.randrange(1, 90)}"
        begin = start + random.randrange(0, 16 * HOUR)
        orders = min(max_orders, random.randrange(5, 9))
        accounts = random.randrange(3, 6)
        for member in range(accounts):
            now.ring_accounts += 1
            user_id = _ring_user_id(now.ring_accounts)
            simulation.at(begin + member * 6 * MINUTE, "ring_account", ring, user_id, now.ring_accounts, drop)
        first = now.ring_accounts - accounts + 1
        for count in range(orders):
            member = first + count % accounts
            time = begin + 40 * MINUTE + count * random.randrange(4 * MINUTE, 25 * MINUTE)
            place = (random.choice(devices), f"{network}.{random.randrange(1, 255)}", random.choice(cards), drop)
            tested = random.randrange(1, 5) if count < 3 else 0
            simulation.at(min(time, start + DAY - MINUTE), "ring_order", ring, member, *place, tested)
        return orders

    def open_ring_account(self, time: int, ring: int, user_id: int, member: int, drop: str) -> None:
        """Create the account of a member of a ring."""
        simulation, person = self.simulation, self._ring_member(member)
        email = f"{person.first.lower()[:3]}{simulation.random.randrange(10_000)}{member:x}@mail.example"
        place, when = (drop, person.country.cities[0], person.country.code), sql_time(time)
        consent = self.customers.consent_values(user_id)
        simulation.sink.row("users", user_id, email, "f", None, "f", person.name, *place, None, when, when, *consent)
        simulation.sink.add_truth("people", f"ring-{ring}-{member}", f"user:{user_id}")

    def place_ring_order(
        self, time: int, ring: int, member: int, device: str, ip: str, card: str, drop: str, tested: int
    ) -> None:
        """Place the order of a member of a ring."""
        person = self._ring_member(member)
        details = FraudDetails(
            user_id=_ring_user_id(member),
            device=device,
            ip=ip,
            card=card,
            address=f"{drop}, {person.country.cities[0]}",
            tested=tested,
            kind="ring",
            ring=ring,
        )
        self.orders.order_on_web(time, person, details)

    def _ring_member(self, member: int) -> SandboxPerson:
        return make_person(self.simulation.seed + 99_991, member, 0)


def _ring_user_id(member: int) -> int:
    return FIRST_USER_ID + member * USERS_PER_PERSON + 3
