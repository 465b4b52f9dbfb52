"""gold.dim_stores: stores, warehouses and online shops as they are now."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.settings import BusinessSettings
from pipelines.silver.stores import STORES

NO_STORE = "none"
"""The member for sales of no store, such as a marketplace's."""

DIM_STORES = Table(
    "gold.dim_stores",
    doc=f"Stores, warehouses and online shops as they are now, and '{NO_STORE}' for what belongs to no store.",
    columns=(
        column("store_id", pa.string(), "Store.", required=True),
        column("name", pa.string(), "Name."),
        column("kind", pa.string(), f"store, warehouse, online; {NO_STORE}."),
        column("city", pa.string(), "City."),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2."),
        column("updated_at", TIMESTAMP, "When the source last changed the row."),
    ),
    key=("store_id",),
    owner="commerce",
    expectations=(row_count_drift(0.5, at_least=20),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The touched stores, and, where there are any, the member for no store."""
    member = pl.DataFrame({"store_id": [NO_STORE], "name": ["No store"], "kind": [NO_STORE]})
    stores = frames["stores"].filter(pl.col("store_id") != NO_STORE).select(DIM_STORES.schema.names)
    return pl.concat([stores, member.head(stores.height)], how="diagonal").sort("store_id")


_MEMBER = pl.when(pl.col("store_id").is_not_null()).then(pl.lit(NO_STORE))
"""Any change of a store touches the member for no store too, so that it is there as soon as there are stores."""

STEP = Step(
    target=DIM_STORES,
    reads={"stores": Grouped(STORES, keys=((pl.col("store_id"),), (_MEMBER,)), columns=tuple(DIM_STORES.schema.names))},
    transform=transform,
    parameters=(("member for no store", NO_STORE),),
)
