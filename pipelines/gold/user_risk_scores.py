"""gold.user_risk_scores: a rule-based risk score per person, with the reason for every point.

It needs neither training nor labels, so it works from the first day and when no model is available. RULES defines it
completely: a rule adds points for each unit of one signal over a free allowance, up to a cap. The score is the sum, at
most 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, within
from lakehouse.step import Grouped, Lookup, Step
from lakehouse.table import TIMESTAMP, Table, column, references
from pipelines.affected_rows import rows_with
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.parsing.text import comparable_address
from pipelines.sales import is_cancelled
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED

RULE_VERSION = "1"
HIGH_FROM, MEDIUM_FROM = 50, 25
_PAYMENT_SUCCESSES = ("approved", "authorised", "authorized", "captured", "ok", "paid", "succeeded", "success")
"""Outcomes of a successful payment attempt, lower case."""


@dataclass(frozen=True)
class Rule:
    """Points for a signal over `free`: first + each x (signal - free - 1), at most `cap`."""

    signal: str
    free: int
    first: int
    each: int
    cap: int
    reason: str

    @property
    def points(self) -> pl.Expr:
        """Return the points, an integer; 0 for a signal up to `free`."""
        over = pl.col(self.signal) - self.free
        return (
            pl.when(over > 0).then(pl.min_horizontal(self.first + self.each * (over - 1), self.cap)).otherwise(0).cast(pl.Int32)
        )

    @property
    def text(self) -> pl.Expr:
        """Return the reason with the signal and its points; null without points."""
        return pl.when(self.points > 0).then(pl.format(self.reason + " (+{})", pl.col(self.signal), self.points))


RULES = (
    Rule("fraud_chargebacks", 0, 40, 15, 70, "{} fraud chargebacks"),
    Rule("other_chargebacks", 0, 10, 10, 20, "{} other chargebacks"),
    Rule("most_orders_1h", 2, 10, 5, 25, "{} orders within an hour"),
    Rule("most_orders_24h", 4, 5, 3, 15, "{} orders within 24 hours"),
    Rule("cards", 3, 5, 5, 20, "{} different cards"),
    Rule("shared_cards", 0, 10, 10, 30, "{} cards that other people use too"),
    Rule("crowded_devices", 0, 10, 5, 20, "{} devices that a crowd shares"),
    Rule("shipping_addresses", 4, 4, 2, 10, "{} different shipping addresses"),
    Rule("most_failed_payments_24h", 2, 8, 4, 24, "{} failed payments within 24 hours"),
    Rule("most_failed_logins_1h", 4, 8, 2, 16, "{} failed logins within an hour"),
    Rule("cancelled_percent", 49, 10, 0, 10, "{} percent of orders cancelled"),
)

USER_RISK_SCORES = Table(
    "gold.user_risk_scores",
    doc="Rule-based fraud risk score per person with an order, with reasons. Scores are comparable within a rule_version.",
    columns=(
        column("master_user_id", pa.string(), "Id of the person.", required=True),
        column("risk_score", pa.int32(), "Risk score, 0 (no signal) to 100.", required=True),
        column(
            "risk_band",
            pa.string(),
            f"Risk band: low, medium (score from {MEDIUM_FROM}) or high (score from {HIGH_FROM}).",
            required=True,
        ),
        column(
            "reasons",
            pa.string(),
            "Reasons with their points, in the order of the rules, separated by semicolons; null for a score of 0.",
        ),
        column("rule_version", pa.string(), "Version of the scoring rules.", required=True),
        column("orders", pa.int32(), "Number of orders of any status.", required=True),
        column(
            "last_order_at",
            TIMESTAMP,
            "Time of the newest order of any status (UTC); the score includes all orders up to it.",
            required=True,
        ),
        column("fraud_chargebacks", pa.int32(), "Number of chargebacks with reason fraud.", required=True),
        column("other_chargebacks", pa.int32(), "Number of chargebacks with another reason.", required=True),
        column("most_orders_1h", pa.int32(), "Highest number of orders within any hour.", required=True),
        column("most_orders_24h", pa.int32(), "Highest number of orders within any 24 hours.", required=True),
        column(
            "most_failed_payments_24h",
            pa.int32(),
            "Highest number of failed payment attempts within any 24 hours, of accounts with an order.",
            required=True,
        ),
        column(
            "most_failed_logins_1h",
            pa.int32(),
            "Highest number of failed logins within any hour, of accounts with an order.",
            required=True,
        ),
        column("cards", pa.int32(), "Distinct payment cards on orders.", required=True),
        column("shared_cards", pa.int32(), "Payment cards that are also on orders of other people.", required=True),
        column("crowded_devices", pa.int32(), "Devices shared by too many people to identify one.", required=True),
        column(
            "shipping_addresses", pa.int32(), "Distinct shipping addresses, ignoring case, punctuation and spaces.", required=True
        ),
        column(
            "cancelled_percent",
            pa.int32(),
            "Percentage of orders that are cancelled, rounded down; 0 for fewer than 3 orders.",
            required=True,
        ),
    ),
    key=("master_user_id",),
    references=(references("master_user_id", CUSTOMER_360),),
    owner="risk",
    expectations=(
        within("risk_score", 0, 100),
        accepted("risk_band", {"low", "medium", "high"}),
    ),
)


def is_failed_payment() -> pl.Expr:
    """Return whether an event is a failed payment attempt; null when its outcome is unknown."""
    success = pl.col("outcome").str.to_lowercase().is_in(_PAYMENT_SUCCESSES)
    return (pl.col("event_type") == "payment_attempted") & ~success


def is_failure() -> pl.Expr:
    """Return whether an event is a failed login or a failed payment attempt; never null."""
    return ((pl.col("event_type") == "login_failed") | is_failed_payment()).fill_null(False)


def rows_with_attempts(changed: pl.DataFrame) -> pl.Expr:
    """Return a predicate for the orders of accounts with changed payment attempts or failed logins.

    Successful attempts are included: one can replace a failed one with the same id.
    """
    return rows_with("user_id")(changed.filter(pl.col("event_type").is_in(["login_failed", "payment_attempted"])))


def failures(orders: pl.DataFrame, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return per person the highest numbers of failed payments within 24 hours and of failed logins within an hour."""
    people = orders.select("user_id", "master_user_id").drop_nulls().unique()
    failed = events.filter(is_failure()).join(people, on="user_id").sort("master_user_id", "occurred_at")
    logins = pl.col("event_type") == "login_failed"
    return (
        most_within(failed.filter(~logins), "24h", "most_failed_payments_24h", at="occurred_at"),
        most_within(failed.filter(logins), "1h", "most_failed_logins_1h", at="occurred_at"),
    )


