"""Writes simulated data: rows, documents and messages into the three servers, and the ground truth into files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl
import psycopg
import pymongo
from bson import ObjectId
from confluent_kafka import Producer
from pymongo.collection import Collection

from app.sandbox.marketplace import Document
from app.sandbox.postgres_server import DATABASE
from app.sandbox.schema import COLLECTION, TOPIC
from app.sandbox.servers import Addresses
from lakehouse.errors import SandboxError

COLUMNS: dict[str, str] = {
    "users": (
        "user_id email email_verified phone_number phone_verified name address city country loyalty_id created_at updated_at"
    ),
    "orders": (
        "order_id user_id source store_id status currency total_amount payment_method card_fingerprint "
        "ip_address device_id shipping_address created_at updated_at"
    ),
    "order_items": "order_id line_no product_id quantity unit_price",
    "products": "product_id name category brand list_price currency updated_at",
    "stores": "store_id name kind city country updated_at",
    "chargebacks": "chargeback_id order_ref reason reported_at",
    "exchange_rates": "rate_date currency to_base",
}
"""The columns of a row, in the order in which they are written."""
TRUTH: dict[str, dict[str, Any]] = {
    "people": {"person": pl.String, "record_id": pl.String},
    "fraud": {"order_id": pl.String, "kind": pl.String, "ring": pl.Int64},
    "thefts": {"store_id": pl.String, "product_id": pl.String, "quantity": pl.Int64, "stolen_at": pl.Datetime("us", "UTC")},
}
FLUSH_ROWS = 20_000

Value = str | int | None


def text_line(values: tuple[Value, ...]) -> str:
    """Return a row in PostgreSQL's COPY text format."""
    return "\t".join("\\N" if value is None else str(value) for value in values) + "\n"


