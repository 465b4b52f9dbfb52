"""Features of the payment card."""

from __future__ import annotations

from ml.features.groups.entity import DEFAULT_WINDOWS, entity_group

CARD = entity_group(
    "card",
    of="on the card",
    the="the card",
    windows=DEFAULT_WINDOWS,
    seen_with=("customer", "device"),
    fraud_windows=("28d",),
)
