"""Reference data for scoring: the orders of the lakehouse, and look-ups of accounts, identities, products and exchange rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime

import polars as pl

from lakehouse.table import Table
from ml.features.compute import with_ratios
from ml.features.declarations import ORDER_COLUMNS, conform
from ml.tables import order_entities
from ml.tables.category_amounts import totals
from pipelines.identity.links import LINKED
from pipelines.identity.records import MASTER_PREFIX, USER_PREFIX, masters_by_record
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.exchange_rates import EXCHANGE_RATES
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.users_scd import USERS_SCD
from serve.state.table_cache import TableCache

REFERENCE_TABLES: tuple[Table, ...] = (
    ORDERS_UNIFIED,
    ORDER_ITEMS_UNIFIED,
    PRODUCTS,
    CHARGEBACKS,
    USERS_SCD,
    IDENTITY_GRAPH,
    EXCHANGE_RATES,
)


@dataclass(frozen=True, kw_only=True)
class ReferenceData:
    """The orders of the lakehouse, and look-ups for new ones.

    entities           the orders in the form of the features (ORDER_COLUMNS)
    categories         totals per category
    account_opened_at  by user_id
    masters            master_user_id by record_id of an account
    accounts_by_node   user_id by identifier (of links that join); None: several accounts show it
    product_categories by product_id
    rates              by currency: days, and the rate from each day on in 10^-8 units of the base currency
    snapshots          snapshot ids by table name
    committed_at       when orders were last committed
    """

    entities: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=ORDER_COLUMNS))
    categories: pl.DataFrame = field(default_factory=lambda: totals(pl.DataFrame(schema=ORDER_COLUMNS)))
    account_opened_at: Mapping[int, datetime | None] = field(default_factory=dict)
    masters: Mapping[str, str] = field(default_factory=dict)
    accounts_by_node: Mapping[str, int | None] = field(default_factory=dict)
    product_categories: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, tuple[list[date], list[int]]] = field(default_factory=dict)
    snapshots: Mapping[str, int] = field(default_factory=dict)
    committed_at: datetime | None = None


def read_reference_data(tables: TableCache, context: BusinessSettings) -> ReferenceData:
    """Read the reference data from the newest snapshots."""
    cached = {table.name: tables.get(table) for table in REFERENCE_TABLES}
    orders = cached[ORDERS_UNIFIED.name]
    users = cached[USERS_SCD.name].read(columns=("user_id", "created_at"))
    products = cached[PRODUCTS.name].read(columns=("product_id", "category"))
    frames = {
        "orders": orders.read(columns=order_entities.ORDER_COLUMNS),
        "items": cached[ORDER_ITEMS_UNIFIED.name].read(columns=("order_id", "line_no", "product_id", "quantity", "line_amount")),
        "products": products,
        "chargebacks": cached[CHARGEBACKS.name].read(),
        "users": users,
    }
    # training reads the ratios from silver.fraud_ratios, which computes them the same way
    entities = with_ratios(conform(order_entities.transform(frames, context), ORDER_COLUMNS))
    graph = cached[IDENTITY_GRAPH.name].read(columns=("record_id", "node", "kind", "status", "master_user_id"))
    return ReferenceData(
        entities=entities,
        categories=totals(entities),
        account_opened_at=account_opened_at(users),
        masters=masters_by_account(graph),
        accounts_by_node=accounts_by_node(graph),
        product_categories=product_categories(products),
        rates=rates_by_currency(cached[EXCHANGE_RATES.name].read()),
        snapshots={name: one.snapshot_id for name, one in cached.items() if one.snapshot_id is not None},
        committed_at=orders.committed_at,
    )


def current_snapshots(tables: TableCache) -> dict[str, int]:
    """Return the snapshot ids that `read_reference_data` would read now."""
    ids = {table.name: tables.get(table).snapshot_id for table in REFERENCE_TABLES}
    return {name: snapshot_id for name, snapshot_id in ids.items() if snapshot_id is not None}


def account_opened_at(users: pl.DataFrame) -> dict[int, datetime | None]:
    """Return when each account was opened, from silver.users_scd."""
    return dict(users.group_by("user_id").agg(pl.col("created_at").min()).iter_rows())


def masters_by_account(graph: pl.DataFrame) -> dict[str, str]:
    """Return the master_user_id of each account's record, from silver.identity_graph."""
    accounts = graph.filter((pl.col("kind") == "self") & pl.col("record_id").str.starts_with(USER_PREFIX))
    masters = accounts.select("record_id", pl.col("master_user_id").fill_null(MASTER_PREFIX + pl.col("record_id")))
    return dict(masters_by_record(masters).iter_rows())


def accounts_by_node(graph: pl.DataFrame) -> dict[str, int | None]:
    """Return the account that shows each identifier, None for several, from silver.identity_graph."""
    linked = graph.filter(pl.col("kind").is_in(["email", "phone", "loyalty"]) & (pl.col("status") == LINKED))
    accounts = linked.filter(pl.col("record_id").str.starts_with(USER_PREFIX)).group_by("node").agg(pl.col("record_id").unique())
    return {
        node: int(records[0].removeprefix(USER_PREFIX)) if len(records) == 1 else None for node, records in accounts.iter_rows()
    }


def product_categories(products: pl.DataFrame) -> dict[str, str]:
    """Return the category of each product that has one, from silver.products."""
    return dict(products.select("product_id", "category").drop_nulls().iter_rows())


def rates_by_currency(rates: pl.DataFrame) -> dict[str, tuple[list[date], list[int]]]:
    """Return the days and rates of each currency, from silver.exchange_rates."""
    by_currency: dict[str, tuple[list[date], list[int]]] = {}
    for currency, day, rate in rates.select("currency", "rate_date", "to_base").drop_nulls().sort("rate_date").iter_rows():
        days, values = by_currency.setdefault(currency, ([], []))
        days.append(day)
        values.append(int(rate.scaleb(8)))
    return by_currency
