"""silver.order_items_unified: the lines of the orders of every channel."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import not_null, row_count_drift
from lakehouse.step import Grouped, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDER_ITEMS, ORDER_ITEMS_KEY
from pipelines.identity.records import MARKETPLACE_ORDER_ID
from pipelines.parsing.amounts import line_amounts, to_base_currency
from pipelines.parsing.marketplace_documents import parse_items
from pipelines.settings import BusinessSettings
from pipelines.silver.orders_unified import MARKETPLACE_COLUMNS, ORDERS_UNIFIED

ORDER_ITEMS_UNIFIED = Table(
    "silver.order_items_unified",
    doc="Order lines of all channels, with what their order says about time, place and currency. A line whose order is "
    "not there (yet, or any more) has none of that and does not count as a sale.",
    columns=(
        column("order_id", pa.string(), "Order, as in silver.orders_unified.", required=True),
        column("line_no", pa.int32(), "Line of the order; on a marketplace the place in its items, from 1.", required=True),
        column("product_id", pa.string(), "Product; null where a marketplace does not say."),
        column("product_name", pa.string(), "What a marketplace calls it."),
        column("quantity", pa.int32(), "Pieces; negative on a return line."),
        column("unit_price", MONEY, "Price of one piece, in `currency`."),
        column("currency", pa.string(), "Currency of the order, ISO 4217."),
        column("exchange_rate", pa.decimal128(18, 8), "Units of the base currency per unit on the day of the order."),
        column("line_amount", MONEY, "quantity x unit_price, exact, in `currency`."),
        column("net_base", MONEY, "That in the base currency, rounded half-even to 4 places; null when the rate is unknown."),
        column("counts_as_sale", pa.bool_(), "False when the order is cancelled or not there.", required=True),
        column("order_date", pa.date32(), "Day of the order (UTC)."),
        column("placed_at", TIMESTAMP, "When the order was placed."),
        column("channel", pa.string(), "web, pos or marketplace."),
        column("platform", pa.string(), "The marketplace; null for the shop's own channels."),
        column("store_id", pa.string(), "Store of the order."),
        column("country", pa.string(), "Country of the order, ISO 3166-1 alpha-2."),
        column("status", pa.string(), "Status of the order."),
        column("variant", pa.string(), "What a marketplace says about size, colour and the like: canonical JSON."),
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

_OF_LINE = ("order_id", "line_no", "product_id", "product_name", "quantity", "unit_price", "variant")
_OF_ORDER = (
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
    """The newest version of each line, priced, beside its order."""
    marketplace = parse_items(frames["marketplace"]).select(_OF_LINE)
    lines = pl.concat([_web(frames["lines"]), marketplace], how="vertical")
    orders = frames["orders"].select(_OF_ORDER).unique("order_id").with_columns(pl.lit(True).alias("_known"))
    priced = lines.with_columns(line_amounts(lines["quantity"], lines["unit_price"]).alias("line_amount"))
    joined = priced.join(orders, on="order_id", how="left")
    cancelled = (pl.col("status") == "cancelled").fill_null(False)
    return joined.with_columns(
        to_base_currency(joined["line_amount"], joined["exchange_rate"]).alias("net_base"),
        (pl.col("_known").fill_null(False) & ~cancelled).alias("counts_as_sale"),
    ).select(ORDER_ITEMS_UNIFIED.schema.names)


def _web(bronze: pl.DataFrame) -> pl.DataFrame:
    nothing = pl.lit(None, pl.String)
    return current_rows(bronze, ORDER_ITEMS_KEY).select(
        pl.col("order_id").cast(pl.String),
        pl.col("line_no").cast(pl.Int32),
        "product_id",
        nothing.alias("product_name"),
        pl.col("quantity").cast(pl.Int32),
        pl.col("unit_price").cast(pl.Decimal(20, 4)),
        nothing.alias("variant"),
    )


STEP = Step(
    target=ORDER_ITEMS_UNIFIED,
    reads={
        "lines": Grouped(ORDER_ITEMS, keys=((pl.col("order_id").cast(pl.String),),), parse=unreadable_rows),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS, keys=((MARKETPLACE_ORDER_ID,),), columns=MARKETPLACE_COLUMNS, resolve=("document_id",)
        ),
        "orders": Grouped(ORDERS_UNIFIED, keys=((pl.col("order_id"),),), columns=_OF_ORDER),
    },
    transform=transform,
)
