"""The bronze tables: rows as the sources sent them. Append-only; every row has a position and is never updated.

Every row has an operation (`_op`):
    r    read by the initial read or a re-snapshot
    c    inserted
    u    updated (in MongoDB also: replaced)
    d    deleted
    t    all rows of the source table were deleted at once (TRUNCATE, a dropped collection), or an epoch begins here, and keys
         that its read did not find were deleted (see `pipelines.sources.epochs`). No key can be named, so the columns are null
    fix  a correction of the row with the same `_source_position`, appended by `python -m app replay --fix`

`_source_position` is text that sorts in the order of the source, so the newest version of a key is the one with the greatest
`_source_position`, in whatever order rows arrived.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from lakehouse.table import TIMESTAMP, Column, Table, column

MILLISECONDS = (-62_135_596_800_000, 253_402_300_799_999)
"""The first and last millisecond of the years 1 to 9999, since 1970. Other times cannot be stored."""

OP = column(
    "_op", pa.string(), "Operation: r (read), c (insert), u (update), d (delete), t (truncate) or fix (correction)", required=True
)
SOURCE_POSITION = column(
    "_source_position", pa.string(), "Position in the source, as text that sorts in the source's order", required=True
)
SOURCE_TIME = column("_source_time", TIMESTAMP, "Time of the operation by the source's clock")
INGESTED_AT = column("_ingested_at", TIMESTAMP, "Start of the run that stored the row")
UNCHANGED = column(
    "_unchanged",
    pa.string(),
    "Columns, separated by commas (in a name: %2C), that an update did not change and PostgreSQL did not send; null here, as in "
    "the previous version",
)
UNREADABLE = column(
    "_unreadable",
    pa.string(),
    "JSON object, column to text, of values that the column's type cannot hold (NaN, infinity, years outside 1-9999)",
    personal="text",
)

POSTGRES_METADATA = (OP, SOURCE_POSITION, SOURCE_TIME, UNCHANGED, UNREADABLE)
"""Columns of a bronze table of PostgreSQL beside the source's columns and `_ingested_at`."""


def money(scale: int) -> pa.DataType:
    """Return the type of exact amounts, numeric(18, scale)."""
    return pa.decimal128(18, scale)


def postgres_table(name: str, doc: str, key: tuple[str, ...], *columns: Column) -> Table:
    """Declare a bronze table of PostgreSQL. key: the source's primary key (bronze itself is append-only and has none)."""
    if missing := [item for item in key if item not in {each.name for each in columns}]:
        raise ValueError(f"{name}: key columns {missing} are not declared. Columns: {[each.name for each in columns]}")
    return Table(f"bronze.bronze_postgres__{name}", doc, (*columns, *POSTGRES_METADATA, INGESTED_AT), owner="data platform")


USERS_KEY = ("user_id",)
USERS = postgres_table(
    "users",
    "Accounts of the web shop and the loyalty programme; all versions.",
    USERS_KEY,
    column("user_id", pa.int64(), "Account id", personal="account"),
    column("email", pa.string(), "E-mail address as entered", personal="email"),
    column("email_verified", pa.bool_(), "Whether the e-mail address was confirmed"),
    column("phone_number", pa.string(), "Phone number as entered", personal="phone"),
    column("phone_verified", pa.bool_(), "Whether the phone number was confirmed"),
    column("name", pa.string(), "Name", personal="name"),
    column("address", pa.string(), "Postal address", personal="address"),
    column("city", pa.string(), "City", personal="city"),
    column("country", pa.string(), "ISO 3166 alpha-2 country"),
    column("loyalty_id", pa.string(), "Loyalty card number", personal="loyalty"),
    column("created_at", TIMESTAMP, "Creation time"),
    column("updated_at", TIMESTAMP, "Time of the last change"),
)

