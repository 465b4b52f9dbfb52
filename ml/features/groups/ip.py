"""Features of the client's IP address."""

from __future__ import annotations

from ml.features.groups.entity import DEFAULT_WINDOWS, entity_group

IP = entity_group(
    "ip",
    of="from the IP address",
    the="the IP address",
    windows=DEFAULT_WINDOWS,
    seen_with=("customer", "card"),
    fraud_windows=("28d",),
)
