"""The schema of the sandbox's sources: tables, publication, collection, topic."""

from __future__ import annotations

import psycopg
import pymongo
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from pymongo.collection import Collection

from app.sandbox.postgres_server import DATABASE
from app.sandbox.servers import Addresses
from lakehouse.errors import SandboxError

TABLES: dict[str, str] = {
    "users": """
        user_id bigint PRIMARY KEY, email text, email_verified boolean NOT NULL, phone_number text,
        phone_verified boolean NOT NULL, name text, address text, city text, country char(2), loyalty_id text,
        created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL""",
    "orders": """
        order_id bigint PRIMARY KEY, user_id bigint, source text NOT NULL, store_id text, status text NOT NULL,
        currency char(3) NOT NULL, total_amount numeric(18,2) NOT NULL, payment_method text, card_fingerprint text,
        ip_address text, device_id text, shipping_address text,
        created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL""",
    "order_items": """
        order_id bigint, line_no int, product_id text NOT NULL, quantity int NOT NULL, unit_price numeric(18,4) NOT NULL,
        PRIMARY KEY (order_id, line_no)""",
    "products": """
        product_id text PRIMARY KEY, name text NOT NULL, category text, brand text, list_price numeric(18,2) NOT NULL,
        currency char(3) NOT NULL, updated_at timestamptz NOT NULL""",
    "stores": """
        store_id text PRIMARY KEY, name text NOT NULL, kind text NOT NULL, city text, country char(2),
        updated_at timestamptz NOT NULL""",
    "chargebacks": """
        chargeback_id bigint PRIMARY KEY, order_ref text NOT NULL, reason text NOT NULL, reported_at timestamptz NOT NULL""",
    "exchange_rates": """
        rate_date date, currency char(3), to_base numeric(18,8) NOT NULL, PRIMARY KEY (rate_date, currency)""",
}
COLLECTION = "marketplace_orders"
TOPIC = "events"
PARTITIONS = 4
PUBLICATION = "shopsphere"


def create_sources(addresses: Addresses) -> None:
    """Create tables, publication, collection and topic where they do not exist. Raises SandboxError."""
    create_tables(addresses.postgres_dsn)
    create_collection(addresses.mongo_uri)
    create_topic(addresses.kafka_bootstrap)


def create_tables(dsn: str) -> None:
    """Create the tables of the source contract, with full replica identity, and the publication."""
    with psycopg.connect(dsn) as connection:
        for table, columns in TABLES.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
            connection.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")
        if not connection.execute("SELECT 1 FROM pg_publication WHERE pubname = %s", [PUBLICATION]).fetchone():
            connection.execute(f"CREATE PUBLICATION {PUBLICATION} FOR TABLES IN SCHEMA public")


def create_collection(uri: str) -> None:
    """Create the collection of marketplace orders and its indexes."""
    with pymongo.MongoClient[dict[str, object]](uri, serverSelectionTimeoutMS=10_000) as client:
        database = client[DATABASE]
        if COLLECTION not in database.list_collection_names():
            database.create_collection(COLLECTION)
        index_collection(database[COLLECTION])


def index_collection(collection: Collection[dict[str, object]]) -> None:
    """Create indexes by order and by time. An index with `_id` makes this server refuse every insert."""
    collection.create_index([("platform", 1), ("mp_order_id", 1)])
    collection.create_index([("updated_at", 1)])


def create_topic(bootstrap: str) -> None:
    """Create the topic of events. Raises SandboxError."""
    client = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    try:
        for created in client.create_topics([NewTopic(TOPIC, PARTITIONS, 1)]).values():
            created.result(30)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise SandboxError(f"Topic {TOPIC} cannot be created: {error.args[0].str()}.") from None
