"""Features of the device, or terminal: in particular frauds that point to the device rather than to the customer."""

from __future__ import annotations

from ml.features.declarations import RISK_WINDOWS, Feature
from ml.features.groups.entity import DEFAULT_WINDOWS, entity_group

LAST_LABELS = (1, 2, 3, 5, 10)

DEVICE = entity_group(
    "device",
    of="on the device",
    the="the device",
    own=(
        Feature(
            name="device_mean",
            type="amount",
            window="ever",
            doc="Mean of the device's earlier amounts.",
            reason_text="orders on the device are usually {value}",
        ),
    ),
    windows=DEFAULT_WINDOWS,
    seen_with=("customer", "card"),
    fraud_windows=tuple(RISK_WINDOWS),
    risk_windows=tuple(RISK_WINDOWS),
    last_labels=LAST_LABELS,
    unexplained_windows=("7d", "14d", "28d"),
)