ORDERS_KEY = ("order_id",)
ORDERS = postgres_table(
    "orders",
    "Orders of the web shop and the stores; all versions.",
    ORDERS_KEY,
    column("order_id", pa.int64(), "Order id"),
    column("user_id", pa.int64(), "Account; null for an anonymous sale", personal="account"),
    column("source", pa.string(), "Channel: web or pos"),
    column("store_id", pa.string(), "Store that sells or ships"),
    column("status", pa.string(), "Status: placed, paid, shipped, delivered, cancelled or returned"),
    column("currency", pa.string(), "ISO 4217 currency of the amount"),
    column("total_amount", money(2), "Total amount in `currency`"),
    column("payment_method", pa.string(), "Payment method"),
    column("card_fingerprint", pa.string(), "Hash of the payment card", personal="card"),
    column("ip_address", pa.string(), "Client IP address", personal="ip"),
    column("device_id", pa.string(), "Client device id", personal="device"),
    column("shipping_address", pa.string(), "Shipping address", personal="address"),
    column("created_at", TIMESTAMP, "Time the order was placed"),
    column("updated_at", TIMESTAMP, "Time of the last change"),
)

ORDER_ITEMS_KEY = ("order_id", "line_no")
ORDER_ITEMS = postgres_table(
    "order_items",
    "Order lines; all versions.",
    ORDER_ITEMS_KEY,
    column("order_id", pa.int64(), "Order id"),
    column("line_no", pa.int32(), "Line number within the order"),
    column("product_id", pa.string(), "Product id"),
    column("quantity", pa.int32(), "Units; negative on a return line"),
    column("unit_price", money(4), "Price of one unit in the order's currency"),
)

PRODUCTS_KEY = ("product_id",)
PRODUCTS = postgres_table(
    "products",
    "Product catalogue; all versions.",
    PRODUCTS_KEY,
    column("product_id", pa.string(), "Product id"),
    column("name", pa.string(), "Name"),
    column("category", pa.string(), "Category"),
    column("brand", pa.string(), "Brand"),
    column("list_price", money(2), "List price"),
    column("currency", pa.string(), "ISO 4217 currency of the list price"),
    column("updated_at", TIMESTAMP, "Time of the last change"),
)

STORES_KEY = ("store_id",)
STORES = postgres_table(
    "stores",
    "Stores, warehouses and online shops; all versions.",
    STORES_KEY,
    column("store_id", pa.string(), "Store id"),
    column("name", pa.string(), "Name"),
    column("kind", pa.string(), "Kind: store, warehouse or online"),
    column("city", pa.string(), "City"),
    column("country", pa.string(), "ISO 3166 alpha-2 country"),
    column("updated_at", TIMESTAMP, "Time of the last change"),
)

CHARGEBACKS_KEY = ("chargeback_id",)
CHARGEBACKS = postgres_table(
    "chargebacks",
    "Payments reversed by the cardholder's bank; all versions.",
    CHARGEBACKS_KEY,
    column("chargeback_id", pa.int64(), "Chargeback id"),
    column("order_ref", pa.string(), "Order id, as in orders_unified.order_id"),
    column("reason", pa.string(), "Reason: fraud, not_received, not_as_described or other"),
    column("reported_at", TIMESTAMP, "Time of the report"),
)

EXCHANGE_RATES_KEY = ("rate_date", "currency")
EXCHANGE_RATES = postgres_table(
    "exchange_rates",
    "Daily exchange rates to the base currency; all versions.",
    EXCHANGE_RATES_KEY,
    column("rate_date", pa.date32(), "Day"),
    column("currency", pa.string(), "ISO 4217 currency"),
    column("to_base", money(8), "Units of the base currency per unit of `currency`"),
)

POSTGRES_TABLES: dict[str, tuple[Table, tuple[str, ...]]] = {
    "users": (USERS, USERS_KEY),
    "orders": (ORDERS, ORDERS_KEY),
    "order_items": (ORDER_ITEMS, ORDER_ITEMS_KEY),
    "products": (PRODUCTS, PRODUCTS_KEY),
    "stores": (STORES, STORES_KEY),
    "chargebacks": (CHARGEBACKS, CHARGEBACKS_KEY),
    "exchange_rates": (EXCHANGE_RATES, EXCHANGE_RATES_KEY),
}
"""Bronze table and primary key, by the source's table name."""

