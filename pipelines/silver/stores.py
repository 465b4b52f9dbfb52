"""silver.stores: the current row of each store, warehouse and online shop."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze import tables
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.parsing.text import trimmed
from pipelines.settings import BusinessSettings

STORES = Table(
    "silver.stores",
    doc="Current stores, warehouses and online shops.",
    columns=(
        column("store_id", pa.string(), "Store id.", required=True),
        column("name", pa.string(), "Store name; null when unknown."),
        column("kind", pa.string(), "Kind of store: store, warehouse or online."),
        column("city", pa.string(), "City; null when unknown."),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2 code in upper case; null when unknown."),
        column("updated_at", TIMESTAMP, "When the source last changed the store (UTC)."),
    ),
    key=tables.STORES_KEY,
    owner="retail operations",
    expectations=(row_count_drift(0.5, at_least=20),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the newest row of each live store."""
    return (
        current_rows(frames["stores"], tables.STORES_KEY)
        .with_columns(trimmed("country").str.to_uppercase())
        .select(STORES.schema.names)
    )


STEP = Step(
    target=STORES,
    reads={"stores": Grouped(tables.STORES, keys=((pl.col("store_id"),),), parse=unreadable_rows)},
    transform=transform,
)
