"""The MongoDB connector against a MongoDB-wire server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import Decimal128, Int64, ObjectId, json_util
from bson.datetime_ms import DatetimeMS
from bson.timestamp import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo.errors import OperationFailure
from support.bronze_reading import Reader, live_rows_by_key
from support.mongo_market import START, TABLE, Market, open_market

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Reached, Rows, restart_position
from pipelines.settings import MongoSettings
from pipelines.sources.mongo import change_stream, connection
from pipelines.sources.mongo.change_stream import ChangeStreamTask, OpenChangeStream
from pipelines.sources.mongo.connection import open_collection
from pipelines.sources.mongo.resume_tokens import sortable_token
from pipelines.sources.mongo.source import MongoSource
from pipelines.sources.mongo.watermark import Watermark, id_order


@pytest.fixture
def market(servers: Any) -> Iterator[Market]:
    with open_market(servers.mongo_uri) as market:
        yield market


def test_documents_are_stored_without_loss(market: Market) -> None:
    document = {
        "_id": ObjectId("65a000000000000000000001"),
        "mp_order_id": "O1",
        "platform": 7,
        "int": 5,
        "long": 2**40,
        "double": 350000.0,
        "text": "Rp 350.000 \u00e9\u4e16",
        "nothing": None,
        "at": START,
        "items": [{"variant": {"size": "42"}, "quantity": 1}],
    }
    market.collection.insert_one(document)
    (row,) = market.reader.run()[TABLE]
    assert json.loads(row["document"]) == {
        "_id": {"$oid": "65a000000000000000000001"},
        "mp_order_id": "O1",
        "platform": {"$numberInt": "7"},
        "int": {"$numberInt": "5"},
        "long": {"$numberLong": str(2**40)},
        "double": {"$numberDouble": "350000.0"},
        "text": "Rp 350.000 \u00e9\u4e16",
        "nothing": None,
        "at": {"$date": {"$numberLong": str(int(START.replace(tzinfo=UTC).timestamp() * 1000))}},
        "items": [{"variant": {"size": "42"}, "quantity": {"$numberInt": "1"}}],
    }
    assert (row["document_id"], row["platform"], row["mp_order_id"]) == ("65a000000000000000000001", None, "O1")
    assert (row["_op"], row["_source_position"]) == ("r", "065a000000000000000000001")
    assert abs((row["_source_time"] - datetime.now(UTC)).total_seconds()) < 60


def test_changes_follow_the_initial_read(market: Market) -> None:
    market.add(1, 20)
    market.reader.run()
    market.add(21, 21)
    market.collection.replace_one({"mp_order_id": "O5"}, {"mp_order_id": "O5", "platform": "shopee", "updated_at": START})
    market.collection.update_one({"mp_order_id": "O6"}, {"$set": {"status": "paid"}})
    market.collection.delete_one({"mp_order_id": "O7"})
    rows = market.reader.run()[TABLE]
    assert [row["_op"] for row in rows] == ["c", "u", "u", "d"]
    assert [row["mp_order_id"] for row in rows] == ["O21", "O5", "O6", None]
    assert rows[3]["document"] is None
    assert rows[3]["document_id"]
    positions = [row["_source_position"] for row in rows]
    assert positions == sorted(positions)
    assert min(positions) > max(row["_source_position"] for row in market.reader.rows[TABLE] if row["_op"] == "r")
    assert market.bronze_documents() == market.source_documents()


def test_a_change_during_the_initial_read_is_not_missed(market: Market) -> None:
    market.add(1, 20)
    plan = market.reader.plan()
    market.add(21, 25)
    market.collection.delete_one({"mp_order_id": "O3"})
    rows, positions = market.reader.read(plan)
    market.reader.rows, market.reader.positions = rows, positions
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()


def test_a_plan_without_changes_is_fast_and_has_no_tasks(market: Market) -> None:
    assert not market.reader.plan().tasks
    market.add(1, 5)
    market.reader.run()
    started = time.monotonic()
    plan = market.reader.plan()
    assert time.monotonic() - started < 3
    assert not plan.tasks
    assert market.reader.source.lag(market.reader.positions) == {TABLE: "0 changes"}
    market.add(6, 6)
    assert market.reader.source.lag(market.reader.positions) == {TABLE: "1 change"}


def test_a_crash_before_the_commit_repeats_the_same_changes(market: Market) -> None:
    """With more changes than the server keeps for streams that have passed them."""
    market.add(1, 10)
    market.reader.run()
    market.add(11, 3010)
    first, _ = market.reader.read(market.reader.plan())
    repeated, _ = market.reader.read(market.reader.plan())
    assert len(first[TABLE]) == 3000
    assert [row["_source_position"] for row in repeated[TABLE]] == [row["_source_position"] for row in first[TABLE]]
    assert [row["document"] for row in repeated[TABLE]] == [row["document"] for row in first[TABLE]]


def test_changes_after_the_plan_wait_for_the_next_run(market: Market) -> None:
    market.add(1, 1)
    market.reader.run()
    market.add(2, 3)
    plan = market.reader.plan()
    market.add(4, 5)
    rows, market.reader.positions = market.reader.read(plan)
    assert len(rows[TABLE]) == 2
    assert len(market.reader.run()[TABLE]) == 2


def test_documents_deleted_before_the_lookup_and_ids_of_every_type(market: Market) -> None:
    market.add(1, 1)
    market.reader.run()
    market.collection.insert_many(
        [{"_id": "text", "mp_order_id": "A"}, {"_id": 7, "mp_order_id": "B"}, {"_id": 8, "mp_order_id": "C"}]
    )
    market.collection.delete_one({"_id": 8})
    rows = market.reader.run()[TABLE]
    assert [row["_op"] for row in rows] == ["c", "c", "d", "d"]
    assert [row["document_id"] for row in rows] == ['"text"', '{"$numberInt": "7"}', '{"$numberInt": "8"}', '{"$numberInt": "8"}']
    assert market.bronze_documents() == market.source_documents()


def test_an_old_token_is_renewed(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    market.add(1, 1)
    market.reader.run()
    market.reader.positions = {TABLE: {**market.reader.positions[TABLE], "at": 0}}
    assert market.reader.run() == {}
    assert market.reader.positions[TABLE]["at"] > 0
    assert not market.reader.plan().tasks


def test_a_token_of_another_server_is_an_error(market: Market) -> None:
    market.add(1, 1)
    market.reader.run()
    market.reader.positions = {TABLE: {**market.reader.positions[TABLE], "token": '{"_data": "nx:999999"}'}}
    with pytest.raises(OffsetExpired, match=f"resume token of {TABLE} is no longer valid.*python -m app rebuild {TABLE}"):
        market.reader.plan()


@pytest.mark.parametrize("code", [286, 280, 260])
def test_a_token_refused_by_the_server_is_an_error(market: Market, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    market.add(1, 1)
    market.reader.run()

    def refuse(*arguments: Any) -> Any:
        raise OperationFailure("resume of change stream was not possible", code)

    monkeypatch.setattr(change_stream, "open_change_stream", refuse)
    with pytest.raises(OffsetExpired, match="is no longer valid"):
        market.reader.plan()


def test_watermark_reads_newer_documents_once(market: Market) -> None:
    market.use_settings(mode="watermark")
    market.add(1, 21)
    market.collection.insert_many([{"_id": "undated", "mp_order_id": "U"}, {"mp_order_id": "V"}])
    assert len(market.reader.run()[TABLE]) == 23
    assert not market.reader.plan().tasks
    market.collection.insert_one({"mp_order_id": "W"})
    market.add(21, 21)  # same moment as the newest document, greater _id
    market.collection.replace_one(
        {"mp_order_id": "O5"}, {"mp_order_id": "O5", "platform": "x", "updated_at": START + timedelta(days=1)}
    )
    assert market.reader.source.lag(market.reader.positions) == {TABLE: "3 changes"}
    rows = market.reader.run()[TABLE]
    assert sorted(row["mp_order_id"] for row in rows) == ["O21", "O5", "W"]
    assert {row["_op"] for row in rows} == {"u"}
    assert not market.reader.plan().tasks
    assert market.bronze_documents() == market.source_documents()
    with pytest.raises(SourceError, match=r"was read in mode 'watermark', but mongo\.mode is 'change_stream'"):
        MongoSource(market.settings.model_copy(update={"mode": "change_stream"})).plan(market.reader.positions, {})
    assert not MongoSource(market.settings).plan(market.reader.positions, {}).tasks


def test_a_server_without_change_streams_is_read_by_watermark(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OperationFailure("The $changeStream stage is only supported on replica sets", 40573)

    monkeypatch.setattr(pymongo.collection.Collection, "watch", refuse)
    market.add(1, 3)
    assert len(market.reader.run()[TABLE]) == 3
    assert market.reader.positions[TABLE]["mode"] == "watermark"
    with pytest.raises(SourceError, match="does not support change streams"):
        MongoSource(market.settings.model_copy(update={"mode": "change_stream"})).plan({}, {})


def documents_in_three_orders(market: Market) -> list[dict[str, Any]]:
    """Return the documents from the rows in three different orders."""
    rows = market.reader.rows[TABLE]
    found = []
    for order in (rows, rows[::-1], sorted(rows, key=lambda row: str(row["document"]))):
        newest = live_rows_by_key(list(order), ("document_id",))
        found.append({key[0]: json_util.loads(row["document"]) for key, row in newest.items()})
    return found


@pytest.mark.parametrize("mode", ["watermark", "change_stream"])
def test_resnapshot_of_a_collection_begins_an_epoch_with_a_marker(market: Market, mode: str) -> None:
    market.use_settings(mode=mode)
    market.add(1, 5)
    market.collection.insert_one({"_id": "undated", "mp_order_id": "U"})
    market.reader.run()
    market.add(6, 6)
    market.reader.run()
    before = list(market.reader.rows[TABLE])
    market.collection.delete_one({"mp_order_id": "O2"})
    market.collection.replace_one({"_id": "undated"}, {"mp_order_id": "V"})
    market.reader.positions = {TABLE: restart_position(market.reader.positions[TABLE])}
    rows = market.reader.run()[TABLE]
    assert [row["_op"] for row in rows] == ["t", *["r"] * 6]
    assert rows[0]["_source_position"] == "~000001~"
    assert max(row["_source_position"] for row in before) < "~000001~" < min(row["_source_position"] for row in rows[1:])
    assert abs((rows[0]["_source_time"] - datetime.now(UTC)).total_seconds()) < 60
    assert documents_in_three_orders(market) == [market.source_documents()] * 3
    market.add(7, 7)
    assert [row["_source_position"][:8] for row in market.reader.run()[TABLE]] == ["~000001~"]
    assert documents_in_three_orders(market) == [market.source_documents()] * 3
    assert market.reader.positions[TABLE]["generation"] == 1
    assert not market.reader.plan().tasks


@pytest.mark.parametrize("mode", ["watermark", "change_stream"])
def test_resnapshot_of_an_emptied_collection_is_empty(market: Market, mode: str) -> None:
    market.use_settings(mode=mode)
    market.add(1, 5)
    market.reader.run()
    market.collection.delete_many({})
    market.reader.positions = {TABLE: restart_position(market.reader.positions[TABLE])}
    assert [row["_op"] for row in market.reader.run()[TABLE]] == ["t"]
    assert market.reader.positions[TABLE]["generation"] == 1
    assert market.bronze_documents() == {}
    assert not market.reader.plan().tasks
    market.add(6, 7)
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()


def test_rows_sort_in_read_order_across_changes_of_mode(market: Market) -> None:
    modes = ["change_stream", "watermark", "change_stream"]
    market.add(1, 5)
    reader = market.use_settings(mode=modes[0])
    reader.run()
    for number, mode in enumerate(modes):
        rows, positions = market.reader.rows, market.reader.positions
        market.reader = Reader(MongoSource(market.settings.model_copy(update={"mode": mode})), rows, positions)
        if number:
            with pytest.raises(SourceError, match=f"or re-snapshot the table: python -m app rebuild {TABLE}"):
                market.reader.plan()
            market.reader.positions = {TABLE: restart_position(positions[TABLE])}
            market.reader.run()
            assert documents_in_three_orders(market) == [market.source_documents()] * 3
        market.collection.replace_one(
            {"mp_order_id": "O3"}, {"mp_order_id": "O3", "status": mode, "updated_at": START + timedelta(days=1 + number)}
        )
        market.reader.run()
        assert documents_in_three_orders(market) == [market.source_documents()] * 3
        market.collection.update_one({"mp_order_id": "O3"}, {"$set": {"status": "unseen"}})


def test_a_document_that_loses_its_date_replaces_its_dated_version(market: Market) -> None:
    market.use_settings(mode="watermark")
    market.collection.insert_many([{"_id": n, "mp_order_id": f"O{n}", "updated_at": START} for n in range(5)])
    market.reader.run()
    market.collection.replace_one({"_id": 1}, {"mp_order_id": "O1", "status": "dated", "updated_at": START + timedelta(days=1)})
    market.reader.run()
    for number in (1, 3):
        market.collection.replace_one({"_id": number}, {"mp_order_id": f"O{number}", "status": "undated"})
        market.reader.run()
        assert documents_in_three_orders(market) == [market.source_documents()] * 3
    market.collection.replace_one({"_id": 3}, {"mp_order_id": "O3", "updated_at": START + timedelta(days=2)})
    market.reader.run()
    assert documents_in_three_orders(market) == [market.source_documents()] * 3


def test_a_watermark_without_numbered_reads_continues(market: Market) -> None:
    market.use_settings(mode="watermark")
    market.add(1, 3)
    market.reader.run()
    market.reader.positions = {TABLE: {name: market.reader.positions[TABLE][name] for name in ("mode", "watermark")}}
    identity = str(market.collection.find_one({"mp_order_id": "O3"})["_id"])  # type: ignore[index]
    old = next(row for row in market.reader.rows[TABLE] if row["document_id"] == identity)
    millis = int(DatetimeMS(START)) + (1 << 63)
    market.reader.rows[TABLE].append({**old, "_op": "u", "_source_position": f"1{millis:020d}/{identity}"})
    market.collection.replace_one({"mp_order_id": "O3"}, {"mp_order_id": "O3", "updated_at": START + timedelta(days=1)})
    market.reader.run()
    assert documents_in_three_orders(market) == [market.source_documents()] * 3


IDENTITIES = st.one_of(
    st.integers(-5, 5), st.text("ab", max_size=2), st.binary(min_size=12, max_size=12).map(ObjectId), st.just(Decimal128("2.5"))
)
MOMENTS = st.none() | st.just("2026") | st.integers(-3, 3).map(DatetimeMS)


@given(st.lists(st.tuples(IDENTITIES, MOMENTS), unique_by=lambda item: str(item[0]), max_size=12), st.integers(0, 12))
def test_a_watermark_splits_documents_into_read_and_new(documents: list[tuple[Any, Any]], cut: int) -> None:
    """In the order of (date, _id), documents already seen are not new and later ones are, whatever their types."""

    def order(item: tuple[Any, Any]) -> Any:
        dated = isinstance(item[1], DatetimeMS)
        kind, key = id_order(item[0])
        return (dated, int(item[1]) if dated else 0, kind, key)

    ordered = [{"_id": identity, "updated_at": moment} for identity, moment in sorted(documents, key=order)]
    mark = Watermark(None, {}, {})
    for document in ordered[:cut]:
        assert mark.is_new(document)
        mark.advance(document)
    mark = Watermark.from_position(mark.to_position()) if ordered[:cut] else mark
    assert [mark.is_new(document) for document in ordered] == [False] * len(ordered[:cut]) + [True] * len(ordered[cut:])


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_split_into_runs_gives_the_same_documents(servers: Any, data: st.DataObject) -> None:
    market = Market(servers.mongo_uri, f"m{time.time_ns():x}")
    try:
        for kind, number in data.draw(st.lists(st.tuples(st.sampled_from("iudr"), st.integers(0, 4)), min_size=5, max_size=20)):
            if kind == "i" and market.collection.find_one({"mp_order_id": f"O{number}"}) is None:
                market.add(number, number)
            elif kind == "u":
                market.collection.update_one({"mp_order_id": f"O{number}"}, {"$set": {"status": time.time_ns()}})
            elif kind == "d":
                market.collection.delete_one({"mp_order_id": f"O{number}"})
            elif kind == "r":
                market.reader.run()
        market.reader.run()
        market.reader.rows[TABLE] = data.draw(st.permutations(market.reader.rows.get(TABLE, [])))
        assert market.bronze_documents() == market.source_documents()
    finally:
        market.client.drop_database(market.settings.database)
        market.client.close()


# -- recorded events of a replica set, which no test server is ----------------------------------------------------------------


class Stream:
    """A change stream with scripted events."""

    def __init__(self, events: list[dict[str, Any] | None], resume_token: dict[str, Any]) -> None:
        self.events, self.resume_token, self.alive = events, resume_token, True

    def try_next(self) -> dict[str, Any] | None:
        if not self.events:
            return None
        event = self.events.pop(0)
        if event is not None:
            self.resume_token = event["_id"]
            self.alive = event["operationType"] != "invalidate"
        return event

    def close(self) -> None: ...


def event(number: int, operation: str, **more: Any) -> dict[str, Any]:
    return {
        "_id": {"_data": f"8265A0000{number:07X}2B"},
        "operationType": operation,
        "clusterTime": Timestamp(1_700_000_000 + number, 1),
        **more,
    }


def test_events_of_a_replica_set(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"documentKey": {"_id": ObjectId("65a000000000000000000001")}}
    document = {
        "_id": key["documentKey"]["_id"],
        "mp_order_id": "O",
        "amount": Decimal128("1.50"),
        "n": Int64(5),
        "at": DatetimeMS(2**60),
    }
    stream = Stream(
        [
            event(1, "insert", **key, fullDocument=document, wallTime=DatetimeMS(1_700_000_000_500)),
            event(2, "update", **key, fullDocument=None),
            event(3, "createIndexes"),
            event(4, "drop"),
            event(5, "invalidate"),
        ],
        {"_data": "82"},
    )

    class Watching:
        def __enter__(self) -> OpenChangeStream:
            return OpenChangeStream(stream, False)  # type: ignore[arg-type]

        def __exit__(self, *arguments: object) -> None: ...

    monkeypatch.setattr(change_stream, "open_change_stream", lambda collection, token: Watching())
    items = list(ChangeStreamTask(market.settings, {"_data": "82"}, "82FF").read())
    rows = [row for item in items if isinstance(item, Rows) for row in item.rows.to_pylist()]
    assert [(row["_op"], row["document_id"]) for row in rows] == [
        ("c", str(document["_id"])),
        ("d", str(document["_id"])),
        ("t", None),
    ]
    assert json.loads(rows[0]["document"])["amount"] == {"$numberDecimal": "1.50"}
    assert json.loads(rows[0]["document"])["n"] == {"$numberLong": "5"}
    assert json.loads(rows[0]["document"])["at"] == {"$date": {"$numberLong": str(2**60)}}
    assert rows[0]["_source_time"] == datetime(2023, 11, 14, 22, 13, 20, 500000, UTC)
    assert rows[1]["_source_time"] == datetime(2023, 11, 14, 22, 13, 22, tzinfo=UTC)
    (reached,) = (item for item in items if isinstance(item, Reached))
    assert json.loads(reached.position["token"]) == event(5, "invalidate")["_id"]


def test_positions_sort_in_stream_order() -> None:
    emulated = [sortable_token({"_data": f"nx:{number}"}) for number in (2, 9, 10, 1000)]
    assert emulated == sorted(emulated)
    assert sortable_token({"_data": "8265a0b1c2d3"}) == "8265A0B1C2D3"


# -- errors --------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_errors_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SERVER_SECONDS", 1)
    secret = "s3cr3tword"
    with pytest.raises(SourceError, match="SHOPSPHERE_MONGO__URI"):
        MongoSource(MongoSettings()).plan({}, {})  # type: ignore[call-arg]
    for uri, text in (
        (f"mongodb://u:{secret}@127.0.0.1:1/", r"no server answered at 127\.0\.0\.1:1 within 1 s"),
        (f"mongo://u:{secret}@127.0.0.1:1/", "is not a valid MongoDB URI"),
        (f"mongodb://u:{secret}@x@127.0.0.1:1/", "is not a valid MongoDB URI"),
    ):
        source = MongoSource(MongoSettings(uri=uri))  # type: ignore[arg-type, call-arg]
        assert secret not in repr(source)
        with pytest.raises(SourceError, match=text) as error:
            source.plan({}, {})
        assert secret not in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("code", "hint"), [(18, "Correct user and password"), (13, "Let the user read"), (1, "Run again")])
def test_refused_requests_are_errors_with_a_hint(code: int, hint: str) -> None:
    with (
        pytest.raises(SourceError, match=hint) as error,
        open_collection(
            MongoSettings(uri="mongodb://u:s3cr3tword@127.0.0.1:1/")  # type: ignore[arg-type, call-arg]
        ),
    ):
        raise OperationFailure("no: s3cr3tword", code, {"errmsg": "no: s3cr3tword"})
    assert "s3cr3tword" not in str(error.value)


def change_and_read_elsewhere(market: Market, changes: int) -> None:
    """Change documents while only another reader reads them, so that a server may discard the changes."""
    market.add(1, 10)
    market.reader.run()
    other = Reader(MongoSource(market.settings))
    other.run()
    for first in range(100, 100 + changes, 500):
        market.add(first, first + 499)
        other.run()


def test_changes_that_another_reader_has_passed_are_kept(market: Market) -> None:
    change_and_read_elsewhere(market, 2500)
    market.reader.run()
    assert market.bronze_documents() == market.source_documents()


def test_changes_that_an_emulation_has_discarded_are_an_error(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = [sys.executable, "-m", "nx_27017.nx_27017", "--host", "127.0.0.1", "--port", str(port)]
    files = ["--data-dir", str(tmp_path), "--log-file", os.devnull, "--pid-file", str(tmp_path / "pid")]
    server = subprocess.Popen([*plain, *files], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        market = Market(f"mongodb://127.0.0.1:{port}/?serverSelectionTimeoutMS=30000", "shop")
        market.client.admin.command("ping")
        change_and_read_elsewhere(market, 2500)
        with pytest.raises(OffsetExpired, match=r"discarded the changes after it.*rebuild"):
            market.reader.run()
        market.client.close()
    finally:
        server.terminate()
        server.wait()
