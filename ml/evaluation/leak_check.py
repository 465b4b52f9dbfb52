"""The check that no feature knows the future, on the shop's own orders: change everything after a moment, and look
whether a feature of the orders up to it moves."""

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


def moved_features(
    lake: Lake, moment: datetime, *, orders: int = ORDERS, delay: timedelta = LABEL_DELAY, seed: int = 7
) -> list[str]:
    """The features of the last `orders` up to a moment that change when the future does; none: there is no leak.

    The orders are computed with everything that shares an entity with them, before the moment and after."""
    return moved(*around(lake, moment, orders, delay), moment, seed)


def moved(asked: pl.DataFrame, history: OrderHistory, moment: datetime, seed: int = 7) -> list[str]:
    """The same for orders up to a moment with all that concerns them (ORDER_COLUMNS, `ratio` included)."""
    if asked.is_empty():
        return []
    return differing(compute(asked, history), compute(asked_then(asked, moment, seed), changed(history, moment, seed)))


def around(lake: Lake, moment: datetime, count: int, delay: timedelta) -> tuple[pl.DataFrame, OrderHistory]:
    """The last orders up to a moment, and all that concerns them, the future included."""
    entities = lake.load(ORDER_ENTITIES, create=False)
    places = entities.read(["order_id", "placed_at"], pl.col("placed_at") <= moment).sort("placed_at", "order_id").tail(count)
    asked = read_orders(lake, pl.col("order_id").is_in(places["order_id"].implode())).sort("placed_at", "order_id")
    return asked, history_of(lake, asked, delay)


def asked_then(asked: pl.DataFrame, moment: datetime, seed: int) -> pl.DataFrame:
    """The orders asked about, with other reports after the moment."""
    return _reported_otherwise(asked, moment, seed)


def changed(history: OrderHistory, moment: datetime, seed: int) -> OrderHistory:
    """The same past with another future: later orders have their values shuffled among each other, every order that was
    not reported until the moment is reported at some time after it or not at all, later events happen to others and are
    of another kind, and the month's own figures are others."""
    past, future = _parts(history.orders, pl.col("placed_at") <= moment)
    loose = [name for name in future.columns if name not in ("order_id", "placed_at")]
    future = future.with_columns(pl.col(name).shuffle(seed + place) for place, name in enumerate(loose))
    gone, coming = _parts(history.events, pl.col("occurred_at") < moment)
    coming = coming.with_columns(pl.col(name).shuffle(seed + place) for place, name in enumerate(("account", "device", "kind")))
    settled, running = _parts(history.categories, pl.col("month") < moment.date().replace(day=1))
    return OrderHistory(
        _reported_otherwise(pl.concat([past, future]), moment, seed),
        pl.concat([gone, coming.head(coming.height // 2)]),
        pl.concat([settled, running.with_columns(pl.col("amount") * 3 + 1, pl.col("orders") + 1)]),
        history.delay,
    )


def _parts(frame: pl.DataFrame, before: pl.Expr) -> tuple[pl.DataFrame, pl.DataFrame]:
    marked = frame.with_columns(before.fill_null(True).alias("_before"))
    return marked.filter("_before").drop("_before"), marked.filter(~pl.col("_before")).drop("_before")


def _reported_otherwise(orders: pl.DataFrame, moment: datetime, seed: int) -> pl.DataFrame:
    draw = pl.col("order_id").hash(seed)
    later = pl.lit(moment, TIME) + pl.duration(seconds=1 + draw % 5_000_000)
    open_ = pl.col("known_at").is_null() | (pl.col("known_at") > moment)
    return orders.with_columns(
        known_at=pl.when(~open_).then("known_at").when(draw % 3 > 0).then(later.cast(TIME)).otherwise(None).cast(TIME)
    )


def differing(first: pl.DataFrame, second: pl.DataFrame) -> list[str]:
    """The features that are not bit-equal in two frames of the same orders."""
    return [f.name for f in FEATURES if not first[f.name].eq_missing(second[f.name]).all()]
