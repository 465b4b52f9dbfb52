"""Customers over HTTP: a person across all accounts and channels, and the links that identify them.

Personal data: requires a key with the scope `customers`. Identifiers are normalised by silver's rules before they are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import msgspec
import polars as pl
from msgspec import Meta
from starlette.responses import Response

from lakehouse.table import Table
from pipelines.gold.customer_360 import CHANNELS, CUSTOMER_360
from pipelines.gold.user_risk_scores import USER_RISK_SCORES
from pipelines.identity.links import LINKED
from pipelines.identity.records import MASTER_PREFIX
from pipelines.parsing.contacts import normalise_email, normalise_phone
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD
from serve.api.parameters import ID_SCHEMA, MAX_ID_LENGTH, limit_parameter, read_id
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest, Endpoint, Parameter, json_response
from serve.http.problems import Problem, Wrong, bad_field
from serve.state.table_cache import TableCache

Struct = TypeVar("Struct", bound=msgspec.Struct)

MAX_TIMELINE = 1_000
MAX_SEARCH_BYTES = 4_096
SearchText = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)]
MAX_LISTED = 20
"""Customers listed when several match."""
SECONDS_PER_DAY = 86_400.0
UNINFORMATIVE_KINDS = ("self", "place", "block")
"""Kinds of links that explain nothing: the record itself, and blocks in which records are only compared."""


class Profile(msgspec.Struct, frozen=True):
    """Profile of the person, from their primary account."""

    name: str | None
    email: str | None
    phone: str | None
    city: str | None
    country: str | None
    customer_since: datetime | None
    loyalty_ids: list[str]
    primary_user_id: int | None
    apparent_customers: Annotated[
        int, Meta(description="Number of customers that single-channel systems would count for this person.")
    ]


class AccountVersion(msgspec.Struct, frozen=True):
    """A version of an account: a period in which nothing about it changed."""

    user_id: int
    valid_from: datetime
    valid_to: datetime | None
    is_current: bool
    email: str | None
    email_verified: bool | None
    phone_number: str | None
    phone_verified: bool | None
    name: str | None
    address: str | None
    city: str | None
    country: str | None
    loyalty_id: str | None
    closed_by: str | None


class Link(msgspec.Struct, frozen=True):
    """A link between a record and an identifier or another record."""

    record_id: Annotated[str, Meta(description="'user:<user_id>' or 'order:<platform>:<order>'.")]
    kind: Annotated[str, Meta(description="loyalty, email, phone, device, address; match: a probabilistic link.")]
    node: Annotated[str, Meta(description="The identifier, '<kind>:<value>'; for a match, the other record.")]
    reason: str
    status: Annotated[str, Meta(description="linked: joins the records; weak, crowded: does not.")]
    trust: Annotated[int, Meta(description="1 (strongest) to 6.")]
    weight: Annotated[float | None, Meta(description="For a match: log2 of its odds.")]
    first_seen: datetime


class Entry(msgspec.Struct, frozen=True):
    """An entry of the timeline."""

    at: datetime
    kind: Annotated[str, Meta(description="order, chargeback, account_opened, account_changed, account_closed.")]
    channel: str | None = None
    platform: str | None = None
    order_id: str | None = None
    status: str | None = None
    amount: Decimal | None = None
    currency: str | None = None
    amount_base: Annotated[Decimal | None, Meta(description="In the base currency; null when the rate is unknown.")] = None
    user_id: int | None = None
    detail: str | None = None


class Channel(msgspec.Struct, frozen=True):
    """Purchases in a channel."""

    channel: str
    orders: int
    share: float


class Rfm(msgspec.Struct, frozen=True):
    """Recency, frequency, monetary value."""

    last_order_at: datetime | None
    recency_days: Annotated[float | None, Meta(description="Days from the last purchase until now.")]
    frequency: int
    monetary: Decimal
    frequency_score: int | None
    monetary_score: int | None


class LifetimeValue(msgspec.Struct, frozen=True):
    """Historic and predicted value of the customer, in the base currency."""

    historic: Decimal
    predicted: Decimal | None
    average_order_value: Decimal | None
    average_days_between_orders: float | None
    expected_next_order_at: datetime | None
    churn_probability: Annotated[
        float | None, Meta(description="1 - exp(-days since the last purchase / expected days between purchases), as of now.")
    ]
    currency: str


class Risk(msgspec.Struct, frozen=True):
    """Rule-based fraud risk of the person; null without orders."""

    score: int | None
    band: str | None
    reasons: list[str]
    rule_version: str | None
    chargebacks: int
    fraud_chargebacks: int


class Customer(msgspec.Struct, frozen=True):
    """A person across all accounts and channels."""

    master_user_id: str
    profile: Profile
    history: Annotated[list[AccountVersion], Meta(description="All versions of all accounts, newest first.")]
    links: list[Link]
    timeline: Annotated[list[Entry], Meta(description="Newest first, at most ?limit= entries.")]
    timeline_total: int
    channel_mix: list[Channel]
    rfm: Rfm
    lifetime_value: LifetimeValue
    risk: Risk
    as_of: Annotated[datetime | None, Meta(description="The most recent commit to any of the tables behind the answer.")]
    staleness_ms: Annotated[int | None, Meta(description="Age of `as_of`.")]
    snapshots: dict[str, int]


class CustomerMatch(msgspec.Struct, frozen=True):
    """A person in a list of search results."""

    master_user_id: str
    name: str | None
    city: str | None
    country: str | None
    orders: int


class AtRisk(msgspec.Struct, frozen=True):
    """A person at medium or high risk."""

    master_user_id: str
    risk_score: int
    risk_band: str
    reasons: list[str]
    orders: int
    last_order_at: datetime | None


LIMIT = limit_parameter(MAX_TIMELINE, "Maximum number of timeline entries")
EMAIL = Parameter("email", "E-mail address, in any spelling.", read_id, ID_SCHEMA, example="siti.hidayat145@post.example")
PHONE = Parameter(
    "phone", "Phone number; without a country code, of the default region.", read_id, ID_SCHEMA, example="+6281297201"
)
LOYALTY_ID = Parameter("loyalty_id", "Loyalty card.", read_id, ID_SCHEMA, example="L-1042")
ORDER_ID = Parameter("order_id", "Order: '123', or '<platform>:<order>' of a marketplace.", read_id, ID_SCHEMA, example="123")
IDENTIFIERS = ("email", "phone", "loyalty_id", "order_id")
TABLES: tuple[Table, ...] = (CUSTOMER_360, USER_RISK_SCORES, IDENTITY_GRAPH, USERS_SCD, ORDERS_UNIFIED, CHARGEBACKS)


class CustomerSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identifiers of one customer: one of them, or several that all belong to the customer."""

    email: SearchText | None = None
    phone: SearchText | None = None
    loyalty_id: SearchText | None = None
    order_id: SearchText | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_TIMELINE, description="Entries of the timeline.")] = 100


