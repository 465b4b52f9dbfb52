"""Features of the order itself."""

from __future__ import annotations

from ml.features.declarations import MISSING, OTHER, Feature, FeatureGroup

CHANNELS = ("web", "pos", "marketplace", OTHER, MISSING)
PAYMENT_METHODS = ("card", "wallet", "bank_transfer", "cash", OTHER, MISSING)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

ORDER = FeatureGroup(
    name="order",
    key="order_id",
    features=(
        Feature(name="amount", type="amount", window="now", doc="Amount of the order.", reason_text="amount {value}"),
        Feature(
            name="channel",
            type="category",
            window="now",
            doc="Sales channel.",
            reason_text="channel {value}",
            categories=CHANNELS,
        ),
        Feature(
            name="payment_method",
            type="category",
            window="now",
            doc="Payment method.",
            reason_text="paid by {value}",
            categories=PAYMENT_METHODS,
        ),
        Feature(name="hour", type="count", window="now", doc="Hour of the day, UTC.", reason_text="placed in hour {value} (UTC)"),
        Feature(
            name="weekday",
            type="category",
            window="now",
            doc="Day of the week, UTC.",
            reason_text="placed on a {value}",
            categories=WEEKDAYS,
        ),
        Feature(
            name="account_minutes",
            type="minutes",
            window="ever",
            doc="Since the account was opened.",
            reason_text="account is {value} old",
        ),
        Feature(
            name="category_ratio",
            type="ratio",
            window="last month",
            doc="Amount relative to the mean order of its main category in the calendar month before.",
            reason_text="{value} times the usual amount in its category",
        ),
    ),
    needs=("placed_at", "amount", "account_created_at", "channel", "payment_method", "category"),
)
