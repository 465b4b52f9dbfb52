"""silver.chargebacks: the newest row of every chargeback."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, not_null
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import CHARGEBACKS as BRONZE_CHARGEBACKS
from pipelines.settings import BusinessSettings

CHARGEBACKS = Table(
    "silver.chargebacks",
    doc="Chargebacks as the bank reported them, the newest row of each. order_ref is traced, so that an order hears of a "
    "chargeback that moved to another order.",
    columns=(
        column("chargeback_id", pa.int64(), "Chargeback.", required=True),
        column("order_ref", pa.string(), "The order it is about: an orders_unified.order_id."),
        column("reason", pa.string(), "fraud, not_received, not_as_described, other."),
        column("reported_at", TIMESTAMP, "When it was reported; weeks after the order."),
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
    """The newest row per chargeback; deleted ones are gone."""
    return current_rows(frames["chargebacks"], ("chargeback_id",)).select(CHARGEBACKS.schema.names)


STEP = Step(
    target=CHARGEBACKS,
    reads={"chargebacks": Grouped(BRONZE_CHARGEBACKS, keys=((pl.col("chargeback_id"),),), parse=unreadable_rows)},
    transform=transform,
)
