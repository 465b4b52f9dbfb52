"""A separate MongoDB collection, and a reader of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pymongo
from bson import json_util
from support.bronze_reading import Reader, live_rows_by_key

from pipelines.bronze.tables import MARKETPLACE_ORDERS
from pipelines.settings import MongoSettings
from pipelines.sources.mongo.documents import id_text
from pipelines.sources.mongo.source import MongoSource

TABLE = MARKETPLACE_ORDERS.name
START = datetime(2026, 1, 1)


class Market:
    """A separate collection and a reader of it."""

    def __init__(self, uri: str, database: str) -> None:
        self.client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(uri)
        self.collection = self.client[database].marketplace_orders
        self.settings = MongoSettings(uri=uri, database=database)  # type: ignore[arg-type, call-arg]
        self.reader = Reader(MongoSource(self.settings))

    def use_settings(self, **changes: Any) -> Reader:
        self.reader = Reader(MongoSource(self.settings.model_copy(update=changes)))
        return self.reader

    def add(self, first: int, last: int) -> None:
        self.collection.insert_many(
            [
                {"mp_order_id": f"O{n}", "platform": "tokopedia", "amount": n, "updated_at": START + timedelta(seconds=n // 2)}
                for n in range(first, last + 1)
            ]
        )

    def bronze_documents(self) -> dict[str, Any]:
        rows = live_rows_by_key(self.reader.rows.get(TABLE, []), ("document_id",))
        return {key[0]: json_util.loads(row["document"]) for key, row in rows.items()}

    def source_documents(self) -> dict[str, Any]:
        return {id_text(document["_id"]): document for document in self.collection.find()}


@contextmanager
def open_market(uri: str) -> Iterator[Market]:
    """Open a market in a database of its own, which is dropped afterwards."""
    name = f"m{time.time_ns():x}"
    market = Market(uri, name)
    yield market
    market.client.drop_database(name)
    market.client.close()
