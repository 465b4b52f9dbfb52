"""silver.order_features: the features of every order, stored, so that a training set is a plain read.

A run computes the new orders and those that a change affects: a late order, a fraud report, an event or a merge of
identities affects the later orders of its entities, and no others. They are computed by `compute` with the slice of history
that affects them. The first build, and a rebuild, compute entity by entity instead (`ml/tables/full_build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.iceberg.catalog import Lake
from lakehouse.step import Broadcast, Grouped, Lookup, Step
from lakehouse.table import TIMESTAMP, Table, column
from ml.features.compute import compute
from ml.features.declarations import ENTITIES, EVENT_COLUMNS, LABEL_DELAY, TIME, OrderHistory
from ml.features.groups import FEATURES
from ml.tables.category_amounts import CATEGORY_AMOUNTS
from ml.tables.fraud_ratios import FRAUD_RATIOS
from ml.tables.order_entities import ORDER_ENTITIES
from pipelines.gold.user_risk_scores import is_failed_payment
from pipelines.settings import BusinessSettings
from pipelines.silver.events_clean import EVENTS_CLEAN, STOCK_EVENTS

ORDER_FEATURES = Table(
    "silver.order_features",
    doc="Features of the fraud model for each order, as of the moment it was placed.",
    columns=(
        column("order_id", pa.string(), "Order, as in silver.orders_unified.", required=True),
        column("placed_at", TIMESTAMP, "When it was placed. Features use earlier data only.", required=True),
        column("customer", pa.string(), "The account or contact that placed the order.", personal="identifier"),
        *(
            column(f.name, pa.string() if f.type == "category" else pa.float64(), f"{f.doc} ({f.type}, {f.window})")
            for f in FEATURES
        ),
    ),
    key=("order_id",),
    sort_by=("placed_at", "order_id"),
    owner="risk",
    expectations=(row_count_drift(0.5),),
)

EVENT_READS = ("event_type", "occurred_at", "user_id", "device_id", "outcome")


def account_events(events: pl.DataFrame) -> pl.DataFrame:
    """Return rows of silver.events_clean as features read them (EVENT_COLUMNS), without stock events."""
    kind = (
        pl.when(pl.col("event_type").is_in(["login_failed", "account_changed"]))
        .then("event_type")
        .when(is_failed_payment())
        .then(pl.lit("payment_failed"))
        .otherwise(pl.lit("visit"))
    )
    return (
        events.filter(~pl.col("event_type").is_in(list(STOCK_EVENTS)))
        .select(pl.col("user_id").alias("account"), pl.col("device_id").alias("device"), "occurred_at", kind.alias("kind"))
        .select(list(EVENT_COLUMNS))
    )


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings, delay: timedelta = LABEL_DELAY) -> pl.DataFrame:
    """Return the features of the affected orders."""
    orders = frames["orders"].unique("order_id")
    around = pl.concat([frames[_of(kind)].select(orders.columns) for kind in ENTITIES]).unique("order_id")
    events = pl.concat([frames["account_events"], frames["device_events"]]).unique("event_id")
    ratios = frames["ratios"].select("order_id", "ratio").unique("order_id")
    around = around.join(ratios, on="order_id", how="left")
    history = OrderHistory(around, account_events(events), frames["categories"], delay)
    orders = orders.join(ratios, on="order_id", how="left")
    return compute(orders, history).join(orders.select("order_id", "customer"), on="order_id").select(ORDER_FEATURES.schema.names)


def read_orders(lake: Lake, selection: pl.Expr) -> pl.DataFrame:
    """Return the selected orders of silver.order_entities as features read them: with the ratios of reported frauds."""
    orders = lake.load(ORDER_ENTITIES, create=False).read(ORDER_ENTITIES.schema.names, selection)
    frauds = orders.filter(pl.col("known_at").is_not_null())["order_id"]
    ratios = lake.load(FRAUD_RATIOS).read(["order_id", "ratio"], pl.col("order_id").is_in(frauds.implode()))
    return orders.join(ratios, on="order_id", how="left")


def history_of(lake: Lake, orders: pl.DataFrame, delay: timedelta = LABEL_DELAY) -> OrderHistory:
    """Return the history of all entities of these orders (ORDER_COLUMNS), the future included."""
    shared = pl.any_horizontal(pl.col(kind).is_in(orders[kind].drop_nulls().implode()) for kind in ENTITIES)
    same_account = pl.col("user_id").is_in(orders["account"].drop_nulls().implode())
    same_device = pl.col("device_id").is_in(orders["device"].drop_nulls().implode())
    return OrderHistory(
        read_orders(lake, shared),
        account_events(lake.load(EVENTS_CLEAN).read(EVENT_READS, same_account | same_device)),
        lake.load(CATEGORY_AMOUNTS).read(CATEGORY_AMOUNTS.schema.names),
        delay,
    )


def later(column: str, values: str, moments: str) -> Callable[[pl.DataFrame], pl.Expr]:
    """Return an `affects` rule: rows whose `column` has a changed value, from the first changed time of this value on."""

    def affects(changed: pl.DataFrame) -> pl.Expr:
        firsts = changed.drop_nulls([values, moments]).group_by(values).agg(pl.col(moments).min())
        if firsts.is_empty():
            return pl.lit(False)
        since = pl.col(column).replace_strict(firsts[values], firsts[moments], default=None, return_dtype=TIME)
        return (pl.col("placed_at") >= since).fill_null(False)

    return affects


def in_following_month(changed: pl.DataFrame) -> pl.Expr:
    """Return, for `affects`, the orders that are compared with a changed month of their category."""
    months = (
        changed.select("category", pl.col("month").dt.offset_by("1mo").alias("following")).unique().sort("category", "following")
    )
    month = pl.col("placed_at").dt.month_start().dt.date()
    affected = [(pl.col("category") == category) & (month == following) for category, following in months.iter_rows()]
    return pl.any_horizontal(affected)


def _of(kind: str) -> str:
    return f"of_{kind}"


def _values(kind: str) -> Callable[[Mapping[str, pl.DataFrame]], pl.Series]:
    return lambda frames: frames["orders"][kind].drop_nulls()


def _neighbours(kind: str) -> Lookup:
    """Return the read of the orders that share an entity with the affected ones."""
    return Lookup(
        ORDER_ENTITIES,
        on=kind,
        values=_values(kind),
        columns=tuple(ORDER_ENTITIES.schema.names),
        affects=later(kind, kind, "placed_at"),
        through=ORDER_ENTITIES,
        affected_keys=(pl.col("order_id"),),
    )


def _events(order_column: str, event_column: str) -> Lookup:
    return Lookup(
        EVENTS_CLEAN,
        on=event_column,
        values=_values(order_column),
        columns=("event_id", *EVENT_READS),
        affects=later(order_column, event_column, "occurred_at"),
        through=ORDER_ENTITIES,
        affected_keys=(pl.col("order_id"),),
    )


def step(delay: timedelta = LABEL_DELAY) -> Step:
    """Return the step of the table for a label delay."""
    return Step(
        target=ORDER_FEATURES,
        reads={
            "orders": Grouped(ORDER_ENTITIES, keys=((pl.col("order_id"),),)),
            **{_of(kind): _neighbours(kind) for kind in ENTITIES},
            "account_events": _events("account", "user_id"),
            "device_events": _events("device", "device_id"),
            "ratios": Lookup(
                FRAUD_RATIOS,
                on="device",
                values=_values("device"),
                columns=("order_id", "ratio"),
                affects=later("device", "device", "known_at"),
                through=ORDER_ENTITIES,
                affected_keys=(pl.col("order_id"),),
            ),
            "categories": Broadcast(
                CATEGORY_AMOUNTS,
                columns=tuple(CATEGORY_AMOUNTS.schema.names),
                affects=in_following_month,
                through=ORDER_ENTITIES,
                affected_keys=(pl.col("order_id"),),
            ),
        },
        transform=partial(transform, delay=delay),
        parameters=(("label delay", str(delay)),),
    )


STEP = step()
