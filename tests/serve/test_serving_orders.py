"""A scoring request is converted to the row that silver's own functions return, for any order and reference data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.property_tests import property_test

from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import Table
from ml.features.declarations import ORDER_COLUMNS, conform
from ml.tables import order_entities
from pipelines.bronze.tables import ORDER_ITEMS, ORDERS
from pipelines.identity.links import LINKED
from pipelines.settings import BusinessSettings
from pipelines.silver import order_items_unified, orders_unified
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.exchange_rates import EXCHANGE_RATES
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import MARKETPLACE_COLUMNS
from pipelines.silver.products import PRODUCTS
from pipelines.silver.stores import STORES
from pipelines.silver.users_scd import USERS_SCD
from serve.http.problems import Problem
from serve.state.orders import Line, Order, order_row
from serve.state.reference_data import (
    ReferenceData,
    account_opened_at,
    accounts_by_node,
    masters_by_account,
    product_categories,
    rates_by_currency,
)

NOW = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)
BRONZE = {"_op": "c", "_source_position": "", "_source_time": None, "_ingested_at": None, "_unchanged": None, "_unreadable": None}


@dataclass(frozen=True)
class SilverTables:
    """The silver tables of the reference data."""

    users: pl.DataFrame
    graph: pl.DataFrame
    products: pl.DataFrame
    rates: pl.DataFrame
    stores: pl.DataFrame

    @property
    def reference(self) -> ReferenceData:
        return ReferenceData(
            account_opened_at=account_opened_at(self.users),
            masters=masters_by_account(self.graph),
            accounts_by_node=accounts_by_node(self.graph),
            product_categories=product_categories(self.products),
            rates=rates_by_currency(self.rates),
        )


def table(of: Table, rows: list[dict[str, Any]]) -> pl.DataFrame:
    types = polars_schema(of.schema)
    return pl.DataFrame({n: pl.Series(n, [r.get(n) for r in rows], dtype=t, strict=False) for n, t in types.items()})


def bronze(of: Table, rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Return rows as stored by the connector; order ids are text here, to which silver casts them anyway."""
    types = {**polars_schema(of.schema), "order_id": pl.String()}
    columns = {name: [row.get(name, BRONZE.get(name)) for row in rows] for name in types}
    return pl.DataFrame({name: pl.Series(name, columns[name], dtype=kind, strict=False) for name, kind in types.items()})


def row_by_silver(order: Order, account: int | None, tables: SilverTables, context: BusinessSettings) -> dict[str, Any]:
    """Return the row that silver's functions compute for an order of an account."""
    row = {name: getattr(order, name) for name in Order.__struct_fields__ if name in polars_schema(ORDERS.schema)}
    row |= {"user_id": account, "status": "placed", "total_amount": Decimal(order.total_amount)}
    row["created_at"] = (order.created_at or NOW).astimezone(UTC)
    lines = [
        {
            "order_id": order.order_id,
            "line_no": number,
            "product_id": line.product_id,
            "quantity": line.quantity,
            "unit_price": Decimal(line.unit_price),
        }
        for number, line in enumerate(order.items, 1)
    ]
    users = tables.users.filter(pl.col("user_id").is_in([account]))
    people = tables.graph.filter(pl.col("kind") == "self").select("record_id", "master_user_id")
    masters = pl.DataFrame({"record_id": [f"user:{account}"] if account is not None else []}, schema={"record_id": pl.String})
    masters = masters.join(people, on="record_id", how="left")
    masters = masters.with_columns(pl.col("master_user_id").fill_null("M-" + pl.col("record_id")))
    no_marketplace = pl.DataFrame(schema=dict.fromkeys(MARKETPLACE_COLUMNS, pl.String))
    frames = {"web": bronze(ORDERS, [row]), "marketplace": no_marketplace, "stores": tables.stores, "rates": tables.rates}
    unified = orders_unified.transform({**frames, "users": users, "identity": masters}, context)
    items = order_items_unified.transform(
        {"lines": bronze(ORDER_ITEMS, lines), "marketplace": no_marketplace, "orders": unified}, context
    )
    opened = users.select("user_id", "created_at")
    if opened.is_empty() and account is not None and order.account_created_at is not None:
        opened = pl.DataFrame([(account, order.account_created_at.astimezone(UTC))], schema=opened.schema, orient="row")
    entities = order_entities.transform(
        {
            "orders": unified.select(order_entities.ORDER_COLUMNS),
            "items": items,
            "products": tables.products,
            "chargebacks": table(CHARGEBACKS, []),
            "users": opened,
        },
        context,
    )
    (only,) = conform(entities, ORDER_COLUMNS).to_dicts()
    return only


