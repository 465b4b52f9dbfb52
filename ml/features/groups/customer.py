"""Features of the customer: the amount relative to the customer's own history, and new cards, devices and addresses."""

from __future__ import annotations

from ml.features.declarations import WINDOW_WORDS, WINDOWS, Feature
from ml.features.groups.entity import UNUSUAL_RATIO, entity_group

RECENT_MEAN_WINDOWS = ("7d", "30d")
GREATEST_RATIO_WINDOWS = ("24h", "3d", "7d", "14d", "30d")
UNUSUAL_WINDOWS = ("3d", "7d", "14d")
FIRST_USES = ("card", "device", "address")
"""Entity columns whose first use by the customer is a feature."""

AMOUNTS = (
    Feature(
        name="customer_mean",
        type="amount",
        window="ever",
        doc="Mean of the customer's earlier amounts.",
        reason_text="customer usually spends {value}",
    ),
    Feature(
        name="customer_deviation",
        type="amount",
        window="ever",
        doc="Sample standard deviation of the customer's earlier amounts.",
        reason_text="customer's amounts vary by {value}",
    ),
    Feature(
        name="customer_ratio",
        type="ratio",
        window="ever",
        doc="Amount relative to the mean of the customer's earlier amounts.",
        reason_text="{value} times the customer's usual amount",
    ),
    Feature(
        name="customer_z",
        type="ratio",
        window="ever",
        doc="Amount minus that mean, in standard deviations.",
        reason_text="{value} standard deviations over the customer's usual amount",
    ),
    *(
        Feature(
            name=f"customer_ratio_{window}",
            type="ratio",
            window=window,
            doc=f"Amount relative to the mean of the customer's orders in the {WINDOW_WORDS[window]} before.",
            reason_text=f"{{value}} times the customer's mean of {WINDOW_WORDS[window]}",
        )
        for window in RECENT_MEAN_WINDOWS
    ),
    *(
        Feature(
            name=f"customer_greatest_ratio_{window}",
            type="ratio",
            window=window,
            doc=f"Greatest ratio to the customer's mean at the time, among the orders in the {WINDOW_WORDS[window]} before.",
            reason_text=f"customer spent {{value}} times the usual amount within the last {WINDOW_WORDS[window]}",
        )
        for window in GREATEST_RATIO_WINDOWS
    ),
)

OUTLIERS = (
    Feature(
        name="customer_usual_mean",
        type="amount",
        window="ever",
        doc=f"Mean of the customer's earlier amounts without outliers: amounts of {UNUSUAL_RATIO:g} times the mean before "
        "them, or more.",
        reason_text="customer usually spends {value}, outliers aside",
    ),
    Feature(
        name="customer_usual_ratio",
        type="ratio",
        window="ever",
        doc="Amount relative to the mean without outliers.",
        reason_text="{value} times what the customer usually spends, outliers aside",
    ),
    *(
        Feature(
            name=f"customer_unusual_{window}",
            type="count",
            window=window,
            doc=f"Orders in the {WINDOW_WORDS[window]} before of {UNUSUAL_RATIO:g} times the mean without outliers, or more.",
            reason_text=f"{{value}} orders of an unusual amount within the last {WINDOW_WORDS[window]}",
        )
        for window in UNUSUAL_WINDOWS
    ),
    Feature(
        name="customer_minutes_since_unusual",
        type="minutes",
        window="ever",
        doc="Since the last order of an unusual amount.",
        reason_text="last order of an unusual amount {value} ago",
    ),
    Feature(
        name="customer_minutes_since_unusual_began",
        type="minutes",
        window="14d",
        doc="Since the first order of an unusual amount in the 14 days before: when a theft may have begun.",
        reason_text="orders of unusual amounts began {value} ago",
    ),
)

NEW = tuple(
    Feature(
        name=f"new_{other}",
        type="flag",
        window="ever",
        doc=f"1 if the customer never used this {other} before.",
        reason_text=f"{other} new to the customer ({{value}})",
    )
    for other in FIRST_USES
)

CUSTOMER = entity_group(
    "customer",
    of="of the customer",
    the="the customer",
    own=(*AMOUNTS, *OUTLIERS, *NEW),
    windows=tuple(WINDOWS),
    seen_with=("card", "device", "address"),
    fraud_windows=("7d", "28d"),
)
