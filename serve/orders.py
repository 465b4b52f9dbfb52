"""Orders as the fraud features see them: those that the lakehouse has, and requests as silver would have them.

A request goes through silver's own functions (`orders_unified.fill`, `order_items_unified.fill`, `order_entities.fill`), as if
its rows had come from PostgreSQL: what the lakehouse says of the order later is the same, as far as it is told the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
import polars as pl
from msgspec import Meta

from lakehouse.iceberg import polars_schema
from lakehouse.step import Context
from lakehouse.table import Table
from ml import order_entities
from ml.category_amounts import totals
from ml.features import ENTITIES, ORDER_COLUMNS, conform
from pipelines.bronze.tables import ORDER_ITEMS, ORDERS
from pipelines.silver import order_items_unified, orders_unified
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.contacts import normalise_email, normalise_phone
from pipelines.silver.exchange_rates import EXCHANGE_RATES
from pipelines.silver.identity.evidence import USER
from pipelines.silver.identity.links import LINKED, MASTER
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import MARKETPLACE_COLUMNS, ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.stores import STORES
from pipelines.silver.users_scd import USERS_SCD
from serve.problems import Problem, Wrong
from serve.snapshots import Snapshots

FIRST = datetime(1970, 1, 1, tzinfo=UTC)
AHEAD = timedelta(minutes=5)
"""How far a checkout's clock may be ahead."""
READ: tuple[Table, ...] = (
    ORDERS_UNIFIED,
    ORDER_ITEMS_UNIFIED,
    PRODUCTS,
    CHARGEBACKS,
    USERS_SCD,
    IDENTITY_GRAPH,
    EXCHANGE_RATES,
    STORES,
)
BRONZE = {"_op": "c", "_source_position": "", "_source_time": None, "_ingested_at": None, "_unchanged": None, "_unreadable": None}

