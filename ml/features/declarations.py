"""Declarations that all features share: features and their groups, the columns that they read, and their windows.

An order placed at time t is described by what was known at t:
- orders earlier than t (orders of the same moment are ordered by order_id);
- account events earlier than t;
- frauds reported before t, whenever they happened;
- the category's totals of the calendar month (UTC) before t's month.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import polars as pl

from lakehouse.errors import ShopSphereError
from ml.features.windows import DAY, HOUR, MINUTE

Kind = Literal["count", "amount", "ratio", "minutes", "flag", "category"]
"""count: whole number; amount: units of the base currency; ratio: dimensionless number; minutes: elapsed time; flag: 0 or 1;
category: one of the declared texts."""

MISSING, OTHER = "missing", "other"
"""Categories of a null, and of a text that the declaration does not list."""

LABEL_DELAY = timedelta(days=45)
"""Maximum time between an order and its fraud report: the label of a younger order is not yet mature."""

TIME = pl.Datetime("us", "UTC")
ENTITIES = ("customer", "card", "device", "address", "ip", "person")
"""Order columns that identify something with a history. customer: the account, or a marketplace buyer's contact, as
known when the order was placed; person: the identity graph's master user, who can have several accounts."""

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
"""An order as features read it. amount: cents of the base currency; account: user_id; known_at: when it was reported as
fraud, null if it was not (yet) reported; ratio: of a fraud, its amount relative to the customer's earlier ones
(`with_ratios`, or silver.fraud_ratios). A missing column is read as null."""

EVENT_COLUMNS: dict[str, pl.DataType] = {
    "account": pl.Int64(),
    "device": pl.String(),
    "occurred_at": TIME,
    "kind": pl.String(),
}
"""An account event. kind: one of EVENT_KINDS."""

EVENT_KINDS = ("visit", "login_failed", "payment_failed", "account_changed")
"""payment_failed: an unsuccessful payment attempt; visit: any event that is none of the others."""

CATEGORY_COLUMNS: dict[str, pl.DataType] = {
    "category": pl.String(),
    "month": pl.Date(),
    "orders": pl.Int64(),
    "amount": pl.Int64(),
}
"""Orders and cents per category and calendar month (its first day)."""

WINDOWS = {
    "10m": 10 * MINUTE,
    "1h": HOUR,
    "24h": DAY,
    "3d": 3 * DAY,
    "7d": 7 * DAY,
    "14d": 14 * DAY,
    "30d": 30 * DAY,
}
"""Windows over orders and events, in microseconds."""
RISK_WINDOWS = {"1d": DAY, "7d": 7 * DAY, "14d": 14 * DAY, "28d": 28 * DAY}
"""Windows over fraud reports and mature labels, in microseconds."""
WINDOW_WORDS = {
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


class FeatureError(ShopSphereError):
    """Features cannot be computed: invalid input rows, or a feature that is declared but not implemented."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature.

    name         column of the frame that `compute` returns
    type         see Kind
    window       how far back it looks: '1h', '30d', 'ever', or 'now' for a property of the order itself
    doc          meaning, for the docs
    reason_text  explanation for a reviewer, with a `{value}` placeholder
    categories   of a category: all its values
    """

    name: str
    type: Kind
    window: str
    doc: str
    reason_text: str
    categories: tuple[str, ...] = ()

    @property
    def dtype(self) -> pl.DataType:
        """The column's type: String for a category, Float64 for all others. Null: unknown."""
        return pl.String() if self.type == "category" else pl.Float64()

    def reason(self, value: float | str | None) -> str:
        """Return the reason text with a value filled in."""
        return self.reason_text.format(value=self._formatted(value))

    def _formatted(self, value: float | str | None) -> str:
        if value is None or isinstance(value, str):
            return value or "unknown"
        if self.type == "minutes":
            for size, name in ((1440, "days"), (60, "hours")):
                if value >= 2 * size:
                    return f"{value / size:.0f} {name}"
            return "less than 1 minute" if value < 1 else f"{value:.0f} minutes"
        if self.type == "amount":
            return f"{value:,.2f}"
        return f"{value:.0f}" if self.type in ("count", "flag") else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class FeatureGroup:
    """Features that can be computed from the rows of one kind of entity alone.

    key                  order column that identifies the entity
    needs                other order columns that the features read
    windows              windows of order counts and amounts
    seen_with            other entity columns whose distinct values are counted
    fraud_windows        windows of reported frauds
    risk_windows         windows of mature labels and their fraud share
    last_labels          how many of the newest mature labels are counted
    unexplained_windows  windows of frauds whose amount was not unusual for their customer
    events               read account events with the same `key`, instead of orders
    """

    name: str
    key: str
    features: tuple[Feature, ...]
    needs: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    seen_with: tuple[str, ...] = ()
    fraud_windows: tuple[str, ...] = ()
    risk_windows: tuple[str, ...] = ()
    last_labels: tuple[int, ...] = ()
    unexplained_windows: tuple[str, ...] = ()
    events: bool = False


@dataclass(frozen=True)
class OrderHistory:
    """Everything known besides the requested orders: see ORDER_COLUMNS, EVENT_COLUMNS, CATEGORY_COLUMNS.

    An order that is both requested and in the history counts once. Empty frames are allowed.
    """

    orders: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=ORDER_COLUMNS))
    events: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=EVENT_COLUMNS))
    categories: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=CATEGORY_COLUMNS))
    delay: timedelta = LABEL_DELAY


def conform(frame: pl.DataFrame, columns: dict[str, pl.DataType]) -> pl.DataFrame:
    """Return exactly the declared columns, cast to their types. A missing column is null."""
    present = set(frame.columns)
    return frame.select(
        (pl.col(name) if name in present else pl.lit(None).alias(name)).cast(dtype) for name, dtype in columns.items()
    )
