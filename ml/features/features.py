"""What the fraud model looks at: every feature declared, and the one function that computes them.

Training calls `compute` with all orders at once, serving with one order and the slice of history that concerns it;
both get the same bits. An order placed at time t is described by what was known at t:
- orders earlier than t (orders of the same moment follow each other by order_id);
- account events earlier than t;
- frauds from the moment on at which they were reported, never from the moment at which they happened;
- the category's figures of the calendar month (UTC) before t's.

The histories given must be whole for the entities of the orders asked about: all earlier orders with the same
customer, card, device, address, ip or person, and all earlier events of the account and device. More does no harm:
rows of others and rows of the future change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.errors import ShopSphereError
from ml.features.windows import (
    DAY,
    HOUR,
    MINUTE,
    NEVER,
    Ints,
    Moments,
    Timeline,
    codes,
    microseconds,
    quotient,
    range_max,
    rank_of,
    scattered,
    sums_before,
)

Kind = Literal["count", "amount", "ratio", "minutes", "flag", "category"]
"""count: whole number; amount: units of the base currency; ratio: a number without unit; minutes: time passed; flag: 0 or 1;
category: one of the declared texts."""

MISSING, OTHER = "missing", "other"
"""Categories of a value that is not there, and of one that the declaration does not list."""

LABEL_DELAY = timedelta(days=45)
"""How long after an order its fraud is reported, at most: younger orders have no label yet."""

TIME = pl.Datetime("us", "UTC")
ENTITIES = ("customer", "card", "device", "address", "ip", "person")
"""Columns of an order that name something with a history. customer: the account, or a marketplace buyer's contact, as
known when the order was placed; person: the identity graph's master user, behind perhaps many accounts."""

ORDER_COLUMNS: dict[str, pl.DataType] = {
    "order_id": pl.String(),
    "placed_at": TIME,
    "amount": pl.Int64(),
    **{name: pl.String() for name in ENTITIES},
    "account": pl.Int64(),
    "account_created_at": TIME,
    "channel": pl.String(),
    "payment_method": pl.String(),
    "category": pl.String(),
    "known_at": TIME,
    "ratio": pl.Float64(),
}
"""An order as features see it. amount: cents of the base currency; account: user_id; known_at: when it was reported as
fraud, null when it was not (yet); ratio: of a fraud, its amount against the customer's earlier ones (`with_ratios`, or
silver.fraud_ratios). A missing column is read as null."""

EVENT_COLUMNS: dict[str, pl.DataType] = {
    "account": pl.Int64(),
    "device": pl.String(),
    "occurred_at": TIME,
    "kind": pl.String(),
}
"""An account event. kind: one of EVENT_KINDS."""

EVENT_KINDS = ("visit", "login_failed", "payment_failed", "account_changed")
"""login_failed, payment_failed (a payment attempt without success), account_changed; visit: everything else."""

CATEGORY_COLUMNS: dict[str, pl.DataType] = {
    "category": pl.String(),
    "month": pl.Date(),
    "orders": pl.Int64(),
    "amount": pl.Int64(),
}
"""Orders and cents per category and calendar month (its first day)."""


class FeatureError(ShopSphereError):
    """Features cannot be computed from the rows given."""


@dataclass(frozen=True)
class Feature:
    """One feature.

    name         column of the frame that `compute` gives
    type         see Kind
    window       how far back it looks: '1h', '30d', 'ever', or 'now' for a property of the order itself
    doc          what it means, for the docs
    reason_text  what to tell a reviewer, with `{value}` in it
    categories   of a category: all texts it can be
    """

    name: str
    type: Kind
    window: str
    doc: str
    reason_text: str
    categories: tuple[str, ...] = ()

    @property
    def dtype(self) -> pl.DataType:
        """The type of the column: String for a category, Float64 for every other; null: cannot be said."""
        return pl.String() if self.type == "category" else pl.Float64()

    def reason(self, value: float | str | None) -> str:
        """The reason text with its value in words."""
        return self.reason_text.format(value=self._words(value))

    def _words(self, value: float | str | None) -> str:
        if value is None or isinstance(value, str):
            return value or "unknown"
        if self.type == "minutes":
            for size, name in ((1440, "days"), (60, "hours")):
                if value >= 2 * size:
                    return f"{value / size:.0f} {name}"
            return f"{value:.0f} minutes"
        if self.type == "amount":
            return f"{value:,.2f}"
        return f"{value:.0f}" if self.type in ("count", "flag") else f"{value:.2f}"


