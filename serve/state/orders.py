"""Orders as the fraud features see them: those that the lakehouse has, and requests as silver would have them.

A request is not worth a data frame: it is looked up in dictionaries, by the rules of silver (`orders_unified.fill`,
`order_items_unified.fill`, `order_entities.fill`). A test deals out orders and lookups at random and compares each with what
silver's own functions make of it, so that what the lakehouse says of the order later is the same, as far as it is told the same.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import polars as pl
from msgspec import Meta

from lakehouse.table import Table
from ml.features.compute import with_ratios
from ml.features.declarations import ORDER_COLUMNS, conform
from ml.tables import order_entities
from ml.tables.category_amounts import totals
from pipelines.identity.links import LINKED
from pipelines.identity.records import MASTER_PREFIX, USER_PREFIX, masters_by_record
from pipelines.parsing.contacts import normalise_email, normalise_phone
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.exchange_rates import EXCHANGE_RATES
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.users_scd import USERS_SCD
from serve.http.problems import Problem, Wrong
from serve.state.table_cache import TableCache

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
)
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""What polars takes off the ends of a text; Python's own strip takes off more."""
RATE_UNITS = 10**8
FITS = 10**20
"""Amounts of so many ten-thousandths do not fit into silver's columns."""

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
class ReferenceData:
    """What the lakehouse says about orders and those who place them.

    accounts    user_id -> when it was opened
    people      record_id of an account -> master_user_id
    nodes       identifiers (of accounts that they join) -> user_id, None when several show it
    products    product_id -> category
    rates       currency -> days and, for each, 10^-8 units of the base currency from then on
    snapshots   read
    at          when the orders were last added to
    """

    entities: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=ORDER_COLUMNS))
    categories: pl.DataFrame = field(default_factory=lambda: totals(pl.DataFrame(schema=ORDER_COLUMNS)))
    accounts: Mapping[int, datetime | None] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, int | None] = field(default_factory=dict)
    products: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, tuple[list[date], list[int]]] = field(default_factory=dict)
    snapshots: Mapping[str, int] = field(default_factory=dict)
    at: datetime | None = None


def read_reference_data(snapshots: TableCache, context: BusinessSettings) -> ReferenceData:
    """Read it all."""
    of = {table.name: snapshots.of(table) for table in READ}
    orders = of[ORDERS_UNIFIED.name]
    users = of[USERS_SCD.name].read(columns=("user_id", "created_at"))
    products = of[PRODUCTS.name].read(columns=("product_id", "category"))
    frames = {
        "orders": orders.read(columns=order_entities.ORDER_COLUMNS),
        "items": of[ORDER_ITEMS_UNIFIED.name].read(columns=("order_id", "line_no", "product_id", "quantity", "line_amount")),
        "products": products,
        "chargebacks": of[CHARGEBACKS.name].read(),
        "users": users,
    }
    # training reads the ratios from silver.fraud_ratios, which are made so
    entities = with_ratios(conform(order_entities.transform(frames, context), ORDER_COLUMNS))
    graph = of[IDENTITY_GRAPH.name].read(columns=("record_id", "node", "kind", "status", "master_user_id"))
    return ReferenceData(
        entities=entities,
        categories=totals(entities),
        accounts=accounts_of(users),
        people=people_of(graph),
        nodes=nodes_of(graph),
        products=products_of(products),
        rates=rates_of(of[EXCHANGE_RATES.name].read()),
        snapshots={name: one.snapshot_id for name, one in of.items() if one.snapshot_id is not None},
        at=orders.at,
    )


def accounts_of(users: pl.DataFrame) -> dict[int, datetime | None]:
    """silver.users_scd -> when each account was opened."""
    return dict(users.group_by("user_id").agg(pl.col("created_at").min()).iter_rows())


def people_of(graph: pl.DataFrame) -> dict[str, str]:
    """silver.identity_graph -> the person of each account."""
    own = graph.filter((pl.col("kind") == "self") & pl.col("record_id").str.starts_with(USER_PREFIX))
    named = own.select("record_id", pl.col("master_user_id").fill_null(MASTER_PREFIX + pl.col("record_id")))
    return dict(masters_by_record(named).iter_rows())


def nodes_of(graph: pl.DataFrame) -> dict[str, int | None]:
    """silver.identity_graph -> the account that shows an identifier; None: several do."""
    joins = graph.filter(pl.col("kind").is_in(["email", "phone", "loyalty"]) & (pl.col("status") == LINKED))
    shown = joins.filter(pl.col("record_id").str.starts_with(USER_PREFIX)).group_by("node").agg(pl.col("record_id").unique())
    return {node: int(records[0].removeprefix(USER_PREFIX)) if len(records) == 1 else None for node, records in shown.iter_rows()}


def products_of(products: pl.DataFrame) -> dict[str, str]:
    """silver.products -> the category of each product that has one."""
    return dict(products.select("product_id", "category").drop_nulls().iter_rows())


