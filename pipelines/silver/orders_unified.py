"""silver.orders_unified: one row per order of any channel: web shop, stores, marketplaces."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, fresh, not_null, row_count_drift, within
from lakehouse.step import Broadcast, Grouped, Lookup, Parsed, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column
from pipelines.affected_rows import rows_priced_since, rows_with
from pipelines.bronze.current_rows import current_rows, unreadable_rows, within_limit
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, ORDERS_KEY
from pipelines.identity.records import (
    MARKETPLACE_ORDER_ID,
    ORDER_PREFIX,
    ORDER_RECORD_ID,
    USER_RECORD_ID,
    masters_by_record,
    user_record_ids,
)
from pipelines.parsing import contacts
from pipelines.parsing.amounts import AMOUNT, MAX_AMOUNT, to_base_currency
from pipelines.parsing.marketplace_documents import find_unreadable_documents, parse_documents
from pipelines.parsing.text import trimmed
from pipelines.settings import BusinessSettings
from pipelines.silver.exchange_rates import EXCHANGE_RATES, with_rates
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.stores import STORES
from pipelines.silver.users_scd import USERS_SCD

PLAUSIBLE_TIMES = (datetime(1990, 1, 1, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC))
"""An order outside of these is in quarantine: gold has a row for each month of a cohort, and 9999 is a common placeholder."""

ORDERS_UNIFIED = Table(
    "silver.orders_unified",
    doc="Current orders of all channels, attributed to a master user, with totals in the base currency.",
    columns=(
        column(
            "order_id",
            pa.string(),
            "Order id: '123' for order 123 of the web shop and stores, '<platform>:<mp_order_id>' for a marketplace order.",
            required=True,
        ),
        column("source_order_id", pa.string(), "Order id in the source system.", required=True),
        column("channel", pa.string(), "Sales channel: web, pos or marketplace; null when unknown."),
        column("platform", pa.string(), "Name of the marketplace; null in other channels."),
        column("user_id", pa.int64(), "User id of the account; null for an order without one."),
        column("customer_record", pa.string(), "record_id of the buyer in silver.identity_graph; null for an anonymous sale."),
        column(
            "master_user_id", pa.string(), "Id of the person who ordered, from silver.identity_graph; null for an anonymous sale."
        ),
        column("store_id", pa.string(), "Store id of the store that sells or ships; null for marketplaces."),
        column(
            "status",
            pa.string(),
            "Status in lower case: placed, paid, shipped, delivered, cancelled, returned, or one of a marketplace.",
        ),
        column("currency", pa.string(), "Currency of total_amount, ISO 4217 code; null when unknown."),
        column("total_amount", MONEY, "Order total as stated by the source, in `currency`; null when unknown."),
        column(
            "exchange_rate",
            pa.decimal128(18, 8),
            "Units of the base currency per unit of `currency` on order_date; null when unknown.",
        ),
        column(
            "total_base",
            MONEY,
            "total_amount in the base currency, rounded half-even to 4 places; null when the exchange rate is unknown.",
        ),
        column("payment_method", pa.string(), "Payment method; null when unknown."),
        column("card_fingerprint", pa.string(), "Fingerprint (hash) of the payment card; null without one.", personal="card"),
        column("ip_address", pa.string(), "IP address of the client; null when unknown.", personal="ip"),
        column("device_id", pa.string(), "Device id of the client; null when unknown.", personal="device"),
        column("shipping_address", pa.string(), "Shipping address as entered; null when unknown.", personal="address"),
        column(
            "email",
            pa.string(),
            "E-mail address of the buyer of a marketplace order, normalised; null when absent or invalid.",
            personal="email",
        ),
        column(
            "phone",
            pa.string(),
            "Phone number of the buyer of a marketplace order, E.164; null when absent or invalid.",
            personal="phone",
        ),
        column(
            "country",
            pa.string(),
            "Country, ISO 3166-1 alpha-2 code: of the store, else of the user, else of the marketplace; null when unknown.",
        ),
        column("placed_at", TIMESTAMP, "When the order was placed (UTC)."),
        column("order_date", pa.date32(), "Day of placed_at (UTC)."),
        column("updated_at", TIMESTAMP, "When the source last changed the order (UTC)."),
    ),
    key=("order_id",),
    tracked=("order_date", "channel", "store_id", "country", "master_user_id", "card_fingerprint"),
    # within a platform, ids grow with time: a data file covers a narrow range of both
    sort_by=("platform", "order_date", "order_id"),
    owner="commerce",
    expectations=(
        not_null("placed_at", severity="quarantine"),
        within("placed_at", *PLAUSIBLE_TIMES, severity="quarantine"),
        not_null("currency", "total_amount", severity="warn"),
        accepted("channel", {"web", "pos", "marketplace"}, severity="warn"),
        fresh("placed_at", hours=24),
        row_count_drift(0.5),
    ),
)

MARKETPLACE_COLUMNS = ("document_id", "platform", "mp_order_id", "document", "_op", "_source_position", "_ingested_at")


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the current orders with exchange rate, country and master user."""
    orders = pl.concat([_shop_orders(frames["web"]), _marketplace_orders(frames["marketplace"], context)], how="vertical")
    orders = with_rates(orders, frames["rates"], context.base_currency)
    stores = frames["stores"].select("store_id", pl.col("country").alias("store_country"))
    return (
        orders.with_columns(to_base_currency(orders["total_amount"], orders["exchange_rate"]).alias("total_base"))
        .join(stores.unique("store_id"), on="store_id", how="left")
        .join(_user_countries(frames["users"]), on="user_id", how="left")
        .join(masters_by_record(frames["identity"]), left_on="customer_record", right_on="record_id", how="left")
        .with_columns(pl.coalesce("store_country", "user_country", "platform_country").alias("country"))
        .select(ORDERS_UNIFIED.schema.names)
    )


