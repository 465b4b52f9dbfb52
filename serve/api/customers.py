"""Customers over HTTP: who somebody is over all their accounts and channels, and why that is one person.

Personal data: a key needs the scope `customers`. Identifiers are brought into silver's own spelling before they are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

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
from serve.api.inventory import ID, read_id, read_limit
from serve.http.edges import ApiRequest, Endpoint, Gate, Parameter, answer
from serve.http.problems import Problem, Wrong
from serve.state.table_cache import TableCache

MOST = 1_000
"""Entries of a timeline that can be asked for at once."""
NAMED = 20
"""Customers that are named where an identifier is shown by several."""
SECONDS_OF_DAY = 86_400.0
SILENT = ("self", "place", "block")
"""Kinds of links that explain nothing: the record itself, and where records only meet to be compared."""


class Profile(msgspec.Struct, frozen=True):
    """Who it is, of the account that stands for the person."""

    name: str | None
    email: str | None
    phone: str | None
    city: str | None
    country: str | None
    customer_since: datetime | None
    loyalty_ids: list[str]
    primary_user_id: int | None
    apparent_customers: Annotated[int, Meta(description="As how many customers single-channel systems see the person.")]


class AccountVersion(msgspec.Struct, frozen=True):
    """An account over a stretch of time in which nothing about it changed."""

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
    """Why a record belongs, or might belong, to the person."""

    record_id: Annotated[str, Meta(description="'user:<user_id>' or 'order:<platform>:<order>'.")]
    kind: Annotated[str, Meta(description="loyalty, email, phone, device, address; match: a probabilistic link.")]
    node: Annotated[str, Meta(description="The identifier shown, '<kind>:<value>'; of a match the other record.")]
    reason: str
    status: Annotated[str, Meta(description="linked joins; weak and crowded do not.")]
    trust: Annotated[int, Meta(description="1 strongest to 6.")]
    weight: Annotated[float | None, Meta(description="Of a match: log2 of its odds.")]
    first_seen: datetime


class Entry(msgspec.Struct, frozen=True):
    """Something that happened."""

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
    recency_days: Annotated[float | None, Meta(description="Days since the last purchase, now.")]
    frequency: int
    monetary: Decimal
    frequency_score: int | None
    monetary_score: int | None


class LifetimeValue(msgspec.Struct, frozen=True):
    """What the customer brought and is expected to bring, in the base currency."""

    historic: Decimal
    predicted: Decimal | None
    average_order_value: Decimal | None
    average_days_between_orders: float | None
    expected_next_order_at: datetime | None
    churn_probability: Annotated[float | None, Meta(description="1 - exp(-days since the last purchase / expected gap), now.")]
    currency: str


class Risk(msgspec.Struct, frozen=True):
    """Fraud risk of the person, by rules; null figures: no order yet."""

    score: int | None
    band: str | None
    reasons: list[str]
    rule_version: str | None
    chargebacks: int
    fraud_chargebacks: int


class Customer(msgspec.Struct, frozen=True):
    """A person over all accounts and channels."""

    master_user_id: str
    profile: Profile
    history: Annotated[list[AccountVersion], Meta(description="All accounts, all their versions, newest first.")]
    links: list[Link]
    timeline: Annotated[list[Entry], Meta(description="Newest first, at most ?limit=.")]
    timeline_total: int
    channel_mix: list[Channel]
    rfm: Rfm
    lifetime_value: LifetimeValue
    risk: Risk
    as_of: Annotated[datetime | None, Meta(description="When the lakehouse last changed one of the tables read.")]
    staleness_ms: Annotated[int | None, Meta(description="How long ago `as_of` is.")]
    snapshots: dict[str, int]


class Found(msgspec.Struct, frozen=True):
    """A person in a list."""

    master_user_id: str
    name: str | None
    city: str | None
    country: str | None
    orders: int


class AtRisk(msgspec.Struct, frozen=True):
    """A person whom the rules suspect."""

    master_user_id: str
    risk_score: int
    risk_band: str
    reasons: list[str]
    orders: int
    last_order_at: datetime | None


LIMIT = Parameter(
    "limit",
    f"Entries of the timeline: 1 to {MOST}; 100 when absent.",
    lambda text: read_limit(MOST, text),
    {"type": "integer", "minimum": 1, "maximum": MOST, "default": 100},
)
IDENTIFIERS = ("email", "phone", "loyalty_id", "order_id")
READ: tuple[Table, ...] = (CUSTOMER_360, USER_RISK_SCORES, IDENTITY_GRAPH, USERS_SCD, ORDERS_UNIFIED, CHARGEBACKS)


class Customers:
    """The answers about customers."""

    def __init__(self, snapshots: TableCache, gate: Gate, region: str, currency: str) -> None:
        self.snapshots, self.gate, self.region, self.currency = snapshots, gate, region, currency

    async def by_master(self, asked: ApiRequest) -> Response:
        """GET /v1/customers/{master_user_id}"""
        return answer(await self.gate.run(self.named, asked.path["master_user_id"], asked.query.get("limit", 100)))

    async def by_identifier(self, asked: ApiRequest) -> Response:
        """GET /v1/customers"""
        given = {name: asked.query[name] for name in IDENTIFIERS if name in asked.query}
        if not given:
            raise Problem(404, f"Nobody is named: give {', '.join(IDENTIFIERS[:-1])} or {IDENTIFIERS[-1]}.")
        return answer(await self.gate.run(self.shown_by, given, asked.query.get("limit", 100)))

    def named(self, name: str, limit: int) -> Customer:
        """The person of a master_user_id, also of one from before a merge. Raises Problem 404."""
        # a master user is named after a record; when persons merge, that record still tells whose it is now
        masters = self._masters(pl.col("record_id") == name.removeprefix(MASTER_PREFIX)) if name.startswith(MASTER_PREFIX) else []
        return self._only(masters, limit)

    def shown_by(self, given: Mapping[str, str], limit: int) -> Customer:
        """The one whom all the identifiers (name, one of IDENTIFIERS -> value) belong to. Raises Problem 404, 409."""
        found = [self._shown_by(kind, value) for kind, value in given.items()]
        if not all(found):
            raise Problem(404, "No customer is known by that.")
        common = set(found[0]).intersection(*found[1:])
        if not common:
            raise Problem(409, "The identifiers are of different customers.")
        return self._only(sorted(common), limit)

    def _shown_by(self, kind: str, value: str) -> list[str]:
        """Those who show an identifier."""
        if kind == "order_id":
            order = self.snapshots.of(ORDERS_UNIFIED).read(pl.col("order_id") == value, ["master_user_id"])
            if order.height and order["master_user_id"][0] is None:
                raise Problem(404, "Nobody is known to have placed this order.")
            return order["master_user_id"].to_list()
        node = self.node(kind, value)
        linked = self._masters((pl.col("node") == node) & (pl.col("status") == LINKED))
        return linked or self._masters(pl.col("node") == node)

    def called(self, name: str) -> tuple[list[Found], int]:
        """People of whose name this is a part, at most NAMED of them, by name; and how many there are."""
        return self._people(pl.col("name").str.to_lowercase().str.contains(name.strip().lower(), literal=True))

    def showing(self, given: Mapping[str, str]) -> tuple[list[Found], int]:
        """People who show all the identifiers (as for shown_by), likewise."""
        masters = set.intersection(*(set(self._shown_by(kind, value)) for kind, value in given.items()))
        return self._people(pl.col("master_user_id").is_in(sorted(masters)))

    def _people(self, predicate: pl.Expr) -> tuple[list[Found], int]:
        columns = ["master_user_id", "name", "city", "country", "orders"]
        rows = self.snapshots.of(CUSTOMER_360).read(predicate, columns).sort("name", "master_user_id", nulls_last=True)
        return [msgspec.convert(row, Found) for row in rows.head(NAMED).to_dicts()], rows.height

    def at_risk(self, most: int) -> tuple[list[AtRisk], int]:
        """People whom the rules put into the bands high and medium, at most `most` of them, riskiest first; and how many."""
        columns = ["master_user_id", "risk_score", "risk_band", "reasons", "orders", "last_order_at"]
        found = self.snapshots.of(USER_RISK_SCORES).read(pl.col("risk_band").is_in(["high", "medium"]), columns)
        rows = found.sort("risk_score", "master_user_id", descending=[True, False])
        return [msgspec.convert(row | {"reasons": _reasons(row)}, AtRisk) for row in rows.head(most).to_dicts()], rows.height

    def node(self, kind: str, value: str) -> str:
        """The node of the identity graph that an identifier is. Raises Problem 404."""
        read: Mapping[str, Callable[[str], str | None]] = {
            "email": normalise_email,
            # a '+' that was not encoded arrives as a space
            "phone": lambda text: normalise_phone("+" + text[1:] if text.startswith(" ") else text, self.region),
            "loyalty_id": lambda text: text.strip() or None,
        }
        spelled = read[kind](value)
        if spelled is None:
            raise Problem(404, f"{kind}: cannot be one, so nobody shows it", errors=(Wrong(kind, "cannot be one"),))
        return f"{kind.removesuffix('_id')}:{spelled}"

    def _masters(self, predicate: pl.Expr) -> list[str]:
        found = self.snapshots.of(IDENTITY_GRAPH).read(predicate, ["master_user_id"])
        return sorted(found["master_user_id"].unique())

    def _only(self, masters: list[str], limit: int) -> Customer:
        if not masters:
            raise Problem(404, "No customer is known by that.")
        if len(masters) > 1:
            named = tuple(Wrong("master_user_id", one) for one in masters[:NAMED])
            raise Problem(409, f"{len(masters)} customers show this; ask for one of them by master_user_id.", errors=named)
        return self.customer(masters[0], limit)

    def customer(self, master: str, limit: int) -> Customer:
        """Everything about one person."""
        of = {table.name: self.snapshots.of(table) for table in READ}
        mine = pl.col("master_user_id") == master

        def rows(table: Table, predicate: pl.Expr) -> list[dict[str, Any]]:
            return of[table.name].read(predicate).to_dicts()

        links = rows(IDENTITY_GRAPH, mine & ~pl.col("kind").is_in(list(SILENT)))
        history = sorted(rows(USERS_SCD, mine), key=lambda row: row["valid_from"], reverse=True)
        orders = rows(ORDERS_UNIFIED, mine)
        charged = rows(CHARGEBACKS, pl.col("order_ref").is_in([row["order_id"] for row in orders]))
        whole = next(iter(rows(CUSTOMER_360, mine)), {})
        risk = next(iter(rows(USER_RISK_SCORES, mine)), {})
        timeline = _timeline(history, orders, charged)
        now = datetime.now(UTC)
        changed = max((one.at for one in of.values() if one.at is not None), default=None)
        return Customer(
            master_user_id=master,
            profile=_profile(whole),
            history=[msgspec.convert({n: row[n] for n in AccountVersion.__struct_fields__}, AccountVersion) for row in history],
            links=[msgspec.convert({n: row[n] for n in Link.__struct_fields__}, Link) for row in _ordered(links)],
            timeline=timeline[:limit],
            timeline_total=len(timeline),
            channel_mix=_mix(whole),
            rfm=_rfm(whole, now),
            lifetime_value=_value(whole, now, self.currency),
            risk=Risk(
                risk.get("risk_score"),
                risk.get("risk_band"),
                _reasons(risk),
                risk.get("rule_version"),
                whole.get("chargebacks", 0),
                whole.get("fraud_chargebacks", 0),
            ),
            as_of=changed,
            staleness_ms=round((now - changed).total_seconds() * 1000) if changed else None,
            snapshots={name: one.snapshot_id for name, one in of.items() if one.snapshot_id is not None},
        )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What can be asked."""
        return (
            Endpoint(
                "GET",
                "/v1/customers",
                "find_customer",
                "The customer whom an identifier belongs to; of several given, the one whom all belong to.",
                self.by_identifier,
                Customer,
                "customers",
                (
                    Parameter("email", "E-mail address, in any spelling.", read_id, ID, example="siti.hidayat145@post.example"),
                    Parameter(
                        "phone",
                        "Phone number; without a country code the region's.",
                        read_id,
                        ID,
                        example="+6281297201",
                    ),
                    Parameter("loyalty_id", "Loyalty card.", read_id, ID, example="L-1042"),
                    Parameter("order_id", "Order: '123', or '<platform>:<order>' of a marketplace.", read_id, ID, example="123"),
                    LIMIT,
                ),
                statuses=(404, 409, 429),
            ),
            Endpoint(
                "GET",
                "/v1/customers/{master_user_id}",
                "customer",
                "A customer. A name from before a merge finds the merged one.",
                self.by_master,
                Customer,
                "customers",
                (LIMIT,),
                {"master_user_id": "M-user:7"},
                statuses=(404, 409, 429),
            ),
        )


