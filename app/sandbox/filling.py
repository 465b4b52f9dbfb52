"""Filling the sandbox with the seeded shop, and taking it further; what is remembered between steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from app.sandbox.people import DAY
from app.sandbox.servers import WAY_OUT, Addresses
from app.sandbox.shop import LAST_DAY, Shop, ShopProgress, weight
from app.sandbox.sink import Sink
from app.sandbox.stock import StoreStock
from lakehouse.errors import SandboxError

Report = Callable[[str, int, int], None]

HISTORY_DAYS = 400
FEWEST_PER_DAY, MOST_PER_DAY = 5.0, 250.0
FEWEST_DAYS = 30


def orders_per_day(orders: int) -> float:
    """The size of the shop: a little more than a year for small histories, longer histories above 100,000 orders."""
    return min(MOST_PER_DAY, max(FEWEST_PER_DAY, orders / HISTORY_DAYS))


def fill(addresses: Addresses, directory: Path, orders: int, seed: int, base_currency: str, report: Report | None) -> None:
    """Play the shop's history of `orders` orders into the servers; it ends on the same day whatever the seed."""
    per_day = orders_per_day(orders)
    days = max(FEWEST_DAYS, round(orders / per_day))
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
    total = sum(weight(day) for day in range(first, LAST_DAY + 1))
    with Sink(addresses, directory / "truth", 0) as sink:
        shop = Shop(progress, sink)
        shop.open(orders)
        for day in range(first, LAST_DAY + 1):
            progress.orders_planned += orders * weight(day) / total
            shop.day(round(progress.orders_planned) - progress.orders if day < LAST_DAY else orders - progress.orders)
            if report:
                report("orders", progress.orders, orders)
    remember(directory, shop)


def go_on(addresses: Addresses, directory: Path, orders: int, report: Report | None) -> None:
    """Play the next days, until `orders` more orders have been placed. Each day is one PostgreSQL transaction."""
    # The three servers share no transaction: after half a step nothing says how far each has come.
    unfinished = directory / "step.unfinished"
    if unfinished.exists():
        raise SandboxError(
            f"The last step was cut off, so this shop cannot go on; its servers still work. Begin anew: `{WAY_OUT}`, "
            f"remove {directory} and the lakehouse made from it, then `python -m app sandbox start`."
        )
    progress, stock, later = recall(directory)
    progress.live_from = (progress.today + 1) * DAY
    progress.steps += 1
    # Sources change when they like: with the first step somebody adds a column to users.
    with Sink(addresses, directory / "truth", progress.steps) as sink:
        unfinished.touch()
        shop = Shop(progress, sink, stock, later)
        if "marketing_consent" not in progress.added_columns.get("users", []):
            sink.add_column("users", "marketing_consent", "boolean")
            progress.added_columns.setdefault("users", []).append("marketing_consent")
        done = 0
        while done < orders:
            count = min(orders - done, max(1, round(progress.per_day * weight(progress.today + 1))))
            shop.day(count)
            sink.flush()
            done += count
            if report:
                report("orders", done, orders)
    remember(directory, shop)
    unfinished.unlink()


def remember(directory: Path, shop: Shop) -> None:
    """Keep what the next step needs."""
    content = {
        "progress": asdict(shop.now),
        "stock": asdict(shop.stock),
        "later": {str(day): shop.later[day] for day in shop.later},
    }
    temporary = directory / "shop.json.gz.new"
    with gzip.open(temporary, "wt", compresslevel=3) as file:
        json.dump(content, file)
    temporary.replace(directory / "shop.json.gz")


def recall(directory: Path) -> tuple[ShopProgress, StoreStock, dict[int, list[tuple[int, int, str, list[object]]]]]:
    """What `remember` kept."""
    with gzip.open(directory / "shop.json.gz", "rt") as file:
        content = json.load(file)
    later = {
        int(day): [(time, order, kind, given) for time, order, kind, given in todo] for day, todo in content["later"].items()
    }
    return ShopProgress(**content["progress"]), StoreStock(**content["stock"]), later
