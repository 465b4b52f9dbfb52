"""Features of the person, as the identity graph resolves them, across all their accounts."""

from __future__ import annotations

from ml.features.groups.entity import entity_group

PERSON = entity_group(
    "person",
    of="of the person behind the account",
    the="the person behind the account",
    windows=("24h", "30d"),
    seen_with=("customer",),
    fraud_windows=("28d",),
)