DOCUMENT_PATHS = (
    *((name, "") for name in ("_id", "platform", "mp_order_id", "order_time", "updated_at", "status", "currency", "amount")),
    *((name, "") for name in ("payment_method", "product_id", "items.product_id", "items.quantity", "items.price")),
    *((name, "wording") for name in ("product_name", "variant", "items.product_name", "items.variant")),
    ("user_email", "email"),
    ("buyer_phone", "phone"),
    ("buyer_name", "name"),
    ("shipping_address", "address"),
    ("loyalty_id", "loyalty"),
    ("card_fingerprint", "card"),
    ("device_id", "device"),
    ("ip_address", "ip"),
)
"""Fields of a document and the kind of personal data in them; '' when they have none. wording: product texts, which can contain a
personal engraving."""

COPIED_FIELDS = ("platform", "mp_order_id")
"""Fields of a document that have a column of their own, for lookups."""

MARKETPLACE_ORDERS = Table(
    "bronze.bronze_mongo__marketplace_orders",
    "Marketplace orders; all versions of the documents, unaltered.",
    (
        column(
            "document_id", pa.string(), "The document's _id: the hex digits of an ObjectId, otherwise canonical Extended JSON"
        ),
        column("platform", pa.string(), "Copied from the document for lookups; null when it is not a string"),
        column("mp_order_id", pa.string(), "Copied from the document for lookups; null when it is not a string"),
        column(
            "document",
            pa.string(),
            "The document as canonical Extended JSON v2; null when it was deleted",
            personal=DOCUMENT_PATHS,
        ),
        OP,
        SOURCE_POSITION,
        SOURCE_TIME,
        INGESTED_AT,
    ),
)

_STOCK = ("store_id", "product_id", "quantity", "to_store_id", "purchase_order", "reserved", "sign", "reason")
_SCORED = ("order_id", "placed_at", "amount", "customer", "person", "account_created_at", "channel", "payment_method", "category")
EVENT_PATHS = (
    *((name, "") for name in ("event_id", "event_type", "timestamp", "channel")),
    ("user_id", "account"),
    ("session_id", "session"),
    ("device_id", "device"),
    ("ip_address", "ip"),
    *((f"metadata.{name}", "") for name in (*_STOCK, "order_ref", "outcome", "field")),
    ("metadata.card_fingerprint", "card"),
    *((f"metadata.{name}", "") for name in ("replica", "features", "answer", "challenger")),
    *((f"metadata.order.{name}", "") for name in (*_SCORED, "known_at", "ratio")),
    ("metadata.order.account", "account"),
    *((f"metadata.order.{name}", name) for name in ("card", "device", "address", "ip")),
)
"""Fields of a message and the kind of personal data in them; '' when they have none. `metadata.order` is the order of a served
score."""

EVENTS = Table(
    "bronze.bronze_kafka__events",
    "Messages of the event topics, byte for byte.",
    (
        column("topic", pa.string(), "Topic name", required=True),
        column("partition", pa.int32(), "Partition number", required=True),
        column("offset", pa.int64(), "Offset within the partition", required=True),
        column("key", pa.binary(), "Message key as received", personal="text"),
        column("value", pa.binary(), "Message value as received", personal=EVENT_PATHS),
        column(
            "headers",
            pa.string(),
            "JSON list of [name, base64 of the value], with repeated names; null without headers, [[null, null]] if a name is "
            "not UTF-8",
            personal="text",
        ),
        column("timestamp", TIMESTAMP, "Timestamp of the message as the broker has it; null outside the years 1-9999"),
        OP,
        SOURCE_POSITION,
        SOURCE_TIME,
        INGESTED_AT,
    ),
)

POSTGRES_KEYS: Mapping[str, tuple[str, ...]] = {table.name: key for table, key in POSTGRES_TABLES.values()}
"""The key columns of each table read from PostgreSQL, by its name."""

TABLES: tuple[Table, ...] = (*(table for table, _ in POSTGRES_TABLES.values()), MARKETPLACE_ORDERS, EVENTS)
"""All bronze tables."""


def row_schema(table: Table) -> pa.Schema:
    """Return the columns that a source delivers: all except `_ingested_at`, nullable."""
    return pa.schema([pa.field(item.name, item.type) for item in table.columns if item.name != INGESTED_AT.name])
