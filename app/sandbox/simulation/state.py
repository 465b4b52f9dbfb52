"""The state that all parts of the simulation share: progress, catalogue, stock, people and the agenda."""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from random import Random
from typing import Any

from app.sandbox.catalogue import Product, products
from app.sandbox.people import DAY, PersonProfile, SandboxPerson, activity, make_person, profile_at
from app.sandbox.simulation.progress import HOUR, ShopProgress
from app.sandbox.sink import Sink
from app.sandbox.stock import StoreStock

PRODUCTS = 120
MAX_CACHED_PEOPLE = 20_000

Action = tuple[int, int, str, list[Any]]
"""Time, sequence number, kind and arguments. Stored as JSON between two steps."""


class Simulation:
    """Shared state. `agenda` holds the rest of today as a heap; `later` holds future actions by day."""

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
        self._people: OrderedDict[int, SandboxPerson] = OrderedDict()
        self._cumulative_popularity = _cumulative([product.popularity for product in self.catalogue])
        for table, columns in progress.added_columns.items():
            self.sink.columns[table].extend(columns)

    def at(self, time: int, kind: str, *arguments: Any) -> None:
        """Schedule an action, today or later."""
        self.now.order += 1
        action = (time, self.now.order, kind, list(arguments))
        if time // DAY <= self.now.today:
            heapq.heappush(self.agenda, action)
        else:
            self.later.setdefault(time // DAY, []).append(action)

    def begin_day(self) -> None:
        """Start the day after `today` with its scheduled actions and its own random numbers."""
        self.now.today += 1
        self.random = Random(f"{self.seed}/day/{self.now.today}")

    def load_agenda(self) -> None:
        """Move the actions scheduled for today to the agenda."""
        self.agenda += self.later.pop(self.now.today, [])
        heapq.heapify(self.agenda)

    def add_column(self, table: str, column: str, kind: str) -> None:
        """Add a column to a source table; later rows have a value for it."""
        self.sink.add_column(table, column, kind)
        self.now.added_columns.setdefault(table, []).append(column)

    # People

    def person(self, number: int) -> SandboxPerson:
        """Return the person with a number."""
        person = self._people.get(number)
        if person is None:
            person = make_person(self.seed, number, self._joined(number))
            self._people[number] = person
            if len(self._people) > MAX_CACHED_PEOPLE:
                self._people.popitem(last=False)
        return person

    def _joined(self, number: int) -> int:
        """Return when a person becomes a customer."""
        index = bisect.bisect_right(self.now.people_by_day, number)
        draw = Random((self.seed << 33) ^ number)
        first = self.now.first_day * DAY
        if index == 0:
            return first - draw.randrange(1, 500 * DAY)
        return first + (index - 1) * DAY + draw.randrange(8 * HOUR, 20 * HOUR)

    def profile(self, person: SandboxPerson, time: int) -> PersonProfile:
        """Return the person's profile at a time."""
        return person.first_profile if person.first_change is None else profile_at(self.seed, person, time)

    def draw_buyer(self) -> SandboxPerson:
        """Return a person who had joined by yesterday; loyal and recent customers are more likely."""
        random, people = self.random, self.now.people_by_day[-2]
        number = 0
        for _ in range(8):
            draw = random.random()
            number = int(people * (1 - draw * draw if random.random() < 0.5 else draw))
            if number < people and random.random() < activity(self.seed, number):
                break
        return self.person(min(number, people - 1))

    # Products, sessions, addresses

    def draw_product(self, expensive: bool) -> int:
        """Return the index of a product: by popularity, or the most expensive of eight."""
        random = self.random
        if not expensive:
            return bisect.bisect_right(self._cumulative_popularity, random.random() * self._cumulative_popularity[-1])
        return max((random.randrange(PRODUCTS) for _ in range(8)), key=lambda product: self.catalogue[product].dollars)

    def next_session(self) -> str:
        """Return a new session id."""
        self.now.sessions += 1
        return f"s-{self.now.sessions}"

    def draw_ip(self) -> str:
        """Return an IP address that belongs to no customer."""
        random = self.random
        return (
            f"{random.choice((45, 91, 185, 198, 203))}.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        )


def _cumulative(weights: list[float]) -> list[float]:
    total, sums = 0.0, []
    for weight in weights:
        total += weight
        sums.append(total)
    return sums
