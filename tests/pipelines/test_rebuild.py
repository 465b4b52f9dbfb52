"""Sources that moved on without ShopSphere: the command that the error names makes silver equal to the source again."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymongo
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg.conninfo import make_conninfo

from app.cli.main import main
from app.sandbox.schema import create_tables
from app.sandbox.servers import Addresses, start_servers, stop_servers

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
EARLY = "timestamptz '2026-01-01 00:00+00'"


class Database:
    """A PostgreSQL database with the tables of the shop."""

    def __init__(self, server: str) -> None:
        self.server, self.name = server, f"rebuild_{time.time_ns():x}"
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {self.name}")  # type: ignore[call-overload]
        self.dsn = make_conninfo(server, dbname=self.name)
        create_tables(self.dsn)

    def __call__(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query)  # type: ignore[call-overload]
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def add(self, first: int, last: int, price: str = "1") -> None:
        """Insert users, products and orders with these numbers."""
        self(
            f"INSERT INTO users SELECT i, 'u' || i || '@x.com', false, NULL, false, 'User ' || i, NULL, NULL, 'DE', NULL, "
            f"{EARLY}, {EARLY} + make_interval(mins => i) FROM generate_series({first}, {last}) i; "
            f"INSERT INTO products SELECT 'P' || i, 'n', 'c', 'b', {price}, 'USD', {EARLY} "
            f"FROM generate_series({first}, {last}) i; "
            f"INSERT INTO orders SELECT i, i, 'web', NULL, 'paid', 'USD', 5, NULL, NULL, NULL, NULL, NULL, {EARLY}, {EARLY} "
            f"FROM generate_series({first}, {last}) i"
        )

    def lose(self, number: int) -> None:
        self(
            f"DELETE FROM users WHERE user_id = {number}; DELETE FROM products WHERE product_id = 'P{number}'; "
            f"DELETE FROM orders WHERE order_id = {number}"
        )

    def close(self) -> None:
        with psycopg.connect(self.server, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (self.name,)
            )
            admin.execute(f"DROP DATABASE {self.name} WITH (FORCE)")  # type: ignore[call-overload]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command on an empty lakehouse without sources: (exit code, stdout, stderr)."""
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path / "home"))
    for name in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{name}__ENABLED", "false")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def database(servers: Addresses, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    shop = Database(servers.postgres_dsn)
    follow(monkeypatch, shop)
    yield shop
    shop.close()


def follow(monkeypatch: pytest.MonkeyPatch, shop: Database) -> None:
    monkeypatch.setenv("SHOPSPHERE_POSTGRES__ENABLED", "true")
    monkeypatch.setenv("SHOPSPHERE_POSTGRES__DSN", shop.dsn)
    monkeypatch.setenv("SHOPSPHERE_POSTGRES__SLOT", "rebuild")


