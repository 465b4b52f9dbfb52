"""The stock of every store and product: actual units, book units, and the rules for ordering more."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.sandbox.catalogue import Product
from app.sandbox.places import STORES

DEMAND = (0.50, 0.17, 0.09, 0.07, 0.05, 0.05, 0.025, 0.025, 0.02, 0.02)
"""Approximate share of all orders per store."""


@dataclass
class StoreStock:
    """Units per pair of store and product (pair = store x products + product).

    `there` are the actual units, `book` the sum of the events; they differ by thefts until a count. `daily` is the expected
    demand in units per day.
    """

    products: int
    daily: list[float]
    there: list[int] = field(default_factory=list)
    book: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    incoming: list[int] = field(default_factory=list)
    counted: int = 0

    @staticmethod
    def expecting(catalogue: tuple[Product, ...], orders_per_day: float) -> StoreStock:
        """Return empty stock for this number of orders."""
        total = sum(product.popularity for product in catalogue)
        units = orders_per_day * 2.1
        daily = [units * share * product.popularity / total for share in DEMAND for product in catalogue]
        size = len(STORES) * len(catalogue)
        return StoreStock(len(catalogue), daily, [0] * size, [0] * size, [0] * size, [0] * size)

    def free(self, pair: int) -> int:
        """Return the units that can be sold, by the books and actually."""
        return min(self.book[pair], self.there[pair]) - self.reserved[pair]

    def wants(self, pair: int) -> int:
        """Return the units to order now, 0 when there are enough."""
        if self.book[pair] - self.reserved[pair] + self.incoming[pair] > 14 * self.daily[pair] + 4:
            return 0
        return int(30 * self.daily[pair]) + 12

    def opening(self, pair: int) -> int:
        """Return the units on the first day."""
        return int(30 * self.daily[pair]) + 15

    def safety(self, pair: int) -> int:
        """Return the safety stock."""
        return int(3 * self.daily[pair]) + 1

    def receive(self, pair: int, quantity: int) -> None:
        """Add units, or remove them with a negative quantity."""
        self.there[pair] += quantity
        self.book[pair] += quantity

    def place(self, pair: int) -> tuple[str, int]:
        """Return (store id, index of the product) of a pair."""
        return STORES[pair // self.products].store_id, pair % self.products
