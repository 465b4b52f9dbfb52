"""gold.dim_stores: stores, warehouses and online shops as they are now."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Context, Gather, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.silver.stores import STORES

DIM_STORES = Table(
    "gold.dim_stores",
    doc="Stores, warehouses and online shops as they are now.",
    columns=(
        column("store_id", pa.string(), "Store.", required=True),
        column("name", pa.string(), "Name."),
        column("kind", pa.string(), "store, warehouse, online."),
        column("city", pa.string(), "City."),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2."),
        column("updated_at", TIMESTAMP, "When the source last changed the row."),
    ),
    key=("store_id",),
    owner="commerce",
    expectations=(row_count_drift(0.5, at_least=20),),
)


def fill(frames: Mapping[str, pl.DataFrame], context: Context) -> pl.DataFrame:
    """The touched stores."""
    return frames["stores"].select(DIM_STORES.schema.names).sort("store_id")


STEP = Step(
    target=DIM_STORES,
    reads={"stores": Gather(STORES, keys=((pl.col("store_id"),),), columns=tuple(DIM_STORES.schema.names))},
    fill=fill,
)
