"""Fills the source servers with a simulated history, and simulates further orders."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

from app.sandbox.people import DAY
from app.sandbox.servers import STOP_COMMAND, Addresses, ShowProgress
from app.sandbox.simulation.progress import LAST_DAY, ShopProgress, day_weight
from app.sandbox.simulation.shop import Shop
from app.sandbox.simulation.state import Action
from app.sandbox.sink import Sink
from app.sandbox.stock import StoreStock
from lakehouse.errors import SandboxError

HISTORY_DAYS = 400
MIN_ORDERS_PER_DAY, MAX_ORDERS_PER_DAY = 5.0, 250.0
MIN_DAYS = 30


def orders_per_day(orders: int) -> float:
    """Return the size of the source: a little more than a year of history, and a longer one above 100,000 orders."""
    return min(MAX_ORDERS_PER_DAY, max(MIN_ORDERS_PER_DAY, orders / HISTORY_DAYS))


def fill(addresses: Addresses, directory: Path, orders: int, seed: int, base_currency: str, show: ShowProgress | None) -> None:
    """Simulate a history of `orders` orders into the servers. It ends on the same day for every seed."""
    per_day = orders_per_day(orders)
    days = max(MIN_DAYS, round(orders / per_day))
    first = LAST_DAY - days + 1
    progress = ShopProgress(
        seed=seed,
        base_currency=base_currency,
        per_day=per_day,
        first_day=first,
        today=first - 1,
        new_things_from=first + days // 2,
        live_from=(LAST_DAY - 1) * DAY,
    )
    total = sum(day_weight(day) for day in range(first, LAST_DAY + 1))
    with Sink(addresses, directory / "truth", 0) as sink:
        shop = Shop(progress, sink)
        shop.open(orders)
        for day in range(first, LAST_DAY + 1):
            progress.orders_planned += orders * day_weight(day) / total
            shop.day(round(progress.orders_planned) - progress.orders if day < LAST_DAY else orders - progress.orders)
            if show:
                show("orders", progress.orders, orders)
    save(directory, shop)


def simulate_more(addresses: Addresses, directory: Path, orders: int, show: ShowProgress | None) -> None:
    """Simulate days until `orders` more orders have been placed. Each day is one PostgreSQL transaction.

    Raises SandboxError after a step that was interrupted: the three servers share no transaction, so their state is unknown.
    """
    unfinished = directory / "step.unfinished"
    if unfinished.exists():
        raise SandboxError(
            f"The last step was interrupted, so this sandbox cannot simulate further; its servers still work. Start again: "
            f"`{STOP_COMMAND}`, remove {directory} and the lakehouse built from it, then `python -m app sandbox start`."
        )
    progress, stock, later = load(directory)
    progress.live_from = (progress.today + 1) * DAY
    progress.steps += 1
    with Sink(addresses, directory / "truth", progress.steps) as sink:
        unfinished.touch()
        shop = Shop(progress, sink, stock, later)
        if "marketing_consent" not in progress.added_columns.get("users", []):
            # source schemas change at any time: the first step adds a column
            shop.simulation.add_column("users", "marketing_consent", "boolean")
        done = 0
        while done < orders:
            count = min(orders - done, max(1, round(progress.per_day * day_weight(progress.today + 1))))
            shop.day(count)
            sink.flush()
            done += count
            if show:
                show("orders", done, orders)
    save(directory, shop)
    unfinished.unlink()


def save(directory: Path, shop: Shop) -> None:
    """Write the state that the next step needs."""
    simulation = shop.simulation
    content = {
        "progress": asdict(simulation.now),
        "stock": asdict(simulation.stock),
        "later": {str(day): actions for day, actions in simulation.later.items()},
    }
    temporary = directory / "shop.json.gz.new"
    with gzip.open(temporary, "wt", compresslevel=3) as file:
        json.dump(content, file)
    temporary.replace(directory / "shop.json.gz")


def load(directory: Path) -> tuple[ShopProgress, StoreStock, dict[int, list[Action]]]:
    """Read the state that `save` wrote."""
    with gzip.open(directory / "shop.json.gz", "rt") as file:
        content = json.load(file)
    later = {
        int(day): [(time, order, kind, arguments) for time, order, kind, arguments in actions]
        for day, actions in content["later"].items()
    }
    return ShopProgress(**content["progress"]), StoreStock(**content["stock"]), later
