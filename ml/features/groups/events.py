"""Features of the account events of an account, and of those on a device."""

from __future__ import annotations

from collections.abc import Sequence

from ml.features.declarations import WINDOW_WORDS, Feature, FeatureGroup

EVENT_WINDOWS = ("10m", "1h", "24h")
FAILURE_WINDOWS = ("1h", "24h")
COUNTED_KINDS = {"failed_logins": "login_failed", "failed_payments": "payment_failed", "changes": "account_changed"}
"""Kind of the events that each name in a feature counts; `events` counts all."""


def _counts(prefix: str, of: str, windows: Sequence[str], nouns: Sequence[str]) -> list[Feature]:
    return [
        Feature(
            name=f"{prefix}_{noun}_{window}",
            type="count",
            window=window,
            doc=f"{noun.replace('_', ' ').capitalize()} {of} in the {WINDOW_WORDS[window]} before.",
            reason_text=f"{{value}} {noun.replace('_', ' ')} {of} within the last {WINDOW_WORDS[window]}",
        )
        for noun in nouns
        for window in windows
    ]


ACCOUNT_EVENTS = FeatureGroup(
    name="account_events",
    key="account",
    features=(
        *_counts("account", "of the account", EVENT_WINDOWS, ("events",)),
        *_counts("account", "of the account", FAILURE_WINDOWS, ("failed_logins", "failed_payments")),
        Feature(
            name="account_minutes_since_failed_login",
            type="minutes",
            window="ever",
            doc="Since the account's last failed login.",
            reason_text="failed login {value} before",
        ),
        Feature(
            name="account_minutes_since_change",
            type="minutes",
            window="ever",
            doc="Since the last change of the account's data.",
            reason_text="account changed {value} before",
        ),
    ),
    events=True,
)
DEVICE_EVENTS = FeatureGroup(
    name="device_events",
    key="device",
    features=tuple(_counts("device", "on the device", FAILURE_WINDOWS, ("failed_logins", "failed_payments"))),
    events=True,
)
