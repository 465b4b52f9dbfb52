"""silver.products: the current row of each product."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze import tables
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.settings import BusinessSettings

PRODUCTS = Table(
    "silver.products",
    doc="The current catalogue. category is tracked: a product that changes it affects the sales of both categories.",
    columns=(
        column("product_id", pa.string(), "Product id.", required=True),
        column("name", pa.string(), "Product name; null when unknown."),
        column("category", pa.string(), "Category; null when it has none."),
        column("brand", pa.string(), "Brand; null when unknown."),
        column("list_price", pa.decimal128(18, 2), "List price, in `currency`; null when unknown."),
        column("currency", pa.string(), "Currency of list_price, ISO 4217 code."),
        column("updated_at", TIMESTAMP, "When the source last changed the product (UTC)."),
    ),
    key=tables.PRODUCTS_KEY,
    tracked=("category",),
    owner="merchandising",
    expectations=(within("list_price", 0, None, severity="warn"),),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the newest row of each live product."""
    return current_rows(frames["products"], tables.PRODUCTS_KEY).select(PRODUCTS.schema.names)


STEP = Step(
    target=PRODUCTS,
    reads={"products": Grouped(tables.PRODUCTS, keys=((pl.col("product_id"),),), parse=unreadable_rows)},
    transform=transform,
)
