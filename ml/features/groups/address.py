"""Features of the shipping address."""

from __future__ import annotations

from ml.features.groups.entity import DEFAULT_WINDOWS, entity_group

ADDRESS = entity_group(
    "address",
    of="to the address",
    the="the address",
    windows=DEFAULT_WINDOWS,
    seen_with=("customer", "card"),
    fraud_windows=("28d",),
    risk_windows=("28d",),
)
