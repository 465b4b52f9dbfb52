"""silver.fraud_ratios: how unusual the amount of each reported fraud was for its customer.

A fraud of an ordinary amount points to the device or terminal rather than to the customer. Whether the amount is ordinary
depends on the customer's history, which would be expensive to read for every order on the same device.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from ml.features.compute import with_ratios
from ml.tables.order_entities import ORDER_ENTITIES
from pipelines.settings import BusinessSettings

FRAUD_RATIOS = Table(
    "silver.fraud_ratios",
    doc="Reported frauds of orders with a customer: their amount relative to the mean of the customer's earlier amounts.",
    columns=(
        column("customer", pa.string(), "Customer of the order.", required=True, personal="identifier"),
        column("order_id", pa.string(), "Order, as in silver.orders_unified.", required=True),
        column("device", pa.string(), "Device of the order.", personal="device"),
        column("known_at", TIMESTAMP, "When it was reported as fraud.", required=True),
        column("ratio", pa.float64(), "Amount relative to the mean of the customer's earlier orders; null for the first order."),
    ),
    key=("customer", "order_id"),
    group=("customer",),
    tracked=("device", "known_at"),
    owner="risk",
    expectations=(within("ratio", 0, None, severity="warn"),),
    named_by=("order_id",),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the reported orders of the affected customers."""
    orders = with_ratios(frames["orders"].unique("order_id"))
    return orders.filter(pl.col("known_at").is_not_null()).select(FRAUD_RATIOS.schema.names)


STEP = Step(
    target=FRAUD_RATIOS,
    reads={
        "orders": Grouped(
            ORDER_ENTITIES,
            keys=((pl.col("customer"),),),
            columns=("order_id", "placed_at", "customer", "device", "amount", "known_at"),
        )
    },
    transform=transform,
)
