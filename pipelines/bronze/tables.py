"""The bronze tables: what the sources sent, as received. Append-only; a position per row, never an update.

Every row says what happened (`_op`):
    r    read by the initial read          c    inserted          u    updated (for MongoDB also: replaced)
    d    deleted                           t    everything in the source table was deleted at once (TRUNCATE,
                                                a dropped collection), or the table is read anew from here on, and what
                                                is not found any more was deleted (see `generations`): the columns are
                                                null, no key can be named
    fix  a correction of the row with the same `_source_position`, appended by `python -m app replay --fix`

`_source_position` is text that sorts in the order of the source, so the newest version of a key is the one with
the greatest `_source_position`, in whatever order rows arrived.
"""

from __future__ import annotations

import pyarrow as pa

from lakehouse.table import TIMESTAMP, Column, Table, column

MILLISECONDS = (-62_135_596_800_000, 253_402_300_799_999)
"""The years 1 to 9999, since 1970: what times that are stored lie between."""

OP = column("_op", pa.string(), "What happened: r, c, u, d, t or fix", required=True)
SOURCE_POSITION = column("_source_position", pa.string(), "Where the source had it; sorts in the source's order", required=True)
SOURCE_TIME = column("_source_time", TIMESTAMP, "When it happened, by the source's clock")
INGESTED_AT = column("_ingested_at", TIMESTAMP, "When the run that stored it began")
UNCHANGED = column(
    "_unchanged",
    pa.string(),
    "Columns (comma-joined) that an update left alone and PostgreSQL did not send: null here, as in the row's version before",
)
UNREADABLE = column(
    "_unreadable",
    pa.string(),
    "JSON object, column to text: values that the column's type cannot hold (NaN, infinity, years outside 1-9999); null here",
    personal="text",
)

POSTGRES_METADATA = (OP, SOURCE_POSITION, SOURCE_TIME, UNCHANGED, UNREADABLE)
"""What a row of a PostgreSQL table carries beside the source's columns, apart from `_ingested_at`."""


def money(scale: int) -> pa.DataType:
    """numeric(18, scale), exact."""
    return pa.decimal128(18, scale)


def postgres_table(name: str, doc: str, key: tuple[str, ...], *columns: Column) -> Table:
    """A table read from PostgreSQL; `key` is the source's primary key (bronze itself has none: it is append-only)."""
    if missing := [item for item in key if item not in {each.name for each in columns}]:
        raise ValueError(f"{name}: no column {missing}")
    return Table(f"bronze.bronze_postgres__{name}", doc, (*columns, *POSTGRES_METADATA, INGESTED_AT), owner="data platform")


USERS_KEY = ("user_id",)
USERS = postgres_table(
    "users",
    "Accounts of the web shop and the loyalty programme, every version.",
    USERS_KEY,
    column("user_id", pa.int64(), "Account id", personal="account"),
    column("email", pa.string(), "E-mail as typed", personal="email"),
    column("email_verified", pa.bool_(), "The e-mail was confirmed"),
    column("phone_number", pa.string(), "Phone as typed", personal="phone"),
    column("phone_verified", pa.bool_(), "The phone was confirmed"),
    column("name", pa.string(), "Name", personal="name"),
    column("address", pa.string(), "Postal address", personal="address"),
    column("city", pa.string(), "City", personal="city"),
    column("country", pa.string(), "ISO 3166 alpha-2 country"),
    column("loyalty_id", pa.string(), "Loyalty card", personal="loyalty"),
    column("created_at", TIMESTAMP, "Created"),
    column("updated_at", TIMESTAMP, "Last changed"),
)

ORDERS_KEY = ("order_id",)
ORDERS = postgres_table(
    "orders",
    "Orders of the web shop and the tills, every version.",
    ORDERS_KEY,
    column("order_id", pa.int64(), "Order id"),
    column("user_id", pa.int64(), "Account; null for an anonymous sale", personal="account"),
    column("source", pa.string(), "web or pos"),
    column("store_id", pa.string(), "Store that sells or ships"),
    column("status", pa.string(), "placed, paid, shipped, delivered, cancelled or returned"),
    column("currency", pa.string(), "ISO 4217 currency of the amount"),
    column("total_amount", money(2), "Total in that currency"),
    column("payment_method", pa.string(), "How it was paid"),
    column("card_fingerprint", pa.string(), "Which card, hashed", personal="card"),
    column("ip_address", pa.string(), "Client address", personal="ip"),
    column("device_id", pa.string(), "Client device", personal="device"),
    column("shipping_address", pa.string(), "Where it goes", personal="address"),
    column("created_at", TIMESTAMP, "Placed"),
    column("updated_at", TIMESTAMP, "Last changed"),
)