def most_within(rows: pl.DataFrame, period: str, name: str, *, at: str = "placed_at") -> pl.DataFrame:
    """Return per person the highest number of rows within any period. rows: sorted by (master_user_id, at)."""
    return (
        rows.rolling(at, period=period, closed="both", group_by="master_user_id")
        .agg(pl.len().alias(name))
        .group_by("master_user_id")
        .agg(pl.col(name).max().cast(pl.Int32))
    )


def shared_cards(orders: pl.DataFrame, card_orders: pl.DataFrame) -> pl.DataFrame:
    """Return per person the number of cards that other people use too."""
    shared = (
        card_orders.drop_nulls(["card_fingerprint", "master_user_id"])
        .unique(["card_fingerprint", "master_user_id"])
        .group_by("card_fingerprint")
        .agg(pl.len().alias("people"))
        .filter(pl.col("people") > 1)
    )
    return (
        orders.select("master_user_id", "card_fingerprint")
        .unique()
        .join(shared, on="card_fingerprint")
        .group_by("master_user_id")
        .agg(pl.len().cast(pl.Int32).alias("shared_cards"))
    )


def from_orders(orders: pl.DataFrame, chargebacks: pl.DataFrame) -> pl.DataFrame:
    """Return per person the counts over orders and their chargebacks."""
    fraud = pl.col("reason") == "fraud"
    charged = chargebacks.group_by(pl.col("order_ref").alias("order_id")).agg(
        fraud.sum().alias("fraud_chargebacks"), (pl.len() - fraud.sum()).alias("other_chargebacks")
    )
    percent = 100 * is_cancelled().sum() // pl.len()
    return (
        orders.join(charged, on="order_id", how="left")
        .group_by("master_user_id")
        .agg(
            pl.len().cast(pl.Int32).alias("orders"),
            pl.col("placed_at").max().alias("last_order_at"),
            pl.col("fraud_chargebacks", "other_chargebacks").sum().cast(pl.Int32),
            pl.col("card_fingerprint").drop_nulls().n_unique().cast(pl.Int32).alias("cards"),
            comparable_address("shipping_address").drop_nulls().n_unique().cast(pl.Int32).alias("shipping_addresses"),
            pl.when(pl.len() >= 3).then(percent).otherwise(0).cast(pl.Int32).alias("cancelled_percent"),
        )
    )