moments = st.datetimes(datetime(2025, 12, 1), datetime(2026, 1, 31, 12), timezones=st.just(UTC))
zones = st.sampled_from(["+00:00", "+07:00", "-11:30", "+14:00"])
texts = st.one_of(
    st.none(),
    st.sampled_from(["", " ", "c-1", " c-1\t", "c-1\x1f", "\x1cc-1", "\xa0d\u2003", "\u200bd", "\x85"]),
    st.text(max_size=12),
)
addresses = st.one_of(
    st.none(),
    st.text(max_size=30),
    st.text(st.characters(max_codepoint=127), max_size=30),
    st.sampled_from(
        ["Jalan Ahmad Yani 87, Makassar", " _x_--Y ", "ΟΔΟΣ ΣΊΣΥΦΟΣ 3", "İstanbul, Çarşı", "東京都 1-2", "…", "a\x1fb", "ß ẞ"]
    ),
)
amounts = st.one_of(
    st.sampled_from(["0", "-0", "-0.005", "0.005", "0.015", "2.675", "1.2350", "1.2450", "999999999999.9999", "0.0001", "007.5"]),
    st.decimals(-(10**6), 10**6, places=4).map(lambda value: f"{value:f}"),
    st.from_regex(r"\A-?[0-9]{1,12}(\.[0-9]{1,4})?\Z"),
)
PRODUCTS_KNOWN = ["P1", "P2", "P3", "P4", "P5"]
lines = st.builds(
    Line,
    product_id=st.sampled_from([*PRODUCTS_KNOWN, "P9", "p1", " P1", None]),
    quantity=st.one_of(st.integers(1, 3), st.just(1_000_000)),
    unit_price=st.one_of(st.sampled_from(["5", "10.00", "-10", "2.5", "0"]), amounts),
)
orders = st.builds(
    Order,
    order_id=st.one_of(st.just("184467"), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)),
    currency=st.sampled_from(["USD", "usd", "IDR", "eur", "JPY", "XXX", "USD\n"]),
    total_amount=amounts,
    items=st.lists(lines, max_size=5),
    source=st.sampled_from(["web", "pos"]),
    user_id=st.one_of(st.none(), st.integers(0, 6), st.just(2**63 - 1)),
    email=st.sampled_from([None, "ana@example.com", "Ana <ANA@example.com>", "b@example.com", "shared@example.com", "no"]),
    phone=st.sampled_from([None, "0812 3456 7890", "+62 812-3456-7890", "x"]),
    loyalty_id=st.sampled_from([None, " L1 ", "L1", "L2", ""]),
    account_created_at=st.one_of(st.none(), moments),
    store_id=st.sampled_from([None, "ST-1", "ST-9"]),
    payment_method=st.one_of(st.none(), st.sampled_from(["card", " card", "CARD", "barter", ""])),
    card_fingerprint=texts,
    ip_address=texts,
    device_id=texts,
    shipping_address=addresses,
    created_at=st.one_of(
        st.none(), st.builds(lambda at, zone: datetime.fromisoformat(f"{at:%Y-%m-%dT%H:%M:%S.%f}{zone}"), moments, zones)
    ),
)