@dataclass(frozen=True)
class OrderHistory:
    """What is known besides the orders asked about: see ORDER_COLUMNS, EVENT_COLUMNS, CATEGORY_COLUMNS.

    An order that is both asked about and in the history counts once. Empty frames are fine.
    """

    orders: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=ORDER_COLUMNS))
    events: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=EVENT_COLUMNS))
    categories: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=CATEGORY_COLUMNS))
    delay: timedelta = LABEL_DELAY


WINDOWS = {
    "10m": 10 * MINUTE,
    "1h": HOUR,
    "24h": DAY,
    "3d": 3 * DAY,
    "7d": 7 * DAY,
    "14d": 14 * DAY,
    "30d": 30 * DAY,
}
USUAL = ("10m", "1h", "24h", "7d", "30d")
RATIO_WINDOWS = ("24h", "3d", "7d", "14d", "30d")
UNUSUAL = 2.5
"""An amount of so many times the customer's mean is unusual. It explains a fraud: it is the customer's, not the device's."""
UNUSUAL_WINDOWS = ("3d", "7d", "14d")
UNEXPLAINED = ("7d", "14d", "28d")
RISK_WINDOWS = {"1d": DAY, "7d": 7 * DAY, "14d": 14 * DAY, "28d": 28 * DAY}
EVENT_WINDOWS = ("10m", "1h", "24h")
IN_WORDS = {
    "10m": "10 minutes",
    "1h": "hour",
    "24h": "24 hours",
    "3d": "3 days",
    "7d": "7 days",
    "14d": "14 days",
    "30d": "30 days",
    "1d": "day",
    "28d": "28 days",
}
PLURAL = {"customer": "customers", "card": "cards", "device": "devices", "address": "addresses"}
LAST_LABELS = (1, 2, 3, 5, 10)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class FeatureGroup:
    """Features that can be computed from the rows of one entity kind alone.

    key           the order column that names the entity
    needs         other entity columns of the order that it reads
    windows       of velocities
    seen_with     other entity columns of which the different ones are counted
    risk_windows  of frauds reported and labels that came due
    labels        numbers of newest labels that are looked at
    unexplained   windows of frauds whose amount was nothing unusual for their customer
    events        reads account events with the same `key`, instead of orders
    """

    name: str
    key: str
    features: tuple[Feature, ...]
    needs: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    seen_with: tuple[str, ...] = ()
    fraud_windows: tuple[str, ...] = ()
    risk_windows: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    unexplained: tuple[str, ...] = ()
    events: bool = False


def _velocity(kind: str, of: str, windows: Sequence[str]) -> list[Feature]:
    found = []
    for window in windows:
        words = IN_WORDS[window]
        found += [
            Feature(
                f"{kind}_orders_{window}",
                "count",
                window,
                f"Orders {of} in the {words} before.",
                f"{{value}} orders {of} within the last {words}",
            ),
            Feature(
                f"{kind}_amount_{window}",
                "amount",
                window,
                f"Amounts of the orders {of} in the {words} before, together.",
                f"{{value}} in orders {of} within the last {words}",
            ),
        ]
    return found


def _age(kind: str, the: str) -> list[Feature]:
    return [
        Feature(f"{kind}_orders_ever", "count", "ever", f"Earlier orders of {the}.", f"{{value}} earlier orders of {the}"),
        Feature(
            f"{kind}_minutes_since_first",
            "minutes",
            "ever",
            f"Since the first order of {the}.",
            f"{the} first seen {{value}} ago",
        ),
        Feature(
            f"{kind}_minutes_since_last",
            "minutes",
            "ever",
            f"Since the last order of {the}.",
            f"previous order of {the} {{value}} ago",
        ),
    ]


