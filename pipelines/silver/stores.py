"""silver.stores: the newest row of every store, warehouse and online shop."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import STORES as BRONZE_STORES
from pipelines.bronze.tables import STORES_KEY
from pipelines.settings import BusinessSettings

STORES = Table(
    "silver.stores",
    doc="Stores, warehouses and online shops as they are now.",
    columns=(
        column("store_id", pa.string(), "Store.", required=True),
        column("name", pa.string(), "Name."),
        column("kind", pa.string(), "store, warehouse or online."),
        column("city", pa.string(), "City."),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2, upper case."),
        column("updated_at", TIMESTAMP, "When the source last changed it."),
    ),
    key=STORES_KEY,
    owner="retail operations",
    expectations=(row_count_drift(0.5, at_least=20),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The newest row per store; deleted ones are gone."""
    country = pl.col("country").str.strip_chars().str.to_uppercase()
    return (
        current_rows(frames["stores"], STORES_KEY)
        .with_columns(pl.when(country != "").then(country).alias("country"))
        .select(STORES.schema.names)
    )


STEP = Step(
    target=STORES,
    reads={"stores": Grouped(BRONZE_STORES, keys=((pl.col("store_id"),),), parse=unreadable_rows)},
    transform=transform,
)
