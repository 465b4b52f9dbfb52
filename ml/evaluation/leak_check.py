"""The leak check: change everything after a point in time and compare the features of the orders before it.

A feature that differs uses the future."""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl

from lakehouse.iceberg.catalog import Lake
from ml.features.compute import compute
from ml.features.declarations import LABEL_DELAY, TIME, OrderHistory
from ml.features.groups import FEATURES
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import history_of, read_orders

ORDERS = 300


def leaking_features(
    lake: Lake, moment: datetime, *, orders: int = ORDERS, delay: timedelta = LABEL_DELAY, seed: int = 7
) -> list[str]:
    """Return the features of the last `orders` up to a moment that depend on the future; empty if there is no leak.

    The orders are computed with the whole history of their entities, before and after the moment."""
    return changed_features(*with_history(lake, moment, orders, delay), moment, seed)


def changed_features(orders: pl.DataFrame, history: OrderHistory, moment: datetime, seed: int = 7) -> list[str]:
    """Return the leaking features of orders up to a moment (ORDER_COLUMNS with `ratio`) with the history of their entities."""
    if orders.is_empty():
        return []
    other_orders = with_other_reports(orders, moment, seed)
    return differing(compute(orders, history), compute(other_orders, with_other_future(history, moment, seed)))


def with_history(lake: Lake, moment: datetime, count: int, delay: timedelta) -> tuple[pl.DataFrame, OrderHistory]:
    """Return the last orders up to a moment, and the whole history of their entities, the future included."""
    entities = lake.load(ORDER_ENTITIES, create=False)
    newest = entities.read(["order_id", "placed_at"], pl.col("placed_at") <= moment).sort("placed_at", "order_id").tail(count)
    orders = read_orders(lake, pl.col("order_id").is_in(newest["order_id"].implode())).sort("placed_at", "order_id")
    return orders, history_of(lake, orders, delay)


def with_other_future(history: OrderHistory, moment: datetime, seed: int) -> OrderHistory:
    """Return the same past with another future.

    Values of later orders are shuffled among them; orders not reported up to the moment are reported at some later time or
    never; later events have shuffled accounts, devices and kinds, and half of them are dropped; totals of the current month
    and later ones are changed."""
    past, future = _split(history.orders, pl.col("placed_at") <= moment)
    shuffled = [name for name in future.columns if name not in ("order_id", "placed_at")]
    future = future.with_columns(pl.col(name).shuffle(seed + place) for place, name in enumerate(shuffled))
    past_events, future_events = _split(history.events, pl.col("occurred_at") < moment)
    future_events = future_events.with_columns(
        pl.col(name).shuffle(seed + place) for place, name in enumerate(("account", "device", "kind"))
    )
    past_months, other_months = _split(history.categories, pl.col("month") < moment.date().replace(day=1))
    return OrderHistory(
        with_other_reports(pl.concat([past, future]), moment, seed),
        pl.concat([past_events, future_events.head(future_events.height // 2)]),
        pl.concat([past_months, other_months.with_columns(pl.col("amount") * 3 + 1, pl.col("orders") + 1)]),
        history.delay,
    )


def _split(frame: pl.DataFrame, before: pl.Expr) -> tuple[pl.DataFrame, pl.DataFrame]:
    marked = frame.with_columns(before.fill_null(True).alias("_before"))
    return marked.filter("_before").drop("_before"), marked.filter(~pl.col("_before")).drop("_before")


def with_other_reports(orders: pl.DataFrame, moment: datetime, seed: int) -> pl.DataFrame:
    """Return the orders with other fraud reports after a moment."""
    draw = pl.col("order_id").hash(seed)
    later = pl.lit(moment, TIME) + pl.duration(seconds=1 + draw % 5_000_000)
    unreported = pl.col("known_at").is_null() | (pl.col("known_at") > moment)
    return orders.with_columns(
        known_at=pl.when(~unreported).then("known_at").when(draw % 3 > 0).then(later.cast(TIME)).otherwise(None).cast(TIME)
    )


def differing(first: pl.DataFrame, second: pl.DataFrame) -> list[str]:
    """Return the features that are not bit-equal in two frames of the same orders."""
    return [f.name for f in FEATURES if not first[f.name].eq_missing(second[f.name]).all()]