class Customers:
    """The customer endpoints."""

    def __init__(self, tables: TableCache, pool: BoundedThreadPool, region: str, currency: str) -> None:
        self.tables, self.pool, self.region, self.currency = tables, pool, region, currency

    async def by_master(self, request: ApiRequest) -> Response:
        """Answer GET /v1/customers/{master_user_id}."""
        master, limit = request.path["master_user_id"], request.query.get("limit", 100)
        return json_response(await self.pool.run(self.find_by_master, master, limit))

    async def by_identifier(self, request: ApiRequest) -> Response:
        """Answer GET /v1/customers."""
        identifiers = {name: request.query[name] for name in IDENTIFIERS if name in request.query}
        if not identifiers:
            raise _no_identifier()
        limit = request.query.get("limit", 100)
        return json_response(await self.pool.run(self.find_by_identifiers, identifiers, limit))

    async def by_search(self, request: ApiRequest) -> Response:
        """Answer POST /v1/customers/search."""
        search: CustomerSearch = request.body
        identifiers = {name: value for name in IDENTIFIERS if (value := getattr(search, name)) is not None}
        if not identifiers:
            raise _no_identifier()
        return json_response(await self.pool.run(self.find_by_identifiers, identifiers, search.limit))

    def find_by_master(self, master: str, limit: int) -> Customer:
        """Return the person with a master_user_id, also one from before a merge. Raises Problem 404."""
        # a master user is named after one of its records, which after a merge belongs to the merged person
        record = master.removeprefix(MASTER_PREFIX)
        masters = self._masters(pl.col("record_id") == record) if master.startswith(MASTER_PREFIX) else []
        return self._only_customer(masters, limit)

    def find_by_identifiers(self, identifiers: Mapping[str, str], limit: int) -> Customer:
        """Return the only person with all identifiers (values by name, one of IDENTIFIERS). Raises Problem 404, 409."""
        found = [self._masters_with(kind, value) for kind, value in identifiers.items()]
        if not all(found):
            raise _no_match()
        common = set(found[0]).intersection(*found[1:])
        if not common:
            raise Problem(409, "The identifiers belong to different customers.")
        return self._only_customer(sorted(common), limit)

    def _masters_with(self, kind: str, value: str) -> list[str]:
        """Return the master_user_ids with an identifier. Raises Problem 404."""
        if kind == "order_id":
            order = self.tables.get(ORDERS_UNIFIED).read(pl.col("order_id") == value, ["master_user_id"])
            if order.height and order["master_user_id"][0] is None:
                raise Problem(404, "The customer of this order is unknown.")
            return order["master_user_id"].to_list()
        node = self.node(kind, value)
        linked = self._masters((pl.col("node") == node) & (pl.col("status") == LINKED))
        return linked or self._masters(pl.col("node") == node)

    def search_by_name(self, name: str) -> tuple[list[CustomerMatch], int]:
        """Return the first MAX_LISTED people, by name, whose name contains this text, and the total number."""
        return self._list_people(pl.col("name").str.to_lowercase().str.contains(name.strip().lower(), literal=True))

    def list_by_identifiers(self, identifiers: Mapping[str, str]) -> tuple[list[CustomerMatch], int]:
        """Return the first MAX_LISTED people, by name, with all these identifiers, and the total number."""
        masters = set.intersection(*(set(self._masters_with(kind, value)) for kind, value in identifiers.items()))
        return self._list_people(pl.col("master_user_id").is_in(sorted(masters)))

    def _list_people(self, predicate: pl.Expr) -> tuple[list[CustomerMatch], int]:
        columns = ["master_user_id", "name", "city", "country", "orders"]
        rows = self.tables.get(CUSTOMER_360).read(predicate, columns).sort("name", "master_user_id", nulls_last=True)
        return [msgspec.convert(row, CustomerMatch) for row in rows.head(MAX_LISTED).to_dicts()], rows.height

    def at_risk(self, limit: int) -> tuple[list[AtRisk], int]:
        """Return the `limit` people with the highest risk in the bands high and medium, and the total number."""
        columns = ["master_user_id", "risk_score", "risk_band", "reasons", "orders", "last_order_at"]
        found = self.tables.get(USER_RISK_SCORES).read(pl.col("risk_band").is_in(["high", "medium"]), columns)
        rows = found.sort("risk_score", "master_user_id", descending=[True, False])
        return [msgspec.convert(row | {"reasons": _reasons(row)}, AtRisk) for row in rows.head(limit).to_dicts()], rows.height

    def node(self, kind: str, value: str) -> str:
        """Return an identifier's node in the identity graph. Raises Problem 404 for an invalid identifier."""
        normalise: Mapping[str, Callable[[str], str | None]] = {
            "email": normalise_email,
            # a '+' that was not percent-encoded arrives as a space
            "phone": lambda text: normalise_phone("+" + text[1:] if text.startswith(" ") else text, self.region),
            "loyalty_id": lambda text: text.strip() or None,
        }
        normalised = normalise[kind](value)
        if normalised is None:
            nouns = {"email": "e-mail address", "phone": "phone number", "loyalty_id": "loyalty id"}
            raise bad_field(kind, f"is not a valid {nouns[kind]}", 404)
        return f"{kind.removesuffix('_id')}:{normalised}"

    def _masters(self, predicate: pl.Expr) -> list[str]:
        links = self.tables.get(IDENTITY_GRAPH).read(predicate, ["master_user_id"])
        return sorted(links["master_user_id"].unique())

    def _only_customer(self, masters: list[str], limit: int) -> Customer:
        if not masters:
            raise _no_match()
        if len(masters) > 1:
            listed = tuple(Wrong("master_user_id", master) for master in masters[:MAX_LISTED])
            raise Problem(409, f"{len(masters)} customers match. Request one of them by master_user_id.", errors=listed)
        return self.customer(masters[0], limit)

    def customer(self, master: str, limit: int) -> Customer:
        """Return everything about one person, with at most `limit` timeline entries."""
        tables = {table.name: self.tables.get(table) for table in TABLES}
        is_person = pl.col("master_user_id") == master

        def rows(table: Table, predicate: pl.Expr) -> list[dict[str, Any]]:
            return tables[table.name].read(predicate).to_dicts()

        links = rows(IDENTITY_GRAPH, is_person & ~pl.col("kind").is_in(list(UNINFORMATIVE_KINDS)))
        history = sorted(rows(USERS_SCD, is_person), key=lambda row: row["valid_from"], reverse=True)
        orders = rows(ORDERS_UNIFIED, is_person)
        chargebacks = rows(CHARGEBACKS, pl.col("order_ref").is_in([row["order_id"] for row in orders]))
        summary = next(iter(rows(CUSTOMER_360, is_person)), {})
        risk = next(iter(rows(USER_RISK_SCORES, is_person)), {})
        timeline = _timeline(history, orders, chargebacks)
        now = datetime.now(UTC)
        committed_at = max((one.committed_at for one in tables.values() if one.committed_at is not None), default=None)
        return Customer(
            master_user_id=master,
            profile=_profile(summary),
            history=[_struct(row, AccountVersion) for row in history],
            links=[_struct(row, Link) for row in _sorted_links(links)],
            timeline=timeline[:limit],
            timeline_total=len(timeline),
            channel_mix=_channel_mix(summary),
            rfm=_rfm(summary, now),
            lifetime_value=_lifetime_value(summary, now, self.currency),
            risk=_risk(risk, summary),
            as_of=committed_at,
            staleness_ms=round((now - committed_at).total_seconds() * 1000) if committed_at else None,
            snapshots={name: one.snapshot_id for name, one in tables.items() if one.snapshot_id is not None},
        )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The customer endpoints."""
        return (
            Endpoint(
                method="GET",
                path="/v1/customers",
                name="find_customer",
                doc="The customer with an identifier, or with all of several identifiers. Proxies log addresses, with the "
                "identifiers in them: prefer POST /v1/customers/search.",
                handler=self.by_identifier,
                answer=Customer,
                scope="customers",
                parameters=(EMAIL, PHONE, LOYALTY_ID, ORDER_ID, LIMIT),
                statuses=(404, 409, 429),
            ),
            Endpoint(
                method="POST",
                path="/v1/customers/search",
                name="search_customer",
                doc="The customer with an identifier, or with all of several identifiers, which are in no log.",
                handler=self.by_search,
                answer=Customer,
                scope="customers",
                body=CustomerSearch,
                body_limit=MAX_SEARCH_BYTES,
                body_example=CustomerSearch(email="siti.hidayat145@post.example"),
                statuses=(404, 409, 429),
            ),
            Endpoint(
                method="GET",
                path="/v1/customers/{master_user_id}",
                name="customer",
                doc="A customer. An id from before a merge returns the merged customer.",
                handler=self.by_master,
                answer=Customer,
                scope="customers",
                parameters=(LIMIT,),
                path_example={"master_user_id": "M-user:7"},
                statuses=(404, 409, 429),
            ),
        )


def _no_identifier() -> Problem:
    return Problem(404, f"No identifier is given. Use {', '.join(IDENTIFIERS[:-1])} or {IDENTIFIERS[-1]}.")


def _no_match() -> Problem:
    return Problem(404, "No customer matches this identifier.")


def _struct(row: Mapping[str, Any], kind: type[Struct]) -> Struct:
    return msgspec.convert({name: row[name] for name in kind.__struct_fields__}, kind)


def _reasons(risk: Mapping[str, Any]) -> list[str]:
    return [text for text in (risk.get("reasons") or "").split("; ") if text]


def _sorted_links(links: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(links, key=lambda row: (row["status"] != LINKED, row["trust"], row["record_id"], row["node"]))


def _risk(risk: Mapping[str, Any], summary: Mapping[str, Any]) -> Risk:
    return Risk(
        score=risk.get("risk_score"),
        band=risk.get("risk_band"),
        reasons=_reasons(risk),
        rule_version=risk.get("rule_version"),
        chargebacks=summary.get("chargebacks", 0),
        fraud_chargebacks=summary.get("fraud_chargebacks", 0),
    )


def _profile(summary: Mapping[str, Any]) -> Profile:
    cards = [card.strip() for card in (summary.get("loyalty_ids") or "").split(",") if card.strip()]
    return Profile(
        name=summary.get("name"),
        email=summary.get("email"),
        phone=summary.get("phone"),
        city=summary.get("city"),
        country=summary.get("country"),
        customer_since=summary.get("customer_since"),
        loyalty_ids=cards,
        primary_user_id=summary.get("primary_user_id"),
        apparent_customers=summary.get("apparent_customers", 0),
    )


def _timeline(history: list[dict[str, Any]], orders: list[dict[str, Any]], chargebacks: list[dict[str, Any]]) -> list[Entry]:
    opened = {row["user_id"]: row["valid_from"] for row in history}  # newest first, so the first version wins
    entries = [
        Entry(
            at=row["placed_at"],
            kind="order",
            channel=row["channel"],
            platform=row["platform"],
            order_id=row["order_id"],
            status=row["status"],
            amount=row["total_amount"],
            currency=row["currency"],
            amount_base=row["total_base"],
            user_id=row["user_id"],
        )
        for row in orders
        if row["placed_at"] is not None
    ]
    entries += [
        Entry(row["reported_at"], "chargeback", order_id=row["order_ref"], detail=row["reason"])
        for row in chargebacks
        if row["reported_at"] is not None
    ]
    for row in history:
        kind = "account_opened" if row["valid_from"] == opened[row["user_id"]] else "account_changed"
        entries.append(Entry(row["valid_from"], kind, user_id=row["user_id"]))
        if row["closed_by"] == "delete":
            entries.append(Entry(row["valid_to"], "account_closed", user_id=row["user_id"]))
    return sorted(entries, key=lambda entry: (entry.at, entry.kind, entry.order_id or ""), reverse=True)


def _channel_mix(summary: Mapping[str, Any]) -> list[Channel]:
    counts = {channel: summary.get(f"orders_{channel}", 0) for channel in CHANNELS}
    total = sum(counts.values())
    return [Channel(channel, count, count / total) for channel, count in counts.items() if count]


def _days_since(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max(0.0, (now - moment).total_seconds() / SECONDS_PER_DAY)


def _rfm(summary: Mapping[str, Any], now: datetime) -> Rfm:
    last = summary.get("last_order_at")
    return Rfm(
        last_order_at=last,
        recency_days=_days_since(last, now),
        frequency=summary.get("orders", 0),
        monetary=summary.get("net_revenue", Decimal(0)),
        frequency_score=summary.get("frequency_score"),
        monetary_score=summary.get("monetary_score"),
    )


def _lifetime_value(summary: Mapping[str, Any], now: datetime, currency: str) -> LifetimeValue:
    days, gap = _days_since(summary.get("last_order_at"), now), summary.get("expected_gap_days")
    return LifetimeValue(
        historic=summary.get("net_revenue", Decimal(0)),
        predicted=summary.get("predicted_lifetime_value"),
        average_order_value=summary.get("average_order_value"),
        average_days_between_orders=summary.get("average_days_between_orders"),
        expected_next_order_at=summary.get("expected_next_order_at"),
        churn_probability=1 - math.exp(-days / gap) if days is not None and gap else None,
        currency=currency,
    )
