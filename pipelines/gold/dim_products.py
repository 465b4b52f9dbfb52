"""gold.dim_products: the current catalogue."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift, within
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.settings import BusinessSettings
from pipelines.silver.products import PRODUCTS

UNCATEGORISED = "uncategorised"
"""Category of products without one, and of products that were sold but are not in the catalogue."""

DIM_PRODUCTS = Table(
    "gold.dim_products",
    doc="Products of the current catalogue. Products that were sold but are not in the catalogue have no row; "
    f"sales_daily has their revenue under category '{UNCATEGORISED}'.",
    columns=(
        column("product_id", pa.string(), "Product id.", required=True),
        column("name", pa.string(), "Product name; null when unknown."),
        column("category", pa.string(), f"Category; '{UNCATEGORISED}' when the catalogue has none.", required=True),
        column("brand", pa.string(), "Brand; null when unknown."),
        column("list_price", pa.decimal128(18, 2), "List price, in `currency`; null when unknown."),
        column("currency", pa.string(), "Currency of list_price, ISO 4217 code."),
        column("updated_at", TIMESTAMP, "When the source last changed the row (UTC)."),
    ),
    key=("product_id",),
    owner="commerce",
    expectations=(
        within("list_price", 0, None, severity="warn"),
        row_count_drift(0.5),
    ),
)


def category() -> pl.Expr:
    """Return the category, never null."""
    return pl.col("category").fill_null(UNCATEGORISED)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the affected products."""
    return frames["products"].with_columns(category()).select(DIM_PRODUCTS.schema.names).sort("product_id")


STEP = Step(
    target=DIM_PRODUCTS,
    reads={"products": Grouped(PRODUCTS, keys=((pl.col("product_id"),),), columns=tuple(DIM_PRODUCTS.schema.names))},
    transform=transform,
)