def rates_of(rates: pl.DataFrame) -> dict[str, tuple[list[date], list[int]]]:
    """silver.exchange_rates -> by currency the days, and what holds from each on."""
    found: dict[str, tuple[list[date], list[int]]] = {}
    for currency, day, rate in rates.select("currency", "rate_date", "to_base").drop_nulls().sort("rate_date").iter_rows():
        days, values = found.setdefault(currency, ([], []))
        days.append(day)
        values.append(int(rate.scaleb(8)))
    return found


def snapshots_of(snapshots: TableCache) -> dict[str, int]:
    """The snapshots that `read_known` would read now."""
    found = {table.name: snapshots.of(table).snapshot_id for table in READ}
    return {name: number for name, number in found.items() if number is not None}


def row_of(order: Order, known: ReferenceData, context: BusinessSettings, now: datetime, at: str = "") -> dict[str, Any]:
    """The order as features take it (ORDER_COLUMNS). Raises Problem for a moment in the future; at: where the order stands."""
    account = account_of(order, known, context.default_region)
    placed = _moment(order.created_at or now, now, f"{at}created_at")
    created: datetime | None = None
    record = person = None
    if account is not None:
        record = f"{USER_PREFIX}{account}"
        # an account that the lakehouse has not met is a person of its own until it is
        person = known.people.get(record) or MASTER_PREFIX + record
        if order.account_created_at is not None:
            created = _moment(order.account_created_at, now, f"{at}account_created_at")
        if account in known.accounts:
            created = known.accounts[account]
    return {
        "order_id": order.order_id,
        "placed_at": placed,
        "amount": _cents(order, placed.date(), known, context.base_currency),
        "customer": record,
        "card": _text(order.card_fingerprint),
        "device": _text(order.device_id),
        "address": _address(order.shipping_address),
        "ip": _text(order.ip_address),
        "person": person,
        "account": account,
        "account_created_at": created,
        "channel": order.source,
        "payment_method": order.payment_method,
        "category": _category(order.items, known),
        "known_at": None,
        "ratio": None,
    }


def _moment(moment: datetime, now: datetime, field: str) -> datetime:
    """The moment in UTC. Raises Problem when it contradicts the clock."""
    if moment > now + AHEAD or moment < FIRST:
        detail = "lies in the future" if moment > now else f"lies before {FIRST:%Y}"
        raise Problem(409, f"{field}: {detail}", errors=(Wrong(field, detail),))
    return moment.astimezone(UTC)


def account_of(order: Order, known: ReferenceData, region: str) -> int | None:
    """The account that places the order: the one named, or the only one that shows an identifier given."""
    if order.user_id is not None:
        return order.user_id
    for kind, spelled in (
        ("loyalty", (order.loyalty_id or "").strip() or None),
        ("email", normalise_email(order.email)),
        ("phone", normalise_phone(order.phone, region)),
    ):
        if spelled and (account := known.nodes.get(f"{kind}:{spelled}")) is not None:
            return account
    return None


def _cents(order: Order, day: date, known: ReferenceData, base_currency: str) -> int | None:
    """The amount in cents of the base currency; None when the rate is unknown."""
    currency, rate = order.currency.strip(SPACES).upper(), RATE_UNITS
    if currency != base_currency:
        days, rates = known.rates.get(currency, ((), ()))
        place = bisect_right(days, day)
        if not place:
            return None
        rate = rates[place - 1]
    total = 100 * _half_even(_units(order.total_amount), 100)  # the source keeps two places
    base = _half_even(total * rate, RATE_UNITS)
    return _half_even(base, 100) if -FITS < base < FITS else None


def _units(amount: str) -> int:
    """An Amount in ten-thousandths."""
    whole, _, rest = amount.strip().partition(".")
    return int(whole + rest.ljust(4, "0"))


def _half_even(value: int, by: int) -> int:
    """value / by, halves to the even neighbour. by: even."""
    floor, rest = divmod(value, by)
    return floor + (rest > by // 2 or (rest == by // 2 and floor % 2 == 1))


def _category(lines: Sequence[Line], known: ReferenceData) -> str | None:
    """The category with the greatest share of what was ordered; of equals the first by name."""
    shares: dict[str, int] = {}
    for line in lines:
        category = known.products.get(line.product_id) if line.product_id is not None else None
        if category is not None:
            amount = line.quantity * _units(line.unit_price)
            shares[category] = shares.get(category, 0) + (amount if -FITS < amount < FITS else 0)
    return min(shares, key=lambda category: (-shares[category], category), default=None)


def _text(value: str | None) -> str | None:
    return (value.strip(SPACES) or None) if value is not None else None


def _address(text: str | None) -> str | None:
    if text is None:
        return None
    if text.isascii():
        return re.sub(r"\W+", " ", text.lower(), flags=re.ASCII).strip() or None
    return _spelled(text)


@lru_cache(maxsize=8192)
def _spelled(text: str) -> str | None:
    """Letters of the whole world by polars' own rules: Python knows others."""
    found: str | None = pl.DataFrame({"shipping_address": [text]}).select(order_entities.ADDRESS).item()
    return found