def rows(cli: Cli, statement: str) -> list[dict[str, Any]]:
    code, out, err = cli("sql", statement, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return found


def run(cli: Cli) -> None:
    code, _, err = cli("run", "--json")
    assert code == 0, err


def suggested_command(cli: Cli) -> list[str]:
    """Return the command that the error of a run suggests."""
    code, _, err = cli("run", "--json")
    assert code == 1
    found = re.search(r"python -m app (rebuild( \w+\.\w+)+)", err)
    assert found, err
    return shlex.split(found[1])


def assert_silver_equals(cli: Cli, shop: Database) -> None:
    users = rows(cli, "SELECT user_id FROM silver.users_scd WHERE is_current ORDER BY user_id")
    assert [row["user_id"] for row in users] == [row[0] for row in shop("SELECT user_id FROM users ORDER BY user_id")]
    products = rows(cli, "SELECT product_id, list_price FROM silver.products ORDER BY product_id")
    there = shop("SELECT product_id, list_price FROM products ORDER BY product_id")
    assert [(row["product_id"], float(row["list_price"])) for row in products] == [(key, float(price)) for key, price in there]
    orders = rows(cli, "SELECT CAST(order_id AS bigint) AS id FROM silver.orders_unified ORDER BY id")
    assert [row["id"] for row in orders] == [row[0] for row in shop("SELECT order_id FROM orders ORDER BY order_id")]


@pytest.mark.slow
def test_a_dropped_slot_is_recovered_by_the_suggested_command(cli: Cli, database: Database) -> None:
    database.add(1, 4)
    run(cli)
    history = rows(cli, "SELECT * FROM silver.users_scd WHERE user_id IN (1, 3) ORDER BY user_id, valid_from")
    database("SELECT pg_drop_replication_slot('rebuild')")
    database.lose(2)
    database.lose(4)
    database.add(5, 5)
    database("UPDATE products SET list_price = 7 WHERE product_id = 'P1'")
    command = suggested_command(cli)
    assert len(command) == 8
    assert cli(*command[:2])[0] == 1, "one table cannot be reread without the others"
    code, _, err = cli(*command)
    assert code == 0, err
    run(cli)
    assert_silver_equals(cli, database)
    assert rows(cli, "SELECT * FROM silver.users_scd WHERE user_id IN (1, 3) ORDER BY user_id, valid_from") == history
    ended = rows(cli, "SELECT user_id, closed_by, valid_to IS NULL AS open FROM silver.users_scd WHERE NOT is_current ORDER BY 1")
    assert ended == [{"user_id": number, "closed_by": "delete", "open": False} for number in (2, 4)]
    database.add(6, 6)
    database.lose(1)
    run(cli)
    assert_silver_equals(cli, database)
    # rereading one table without changes at the source changes nothing
    before = json.loads(cli("digest", "--json")[1].splitlines()[-1])
    assert cli("rebuild", "bronze.bronze_postgres__users", "silver.users_scd", "gold.dim_users")[0] == 0
    run(cli)
    after = json.loads(cli("digest", "--json")[1].splitlines()[-1])
    assert {name: it for name, it in after.items() if "bronze" not in name} == {
        name: it for name, it in before.items() if "bronze" not in name
    }


@pytest.mark.slow
def test_a_replaced_server_with_lower_positions_is_followed(
    cli: Cli, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        database("CREATE TABLE filler (id int); DROP TABLE filler; SELECT pg_switch_wal()")
    database.add(1, 3)
    run(cli)
    second = start_servers(tmp_path / "second")
    try:
        other = Database(second.postgres_dsn)
        other.add(2, 4, price="3")
        ahead = "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"
        assert other(ahead)[0][0] < database(ahead)[0][0]
        follow(monkeypatch, other)
        code, _, err = cli(*suggested_command(cli))
        assert code == 0, err
        run(cli)
        assert_silver_equals(cli, other)
        other("UPDATE products SET list_price = 9 WHERE product_id = 'P2'")
        other.lose(3)
        run(cli)
        assert_silver_equals(cli, other)
        assert other("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'rebuild' AND NOT temporary") == [(1,)]
    finally:
        stop_servers(tmp_path / "second")


def test_unreadable_values_of_the_initial_read_are_quarantined_by_row(cli: Cli, database: Database) -> None:
    database.add(1, 3)
    database("UPDATE products SET list_price = 'NaN' WHERE product_id <> 'P2'")
    run(cli)
    found = rows(cli, "SELECT original FROM silver.quarantine WHERE source_table = 'bronze.bronze_postgres__products'")
    assert sorted(json.loads(row["original"])["product_id"] for row in found) == ["P1", "P3"]


def test_a_rebuild_finds_deletes_that_a_watermark_cannot_detect(
    cli: Cli, servers: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"m{time.time_ns():x}"
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(servers.mongo_uri)
    documents = client[name].marketplace_orders
    for setting, value in {"ENABLED": "true", "URI": servers.mongo_uri, "DATABASE": name, "MODE": "watermark"}.items():
        monkeypatch.setenv(f"SHOPSPHERE_MONGO__{setting}", value)
    order = {"platform": "tokopedia", "order_time": "2026-01-01T00:00:00Z", "amount": 5, "currency": "USD"}
    ids = "SELECT source_order_id AS id FROM silver.orders_unified ORDER BY id"
    try:
        documents.insert_many([{**order, "mp_order_id": f"O{number}"} for number in range(3)])
        run(cli)
        documents.delete_one({"mp_order_id": "O1"})
        run(cli)
        assert [row["id"] for row in rows(cli, ids)] == ["O0", "O1", "O2"]
        assert cli("rebuild", "bronze_mongo__marketplace_orders")[0] == 0
        run(cli)
        assert [row["id"] for row in rows(cli, ids)] == ["O0", "O2"]
        documents.delete_many({})
        assert cli("rebuild", "bronze_mongo__marketplace_orders")[0] == 0
        run(cli)
        assert rows(cli, ids) == []
    finally:
        client.drop_database(name)
        client.close()


def test_a_recreated_topic_is_recovered_by_the_suggested_command(
    cli: Cli, servers: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"rebuild-{time.time_ns():x}"
    for setting, value in {"ENABLED": "true", "BOOTSTRAP_SERVERS": servers.kafka_bootstrap, "TOPICS": topic}.items():
        monkeypatch.setenv(f"SHOPSPHERE_KAFKA__{setting}", value)
    admin = AdminClient({"bootstrap.servers": servers.kafka_bootstrap})

    def make_and_fill(name: str, count: int) -> None:
        admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
        producer = Producer({"bootstrap.servers": servers.kafka_bootstrap})
        for number in range(count):
            event = {"event_id": f"{name}{number}", "event_type": "click", "timestamp": "2026-01-02T10:00:00Z"}
            producer.produce(topic, value=json.dumps(event) if number else name)
        assert producer.flush(10) == 0

    def found() -> tuple[list[str], list[str]]:
        events = rows(cli, "SELECT event_id FROM silver.events_clean ORDER BY event_id")
        broken = rows(cli, "SELECT original FROM silver.quarantine ORDER BY original")
        return [row["event_id"] for row in events], [row["original"] for row in broken]

    try:
        make_and_fill("a", 3)
        run(cli)
        assert found() == (["a1", "a2"], ["a"])
        assert cli("rebuild", "bronze_kafka__events")[0] == 0
        run(cli)
        assert found() == (["a1", "a2"], ["a"])
        admin.delete_topics([topic])[topic].result(10)
        make_and_fill("b", 5)
        command = suggested_command(cli)
        assert command == ["rebuild", "bronze.bronze_kafka__events"]
        assert cli(*command)[0] == 0
        run(cli)
        assert found() == (["a1", "a2", "b1", "b2", "b3", "b4"], ["a", "b"])
    finally:
        admin.delete_topics([topic])[topic].result(10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rebuild_killed_at_any_time_is_finished_by_the_suggested_command(cli: Cli, database: Database) -> None:
    database.add(0, 40)
    run(cli)
    chance = random.Random(4)
    longest, killed = 60.0, 0
    for number in range(9):
        database("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'rebuild'")
        database.lose(number)
        database.add(41 + number, 41 + number)
        command = suggested_command(cli)
        process = subprocess.Popen([sys.executable, "-m", "app", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        if number == 0:
            assert process.wait(longest) == 0
            longest = time.monotonic() - begun
        else:
            time.sleep(longest * chance.uniform(0.3, 1.0))
            killed += process.poll() is None
            process.kill()
            process.wait()
        database("UPDATE products SET list_price = list_price + 1")
        for _ in range(3):
            if cli("run", "--json")[0] == 0:
                break
            assert cli(*suggested_command(cli))[0] == 0
        run(cli)
        assert_silver_equals(cli, database)
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("table", ["users", "products"])
def test_one_table_can_be_reread_whichever_changed_last(cli: Cli, database: Database, table: str) -> None:
    database.add(1, 3)
    run(cli)
    database("UPDATE users SET city = 'x' WHERE user_id = 1")  # only users gets a newer position
    run(cli)
    code, _, err = cli("rebuild", f"bronze.bronze_postgres__{table}")
    assert code == 0, err
    database.lose(2)
    run(cli)
    assert_silver_equals(cli, database)


def test_pending_changes_of_a_healthy_slot_become_history_when_its_table_is_reread(cli: Cli, database: Database) -> None:
    database.add(1, 3)
    run(cli)
    database("UPDATE users SET city = 'B', updated_at = '2026-02-01 00:00+00' WHERE user_id = 1")
    database("UPDATE users SET city = 'C', updated_at = '2026-03-01 00:00+00' WHERE user_id = 1")
    database.add(4, 4)
    database("DELETE FROM users WHERE user_id = 4")
    assert cli("rebuild", "bronze.bronze_postgres__users")[0] == 0
    run(cli)
    history = "SELECT user_id, city, closed_by FROM silver.users_scd WHERE user_id IN (1, 4) ORDER BY user_id, valid_from"
    assert [tuple(row.values()) for row in rows(cli, history)] == [
        (1, None, "update"), (1, "B", "update"), (1, "C", None), (4, None, "delete"),
    ]  # fmt: skip
    assert_silver_equals(cli, database)


def test_corrections_are_stored_once_and_only_from_a_valid_file(cli: Cli, database: Database, tmp_path: Path) -> None:
    database.add(1, 3)
    database("UPDATE products SET list_price = 'NaN' WHERE product_id = 'P2'")
    database("UPDATE orders SET total_amount = 'NaN' WHERE order_id = 2")
    run(cli)
    orders, products = rows(cli, "SELECT source_table, source_position FROM silver.quarantine ORDER BY 1")
    file = tmp_path / "fix.jsonl"

    def replay(price: str) -> tuple[int, str, str]:
        fixes = ((orders, {"total_amount": "7"}), (products, {"list_price": price}))
        file.write_text(
            "\n".join(
                json.dumps({"table": r["source_table"], "position": r["source_position"], "value": json.dumps(value)})
                for r, value in fixes
            )
        )
        return cli("replay", "--fix", str(file))

    assert replay("abc")[0] == 1
    assert rows(cli, "SELECT count(*) AS n FROM bronze.bronze_postgres__orders WHERE _op = 'fix'") == [{"n": 0}]
    for _ in range(2):
        code, _, err = replay("7")
        assert code == 0, err
    assert rows(cli, "SELECT count(*) AS n FROM silver.quarantine") == [{"n": 0}]
    assert rows(cli, "SELECT count(*) AS n FROM bronze.bronze_postgres__orders WHERE _op = 'fix'") == [{"n": 1}]


def test_an_emptied_topic_can_be_reread(cli: Cli, servers: Addresses, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = f"rebuild-{time.time_ns():x}"
    for setting, value in {"ENABLED": "true", "BOOTSTRAP_SERVERS": servers.kafka_bootstrap, "TOPICS": topic}.items():
        monkeypatch.setenv(f"SHOPSPHERE_KAFKA__{setting}", value)
    admin, producer = (kind({"bootstrap.servers": servers.kafka_bootstrap}) for kind in (AdminClient, Producer))

    def produce_events(name: str) -> None:
        for number in range(3):
            event = {"event_id": f"{name}{number}", "event_type": "click", "timestamp": "2026-01-02T10:00:00Z"}
            producer.produce(topic, value=json.dumps(event))
        assert producer.flush(10) == 0

    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    produce_events("a")
    run(cli)
    admin.delete_topics([topic])[topic].result(10)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    assert cli("run")[0] == 1
    assert cli("rebuild", "bronze.bronze_kafka__events")[0] == 0
    run(cli)
    produce_events("b")
    run(cli)
    assert rows(cli, "SELECT count(*) AS n FROM silver.events_clean") == [{"n": 6}]