def _shop_orders(bronze: pl.DataFrame) -> pl.DataFrame:
    """Return the current orders of the web shop and the stores."""
    current = current_rows(bronze, ORDERS_KEY)
    order_id = pl.col("order_id").cast(pl.String)
    no_text = pl.lit(None, pl.String)
    return current.select(
        order_id,
        order_id.alias("source_order_id"),
        trimmed("source").str.to_lowercase().alias("channel"),
        no_text.alias("platform"),
        "user_id",
        USER_RECORD_ID.alias("customer_record"),
        "store_id",
        trimmed("status").str.to_lowercase().alias("status"),
        trimmed("currency").str.to_uppercase().alias("currency"),
        within_limit("total_amount", MAX_AMOUNT).cast(AMOUNT),
        "payment_method",
        "card_fingerprint",
        "ip_address",
        "device_id",
        "shipping_address",
        no_text.alias("email"),
        no_text.alias("phone"),
        no_text.alias("platform_country"),
        pl.col("created_at").alias("placed_at"),
        pl.col("created_at").dt.date().alias("order_date"),
        "updated_at",
    )


def _marketplace_orders(bronze: pl.DataFrame, context: BusinessSettings) -> pl.DataFrame:
    """Return the current orders of the marketplaces."""
    orders = parse_documents(bronze, context.default_region).orders
    return orders.select(
        "order_id",
        pl.col("mp_order_id").alias("source_order_id"),
        pl.lit("marketplace").alias("channel"),
        "platform",
        pl.lit(None, pl.Int64).alias("user_id"),
        (ORDER_PREFIX + pl.col("order_id")).alias("customer_record"),
        pl.lit(None, pl.String).alias("store_id"),
        "status",
        "currency",
        "total_amount",
        "payment_method",
        "card_fingerprint",
        "ip_address",
        "device_id",
        "shipping_address",
        "email",
        "phone",
        pl.when(pl.col("region") != contacts.UNKNOWN_REGION).then("region").alias("platform_country"),
        "placed_at",
        pl.col("placed_at").dt.date().alias("order_date"),
        "updated_at",
    )


def _user_countries(users: pl.DataFrame) -> pl.DataFrame:
    """Return the last known country of each user, including deleted accounts."""
    newest = users.sort("valid_from").unique("user_id", keep="last", maintain_order=True)
    return newest.select("user_id", pl.col("country").alias("user_country"))


def _user_ids(frames: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Return the user ids of the orders, to look up their countries."""
    return frames["web"]["user_id"].drop_nulls().unique()


def _record_ids(frames: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Return the record ids of the buyers, to look up their master users."""
    marketplace = frames["marketplace"].select(ORDER_RECORD_ID).to_series().drop_nulls().unique()
    return pl.concat([user_record_ids(_user_ids(frames)), marketplace])


def parse_orders(bronze: pl.DataFrame) -> Parsed:
    """Reject rows with a total that is no number, or too large to be one."""
    return unreadable_rows(bronze, {"total_amount": MAX_AMOUNT})


STEP = Step(
    target=ORDERS_UNIFIED,
    reads={
        "web": Grouped(ORDERS, keys=((pl.col("order_id").cast(pl.String),),), parse=parse_orders),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS,
            keys=((MARKETPLACE_ORDER_ID,),),
            columns=MARKETPLACE_COLUMNS,
            parse=find_unreadable_documents,
            resolve=("document_id",),
        ),
        "stores": Broadcast(STORES, columns=("store_id", "country"), affects=rows_with("store_id")),
        "rates": Broadcast(EXCHANGE_RATES, affects=rows_priced_since(pl.col("order_date"))),
        "users": Lookup(
            USERS_SCD,
            on="user_id",
            values=_user_ids,
            columns=("user_id", "valid_from", "country"),
            affects=rows_with("user_id"),
        ),
        "identity": Lookup(
            IDENTITY_GRAPH,
            on="record_id",
            values=_record_ids,
            columns=("record_id", "master_user_id"),
            affects=rows_with("customer_record", changed="record_id"),
        ),
    },
    transform=transform,
)