def _seen_with(kind: str, the: str, others: Sequence[str]) -> list[Feature]:
    return [
        Feature(
            f"{kind}_{PLURAL[other]}_ever",
            "count",
            "ever",
            f"Different {PLURAL[other]} seen with {the} before.",
            f"{{value}} {PLURAL[other]} seen with {the}",
        )
        for other in others
    ]


def _frauds(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    return [
        Feature(
            f"{kind}_frauds_ever",
            "count",
            "ever",
            f"Frauds of {the} that were reported before.",
            f"{{value}} earlier frauds reported for {the}",
        ),
        *(
            Feature(
                f"{kind}_frauds_{window}",
                "count",
                window,
                f"Of them, reported in the {IN_WORDS[window]} before.",
                f"{{value}} frauds reported for {the} within the last {IN_WORDS[window]}",
            )
            for window in windows
        ),
        Feature(
            f"{kind}_minutes_since_fraud",
            "minutes",
            "ever",
            "Since the order of the fraud reported last.",
            f"last known fraud of {the} {{value}} ago",
        ),
    ]


def _risk(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    found = []
    for window in windows:
        words = IN_WORDS[window]
        found += [
            Feature(
                f"{kind}_settled_{window}",
                "count",
                window,
                f"Orders of {the} whose label came due in the {words} before.",
                f"{{value}} labelled orders of {the} within {words}",
            ),
            Feature(
                f"{kind}_risk_{window}",
                "ratio",
                window,
                f"Frauds reported per order that came due in the {words} before.",
                f"fraud share {{value}} of {the} within {words}",
            ),
        ]
    return found


def _labels(kind: str, the: str) -> list[Feature]:
    return [
        *(
            Feature(
                f"{kind}_frauds_of_last_{n}",
                "count",
                f"{n} labels",
                f"Frauds among the last {n} labels of {the} that came due.",
                f"{{value}} of the last {n} known orders of {the} were fraud",
            )
            for n in LAST_LABELS
        ),
        Feature(
            f"{kind}_run_frauds",
            "count",
            "ever",
            f"Frauds in an unbroken row up to the newest label of {the}.",
            f"the last {{value}} known orders of {the} were all fraud",
        ),
        Feature(
            f"{kind}_run_minutes",
            "minutes",
            "ever",
            "Since the first order of that row.",
            f"every order of {the} for {{value}} was fraud",
        ),
        Feature(
            f"{kind}_minutes_since_genuine",
            "minutes",
            "ever",
            f"Since the newest order of {the} whose label came due without a fraud.",
            f"last order of {the} known to be genuine {{value}} ago",
        ),
        Feature(
            f"{kind}_run_least",
            "amount",
            "ever",
            "The smallest amount in that row: a small one is no fraud for its size.",
            f"even an order of {{value}} at {the} was fraud",
        ),
    ]


def _unexplained(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    rule = f"not over {UNUSUAL:g} times the mean of their customer"
    return [
        *(
            Feature(
                f"{kind}_unexplained_{window}",
                "count",
                window,
                f"Frauds of {the} reported in the {IN_WORDS[window]} before whose amount explains nothing: {rule}.",
                f"{{value}} frauds of ordinary amounts reported for {the} within the last {IN_WORDS[window]}",
            )
            for window in windows
        ),
        Feature(
            f"{kind}_minutes_since_unexplained",
            "minutes",
            "ever",
            "Since the order of the last such fraud.",
            f"last fraud of an ordinary amount of {the} {{value}} ago",
        ),
        Feature(
            f"{kind}_minutes_since_unexplained_began",
            "minutes",
            "28d and the label delay",
            "Since the first such order of that time: when it may have begun.",
            f"frauds of ordinary amounts at {the} began {{value}} ago",
        ),
    ]


def _event_counts(prefix: str, of: str, windows: Sequence[str], kinds: Sequence[str]) -> list[Feature]:
    words = {"events": "events", "failed_logins": "failed logins", "failed_payments": "failed payments"}
    return [
        Feature(
            f"{prefix}_{kind}_{window}",
            "count",
            window,
            f"{words[kind].capitalize()} {of} in the {IN_WORDS[window]} before.",
            f"{{value}} {words[kind]} {of} within the last {IN_WORDS[window]}",
        )
        for kind in kinds
        for window in windows
    ]


CHANNELS = ("web", "pos", "marketplace", OTHER, MISSING)
METHODS = ("card", "wallet", "bank_transfer", "cash", OTHER, MISSING)

ORDER = FeatureGroup(
    "order",
    "order_id",
    (
        Feature("amount", "amount", "now", "Amount of the order.", "amount {value}"),
        Feature("channel", "category", "now", "Where it was placed.", "channel {value}", CHANNELS),
        Feature("payment_method", "category", "now", "How it is paid.", "paid by {value}", METHODS),
        Feature("hour", "count", "now", "Hour of the day, UTC.", "placed in hour {value} (UTC)"),
        Feature("weekday", "category", "now", "Day of the week, UTC.", "placed on a {value}", WEEKDAYS),
        Feature("account_minutes", "minutes", "ever", "Since the account was opened.", "account is {value} old"),
        Feature(
            "category_ratio",
            "ratio",
            "last month",
            "Amount against the mean order of its main category in the calendar month before.",
            "{value} times the usual amount in its category",
        ),
    ),
    ("placed_at", "amount", "account_created_at", "channel", "payment_method", "category"),
)


def _entity(kind: str, of: str, the: str, more: Sequence[Feature] = (), **traits: Any) -> FeatureGroup:
    """The part of an entity kind: the features that its traits ask for, and `more`."""
    part = FeatureGroup(kind, kind, (), **traits)
    features = (
        *_velocity(kind, of, part.windows),
        *_age(kind, the),
        *more,
        *_seen_with(kind, the, part.seen_with),
        *_frauds(kind, the, part.fraud_windows),
        *_risk(kind, the, part.risk_windows),
        *(_labels(kind, the) if part.labels else ()),
        *(_unexplained(kind, the, part.unexplained) if part.unexplained else ()),
    )
    return replace(part, features=features, needs=tuple(dict.fromkeys((*part.needs, *part.seen_with))))


CUSTOMER = _entity(
    "customer",
    "of the customer",
    "the customer",
    (
        Feature("customer_mean", "amount", "ever", "Mean of the customer's earlier amounts.", "customer usually spends {value}"),
        Feature(
            "customer_deviation",
            "amount",
            "ever",
            "Sample deviation of the customer's earlier amounts.",
            "customer's amounts vary by {value}",
        ),
        Feature(
            "customer_ratio",
            "ratio",
            "ever",
            "Amount against the mean of the customer's earlier ones.",
            "{value} times the customer's usual amount",
        ),
        Feature(
            "customer_z",
            "ratio",
            "ever",
            "Amount less that mean, in deviations.",
            "{value} deviations over the customer's usual amount",
        ),
        *(
            Feature(
                f"customer_ratio_{w}",
                "ratio",
                w,
                f"Amount against the mean of the customer's orders in the {IN_WORDS[w]} before.",
                f"{{value}} times the customer's mean of {IN_WORDS[w]}",
            )
            for w in ("7d", "30d")
        ),
        *(
            Feature(
                f"customer_greatest_ratio_{w}",
                "ratio",
                w,
                f"Greatest ratio to the customer's usual amount at the time, of the orders in the {IN_WORDS[w]} before.",
                f"customer spent {{value}} times the usual amount within the last {IN_WORDS[w]}",
            )
            for w in RATIO_WINDOWS
        ),
        Feature(
            "customer_usual_mean",
            "amount",
            "ever",
            f"Mean of the customer's earlier amounts, without those that were {UNUSUAL:g} times the mean before them, or more.",
            "customer usually spends {value}, outliers aside",
        ),
        Feature(
            "customer_usual_ratio",
            "ratio",
            "ever",
            "Amount against that mean.",
            "{value} times what the customer usually spends, outliers aside",
        ),
        *(
            Feature(
                f"customer_unusual_{w}",
                "count",
                w,
                f"Orders in the {IN_WORDS[w]} before that were {UNUSUAL:g} times that mean, or more.",
                f"{{value}} orders of an unusual amount within the last {IN_WORDS[w]}",
            )
            for w in UNUSUAL_WINDOWS
        ),
        Feature(
            "customer_minutes_since_unusual",
            "minutes",
            "ever",
            "Since the last such order.",
            "last order of an unusual amount {value} ago",
        ),
        Feature(
            "customer_minutes_since_unusual_began",
            "minutes",
            "14d",
            "Since the first such order of the 14 days before: when it may have begun.",
            "orders of unusual amounts began {value} ago",
        ),
        *(
            Feature(
                f"new_{other}",
                "flag",
                "ever",
                f"1 when the customer never used this {other} before.",
                f"{other} new to the customer ({{value}})",
            )
            for other in ("card", "device", "address")
        ),
    ),
    windows=tuple(WINDOWS),
    seen_with=("card", "device", "address"),
    fraud_windows=("7d", "28d"),
)
CARD = _entity("card", "on the card", "the card", windows=USUAL, seen_with=("customer", "device"), fraud_windows=("28d",))
DEVICE = _entity(
    "device",
    "on the device",
    "the device",
    (
        Feature(
            "device_mean", "amount", "ever", "Mean of the device's earlier amounts.", "orders on the device are usually {value}"
        ),
    ),
    windows=USUAL,
    seen_with=("customer", "card"),
    fraud_windows=tuple(RISK_WINDOWS),
    risk_windows=tuple(RISK_WINDOWS),
    labels=LAST_LABELS,
    unexplained=UNEXPLAINED,
)
ADDRESS = _entity(
    "address",
    "to the address",
    "the address",
    windows=USUAL,
    seen_with=("customer", "card"),
    fraud_windows=("28d",),
    risk_windows=("28d",),
)
IP = _entity("ip", "from the IP address", "the IP address", windows=USUAL, seen_with=("customer", "card"), fraud_windows=("28d",))
PERSON = _entity(
    "person",
    "of the person behind the account",
    "the person behind the account",
    windows=("24h", "30d"),
    seen_with=("customer",),
    fraud_windows=("28d",),
)
ACCOUNT_EVENTS = FeatureGroup(
    "account_events",
    "account",
    (
        *_event_counts("account", "of the account", EVENT_WINDOWS, ("events",)),
        *_event_counts("account", "of the account", ("1h", "24h"), ("failed_logins", "failed_payments")),
        Feature(
            "account_minutes_since_failed_login",
            "minutes",
            "ever",
            "Since the account's last failed login.",
            "failed login {value} before",
        ),
        Feature(
            "account_minutes_since_change",
            "minutes",
            "ever",
            "Since the account's data last changed.",
            "account changed {value} before",
        ),
    ),
    events=True,
)
DEVICE_EVENTS = FeatureGroup(
    "device_events",
    "device",
    tuple(_event_counts("device", "on the device", ("1h", "24h"), ("failed_logins", "failed_payments"))),
    events=True,
)

FEATURE_GROUPS: tuple[FeatureGroup, ...] = (ORDER, CUSTOMER, CARD, DEVICE, ADDRESS, IP, PERSON, ACCOUNT_EVENTS, DEVICE_EVENTS)
FEATURES: tuple[Feature, ...] = tuple(feature for part in FEATURE_GROUPS for feature in part.features)
FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)


def compute(orders: pl.DataFrame, history: OrderHistory) -> pl.DataFrame:
    """The features of `orders` (ORDER_COLUMNS): order_id, placed_at and FEATURES, a row per order, in the order given.

    The orders are history to each other too. Raises FeatureError when an order has no id or no time, or comes twice.
    """
    orders, known = conform(orders, ORDER_COLUMNS), conform(history.orders, ORDER_COLUMNS)
    _check(orders)
    rows = arranged(orders, known)
    frames = [compute_part(part, rows, history) for part in FEATURE_GROUPS]
    found = pl.concat([rows.filter("asked").select("order_id", "placed_at"), *frames], how="horizontal")
    return (
        orders.select("order_id")
        .join(found, on="order_id", how="left", maintain_order="left")
        .select("order_id", "placed_at", *FEATURE_NAMES)
    )


def conform(frame: pl.DataFrame, columns: dict[str, pl.DataType]) -> pl.DataFrame:
    """The declared columns with their types; a missing one is null."""
    present = set(frame.columns)
    return frame.select(
        (pl.col(name) if name in present else pl.lit(None).alias(name)).cast(dtype) for name, dtype in columns.items()
    )


def arranged(orders: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """All rows once, by (placed_at, order_id), with `asked` where they are wanted."""
    others = known.join(orders.select("order_id"), on="order_id", how="anti").unique("order_id") if known.height else known
    rows = pl.concat([orders.with_columns(asked=pl.lit(True)), others.with_columns(asked=pl.lit(False))])
    return rows.filter(pl.col("placed_at").is_not_null()).sort("placed_at", "order_id")


def _check(orders: pl.DataFrame) -> None:
    if orders["order_id"].null_count() or orders["placed_at"].null_count():
        raise FeatureError("An order without order_id or placed_at has no features. Give both.")
    if orders["order_id"].is_duplicated().any():
        twice = orders.filter(orders["order_id"].is_duplicated())["order_id"][0]
        raise FeatureError(f"Order {twice} was asked about twice in one call. Ask once.")


def compute_part(part: FeatureGroup, rows: pl.DataFrame, history: OrderHistory) -> pl.DataFrame:
    """The features of one part for the rows `asked`, in the rows' order. rows: see `arranged`."""
    asked = rows["asked"].to_numpy()
    if part == ORDER:
        return _order(rows.filter("asked"), history.categories)
    chosen, columns = _of_events(part, rows, history.events) if part.events else _of_orders(part, rows, history.delay)
    place = np.cumsum(asked) - 1
    height = int(asked.sum())
    at = place[chosen]
    return pl.DataFrame({feature.name: scattered(columns[feature.name], at, height) for feature in part.features}).fill_nan(None)


def _order(rows: pl.DataFrame, categories: pl.DataFrame) -> pl.DataFrame:
    placed = rows["placed_at"]
    now = microseconds(placed)
    created = microseconds(rows["account_created_at"])
    usual = rows.select("category", placed.dt.month_start().dt.date().dt.offset_by("-1mo").alias("month")).join(
        conform(categories, CATEGORY_COLUMNS).rename({"amount": "cents"}),
        on=["category", "month"],
        how="left",
        maintain_order="left",
    )
    mean = quotient(usual["cents"].fill_null(0).to_numpy(), usual["orders"].fill_null(0).to_numpy())
    cents = rows["amount"].to_numpy().astype(np.float64)
    age = np.where(created <= now, (now - created).astype(np.float64) / float(MINUTE), np.nan)
    return pl.DataFrame(
        {
            "amount": cents / 100.0,
            "channel": rank_of(CHANNELS, rows["channel"], OTHER, MISSING),
            "payment_method": rank_of(METHODS, rows["payment_method"], OTHER, MISSING),
            "hour": placed.dt.hour().cast(pl.Float64),
            "weekday": pl.Series([*WEEKDAYS], dtype=pl.String).gather(placed.dt.weekday().cast(pl.UInt32) - 1),
            "account_minutes": age,
            "category_ratio": quotient(cents, np.nan_to_num(mean)),
        }
    ).select(pl.col(feature.name).fill_nan(None) if feature.dtype == pl.Float64 else feature.name for feature in ORDER.features)


def _of_orders(part: FeatureGroup, rows: pl.DataFrame, delay: timedelta) -> tuple[Ints, Columns]:
    """The rows that are asked about and have an entity of this kind, and their features."""
    kind = part.key
    line = timeline(rows, kind)
    others = {name: codes(rows[name])[0] for name in part.needs}
    columns: Columns = {
        f"{kind}_orders_ever": line.earlier,
        f"{kind}_minutes_since_first": line.minutes_since_first(),
        f"{kind}_minutes_since_last": line.minutes_since_last(),
        **{f"{kind}_{PLURAL[other]}_ever": line.distinct(others[other]) for other in part.seen_with},
    }
    for window in part.windows:
        start, stop = line.since(WINDOWS[window])
        columns[f"{kind}_orders_{window}"] = stop - start
        columns[f"{kind}_amount_{window}"] = line.amounts(start, stop) / 100.0
    columns |= _reported(part, line)
    if part.risk_windows or part.labels:
        columns |= _settled(part, line, columns, int(delay / timedelta(microseconds=1)))
    if part.unexplained:
        columns |= _without_explanation(part, rows, int(delay / timedelta(microseconds=1)))
    if part == CUSTOMER:
        columns |= _against_own_history(line, others)
    if part == DEVICE:
        columns["device_mean"] = line.means[0][line.at] / 100.0
    return line.chosen, columns


def timeline(rows: pl.DataFrame, kind: str, known_at: pl.Series | None = None) -> Timeline:
    """The orders of the entities of a kind. rows: see `arranged`."""
    return Timeline(
        codes(rows[kind])[0],
        microseconds(rows["placed_at"]),
        rows["amount"].fill_null(0).to_numpy(),
        rows["amount"].is_not_null().to_numpy(),
        microseconds(rows["known_at"] if known_at is None else known_at),
        rows["asked"].to_numpy(),
    )


def with_ratios(orders: pl.DataFrame) -> pl.DataFrame:
    """The orders (ORDER_COLUMNS) with `ratio`: the amount against the mean of the customer's earlier ones.

    The histories of the customers must be whole.
    """
    rows = arranged(conform(orders, ORDER_COLUMNS), conform(orders.clear(), ORDER_COLUMNS))
    line = timeline(rows, "customer")
    ratios = scattered(_own_ratio(line)[line.at], line.chosen, rows.height)
    found = rows.select("order_id", ratio=pl.Series(ratios).fill_nan(None))
    return orders.drop("ratio", strict=False).join(found, on="order_id", how="left", maintain_order="left")


def _own_ratio(line: Timeline) -> npt.NDArray[np.float64]:
    """For every arranged row: its amount against the mean of the entity's earlier ones; NaN when there is none."""
    cents = np.where(line.priced, line.amount.astype(np.float64), np.nan)
    return quotient(cents, np.nan_to_num(line.means[0]))


def _without_explanation(part: FeatureGroup, rows: pl.DataFrame, delay: int) -> Columns:
    """Known frauds whose amount was nothing unusual for the customer."""
    kind = part.key
    explained = pl.col("ratio").fill_null(0.0) >= UNUSUAL
    line = timeline(rows, kind, rows.select(pl.when(~explained).then("known_at")).to_series())
    counts = {f"{kind}_unexplained_{window}": line.known_frauds(RISK_WINDOWS[window]) for window in part.unexplained}
    return {
        **counts,
        f"{kind}_minutes_since_unexplained": line.minutes_since_fraud(),
        f"{kind}_minutes_since_unexplained_began": line.minutes_since_first_fraud(delay + RISK_WINDOWS["28d"]),
    }


def _reported(part: FeatureGroup, line: Timeline) -> Columns:
    """Known frauds."""
    kind = part.key
    columns: Columns = {f"{kind}_frauds_ever": line.known_frauds(), f"{kind}_minutes_since_fraud": line.minutes_since_fraud()}
    for window in part.fraud_windows:
        columns[f"{kind}_frauds_{window}"] = line.known_frauds(RISK_WINDOWS[window])
    return columns


def _settled(part: FeatureGroup, line: Timeline, reported: Columns, delay: int) -> Columns:
    """Labels that have come due."""
    kind, settled = part.key, line.settled(delay)
    columns: Columns = {}
    for window in part.risk_windows:
        orders = settled.orders(RISK_WINDOWS[window])
        columns[f"{kind}_settled_{window}"] = orders
        columns[f"{kind}_risk_{window}"] = quotient(reported[f"{kind}_frauds_{window}"], orders)
    for last in part.labels:
        columns[f"{kind}_frauds_of_last_{last}"] = settled.frauds_of_last(last)
    if part.labels:
        columns[f"{kind}_minutes_since_genuine"] = settled.minutes_since_genuine()
        columns[f"{kind}_run_frauds"], columns[f"{kind}_run_minutes"], columns[f"{kind}_run_least"] = settled.run()
    return columns


def _against_own_history(line: Timeline, others: dict[str, Ints]) -> Columns:
    """Amounts against the customer's own, and what the customer never used before."""
    mean, deviation = line.means
    cents = np.where(line.priced, line.amount.astype(np.float64), np.nan)
    ratio = _own_ratio(line)
    at = line.at
    over = cents[at] - mean[at]
    # a deviation of nothing says nothing
    spread = np.nan_to_num(deviation[at])
    columns: Columns = {
        "customer_mean": mean[at] / 100.0,
        "customer_deviation": deviation[at] / 100.0,
        "customer_ratio": ratio[at],
        "customer_z": np.where(np.isnan(over), np.nan, quotient(over, spread)),
    }
    for window in ("7d", "30d"):
        start, stop = line.since(WINDOWS[window])
        recent = quotient(line.amounts(start, stop), line.prices(start, stop))
        columns[f"customer_ratio_{window}"] = quotient(cents[at], np.nan_to_num(recent))
    for window in RATIO_WINDOWS:
        columns[f"customer_greatest_ratio_{window}"] = range_max(ratio, *line.since(WINDOWS[window]))
    columns |= _outliers(line, cents, ratio)
    return columns | {f"new_{other}": line.is_new(others[other]) for other in ("card", "device", "address")}


def _outliers(line: Timeline, cents: npt.NDArray[np.float64], ratio: npt.NDArray[np.float64]) -> Columns:
    """Amounts against the customer's usual ones, from which outliers are left out."""
    usual = line.mean_where(line.priced & ~(ratio >= UNUSUAL))
    against = quotient(cents, np.nan_to_num(usual))
    unusual = against >= UNUSUAL
    marks = sums_before(unusual)
    columns: Columns = {"customer_usual_mean": usual[line.at] / 100.0, "customer_usual_ratio": against[line.at]}
    for window in UNUSUAL_WINDOWS:
        start, stop = line.since(WINDOWS[window])
        columns[f"customer_unusual_{window}"] = marks[stop] - marks[start]
    columns["customer_minutes_since_unusual"] = line.minutes_since_marked(unusual, line.at)
    columns["customer_minutes_since_unusual_began"] = line.minutes_since_first_marked(unusual, WINDOWS["14d"])
    return columns


def _of_events(part: FeatureGroup, rows: pl.DataFrame, events: pl.DataFrame) -> tuple[Ints, Columns]:
    """The rows that are asked about and have an account (or device), and what its events say."""
    events = conform(events, EVENT_COLUMNS).filter(pl.col(part.key).is_not_null() & pl.col("occurred_at").is_not_null())
    code, entity = codes(events[part.key], rows[part.key])
    chosen = np.flatnonzero((entity >= 0) & rows["asked"].to_numpy())
    entity, now = entity[chosen], microseconds(rows["placed_at"])[chosen]
    prefix = part.key
    wanted = {"events": None, "failed_logins": "login_failed", "failed_payments": "payment_failed", "changes": "account_changed"}
    named = {feature.name for feature in part.features}
    columns: Columns = {}
    for noun, kind in wanted.items():
        of_kind = np.arange(len(code)) if kind is None else np.flatnonzero((events["kind"] == kind).to_numpy())
        moments, _ = Moments.arranged(code[of_kind], microseconds(events["occurred_at"])[of_kind])
        stop = moments.before(entity, now)
        for window in EVENT_WINDOWS:
            if (name := f"{prefix}_{noun}_{window}") in named:
                columns[name] = stop - moments.before(entity, now - WINDOWS[window])
        last = {"failed_logins": f"{prefix}_minutes_since_failed_login", "changes": f"{prefix}_minutes_since_change"}.get(
            noun, ""
        )
        if last in named:
            there = stop > moments.before(entity, np.full(len(entity), -NEVER))
            moment = moments.time[np.maximum(stop - 1, 0)] if len(moments.time) else now
            columns[last] = np.where(there, (now - moment).astype(np.float64) / float(MINUTE), np.nan)
    return chosen, columns
