"""silver.orders_unified: one row per order of every channel: web, tills, marketplaces."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, fresh, not_null, row_count_drift
from lakehouse.step import Broadcast, Grouped, Lookup, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
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
from pipelines.parsing.amounts import to_base_currency
from pipelines.parsing.marketplace_documents import find_unreadable_documents, parse_documents
from pipelines.settings import BusinessSettings
from pipelines.silver.exchange_rates import EXCHANGE_RATES, with_rates
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.stores import STORES
from pipelines.silver.users_scd import USERS_SCD

ORDERS_UNIFIED = Table(
    "silver.orders_unified",
    doc="Orders of all channels, the newest version of each, attributed to a master user and in the base currency.",
    columns=(
        column("order_id", pa.string(), "'123' for order 123 of the shop, else '<platform>:<mp_order_id>'.", required=True),
        column("source_order_id", pa.string(), "The order's id at its source.", required=True),
        column("channel", pa.string(), "web, pos or marketplace."),
        column("platform", pa.string(), "The marketplace; null for the shop's own channels."),
        column("user_id", pa.int64(), "User account; null for a sale without one."),
        column("customer_record", pa.string(), "record_id in silver.identity_graph; null for an anonymous sale."),
        column("master_user_id", pa.string(), "The person who ordered, from silver.identity_graph."),
        column("store_id", pa.string(), "The store that sells or ships."),
        column(
            "status", pa.string(), "placed, paid, shipped, delivered, cancelled, returned, or a marketplace's own; lower case."
        ),
        column("currency", pa.string(), "Currency of the amount, ISO 4217."),
        column("total_amount", MONEY, "Total, in `currency`."),
        column("exchange_rate", pa.decimal128(18, 8), "Units of the base currency per unit on that day; null when unknown."),
        column("total_base", MONEY, "Total in the base currency, rounded half-even to 4 places; null when the rate is unknown."),
        column("payment_method", pa.string(), "How it was paid."),
        column("card_fingerprint", pa.string(), "Which card, hashed.", personal="card"),
        column("ip_address", pa.string(), "Client address.", personal="ip"),
        column("device_id", pa.string(), "Client device.", personal="device"),
        column("shipping_address", pa.string(), "Where it goes, as typed.", personal="address"),
        column("email", pa.string(), "E-mail of a marketplace order's buyer, normalised.", personal="email"),
        column("phone", pa.string(), "Phone of a marketplace order's buyer, E.164.", personal="phone"),
        column("country", pa.string(), "ISO 3166-1 alpha-2: of the store, else of the user, else of the marketplace."),
        column("placed_at", TIMESTAMP, "When it was placed."),
        column("order_date", pa.date32(), "The UTC day of `placed_at`."),
        column("updated_at", TIMESTAMP, "When the source last changed it."),
    ),
    key=("order_id",),
    tracked=("order_date", "channel", "store_id", "country", "master_user_id", "card_fingerprint"),
    # neighbours in time are neighbours in id within one platform: a file's ranges of both stay narrow
    sort_by=("platform", "order_date", "order_id"),
    owner="commerce",
    expectations=(
        not_null("placed_at", "currency", "total_amount", severity="warn"),
        accepted("channel", {"web", "pos", "marketplace"}, severity="warn"),
        fresh("placed_at", hours=24),
        row_count_drift(0.5),
    ),
)

MARKETPLACE_COLUMNS = ("document_id", "platform", "mp_order_id", "document", "_op", "_source_position", "_ingested_at")


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The newest version of each order, with its rate, its country and its person."""
    orders = pl.concat([_web(frames["web"]), _marketplace(frames["marketplace"], context)], how="vertical")
    orders = with_rates(orders, frames["rates"], context.base_currency)
    stores = frames["stores"].select("store_id", pl.col("country").alias("store_country"))
    return (
        orders.with_columns(to_base_currency(orders["total_amount"], orders["exchange_rate"]).alias("total_base"))
        .join(stores.unique("store_id"), on="store_id", how="left")
        .join(_countries(frames["users"]), on="user_id", how="left")
        .join(masters_by_record(frames["identity"]), left_on="customer_record", right_on="record_id", how="left")
        .with_columns(pl.coalesce("store_country", "user_country", "platform_country").alias("country"))
        .select(ORDERS_UNIFIED.schema.names)
    )


