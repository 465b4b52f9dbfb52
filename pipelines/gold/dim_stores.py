"""gold.dim_stores: the current stores, warehouses and online shops."""

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
"""Id of the member for sales without a store, such as those of a marketplace."""

DIM_STORES = Table(
    "gold.dim_stores",
    doc=f"Current stores, warehouses and online shops, and the member '{NO_STORE}' for sales without a store.",
    columns=(
        column("store_id", pa.string(), "Store id.", required=True),
        column("name", pa.string(), "Store name; null when unknown."),
        column("kind", pa.string(), f"Kind of store: store, warehouse or online; '{NO_STORE}' for the member without a store."),
        column("city", pa.string(), "City; null when unknown."),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2 code; null when unknown."),
        column("updated_at", TIMESTAMP, "When the source last changed the row (UTC)."),
    ),
    key=("store_id",),
    owner="commerce",
    expectations=(row_count_drift(0.5, at_least=20),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the affected stores and, if there is any store, the member for sales without one."""
    member = pl.DataFrame({"store_id": [NO_STORE], "name": ["No store"], "kind": [NO_STORE]})
    stores = frames["stores"].filter(pl.col("store_id") != NO_STORE).select(DIM_STORES.schema.names)
    return pl.concat([stores, member.head(stores.height)], how="diagonal").sort("store_id")


_NO_STORE_GROUP = pl.when(pl.col("store_id").is_not_null()).then(pl.lit(NO_STORE))
"""Every changed store affects the member for sales without a store too, so it exists as soon as any store does."""

STEP = Step(
    target=DIM_STORES,
    reads={"stores": Grouped(STORES, keys=((pl.col("store_id"),), (_NO_STORE_GROUP,)), columns=tuple(DIM_STORES.schema.names))},
    transform=transform,
    parameters=(("member for no store", NO_STORE),),
)