def _reasons(risk: Mapping[str, Any]) -> list[str]:
    return [text for text in (risk.get("reasons") or "").split("; ") if text]


def _ordered(links: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(links, key=lambda row: (row["status"] != LINKED, row["trust"], row["record_id"], row["node"]))


def _profile(whole: Mapping[str, Any]) -> Profile:
    cards = [card.strip() for card in (whole.get("loyalty_ids") or "").split(",") if card.strip()]
    return Profile(
        name=whole.get("name"),
        email=whole.get("email"),
        phone=whole.get("phone"),
        city=whole.get("city"),
        country=whole.get("country"),
        customer_since=whole.get("customer_since"),
        loyalty_ids=cards,
        primary_user_id=whole.get("primary_user_id"),
        apparent_customers=whole.get("apparent_customers", 0),
    )


def _timeline(history: list[dict[str, Any]], orders: list[dict[str, Any]], charged: list[dict[str, Any]]) -> list[Entry]:
    opened = {row["user_id"]: row["valid_from"] for row in history}  # newest first: the last one stays
    entries = [
        Entry(
            row["placed_at"],
            "order",
            row["channel"],
            row["platform"],
            row["order_id"],
            row["status"],
            row["total_amount"],
            row["currency"],
            row["total_base"],
            row["user_id"],
        )
        for row in orders
        if row["placed_at"] is not None
    ]
    entries += [
        Entry(row["reported_at"], "chargeback", order_id=row["order_ref"], detail=row["reason"])
        for row in charged
        if row["reported_at"] is not None
    ]
    for row in history:
        kind = "account_opened" if row["valid_from"] == opened[row["user_id"]] else "account_changed"
        entries.append(Entry(row["valid_from"], kind, user_id=row["user_id"]))
        if row["closed_by"] == "delete":
            entries.append(Entry(row["valid_to"], "account_closed", user_id=row["user_id"]))
    return sorted(entries, key=lambda entry: (entry.at, entry.kind, entry.order_id or ""), reverse=True)


def _mix(whole: Mapping[str, Any]) -> list[Channel]:
    counts = {channel: whole.get(f"orders_{channel}", 0) for channel in CHANNELS}
    total = sum(counts.values())
    return [Channel(channel, count, count / total) for channel, count in counts.items() if count]


def _days_since(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max(0.0, (now - moment).total_seconds() / SECONDS_OF_DAY)


def _rfm(whole: Mapping[str, Any], now: datetime) -> Rfm:
    last = whole.get("last_order_at")
    return Rfm(
        last,
        _days_since(last, now),
        whole.get("orders", 0),
        whole.get("net_revenue", Decimal(0)),
        whole.get("frequency_score"),
        whole.get("monetary_score"),
    )


def _value(whole: Mapping[str, Any], now: datetime, currency: str) -> LifetimeValue:
    days, gap = _days_since(whole.get("last_order_at"), now), whole.get("expected_gap_days")
    return LifetimeValue(
        whole.get("net_revenue", Decimal(0)),
        whole.get("predicted_lifetime_value"),
        whole.get("average_order_value"),
        whole.get("average_days_between_orders"),
        whole.get("expected_next_order_at"),
        1 - math.exp(-days / gap) if days is not None and gap else None,
        currency,
    )
