"""Finds the person that an identifier names: their accounts, marketplace orders and master users."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS
from pipelines.identity.records import MARKETPLACE_ORDER_ID, ORDER_PREFIX, USER_PREFIX
from pipelines.parsing.contacts import normalise_email, normalise_phone
from pipelines.privacy.value_replacer import PersonalValue
from pipelines.settings import settings_of
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

MAX_LISTED = 10
"""Master users that an error lists."""


@dataclass(frozen=True)
class SubjectQuery:
    """The identifier of a person; exactly one is given."""

    email: str | None = None
    phone: str | None = None
    loyalty_id: str | None = None
    user_id: int | None = None
    master_user_id: str | None = None


@dataclass(frozen=True)
class DataSubject:
    """A person in the lakehouse.

    masters   master user ids; empty when all accounts are closed
    accounts  user ids
    orders    record ids of marketplace orders
    spelled   the value by which they were found, if it was a contact or loyalty id
    """

    masters: frozenset[str]
    accounts: frozenset[int]
    orders: frozenset[str]
    spelled: tuple[PersonalValue, ...] = ()

    @property
    def records(self) -> frozenset[str]:
        """Return all their record ids in silver.identity_graph."""
        return self.orders | {f"{USER_PREFIX}{number}" for number in self.accounts}


def find_person(lake: Lake, query: SubjectQuery) -> DataSubject:
    """Return the person that the query names. Raises ShopSphereError when no customer or several match."""
    graph = lake.load(IDENTITY_GRAPH).read(["record_id", "node", "master_user_id"])
    users = lake.load(USERS_SCD).read(["user_id", "email", "phone_number", "loyalty_id", "name", "master_user_id"])
    records, accounts, spelled = _matches(query, graph, users, settings_of(lake).default_region)
    masters = set(graph.filter(pl.col("record_id").is_in(records))["master_user_id"].drop_nulls())
    masters |= set(users.filter(pl.col("user_id").is_in(accounts))["master_user_id"].drop_nulls())
    if query.master_user_id is not None:
        masters &= {query.master_user_id}
    if not masters and not accounts and not spelled:
        raise ShopSphereError("No customer matches this identifier. Try another one: e-mail, phone, account or loyalty card.")
    if len(masters) > 1:
        raise ShopSphereError(
            f"{len(masters)} customers match this identifier: {', '.join(sorted(masters)[:MAX_LISTED])}. "
            "Name one of them with --master-user-id."
        )
    members = set(graph.filter(pl.col("master_user_id").is_in(list(masters)))["record_id"]) | set(records if not masters else ())
    accounts |= {int(record.removeprefix(USER_PREFIX)) for record in members if record.startswith(USER_PREFIX)}
    accounts |= _closed_accounts(lake, users, accounts, members, known_records=set(graph["record_id"]))
    orders = frozenset(record for record in members if record.startswith(ORDER_PREFIX))
    return DataSubject(frozenset(masters), frozenset(accounts), orders, spelled)


def _matches(
    query: SubjectQuery, graph: pl.DataFrame, users: pl.DataFrame, region: str
) -> tuple[list[str], set[int], tuple[PersonalValue, ...]]:
    """Return the records and the accounts that match the query, and its value when it is a contact or loyalty id."""
    if query.master_user_id is not None:
        records = graph.filter(pl.col("master_user_id") == query.master_user_id)["record_id"].unique().to_list()
        return records, set(users.filter(pl.col("master_user_id") == query.master_user_id)["user_id"]), ()
    if query.user_id is not None:
        known = users.filter(pl.col("user_id") == query.user_id).height > 0
        return [f"{USER_PREFIX}{query.user_id}"], {query.user_id} if known else set(), ()
    kind, column, raw = next(
        (kind, column, raw)
        for kind, column, raw in (
            ("email", "email", query.email),
            ("phone", "phone_number", query.phone),
            ("loyalty", "loyalty_id", query.loyalty_id),
        )
        if raw is not None
    )
    value = {"email": normalise_email(raw), "phone": normalise_phone(raw, region), "loyalty": raw.strip() or None}[kind]
    if value is None:
        raise ShopSphereError(f"The {kind} is incomplete or masked and does not identify a person. Give it in full.")
    matching = graph.filter((pl.col("node") == f"{kind}:{value}") | pl.col("node").str.starts_with(f"{kind}:{value}|"))
    accounts = set(users.filter(pl.col(column) == value)["user_id"])
    return matching["record_id"].unique().to_list(), accounts, (PersonalValue(kind, raw, value),)


def _closed_accounts(
    lake: Lake, users: pl.DataFrame, accounts: set[int], members: set[str], *, known_records: set[str]
) -> set[int]:
    """Return the closed accounts that share an e-mail with the person's accounts or orders.

    The identity graph does not contain closed accounts. E-mails under too many names belong to a crowd and do not count.
    """
    orders = lake.load(ORDERS_UNIFIED).read(["email"], pl.col("customer_record").is_in(sorted(members)))
    emails = pl.concat([users.filter(pl.col("user_id").is_in(accounts))["email"], orders["email"]]).drop_nulls().unique()
    sharing = users.filter(pl.col("email").is_in(emails.implode()))
    names = sharing.group_by("email").agg(pl.col("name").str.to_lowercase().n_unique().alias("names"))
    crowds = names.filter(pl.col("names") > settings_of(lake).identifier_crowd)["email"]
    candidates = sharing.filter(~pl.col("email").is_in(crowds.implode()))["user_id"].unique().to_list()
    return {number for number in candidates if f"{USER_PREFIX}{number}" not in known_records}


def orders_of(lake: Lake, person: DataSubject) -> list[str]:
    """Return the ids of web and store orders that belonged to the person's accounts at all times."""
    orders = lake.load(ORDERS).read(["order_id", "user_id"]).drop_nulls()
    owned = orders.group_by("order_id").agg(pl.col("user_id").is_in(list(person.accounts)).all().alias("owned"))
    return owned.filter("owned")["order_id"].cast(pl.String).sort().to_list()


def documents_of(lake: Lake, person: DataSubject) -> list[str]:
    """Return the document ids of the person's marketplace orders."""
    order_ids = [record.removeprefix(ORDER_PREFIX) for record in person.orders]
    found = lake.load(MARKETPLACE_ORDERS).read(["document_id"], MARKETPLACE_ORDER_ID.is_in(order_ids))
    return found["document_id"].drop_nulls().unique().sort().to_list()