@st.composite
def silver_tables(draw: Any) -> SilverTables:
    users = [
        {
            "user_id": user,
            "valid_from": at,
            "is_current": True,
            "created_at": draw(st.one_of(st.none(), moments)),
            "country": "ID",
        }
        for user in draw(st.lists(st.integers(0, 5)))
        for at in [draw(moments)]
    ]
    accounts = draw(st.lists(st.integers(0, 6), unique=True))
    graph = [
        {"record_id": f"user:{user}", "node": f"user:{user}", "kind": "self", "status": LINKED, "master_user_id": master}
        for user in accounts
        for master in draw(st.lists(st.sampled_from(["M-user:0", "M-order:x", None]), min_size=1, max_size=2))
    ]
    nodes = {
        "email": ["email:ana@example.com", "email:b@example.com", "email:shared@example.com"],
        "phone": ["phone:+6281234567890"],
        "loyalty": ["loyalty:L1", "loyalty:L2"],
    }
    graph += [
        {
            "record_id": record,
            "node": node,
            "kind": kind,
            "status": draw(st.sampled_from([LINKED, "other"])),
            "master_user_id": "M-1",
        }
        for kind, kinds in nodes.items()
        for node in kinds
        for record in draw(st.lists(st.sampled_from(["user:1", "user:2", "order:amazon:1"]), max_size=3))
    ]
    category = st.sampled_from([None, "toys", "Toys", "été", "zoo", ""])
    products = [{"product_id": name, "category": draw(category)} for name in draw(st.sets(st.sampled_from(PRODUCTS_KNOWN)))]
    days = st.dates(date(2025, 11, 15), date(2026, 2, 10))
    rate = st.one_of(st.none(), st.decimals("0.00000001", "99", places=8), st.sampled_from([Decimal("0.5"), Decimal("0.00006")]))
    rates = [
        {"rate_date": day, "currency": currency, "to_base": draw(rate)}
        for currency in ("USD", "IDR", "EUR", "JPY")
        for day in draw(st.sets(days, max_size=4))
    ]
    stores = [{"store_id": "ST-1", "country": "ID"}]
    return SilverTables(
        table(USERS_SCD, users),
        table(IDENTITY_GRAPH, graph),
        table(PRODUCTS, products),
        table(EXCHANGE_RATES, draw(st.permutations(rates))),
        table(STORES, stores),
    )


@property_test(orders, silver_tables(), st.sampled_from(["USD", "EUR"]), fast=75, slow=300)
def test_order_row_equals_silver(order: Order, tables: SilverTables, base: str) -> None:
    context = BusinessSettings(base_currency=base, default_region="ID")
    row = order_row(order, tables.reference, context, NOW)
    assert list(row) == list(ORDER_COLUMNS)
    assert row == row_by_silver(order, row["account"], tables, context)


def accounts_showing(node: str, tables: SilverTables) -> set[str]:
    shown = tables.graph.filter((pl.col("node") == node) & (pl.col("kind") != "self") & (pl.col("status") == LINKED))
    return {record for record in shown["record_id"] if record.startswith("user:")}


@settings(max_examples=100, deadline=None)
@given(silver_tables(), st.sampled_from(["b@example.com", "shared@example.com", "new@example.com"]))
def test_identifier_finds_the_only_account_that_shows_it(tables: SilverTables, email: str) -> None:
    row = order_row(Order("1", "USD", "1", email=email.upper()), tables.reference, BusinessSettings(default_region="ID"), NOW)
    showing = accounts_showing(f"email:{email}", tables)
    assert row["customer"] == (showing.pop() if len(showing) == 1 else None)


@pytest.mark.parametrize("field", ["created_at", "account_created_at"])
@pytest.mark.parametrize("moment", [NOW + timedelta(minutes=6), datetime(1, 1, 1, tzinfo=UTC)])
def test_impossible_moments_are_rejected(field: str, moment: datetime) -> None:
    with pytest.raises(Problem, match=field):
        order_row(Order("1", "USD", "1", user_id=1, **{field: moment}), ReferenceData(), BusinessSettings(), NOW, "orders[3].")