class Sink:
    """Buffers rows and documents, sends messages, and writes a whole buffer at once.

    Each flush is one PostgreSQL transaction: new rows, then changes of rows. Leaving the context without an error flushes
    the rest and waits until the broker has every message.
    """

    def __init__(self, addresses: Addresses, truth: Path, part: int) -> None:
        self.connection = psycopg.connect(addresses.postgres_dsn)
        self.client: pymongo.MongoClient[Document] = pymongo.MongoClient(addresses.mongo_uri, serverSelectionTimeoutMS=10_000)
        self.collection: Collection[Document] = self.client[DATABASE][COLLECTION]
        self.producer = Producer(
            {
                "bootstrap.servers": addresses.kafka_bootstrap,
                "enable.idempotence": True,
                # delivery reports contain the errors; librdkafka would print them on the terminal as well
                "log_level": 0,
                "compression.type": "lz4",
                "linger.ms": 100,
                "batch.num.messages": 20_000,
                "batch.size": 1 << 20,
                "queue.buffering.max.messages": 500_000,
                "queue.buffering.max.kbytes": 256 << 10,
                "message.timeout.ms": 60_000,
            }
        )
        self.columns = {table: columns.split() for table, columns in COLUMNS.items()}
        self.rows: dict[str, list[str]] = defaultdict(list)
        self.changes: list[tuple[str, tuple[Any, ...]]] = []
        self.documents: list[Document] = []
        self.document_changes: list[tuple[ObjectId, dict[str, Any], list[Document]]] = []
        self.truth_directory, self.part = truth, part
        self.truth: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self.truth_files = 0
        self.events = 0
        self.undelivered: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
                self.flush_truth()
                if self.producer.flush(60):
                    raise SandboxError("The sandbox's broker did not accept all events. See kafka.log in the sandbox directory.")
                self._check_delivery()
        finally:
            self.producer.purge()
            self.connection.close()
            self.client.close()

    # Content

    def row(self, table: str, *values: Value) -> None:
        """Add a row. Its texts contain no tabs, line breaks or backslashes."""
        self.rows[table].append(text_line(values))

    def change(self, statement: str, *values: Any) -> None:
        """Add an UPDATE or DELETE, executed after the rows of this flush."""
        self.changes.append((statement, values))

    def document(self, document: Document) -> None:
        """Add a marketplace order."""
        self.documents.append(document)

    def change_document(self, identifier: ObjectId, fields: dict[str, Any], more_items: list[Document]) -> None:
        """Change fields of a marketplace order and add items to it."""
        self.document_changes.append((identifier, fields, more_items))

    def event(self, key: str, value: str | bytes, time: int) -> None:
        """Send a message. time: its timestamp in milliseconds since 1970."""
        self.events += 1
        while True:
            try:
                self.producer.produce(TOPIC, value, key, timestamp=time, on_delivery=self._delivered)
                break
            except BufferError:
                self.producer.poll(0.1)
        if self.events % 1000 == 0:
            self.producer.poll(0)

    def add_truth(self, kind: str, *values: Any) -> None:
        """Add a row of ground truth: `people`, `fraud` or `thefts`."""
        self.truth[kind].append(values)

    def add_column(self, table: str, column: str, kind: str) -> None:
        """Add a column to a table. Later rows have a value for it, after all others."""
        self.flush()
        self.connection.execute(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column} {kind}")
        self.connection.commit()
        self.columns[table].append(column)

    # Writing

    def full(self) -> bool:
        """Return whether the buffer is full."""
        return sum(map(len, self.rows.values())) + 4 * len(self.documents) > FLUSH_ROWS

    def flush(self) -> None:
        """Write all buffered rows and documents. Messages are already being sent."""
        self._flush_rows()
        self._flush_documents()
        if any(len(rows) > 100_000 for rows in self.truth.values()):
            self.flush_truth()
        self.producer.poll(0)
        self._check_delivery()

    def _flush_rows(self) -> None:
        with self.connection.cursor() as cursor:
            for table, lines in self.rows.items():
                if lines:
                    with cursor.copy(f"COPY {table} ({', '.join(self.columns[table])}) FROM STDIN") as copy:
                        copy.write("".join(lines))
            # consecutive equal statements are pipelined, in their order
            at = 0
            while at < len(self.changes):
                until = at
                while until < len(self.changes) and self.changes[until][0] == self.changes[at][0]:
                    until += 1
                cursor.executemany(self.changes[at][0], [values for _, values in self.changes[at:until]])
                at = until
        self.connection.commit()
        self.rows.clear()
        self.changes.clear()

    def _flush_documents(self) -> None:
        if self.documents:
            self.collection.insert_many(self.documents, ordered=True)
            self.documents = []
        for at in range(0, len(self.document_changes), 500):
            self._change_documents(self.document_changes[at : at + 500])
        self.document_changes = []

    def _change_documents(self, changes: list[tuple[ObjectId, dict[str, Any], list[Document]]]) -> None:
        # whole documents are replaced, because this server stores a date in a $set as text
        identifiers = list({identifier: None for identifier, _, _ in changes})
        found = {document["_id"]: document for document in self.collection.find({"_id": {"$in": identifiers}})}
        for identifier, fields, more_items in changes:
            document = found.get(identifier)
            if document is not None:
                document |= fields
                if more_items and "items" in document:
                    document["items"] = document["items"] + more_items
        replacements = [
            pymongo.ReplaceOne({"_id": identifier}, found[identifier]) for identifier in identifiers if identifier in found
        ]
        if replacements:
            self.collection.bulk_write(replacements)

    def flush_truth(self) -> None:
        """Write the buffered ground truth to a new file per kind."""
        self.truth_directory.mkdir(parents=True, exist_ok=True)
        for kind, rows in self.truth.items():
            if rows:
                file = self.truth_directory / f"{kind}-{self.part:04d}-{self.truth_files:04d}.parquet"
                pl.DataFrame(rows, schema=TRUTH[kind], orient="row").write_parquet(file)
        self.truth.clear()
        self.truth_files += 1

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self.undelivered = str(error)

    def _check_delivery(self) -> None:
        if self.undelivered:
            raise SandboxError(
                f"The sandbox's broker did not accept an event: {self.undelivered}. See kafka.log in the sandbox directory."
            )
