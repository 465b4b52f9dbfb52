"""silver.chargebacks: the current row of each chargeback."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, not_null
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze import tables
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.settings import BusinessSettings

CHARGEBACKS = Table(
    "silver.chargebacks",
    doc="Current chargebacks as the bank reported them. order_ref is tracked: a chargeback that moves to another order affects "
    "both orders.",
    columns=(
        column("chargeback_id", pa.int64(), "Chargeback id.", required=True),
        column("order_ref", pa.string(), "Order id, as orders_unified.order_id; null when unknown."),
        column("reason", pa.string(), "Reason: fraud, not_received, not_as_described or other."),
        column("reported_at", TIMESTAMP, "When the chargeback was reported (UTC), usually weeks after the order."),
    ),
    key=("chargeback_id",),
    tracked=("order_ref",),
    owner="risk",
    expectations=(
        not_null("order_ref", "reported_at", severity="warn"),
        accepted("reason", {"fraud", "not_received", "not_as_described", "other"}, severity="warn"),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the newest row of each live chargeback."""
    return current_rows(frames["chargebacks"], tables.CHARGEBACKS_KEY).select(CHARGEBACKS.schema.names)


STEP = Step(
    target=CHARGEBACKS,
    reads={"chargebacks": Grouped(tables.CHARGEBACKS, keys=((pl.col("chargeback_id"),),), parse=unreadable_rows)},
    transform=transform,
)