def crowded_devices(graph: pl.DataFrame) -> pl.DataFrame:
    """Return per person the number of devices with status crowded in the identity graph."""
    return (
        graph.filter((pl.col("kind") == "device") & (pl.col("status") == "crowded"))
        .group_by("master_user_id")
        .agg(pl.col("node").n_unique().cast(pl.Int32).alias("crowded_devices"))
    )


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the affected people with an order."""
    orders = frames["orders"].filter(pl.col("master_user_id").is_not_null()).sort("master_user_id", "placed_at", "order_id")
    signals = from_orders(orders, frames["chargebacks"])
    for part in (
        most_within(orders, "1h", "most_orders_1h"),
        most_within(orders, "24h", "most_orders_24h"),
        shared_cards(orders, frames["card_orders"]),
        crowded_devices(frames["identity"]),
        *failures(orders, frames["events"]),
    ):
        signals = signals.join(part, on="master_user_id", how="left")
    total = pl.min_horizontal(pl.sum_horizontal(rule.points for rule in RULES), 100).cast(pl.Int32)
    reasons = pl.concat_str([rule.text for rule in RULES], separator="; ", ignore_nulls=True)
    return (
        signals.with_columns(pl.col(rule.signal for rule in RULES).fill_null(0))
        .with_columns(
            total.alias("risk_score"),
            pl.when(reasons != "").then(reasons).alias("reasons"),
            pl.lit(RULE_VERSION).alias("rule_version"),
        )
        .with_columns(
            pl.when(pl.col("risk_score") >= HIGH_FROM)
            .then(pl.lit("high"))
            .when(pl.col("risk_score") >= MEDIUM_FROM)
            .then(pl.lit("medium"))
            .otherwise(pl.lit("low"))
            .alias("risk_band")
        )
        .select(USER_RISK_SCORES.schema.names)
        .sort("master_user_id")
    )


STEP = Step(
    target=USER_RISK_SCORES,
    reads={
        "orders": Grouped(
            ORDERS_UNIFIED,
            keys=((pl.col("master_user_id"),),),
            columns=("order_id", "master_user_id", "user_id", "placed_at", "status", "card_fingerprint", "shipping_address"),
        ),
        "identity": Grouped(
            IDENTITY_GRAPH, keys=((pl.col("master_user_id"),),), columns=("node", "kind", "status", "master_user_id")
        ),
        "chargebacks": Lookup(
            CHARGEBACKS,
            on="order_ref",
            values=lambda frames: frames["orders"]["order_id"],
            columns=("order_ref", "reason"),
            affects=rows_with("order_id", changed="order_ref"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("master_user_id"),),
        ),
        "events": Lookup(
            EVENTS_CLEAN,
            on="user_id",
            values=lambda frames: frames["orders"]["user_id"].drop_nulls(),
            columns=("user_id", "event_type", "outcome", "occurred_at"),
            affects=rows_with_attempts,
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("master_user_id"),),
        ),
        "card_orders": Lookup(
            ORDERS_UNIFIED,
            on="card_fingerprint",
            values=lambda frames: frames["orders"]["card_fingerprint"].drop_nulls(),
            columns=("card_fingerprint", "master_user_id"),
            affects=rows_with("card_fingerprint"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("master_user_id"),),
        ),
    },
    transform=transform,
)
