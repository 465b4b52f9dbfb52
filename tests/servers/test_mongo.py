"""The MongoDB connector against FerretDB and mongo-java-server: servers that are read by watermark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pymongo
import pytest
from bson import Binary, Decimal128, Int64, ObjectId, json_util
from servers.mongo_servers import FerretDB, MongoWire
from support.bronze_reading import Reader, live_rows_by_key

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import restart_position
from pipelines.bronze.tables import MARKETPLACE_ORDERS
from pipelines.settings import MongoSettings
from pipelines.sources.mongo import connection, documents, watermark
from pipelines.sources.mongo.documents import JSON_OPTIONS, id_text
from pipelines.sources.mongo.source import MongoSource

pytestmark = pytest.mark.servers
TABLE = MARKETPLACE_ORDERS.name
START = datetime(2026, 1, 1)
SERVERS = ("ferretdb", "mongo_java")


class Market:
    """A separate collection and a reader of it."""

    def __init__(self, server: MongoWire) -> None:
        self.server = server
        self.client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(server.uri)
        name = f"m{time.time_ns():x}"
        self.collection = self.client[name].marketplace_orders
        self.settings = MongoSettings(uri=server.uri, database=name)  # type: ignore[arg-type, call-arg]
        self.reader = Reader(MongoSource(self.settings))

    def add(self, *numbers: int) -> None:
        self.collection.insert_many([{"mp_order_id": f"O{n}", "updated_at": START + timedelta(seconds=n // 3)} for n in numbers])

    def bronze_documents(self) -> dict[str, Any]:
        rows = live_rows_by_key(self.reader.rows.get(TABLE, []), ("document_id",))
        return {key[0]: json_util.loads(row["document"]) for key, row in rows.items()}

    def source_documents(self) -> dict[str, Any]:
        return {id_text(one["_id"]): one for one in json_util.loads(json_util.dumps(list(self.collection.find())))}


@pytest.fixture(params=SERVERS)
def market(request: pytest.FixtureRequest) -> Iterator[Market]:
    market = Market(request.getfixturevalue(request.param))
    yield market
    market.client.drop_database(market.settings.database)
    market.client.close()


def test_documents_of_every_type_are_stored_without_loss(market: Market) -> None:
    document: dict[str, Any] = {
        "_id": ObjectId(),
        "int": 5,
        "long": Int64(5),
        "large": 2**62,
        "double": 350000.0,
        "tiny": 5e-324,
        "text": "Rp 350.000 \u00e9\u4e16\U0001f6d2",
        "empty": "",
        "nothing": None,
        "yes": True,
        "at": START,
        "long ago": datetime(1, 1, 1),
        "bytes": Binary(b"\x00\xff"),
        "items": [{"variant": {"size": "42"}, "quantity": 1}, {}],
    }
    if not isinstance(market.server, FerretDB):
        document["nested"] = [[], [1, [2]]]
        document["amount"] = Decimal128("350000.10")
        document["huge"] = Decimal128("9.999999999999999999999999999999999E+6144")
    market.collection.insert_one(document)
    (row,) = market.reader.run()[TABLE]
    assert json_util.loads(row["document"], json_options=JSON_OPTIONS) == json_util.loads(
        json_util.dumps(document, json_options=JSON_OPTIONS), json_options=JSON_OPTIONS
    )
    assert '{"$numberLong": "5"}' in row["document"]
    assert market.reader.positions[TABLE]["mode"] == "watermark"


def test_without_change_streams_new_documents_are_found_by_date(market: Market) -> None:
    market.add(*range(30))
    assert len(market.reader.run()[TABLE]) == 30
    assert market.reader.source.lag(market.reader.positions) == {TABLE: "0 changes"}
    assert not market.reader.plan().tasks
    # within the second of the newest document, and after it
    market.add(29, 30, 31)
    market.collection.update_one({"mp_order_id": "O3"}, {"$set": {"status": "paid", "updated_at": START + timedelta(hours=1)}})
    market.collection.insert_one({"mp_order_id": "undated"})
    assert market.reader.source.lag(market.reader.positions) == {TABLE: "5 changes"}
    rows = market.reader.run()[TABLE]
    assert sorted(row["mp_order_id"] for row in rows) == ["O29", "O3", "O30", "O31", "undated"]
    assert market.bronze_documents() == market.source_documents()
    assert not market.reader.plan().tasks


def test_a_delete_is_found_by_a_resnapshot(market: Market) -> None:
    market.add(*range(10))
    market.reader.run()
    market.collection.delete_many({"mp_order_id": {"$in": ["O3", "O4"]}})
    assert market.reader.run() == {}
    market.reader.positions = {TABLE: restart_position(market.reader.positions[TABLE])}  # type: ignore[dict-item]
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()
    assert len(market.bronze_documents()) == 8
    market.add(10)
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()


def test_a_collection_that_was_replaced_by_a_rename_is_an_error_until_it_is_rebuilt(ferretdb: FerretDB) -> None:
    market = Market(ferretdb)
    market.add(8, 9)
    market.reader.run()
    before = market.reader.positions[TABLE]["collection"]
    replacement = market.client[market.settings.database].replacement
    replacement.insert_one({"mp_order_id": "O1", "updated_at": START})  # older than the watermark
    market.collection.drop()
    replacement.rename(market.collection.name)
    with pytest.raises(
        OffsetExpired, match=rf"marketplace_orders' is not the one that was read: .*{before} .*app rebuild {TABLE}"
    ):
        market.reader.plan()
    market.reader.positions = {TABLE: restart_position(market.reader.positions[TABLE])}  # type: ignore[dict-item]
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()
    assert market.reader.positions[TABLE]["collection"] != before
    assert not market.reader.plan().tasks
    market.client.drop_database(market.settings.database)
    market.client.close()


def test_required_but_missing_change_streams_are_an_error(market: Market) -> None:
    market.add(1)
    source = MongoSource(market.settings.model_copy(update={"mode": "change_stream"}))
    with pytest.raises(SourceError, match=r'does not support change streams.*--replSet, or set mongo\.mode = "watermark"'):
        source.plan({}, {})


@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_runs_gives_the_same_documents(market: Market, seed: int) -> None:
    """With accurate clocks, and _ids of several types, of which some are comparable only in Python."""
    random, moment, identities = Random(seed), START, []
    made: list[Any] = []
    for step in range(120):
        if random.random() < 0.7:
            moment += timedelta(milliseconds=random.choice([0, 1, 1000]))
        if identities and random.random() < 0.4:
            identity = random.choice(identities)
            # a changed document gets a unique date, later than all others
            moment += timedelta(milliseconds=1)
            market.collection.replace_one({"_id": identity}, {"_id": identity, "step": step, "updated_at": moment})
        else:
            greatest = len(made)
            made.append(None)
            identity = random.choice([ObjectId(f"{greatest:024x}"), greatest, f"id{greatest:05d}", float(greatest) + 0.5])
            identities.append(identity)
            market.collection.insert_one({"_id": identity, "step": step, "updated_at": moment})
        if random.random() < 0.15:
            market.reader.run()
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()
    assert len(market.bronze_documents()) == len(identities)
    assert not market.reader.plan().tasks


def test_many_documents_come_in_batches(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, watermark):
        monkeypatch.setattr(module, "BATCH_DOCUMENTS", 500)
    market.add(*range(4000))
    market.reader.run()
    assert len(market.bronze_documents()) == 4000
    market.add(*range(4000, 6000))
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()


def test_a_killed_server_is_an_error_until_it_is_restarted(ferretdb: FerretDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SERVER_SECONDS", 1)
    market = Market(ferretdb)
    market.add(*range(10))
    market.reader.run()
    market.add(*range(10, 20))
    plan = market.reader.plan()
    ferretdb.kill()
    with pytest.raises(SourceError, match=r"MongoDB: no server answered at 127\.0\.0\.1:\d+ within 1 s"):
        market.reader.read(plan)
    with pytest.raises(SourceError, match="no server answered"):
        market.reader.plan()
    ferretdb.start()
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()
    assert len(market.bronze_documents()) == 20
    market.client.close()
