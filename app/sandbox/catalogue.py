"""Generated products and exchange rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from app.sandbox.places import COUNTRIES, CURRENCIES, Country

CATEGORIES: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "Shoes": (("Running shoe", "Trail shoe", "Sneaker", "Sandal", "Boot", "Loafer"), (25, 160)),
    "Clothing": (("T-shirt", "Hoodie", "Jeans", "Rain jacket", "Dress", "Batik shirt", "Socks"), (6, 120)),
    "Electronics": (("Headphones", "Phone case", "Power bank", "Smart watch", "Keyboard", "Speaker"), (9, 320)),
    "Home": (("Rice cooker", "Lamp", "Blanket", "Mug", "Knife set", "Towel"), (5, 140)),
    "Beauty": (("Face cream", "Shampoo", "Sunscreen", "Lipstick", "Perfume"), (4, 90)),
    "Sports": (("Yoga mat", "Dumbbell", "Football", "Badminton racket", "Bottle"), (6, 110)),
}
BRANDS = ("Aruna", "Northpeak", "Kirana", "Velo", "Mizu", "Halden", "Sagara", "Tessel")
NOMINAL = CURRENCIES | {"GBP": 0.79, "AUD": 1.52, "CHF": 0.88, "MYR": 4.5, "THB": 35.0}


@dataclass(frozen=True)
class Product:
    """One product. `dollars` is its list price in US dollars, `popularity` its weight in baskets."""

    product_id: str
    name: str
    category: str
    brand: str
    dollars: float
    popularity: float


def products(seed: int, count: int) -> tuple[Product, ...]:
    """Return the products of this seed."""
    random = Random(f"{seed}/products")
    catalogue = []
    for number in range(count):
        category = tuple(CATEGORIES)[number % len(CATEGORIES)]
        names, (low, high) = CATEGORIES[category]
        brand = random.choice(BRANDS)
        dollars = round(math.exp(random.uniform(math.log(low), math.log(high)))) - 0.01
        kind = names[number // len(CATEGORIES) % len(names)]
        catalogue.append(
            Product(
                f"P{number + 1:04d}", f"{brand} {kind} {number + 1}", category, brand, dollars, 1 / (1 + random.random() * 12)
            )
        )
    return tuple(catalogue)


def local_price(dollars: float, country: Country) -> int:
    """Return the price in a country, in minor units of its currency, rounded to the country's step."""
    minor = dollars * country.nominal * (100 if country.digits else 1)
    return max(country.step, round(minor / country.step) * country.step)


def decimal_text(minor: int, digits: int) -> str:
    """Return an amount in minor units as decimal text."""
    if digits == 0:
        return str(minor)
    sign, minor = ("-", -minor) if minor < 0 else ("", minor)
    whole, part = divmod(minor, 10**digits)
    return f"{sign}{whole}.{part:0{digits}d}"


def rates(seed: int, day: int, base: str) -> list[tuple[str, str]]:
    """Return (currency, units of `base` per unit with 8 decimals) on a day: a slow wave with some noise."""
    currencies = sorted({country.currency for country in COUNTRIES} | {base})

    def per_dollar(currency: str) -> float:
        if currency == "USD":
            return 1.0
        noise = Random(f"{seed}/rate/{currency}/{day}").gauss(0, 0.002)
        return NOMINAL.get(currency, 1.0) * math.exp(0.03 * math.sin(day / 47 + len(currency) + ord(currency[0])) + noise)

    into = per_dollar(base)
    return [(currency, "1" if currency == base else f"{into / per_dollar(currency):.8f}") for currency in currencies]
