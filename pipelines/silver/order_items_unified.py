"""silver.order_items_unified: one row per order line of any channel."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import not_null, row_count_drift
from lakehouse.step import Grouped, Parsed, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, is_within, unreadable_rows, within_limit
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDER_ITEMS, ORDER_ITEMS_KEY
from pipelines.identity.records import MARKETPLACE_ORDER_ID
from pipelines.parsing.amounts import AMOUNT, MAX_AMOUNT, line_amounts, to_base_currency
from pipelines.parsing.marketplace_documents import parse_items
from pipelines.sales import is_cancelled
from pipelines.settings import BusinessSettings
from pipelines.silver.orders_unified import MARKETPLACE_COLUMNS, ORDERS_UNIFIED

ORDER_ITEMS_UNIFIED = Table(
    "silver.order_items_unified",
    doc="Order lines of all channels, with time, place and currency of their order. A line without a known order "
    "(not yet delivered, or deleted) has null in these columns and does not count as a sale.",
    columns=(
        column("order_id", pa.string(), "Order id, as in silver.orders_unified.", required=True),
        column(
            "line_no",
            pa.int32(),
            "Line number within the order; on marketplaces the position in its items, from 1.",
            required=True,
        ),
        column("product_id", pa.string(), "Product id; null when a marketplace does not provide it."),
        column("product_name", pa.string(), "Product name on the marketplace; null in other channels."),
        column("quantity", pa.int32(), "Pieces; negative when pieces are returned."),
        column("unit_price", MONEY, "Price per piece, in `currency`; null when unknown."),
        column("currency", pa.string(), "Currency of the order, ISO 4217 code; null when unknown."),
        column(
            "exchange_rate",
            pa.decimal128(18, 8),
            "Units of the base currency per unit of `currency` on order_date; null when unknown.",
        ),
        column("line_amount", MONEY, "quantity x unit_price, exact, in `currency`; null when either is unknown."),
        column(
            "net_base",
            MONEY,
            "line_amount in the base currency, rounded half-even to 4 places; null when the exchange rate is unknown.",
        ),
        column(
            "counts_as_sale",
            pa.bool_(),
            "Whether the line counts as a sale: its order is known and not cancelled.",
            required=True,
        ),
        column("order_date", pa.date32(), "Day on which the order was placed (UTC)."),
        column("placed_at", TIMESTAMP, "When the order was placed (UTC)."),
        column("channel", pa.string(), "Sales channel: web, pos or marketplace."),
        column("platform", pa.string(), "Name of the marketplace; null in other channels."),
        column("store_id", pa.string(), "Store id of the order; null for marketplaces."),
        column("country", pa.string(), "Country of the order, ISO 3166-1 alpha-2 code; null when unknown."),
        column("status", pa.string(), "Status of the order."),
        column("variant", pa.string(), "Variant (size, colour, ...) on the marketplace, as canonical JSON; null without one."),
    ),
    key=("order_id", "line_no"),
    group=("order_id",),
    tracked=("order_date", "product_id"),
    sort_by=("platform", "order_date", "order_id", "line_no"),
    owner="commerce",
    expectations=(
        not_null("quantity", "unit_price", severity="warn"),
        row_count_drift(0.5),
    ),
)

MAX_INTEGER = 2**31
"""Magnitude from which on a number of pieces or lines does not fit into its column."""
_LINE_COLUMNS = ("order_id", "line_no", "product_id", "product_name", "quantity", "unit_price", "variant")
_ORDER_COLUMNS = (
    "order_id",
    "currency",
    "exchange_rate",
    "order_date",
    "placed_at",
    "channel",
    "platform",
    "store_id",
    "country",
    "status",
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the current lines with their amounts and the columns of their order."""
    marketplace = parse_items(frames["marketplace"]).select(_LINE_COLUMNS)
    lines = pl.concat([_shop_lines(frames["lines"]), marketplace], how="vertical")
    orders = frames["orders"].select(_ORDER_COLUMNS).unique("order_id").with_columns(pl.lit(True).alias("_has_order"))
    priced = lines.with_columns(line_amounts(lines["quantity"], lines["unit_price"]).alias("line_amount"))
    joined = priced.join(orders, on="order_id", how="left")
    return joined.with_columns(
        to_base_currency(joined["line_amount"], joined["exchange_rate"]).alias("net_base"),
        (pl.col("_has_order").fill_null(False) & ~is_cancelled()).alias("counts_as_sale"),
    ).select(ORDER_ITEMS_UNIFIED.schema.names)


def _shop_lines(bronze: pl.DataFrame) -> pl.DataFrame:
    """Return the current lines of the web shop and the stores."""
    no_text = pl.lit(None, pl.String)
    current = current_rows(bronze, ORDER_ITEMS_KEY)
    return current.filter(is_within("line_no", MAX_INTEGER)).select(
        pl.col("order_id").cast(pl.String),
        pl.col("line_no").cast(pl.Int32),
        "product_id",
        no_text.alias("product_name"),
        within_limit("quantity", MAX_INTEGER).cast(pl.Int32),
        within_limit("unit_price", MAX_AMOUNT).cast(AMOUNT),
        no_text.alias("variant"),
    )


def parse_lines(bronze: pl.DataFrame) -> Parsed:
    """Reject rows with a number that is none, or does not fit into its column."""
    return unreadable_rows(bronze, {"line_no": MAX_INTEGER, "quantity": MAX_INTEGER, "unit_price": MAX_AMOUNT})


STEP = Step(
    target=ORDER_ITEMS_UNIFIED,
    reads={
        "lines": Grouped(ORDER_ITEMS, keys=((pl.col("order_id").cast(pl.String),),), parse=parse_lines),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS, keys=((MARKETPLACE_ORDER_ID,),), columns=MARKETPLACE_COLUMNS, resolve=("document_id",)
        ),
        "orders": Grouped(ORDERS_UNIFIED, keys=((pl.col("order_id"),),), columns=_ORDER_COLUMNS),
    },
    transform=transform,
)