Text = Annotated[str, Meta(max_length=500)]
Amount = Annotated[str, Meta(pattern=r"^-?[0-9]{1,12}(\.[0-9]{1,4})?$")]
"""Money as text: a JSON number would be a float on its way here. What silver's columns hold, with room for sums."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of an order."""

    product_id: Annotated[str, Meta(max_length=200)] | None
    quantity: Annotated[int, Meta(ge=1, le=1_000_000)]
    unit_price: Annotated[Amount, Meta(description="Of one piece, in the order's currency.")]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order as the checkout knows it: the fields of `orders` and its items."""

    order_id: Annotated[str, Meta(min_length=1, max_length=100, description="As it will be in `orders`, as text.")]
    currency: Annotated[str, Meta(pattern="^[A-Za-z]{3}$", description="ISO 4217")]
    total_amount: Amount
    items: Annotated[list[Line], Meta(max_length=500)] = []
    source: Annotated[Literal["web", "pos"], Meta(description="Where it is placed.")] = "web"
    user_id: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    email: Annotated[Text, Meta(description="Without user_id finds the account, as do phone and loyalty_id.")] | None = None
    phone: Text | None = None
    loyalty_id: Text | None = None
    account_created_at: (
        Annotated[datetime, Meta(tz=True, description="Of an account that may be newer than the lakehouse.")] | None
    ) = None
    store_id: Text | None = None
    payment_method: Text | None = None
    card_fingerprint: Text | None = None
    ip_address: Text | None = None
    device_id: Text | None = None
    shipping_address: Annotated[str, Meta(max_length=2_000)] | None = None
    created_at: Annotated[datetime, Meta(tz=True, description="When it is placed; absent: now.")] | None = None


@dataclass(frozen=True)
class Known:
    """What the lakehouse says about orders and those who place them."""

    entities: pl.DataFrame
    categories: pl.DataFrame
    users: pl.DataFrame
    people: pl.DataFrame
    """record_id, master_user_id"""
    nodes: pl.DataFrame
    """node, record_id: identifiers that join"""
    products: pl.DataFrame
    rates: pl.DataFrame
    stores: pl.DataFrame
    snapshots: dict[str, int]
    at: datetime | None
    """When the orders were last added to."""


def read_known(snapshots: Snapshots, context: Context) -> Known:
    """Read it all."""
    of = {table.name: snapshots.of(table) for table in READ}
    orders = of[ORDERS_UNIFIED.name]
    products, users = of[PRODUCTS.name].read(), of[USERS_SCD.name].read()
    graph = of[IDENTITY_GRAPH.name].read(columns=("record_id", "node", "kind", "status", "master_user_id"))
    frames = {
        "orders": orders.read(columns=order_entities.ORDER_COLUMNS),
        "items": of[ORDER_ITEMS_UNIFIED.name].read(columns=("order_id", "line_no", "product_id", "quantity", "line_amount")),
        "products": products,
        "chargebacks": of[CHARGEBACKS.name].read(),
        "users": users,
    }
    entities = conform(order_entities.fill(frames, context), ORDER_COLUMNS)
    joins = graph.filter(pl.col("kind").is_in(["email", "phone", "loyalty"]) & (pl.col("status") == LINKED))
    return Known(
        entities=entities,
        categories=totals(entities),
        users=users,
        people=graph.filter(pl.col("kind") == "self").select("record_id", "master_user_id"),
        nodes=joins.filter(pl.col("record_id").str.starts_with(USER)).select("node", "record_id"),
        products=products,
        rates=of[EXCHANGE_RATES.name].read(),
        stores=of[STORES.name].read(),
        snapshots={name: one.snapshot_id for name, one in of.items() if one.snapshot_id is not None},
        at=orders.at,
    )


def snapshots_of(snapshots: Snapshots) -> dict[str, int]:
    """The snapshots that `read_known` would read now."""
    found = {table.name: snapshots.of(table).snapshot_id for table in READ}
    return {name: number for name, number in found.items() if number is not None}


def entities_of(orders: Sequence[Order], known: Known, context: Context, now: datetime) -> pl.DataFrame:
    """The orders as features take them (ORDER_COLUMNS), in the order given. Raises Problem for a moment in the future."""
    accounts = [account_of(order, known, context.default_region) for order in orders]
    places = [f"orders[{number}]." if len(orders) > 1 else "" for number in range(len(orders))]
    moments = [_moment(order.created_at or now, now, f"{at}created_at") for order, at in zip(orders, places, strict=True)]
    web = _bronze(
        ORDERS,
        [
            {
                "order_id": order.order_id,
                "user_id": account,
                "source": order.source,
                "store_id": order.store_id,
                "status": "placed",
                "currency": order.currency,
                "total_amount": Decimal(order.total_amount),
                "payment_method": order.payment_method,
                "card_fingerprint": order.card_fingerprint,
                "ip_address": order.ip_address,
                "device_id": order.device_id,
                "shipping_address": order.shipping_address,
                "created_at": moment,
            }
            for order, account, moment in zip(orders, accounts, moments, strict=True)
        ],
    )
    lines = _bronze(
        ORDER_ITEMS,
        [
            {
                "order_id": order.order_id,
                "line_no": number,
                "product_id": line.product_id,
                "quantity": line.quantity,
                "unit_price": Decimal(line.unit_price),
            }
            for order in orders
            for number, line in enumerate(order.items, 1)
        ],
    )
    named = pl.Series([account for account in accounts if account is not None], dtype=pl.Int64)
    records = (USER + named.unique().cast(pl.String)).alias("record_id")
    users = known.users.filter(pl.col("user_id").is_in(named.implode()))
    # an account that the lakehouse has not met is a person of its own until it is
    masters = records.to_frame().join(known.people, on="record_id", how="left")
    masters = masters.with_columns(pl.col("master_user_id").fill_null(MASTER + pl.col("record_id")))
    nothing = pl.DataFrame(schema=dict.fromkeys(MARKETPLACE_COLUMNS, pl.String))
    unified = orders_unified.fill(
        {
            "web": web,
            "marketplace": nothing,
            "stores": known.stores,
            "rates": known.rates,
            "users": users,
            "identity": masters,
        },
        context,
    )
    items = order_items_unified.fill({"lines": lines, "marketplace": nothing, "orders": unified}, context)
    created = {
        account: _moment(order.account_created_at, now, f"{at}account_created_at")
        for order, account, at in zip(orders, accounts, places, strict=True)
        if account is not None and order.account_created_at is not None
    }
    met = users.select("user_id", "created_at")
    told = pl.DataFrame(
        [(account, moment) for account, moment in created.items() if account not in set(met["user_id"])],
        schema=met.schema,
        orient="row",
    )
    frames = {
        "orders": unified.select(order_entities.ORDER_COLUMNS),
        "items": items,
        "products": known.products,
        "chargebacks": pl.DataFrame(schema=polars_schema(CHARGEBACKS.schema)),
        "users": pl.concat([met, told]),
    }
    found = conform(order_entities.fill(frames, context), ORDER_COLUMNS)
    wanted = pl.DataFrame({"order_id": [order.order_id for order in orders]})
    return wanted.join(found, on="order_id", how="left", maintain_order="left").select(list(ORDER_COLUMNS))


def _moment(moment: datetime, now: datetime, field: str) -> datetime:
    """The moment in UTC. Raises Problem when it contradicts the clock."""
    if moment > now + AHEAD or moment < FIRST:
        detail = "lies in the future" if moment > now else f"lies before {FIRST:%Y}"
        raise Problem(409, f"{field}: {detail}", errors=(Wrong(field, detail),))
    return moment.astimezone(UTC)


def account_of(order: Order, known: Known, region: str) -> int | None:
    """The account that places the order: the one named, or the only one that shows an identifier given."""
    if order.user_id is not None:
        return order.user_id
    nodes = [
        f"{kind}:{spelled}"
        for kind, spelled in (
            ("loyalty", (order.loyalty_id or "").strip() or None),
            ("email", normalise_email(order.email)),
            ("phone", normalise_phone(order.phone, region)),
        )
        if spelled
    ]
    for node in nodes:
        records = known.nodes.filter(pl.col("node") == node)["record_id"].unique()
        if len(records) == 1:
            return int(records[0].removeprefix(USER))
    return None


def neighbours(rows: pl.DataFrame, orders: pl.DataFrame) -> pl.DataFrame:
    """The rows that share an entity with one of the orders: all that features look back on."""
    same = [pl.col(kind).is_in(orders[kind].drop_nulls().unique().implode()) for kind in ENTITIES]
    return rows.filter(pl.any_horizontal(same))


def _bronze(table: Table, rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows as the connector would have stored them; ids of orders are text here, which silver makes of them anyway."""
    types = {**polars_schema(table.schema), "order_id": pl.String()}
    columns = {name: [row.get(name, BRONZE.get(name)) for row in rows] for name in types}
    return pl.DataFrame({name: pl.Series(name, columns[name], dtype=kind, strict=False) for name, kind in types.items()})