ORDER_ITEMS_KEY = ("order_id", "line_no")
ORDER_ITEMS = postgres_table(
    "order_items",
    "Lines of orders, every version.",
    ORDER_ITEMS_KEY,
    column("order_id", pa.int64(), "Order"),
    column("line_no", pa.int32(), "Line within the order"),
    column("product_id", pa.string(), "Product"),
    column("quantity", pa.int32(), "Pieces; negative on a return line"),
    column("unit_price", money(4), "Price of one piece, in the order's currency"),
)

PRODUCTS_KEY = ("product_id",)
PRODUCTS = postgres_table(
    "products",
    "The catalogue, every version.",
    PRODUCTS_KEY,
    column("product_id", pa.string(), "Product"),
    column("name", pa.string(), "Name"),
    column("category", pa.string(), "Category"),
    column("brand", pa.string(), "Brand"),
    column("list_price", money(2), "List price"),
    column("currency", pa.string(), "ISO 4217 currency of the list price"),
    column("updated_at", TIMESTAMP, "Last changed"),
)

STORES_KEY = ("store_id",)
STORES = postgres_table(
    "stores",
    "Stores, warehouses and online shops, every version.",
    STORES_KEY,
    column("store_id", pa.string(), "Store"),
    column("name", pa.string(), "Name"),
    column("kind", pa.string(), "store, warehouse or online"),
    column("city", pa.string(), "City"),
    column("country", pa.string(), "ISO 3166 alpha-2 country"),
    column("updated_at", TIMESTAMP, "Last changed"),
)

CHARGEBACKS_KEY = ("chargeback_id",)
CHARGEBACKS = postgres_table(
    "chargebacks",
    "Payments that the cardholder's bank took back, every version.",
    CHARGEBACKS_KEY,
    column("chargeback_id", pa.int64(), "Chargeback id"),
    column("order_ref", pa.string(), "Order, as orders_unified.order_id"),
    column("reason", pa.string(), "fraud, not_received, not_as_described or other"),
    column("reported_at", TIMESTAMP, "Reported"),
)

EXCHANGE_RATES_KEY = ("rate_date", "currency")
EXCHANGE_RATES = postgres_table(
    "exchange_rates",
    "Exchange rates to the base currency by day, every version.",
    EXCHANGE_RATES_KEY,
    column("rate_date", pa.date32(), "Day"),
    column("currency", pa.string(), "ISO 4217 currency"),
    column("to_base", money(8), "Units of the base currency per unit"),
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
"""Bronze table and primary key by the source's table name."""

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
"""What is known of a document's fields: harmless, or personal of a kind. wording: it tells of the product, and an engraving of
the person."""

COPIED_FIELDS = ("platform", "mp_order_id")
"""Fields of a document that have a column of their own, for lookups."""

MARKETPLACE_ORDERS = Table(
    "bronze.bronze_mongo__marketplace_orders",
    "Orders taken on marketplaces: every version of the documents, unaltered.",
    (
        column("document_id", pa.string(), "_id: the hex digits of an ObjectId, else canonical Extended JSON"),
        column("platform", pa.string(), "Copied from the document, for look-up; null when it is no string"),
        column("mp_order_id", pa.string(), "Copied from the document, for look-up; null when it is no string"),
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
"""What is known of a message's fields: harmless, or personal of a kind. `metadata.order` is that of a served score."""

EVENTS = Table(
    "bronze.bronze_kafka__events",
    "Messages of the event topics, byte for byte.",
    (
        column("topic", pa.string(), "Topic", required=True),
        column("partition", pa.int32(), "Partition", required=True),
        column("offset", pa.int64(), "Offset within the partition", required=True),
        column("key", pa.binary(), "Key, as received", personal="text"),
        column("value", pa.binary(), "Value, as received", personal=EVENT_PATHS),
        column(
            "headers",
            pa.string(),
            "JSON list of [name, base64 of the value], repeated names kept; null without headers",
            personal="text",
        ),
        column("timestamp", TIMESTAMP, "The broker's timestamp of the message; null outside the years 1-9999"),
        OP,
        SOURCE_POSITION,
        SOURCE_TIME,
        INGESTED_AT,
    ),
)

TABLES: tuple[Table, ...] = (*(table for table, _ in POSTGRES_TABLES.values()), MARKETPLACE_ORDERS, EVENTS)
"""All bronze tables."""


def row_schema(table: Table) -> pa.Schema:
    """The columns that a connector gives: all but `_ingested_at`, nullable."""
    return pa.schema([pa.field(item.name, item.type) for item in table.columns if item.name != INGESTED_AT.name])
