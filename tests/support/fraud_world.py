"""Synthetic orders with features of every type and frauds that depend on them, for tests of training and the gate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

CHANNELS = ("web", "pos", "marketplace")


@dataclass(frozen=True)
class PlainFeature:
    """The minimal feature that training accepts."""

    name: str
    type: str
    categories: tuple[str, ...] = ()
    window: str = ""
    doc: str = "A synthetic feature."


FEATURES = (
    PlainFeature("amount_ratio", "number"),
    PlainFeature("orders_1h", "number"),
    PlainFeature("new_device", "flag"),
    PlainFeature("payment", "category", ("card", "wallet", "other")),
    PlainFeature("noise", "number"),
)


def orders(count: int, *, seed: int = 1, start: datetime = datetime(2026, 1, 1, tzinfo=UTC), days: int = 30) -> pl.DataFrame:
    """Return `count` orders spread over `days`; about 4% are frauds."""
    random = np.random.default_rng(seed)
    ratio = random.lognormal(0, 0.7, count)
    hourly = random.poisson(0.4, count)
    new = random.random(count) < 0.2
    payment = random.choice(["card", "wallet", "other"], count, p=[0.6, 0.3, 0.1])
    odds = -6.0 + 1.2 * ratio + 0.7 * hourly + 1.5 * new + 0.8 * (payment == "other")
    label = random.random(count) < 1 / (1 + np.exp(-odds))
    seconds = np.sort(random.integers(0, days * 86400, count))
    frame = pl.DataFrame(
        {
            "order_id": [f"{seed}-{number}" for number in range(count)],
            "placed_at": [start + timedelta(seconds=int(second)) for second in seconds],
            "amount": np.round(ratio * 40, 2),
            "channel": random.choice(CHANNELS, count, p=[0.5, 0.3, 0.2]),
            "customer": [f"M-{number}" for number in random.integers(0, max(count // 5, 1), count)],
            "label": label.astype(np.int8),
            "amount_ratio": ratio,
            "orders_1h": hourly,
            "new_device": new,
            "payment": payment,
            "noise": random.normal(size=count),
        }
    )
    return frame.with_columns(pl.when(pl.col("noise") > 2).then(None).otherwise(pl.col("noise")).alias("noise"))


def split(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return (train, validation, test), split by time."""
    ordered = frame.sort("placed_at", "order_id")
    first, second = int(len(ordered) * 0.6), int(len(ordered) * 0.8)
    return ordered[:first], ordered[first:second], ordered[second:]