def _web(bronze: pl.DataFrame) -> pl.DataFrame:
    current = current_rows(bronze, ORDERS_KEY)
    order_id = pl.col("order_id").cast(pl.String)
    nothing = pl.lit(None, pl.String)
    return current.select(
        order_id,
        order_id.alias("source_order_id"),
        _code("source").str.to_lowercase().alias("channel"),
        nothing.alias("platform"),
        "user_id",
        USER_RECORD_ID.alias("customer_record"),
        "store_id",
        _code("status").str.to_lowercase().alias("status"),
        _code("currency").str.to_uppercase().alias("currency"),
        pl.col("total_amount").cast(pl.Decimal(20, 4)),
        "payment_method",
        "card_fingerprint",
        "ip_address",
        "device_id",
        "shipping_address",
        nothing.alias("email"),
        nothing.alias("phone"),
        nothing.alias("platform_country"),
        pl.col("created_at").alias("placed_at"),
        pl.col("created_at").dt.date().alias("order_date"),
        "updated_at",
    )


def _marketplace(bronze: pl.DataFrame, context: BusinessSettings) -> pl.DataFrame:
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


def _code(name: str) -> pl.Expr:
    """Trimmed text; '' is null."""
    text = pl.col(name).str.strip_chars()
    return pl.when(text != "").then(text)


def _countries(users: pl.DataFrame) -> pl.DataFrame:
    """The newest country of each user: that of a deleted account stays with its orders."""
    newest = users.sort("valid_from").unique("user_id", keep="last", maintain_order=True)
    return newest.select("user_id", pl.col("country").alias("user_country"))


def _user_ids(gathered: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Users whose country the orders may need."""
    return gathered["web"]["user_id"].drop_nulls().unique()


def _records(gathered: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Records whose master user the orders may need."""
    marketplace = gathered["marketplace"].select(ORDER_RECORD_ID).to_series().drop_nulls().unique()
    return pl.concat([user_record_ids(_user_ids(gathered)), marketplace])


def _of_stores(changed: pl.DataFrame) -> pl.Expr:
    return pl.col("store_id").is_in(changed["store_id"].unique().implode())


def _of_users(changed: pl.DataFrame) -> pl.Expr:
    return pl.col("user_id").is_in(changed["user_id"].unique().implode())


def _of_records(changed: pl.DataFrame) -> pl.Expr:
    return pl.col("customer_record").is_in(changed["record_id"].unique().implode())


def _of_rates(changed: pl.DataFrame) -> pl.Expr:
    """Orders in a currency from the first changed day on."""
    firsts = changed.group_by("currency").agg(pl.col("rate_date").min()).sort("currency")
    touched = [(pl.col("currency") == currency) & (pl.col("order_date") >= day) for currency, day in firsts.iter_rows()]
    return pl.any_horizontal(touched)


STEP = Step(
    target=ORDERS_UNIFIED,
    reads={
        "web": Grouped(ORDERS, keys=((pl.col("order_id").cast(pl.String),),), parse=unreadable_rows),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS,
            keys=((MARKETPLACE_ORDER_ID,),),
            columns=MARKETPLACE_COLUMNS,
            parse=find_unreadable_documents,
            resolve=("document_id",),
        ),
        "stores": Broadcast(STORES, columns=("store_id", "country"), affects=_of_stores),
        "rates": Broadcast(EXCHANGE_RATES, affects=_of_rates),
        "users": Lookup(
            USERS_SCD,
            on="user_id",
            values=_user_ids,
            columns=("user_id", "valid_from", "country"),
            affects=_of_users,
        ),
        "identity": Lookup(
            IDENTITY_GRAPH,
            on="record_id",
            values=_records,
            columns=("record_id", "master_user_id"),
            affects=_of_records,
        ),
    },
    transform=transform,
)
