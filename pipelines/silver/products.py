"""silver.products: the newest row of every product."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import PRODUCTS as BRONZE_PRODUCTS
from pipelines.bronze.tables import PRODUCTS_KEY
from pipelines.settings import BusinessSettings

PRODUCTS = Table(
    "silver.products",
    doc="The catalogue as it is now. category is traced, so that sales by category hear of a product that moved.",
    columns=(
        column("product_id", pa.string(), "Product.", required=True),
        column("name", pa.string(), "Name."),
        column("category", pa.string(), "Category."),
        column("brand", pa.string(), "Brand."),
        column("list_price", pa.decimal128(18, 2), "List price, in `currency`."),
        column("currency", pa.string(), "Currency of the list price, ISO 4217."),
        column("updated_at", TIMESTAMP, "When the source last changed it."),
    ),
    key=PRODUCTS_KEY,
    tracked=("category",),
    owner="merchandising",
    expectations=(within("list_price", 0, None, severity="warn"),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The newest row per product; deleted ones are gone."""
    return current_rows(frames["products"], PRODUCTS_KEY).select(PRODUCTS.schema.names)


STEP = Step(
    target=PRODUCTS,
    reads={"products": Grouped(BRONZE_PRODUCTS, keys=((pl.col("product_id"),),), parse=unreadable_rows)},
    transform=transform,
)
