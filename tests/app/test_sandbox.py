"""The generated data: the same seed gives the same sources, and their content is consistent."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import phonenumbers
import psycopg
import pymongo
import pytest
from bson import json_util
from confluent_kafka import Consumer, TopicPartition

from app import sandbox
from app.sandbox import servers as running_servers
from app.sandbox.schema import PARTITIONS, TABLES, TOPIC
from lakehouse.errors import SandboxError

ORDERS, SEED = 400, 11


def rows(addresses: sandbox.Addresses, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(addresses.postgres_dsn) as connection:
        return connection.execute(statement).fetchall()


def documents(addresses: sandbox.Addresses) -> list[dict[str, Any]]:
    with pymongo.MongoClient[dict[str, Any]](addresses.mongo_uri) as client:
        return list(client.shopsphere.marketplace_orders.find().sort("_id", 1))


def messages(addresses: sandbox.Addresses, topic: str = TOPIC) -> list[list[tuple[bytes | None, bytes | None, int]]]:
    """Return (key, value, timestamp) of all messages, per partition, in order."""
    found: list[list[tuple[bytes | None, bytes | None, int]]] = []
    consumer = Consumer({"bootstrap.servers": addresses.kafka_bootstrap, "group.id": "test", "log_level": 0})
    try:
        for partition in range(PARTITIONS):
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            consumer.assign([TopicPartition(topic, partition, low)])
            got: list[tuple[bytes | None, bytes | None, int]] = []
            while len(got) < high - low:
                for message in consumer.consume(high - low - len(got), timeout=1):
                    assert message.error() is None
                    assert message.offset() == low + len(got)
                    got.append((message.key(), message.value(), message.timestamp()[1]))
            found.append(got)
    finally:
        consumer.close()
    return found


def events(addresses: sandbox.Addresses) -> dict[str, dict[str, Any]]:
    """Return the readable events by id."""
    found: dict[str, dict[str, Any]] = {}
    for _, value, _ in (message for partition in messages(addresses) for message in partition):
        try:
            event = json.loads(value or b"")
            assert event["timestamp"]
            assert event["event_type"]
            found[event["event_id"]] = event
        except (ValueError, KeyError):
            continue
    return found


def contents(addresses: sandbox.Addresses) -> dict[str, Any]:
    """Return the whole content of the sources."""
    tables = {table: rows(addresses, f"SELECT * FROM {table} ORDER BY 1, 2") for table in TABLES}
    return {**tables, "documents": json_util.dumps(documents(addresses)), "messages": messages(addresses)}


def shown_truth(home: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {what: sorted(frame.rows()) for what, frame in sandbox.truth(home).items()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, sandbox.Addresses]]:
    """A small sandbox after two steps."""
    home = tmp_path_factory.mktemp("shop")
    addresses = sandbox.start(home, orders=ORDERS, seed=SEED)
    sandbox.step(home, 30)
    sandbox.step(home, 12)
    yield home, addresses
    sandbox.stop(home)


@pytest.fixture(scope="module")
def everything(shop: tuple[Path, sandbox.Addresses]) -> dict[str, Any]:
    return contents(shop[1])


@pytest.mark.slow
def test_the_same_seed_and_steps_give_the_same_sources(
    shop: tuple[Path, sandbox.Addresses], everything: dict[str, Any], tmp_path: Path
) -> None:
    addresses = sandbox.start(tmp_path, orders=ORDERS, seed=SEED)
    try:
        sandbox.step(tmp_path, 30)
        # A restart between steps changes nothing.
        sandbox.stop(tmp_path)
        addresses = sandbox.start(tmp_path, orders=ORDERS, seed=SEED)
        sandbox.step(tmp_path, 12)
        again = contents(addresses)
    finally:
        sandbox.stop(tmp_path)
    for part, content in everything.items():
        assert content == again[part], part
    assert shown_truth(shop[0]) == shown_truth(tmp_path)


def test_another_seed_gives_other_data(everything: dict[str, Any], tmp_path: Path) -> None:
    addresses = sandbox.start(tmp_path, orders=60, seed=SEED + 1)
    try:
        assert rows(addresses, "SELECT email FROM users ORDER BY 1 LIMIT 20") != [(row[1],) for row in everything["users"][:20]]
    finally:
        sandbox.stop(tmp_path)


def test_it_has_the_requested_number_of_orders(shop: tuple[Path, sandbox.Addresses], everything: dict[str, Any]) -> None:
    readable = [document for document in documents(shop[1]) if not str(document.get("mp_order_id", "-XX-")).startswith("ORD-XX")]
    assert len(everything["orders"]) + len(readable) == ORDERS + 30 + 12
    assert {row[2] for row in everything["orders"]} == {"web", "pos"}
    assert len({document["platform"] for document in readable}) > 3


def test_orders_equal_the_sum_of_their_lines(shop: tuple[Path, sandbox.Addresses]) -> None:
    wrong = """
        SELECT o.order_id FROM orders o JOIN order_items i USING (order_id)
        GROUP BY o.order_id, o.total_amount, o.status
        HAVING sum(i.quantity * i.unit_price) FILTER (WHERE i.quantity > 0) <> o.total_amount
            OR (o.status = 'returned') <> (sum(i.quantity) = 0)"""
    assert rows(shop[1], wrong) == []
    assert rows(shop[1], "SELECT 1 FROM orders o LEFT JOIN order_items i USING (order_id) WHERE i.order_id IS NULL") == []
    # Whoever bought is a user, or was one and has left since.
    buyers = {f"user:{user_id}" for (user_id,) in rows(shop[1], "SELECT user_id FROM orders WHERE user_id IS NOT NULL")}
    assert buyers <= set(sandbox.truth(shop[0])["people"]["record_id"])
    assert all(isinstance(amount, Decimal) for (amount,) in rows(shop[1], "SELECT total_amount FROM orders"))


def test_stock_is_never_negative(shop: tuple[Path, sandbox.Addresses]) -> None:
    on_hand: Counter[tuple[str, str]] = Counter()
    reserved: Counter[tuple[str, str]] = Counter()
    incoming: Counter[tuple[str, str]] = Counter()
    for event in sorted(events(shop[1]).values(), key=lambda event: (event["timestamp"], event["event_id"])):
        data = event["metadata"]
        if "store_id" not in data:
            continue
        place, quantity = (data["store_id"], data["product_id"]), data["quantity"]
        assert quantity > 0
        kind = event["event_type"]
        if kind == "stock_received":
            on_hand[place] += quantity
            incoming[place] -= quantity if "purchase_order" in data else 0
        elif kind == "stock_incoming":
            incoming[place] += quantity
        elif kind in ("stock_reserved", "reservation_released"):
            reserved[place] += quantity if kind == "stock_reserved" else -quantity
        elif kind == "stock_sold":
            on_hand[place] -= quantity
            reserved[place] -= quantity if data.get("reserved") else 0
        elif kind == "stock_returned":
            on_hand[place] += quantity
        elif kind == "stock_adjusted":
            on_hand[place] += quantity * data["sign"]
        elif kind == "stock_transferred":
            on_hand[place] -= quantity
            on_hand[data["to_store_id"], data["product_id"]] += quantity
        elif kind == "stock_counted":
            on_hand[place] = quantity
        else:
            assert kind == "safety_stock_set"
        assert min(on_hand[place], reserved[place], incoming[place]) >= 0, event


def test_the_truth_covers_every_record_and_is_in_no_source(
    shop: tuple[Path, sandbox.Addresses], everything: dict[str, Any]
) -> None:
    truth = sandbox.truth(shop[0])
    records = {f"user:{row[0]}" for row in everything["users"]}
    records |= {f"order:{found['platform']}:{found['mp_order_id']}" for found in documents(shop[1]) if "mp_order_id" in found}
    known = truth["people"]["record_id"]
    assert known.n_unique() == known.len()
    # Users who have left since are still known.
    assert records <= set(known)
    assert len(set(known) - records) < 5
    assert 0.2 * len(records) < truth["people"]["person"].n_unique() < 0.8 * len(records)
    orders = {str(row[0]) for row in everything["orders"]}
    assert set(truth["fraud"]["order_id"]) <= orders
    assert not any("person-" in str(content) for content in everything.values())


def test_phone_numbers_are_valid_in_their_country(shop: tuple[Path, sandbox.Addresses], everything: dict[str, Any]) -> None:
    for row in everything["users"]:
        if row[3]:
            assert phonenumbers.is_valid_number(phonenumbers.parse(row[3], row[8])), row[3]


def test_documents_have_old_and_new_formats_and_several_spellings(shop: tuple[Path, sandbox.Addresses]) -> None:
    found = documents(shop[1])
    assert {type(document.get("amount")) for document in found} >= {int, float, str}
    assert any("items" not in document for document in found)
    assert any("items" in document for document in found)


def test_steps_update_and_delete_existing_rows(shop: tuple[Path, sandbox.Addresses], everything: dict[str, Any]) -> None:
    (column,) = rows(shop[1], "SELECT count(*) FROM information_schema.columns WHERE column_name = 'marketing_consent'")
    assert column == (1,)
    moved = rows(shop[1], "SELECT count(*) FROM orders WHERE updated_at > '2026-02-01' AND created_at < '2026-02-01'")
    assert moved[0][0] > 0
    assert any(document.get("updated_at") and document["updated_at"].month == 2 for document in documents(shop[1]))


@pytest.mark.slow
def test_some_messages_are_late_repeated_or_unreadable(tmp_path: Path) -> None:
    addresses = sandbox.start(tmp_path, orders=2000, seed=3)
    try:
        values = [value or b"" for partition in messages(addresses) for _, value, _ in partition]
        late = 0
        for partition in messages(addresses):
            newest = ""
            for _, value, _ in partition:
                try:
                    stamp = json.loads(value or b"")["timestamp"]
                except (ValueError, KeyError):
                    continue
                late += stamp < newest
                newest = max(newest, stamp)
    finally:
        sandbox.stop(tmp_path)
    assert len(values) - len(set(values)) > 0.005 * len(values)
    assert late > 0.01 * len(values)
    assert 0 < len(values) - sum(_readable(value) for value in values) < 0.002 * len(values)


def _readable(value: bytes) -> bool:
    try:
        return {"event_id", "event_type", "timestamp"} <= json.loads(value).keys()
    except ValueError:
        return False


def test_the_settings_file_gets_the_addresses_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "shopsphere.toml"
    file.write_text('default_region = "US"\n[kafka]\ntopics = "events,more"\nbootstrap_servers = "elsewhere:1"\n')
    addresses = sandbox.start(tmp_path, empty=True, base_currency="EUR")
    try:
        settings = tomllib.loads(file.read_text())
        assert settings["default_region"] == "US"
        assert settings["kafka"] == {"topics": "events,more", "bootstrap_servers": addresses.kafka_bootstrap}
        assert settings["postgres"]["dsn"] == addresses.postgres_dsn
        assert settings["base_currency"] == "EUR"
        assert rows(addresses, "SELECT count(*) FROM orders") == [(0,)]
        assert rows(addresses, "SELECT count(*) FROM pg_publication_tables WHERE pubname = 'shopsphere'") == [(len(TABLES),)]
        with pytest.raises(SandboxError, match=r"already running.*sandbox stop"):
            sandbox.start(tmp_path, empty=True)
        with pytest.raises(SandboxError, match="only a generated history"):
            sandbox.step(tmp_path, 5)
    finally:
        sandbox.stop(tmp_path)
    with pytest.raises(SandboxError, match="another, stopped sandbox"):
        sandbox.start(tmp_path, orders=10)
    with pytest.raises(SandboxError, match="No sandbox is running"):
        sandbox.step(tmp_path, 5)


def test_an_interrupted_step_cannot_be_continued(tmp_path: Path) -> None:
    def interrupt(_what: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    sandbox.start(tmp_path, orders=30)
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.step(tmp_path, 30, interrupt)
        with pytest.raises(SandboxError, match="was interrupted"):
            sandbox.step(tmp_path, 30)
    finally:
        sandbox.stop(tmp_path)


def test_a_start_that_is_interrupted_leaves_no_server_behind(tmp_path: Path) -> None:
    def interrupt(_what: str, done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.start(tmp_path, orders=100, progress=interrupt)
    assert running_servers.any_running(tmp_path) == []
    # What it had filled in is not mistaken for a sandbox.
    addresses = sandbox.start(tmp_path, orders=30)
    try:
        assert sandbox.running(tmp_path) == addresses
    finally:
        sandbox.stop(tmp_path)
    shutil.rmtree(tmp_path / "sandbox")
