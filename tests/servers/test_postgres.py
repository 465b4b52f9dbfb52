"""The PostgreSQL connector on separate servers: failovers, lost slots, long transactions and columns of every type."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from servers.postgres_cluster import Cluster
from support.bronze_reading import Reader
from support.waiting import wait_for

from lakehouse.errors import OffsetExpired, SchemaConflict, SourceError
from lakehouse.source import restart_position
from pipelines.bronze.tables import POSTGRES_TABLES
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres import connection
from pipelines.sources.postgres.source import PostgresSource

pytestmark = pytest.mark.servers
PRODUCTS, STORES = (POSTGRES_TABLES[name][0].name for name in ("products", "stores"))
SCHEMA = """
DROP PUBLICATION IF EXISTS shopsphere;
DROP TABLE IF EXISTS products, stores;
CREATE TABLE products (product_id text PRIMARY KEY, name text, category text, brand text, list_price numeric(18,2),
                       currency char(3), updated_at timestamptz);
CREATE TABLE stores (store_id text PRIMARY KEY, name text, kind text, city text, country char(2), updated_at timestamptz);
ALTER TABLE products REPLICA IDENTITY FULL;
CREATE PUBLICATION shopsphere FOR TABLES IN SCHEMA public;
"""


class Shop:
    """A server with two tables and a reader of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_type = 'logical'")
        cluster(SCHEMA)
        self.settings = PostgresSettings(dsn=cluster.dsn)  # type: ignore[arg-type, call-arg]
        self.reader = Reader(PostgresSource(self.settings))

    def move(self, cluster: Cluster) -> None:
        """Point postgres.dsn at another server."""
        self.cluster, moved = cluster, PostgresSettings(dsn=cluster.dsn)  # type: ignore[arg-type, call-arg]
        self.settings, self.reader.source = moved, PostgresSource(moved)

    def add(self, *names: str) -> None:
        for name in names:
            self.cluster("INSERT INTO products (product_id) VALUES (%s)", name)

    def resnapshot_all(self) -> None:
        """Re-snapshot all tables, as `rebuild` of all PostgreSQL tables does."""
        self.reader.positions = {table: restart_position(position) for table, position in self.reader.positions.items()}  # type: ignore[misc]
        self.reader.run()

    def products(self) -> list[str]:
        return sorted(str(key[0]) for key in self.reader.latest(PRODUCTS, ("product_id",)))

    def source_products(self) -> list[str]:
        return sorted(str(row[0]) for row in self.cluster("SELECT product_id FROM products"))

    def duplicate_positions(self) -> list[str]:
        positions = [row["_source_position"] for row in self.reader.rows[PRODUCTS]]
        return [position for position in positions if positions.count(position) > 1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("postgres") / "primary") as cluster:
        yield cluster


@pytest.fixture
def shop(cluster: Cluster) -> Shop:
    return Shop(cluster)


# -- failover --------------------------------------------------------------------------------------------------------


@contextmanager
def pair(directory: Path, *, synced: bool) -> Iterator[tuple[Shop, Cluster]]:
    """Start a primary with a standby. synced: the standby keeps a copy of the slot."""
    with Cluster(directory / "primary") as primary:
        settings = {"hot_standby_feedback": "on", "sync_replication_slots": "on" if synced else "off"}
        with Cluster(directory / "standby", settings, upstream=primary) as standby:
            shop = Shop(primary)
            shop.add("P1", "P2", "P3")
            shop.reader.run()
            numbers = iter(range(1, 10_000))

            def is_copied() -> bool:
                # the copy is created when the slot advances
                primary("UPDATE products SET name = %s WHERE product_id = 'P1'", str(next(numbers)))
                primary("SELECT pg_log_standby_snapshot()")
                primary("UPDATE products SET name = %s WHERE product_id = 'P1'", str(next(numbers)))
                shop.reader.run()
                return bool(standby("SELECT 1 FROM pg_replication_slots WHERE synced AND NOT temporary"))

            if synced:
                wait_for(is_copied, "the standby did not copy the slot")
            yield shop, standby


def test_a_failover_with_the_slot_neither_loses_nor_duplicates_rows(tmp_path: Path) -> None:
    with pair(tmp_path, synced=True) as (shop, standby):
        shop.add("P4", "P5")
        shop.cluster("DELETE FROM products WHERE product_id = 'P2'")
        shop.reader.run()
        # not read from the old primary
        shop.add("P6")
        standby.wait_for_replay()
        shop.cluster.kill()
        with pytest.raises(SourceError, match=r"Check that the server is running and that postgres\.dsn"):
            shop.reader.plan()
        shop.move(standby)
        with pytest.raises(SourceError, match="the server is a standby"):
            shop.reader.plan()
        standby.promote()
        shop.add("P7")
        shop.cluster("DELETE FROM products WHERE product_id = 'P3'")
        shop.reader.run()
        assert shop.products() == shop.source_products() == ["P1", "P4", "P5", "P6", "P7"]
        assert not shop.duplicate_positions()
        assert not shop.reader.plan().tasks
        assert shop.reader.positions[PRODUCTS]["timeline"] == 2
        # the other table's position is still on the first timeline and remains valid
        assert shop.reader.positions[STORES]["timeline"] == 1
        shop.add("P8")
        shop.reader.run()
        assert shop.products() == shop.source_products()


def test_after_a_failover_without_the_slot_a_rebuild_recovers(tmp_path: Path) -> None:
    with pair(tmp_path, synced=False) as (shop, standby):
        shop.add("P4")
        shop.reader.run()
        shop.cluster("DELETE FROM products WHERE product_id = 'P2'")
        standby.wait_for_replay()
        shop.cluster.kill()
        standby.promote()
        shop.move(standby)
        shop.add("P5")
        with pytest.raises(OffsetExpired, match=rf"replication slot 'shopsphere' no longer exists.*rebuild {PRODUCTS} {STORES}$"):
            shop.reader.plan()
        shop.resnapshot_all()
        shop.add("P6")
        shop.reader.run()
        assert shop.products() == shop.source_products() == ["P1", "P3", "P4", "P5", "P6"]


def test_a_standby_that_lacks_changes_already_read_is_detected(tmp_path: Path) -> None:
    """Its WAL has other changes at the LSNs that were read: continuing would skip them silently."""
    with pair(tmp_path, synced=True) as (shop, standby):
        standby.wait_for_replay()
        standby.kill()
        shop.add("lost 1", "lost 2")
        shop.reader.run()
        read = shop.reader.positions[PRODUCTS]["lsn"]
        shop.cluster.kill()
        standby.start()
        standby.promote()
        shop.move(standby)
        shop.add("N1")
        # the new primary's WAL has passed the position by now
        shop.cluster("CREATE TABLE IF NOT EXISTS filler AS SELECT repeat('x', 100) FROM generate_series(1, 5000)")
        shop.add("N2")
        assert shop.cluster("SELECT pg_current_wal_flush_lsn() > %s::pg_lsn", read) == [(True,)]
        with pytest.raises(
            OffsetExpired,
            match=rf"promoted or restored \(timeline 2\) and left timeline 1 at \S+, but {PRODUCTS} was read up to {read} .*"
            rf"rebuild {PRODUCTS} {STORES}$",
        ):
            shop.reader.plan()
        shop.resnapshot_all()
        assert shop.products() == shop.source_products() == ["N1", "N2", "P1", "P2", "P3"]
        shop.add("N3")
        shop.reader.run()
        assert shop.products() == shop.source_products()
        assert not shop.reader.plan().tasks


def test_with_synchronized_standby_slots_only_replicated_changes_are_read(tmp_path: Path) -> None:
    """No failover loses changes that were read, and a standby that is down does not block a run."""
    with pair(tmp_path, synced=True) as (shop, standby):

        def is_read(name: str) -> bool:
            shop.reader.run()
            return name in shop.products()

        shop.cluster("ALTER SYSTEM SET synchronized_standby_slots = 'standby'")
        shop.cluster("SELECT pg_reload_conf()")
        shop.add("P4")
        standby.wait_for_replay()
        wait_for(lambda: is_read("P4"), "changes that the standby has received were not read")
        standby.kill()
        shop.add("P5")
        started = time.monotonic()
        assert shop.reader.run() == {}
        assert time.monotonic() - started < 10
        assert re.fullmatch(
            r"\d+ (bytes|kB) of WAL, waiting for standbys", shop.reader.source.lag(shop.reader.positions)[PRODUCTS]
        )
        standby.start()
        standby.wait_for_replay()
        wait_for(lambda: is_read("P5"), "changes that the standby has received were not read")
        standby.kill()
        shop.add("lost")
        shop.reader.run()
        shop.cluster.kill()
        standby.start()
        standby.promote()
        shop.move(standby)
        # this server copied that setting
        shop.cluster("ALTER SYSTEM RESET synchronized_standby_slots")
        shop.cluster("SELECT pg_reload_conf()")
        shop.add("P6")
        shop.reader.run()
        assert shop.products() == shop.source_products() == ["P1", "P2", "P3", "P4", "P5", "P6"]
        assert not shop.duplicate_positions()


# -- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_dropped_with_pending_changes_is_an_error_until_all_is_resnapshotted(shop: Shop) -> None:
    shop.add("P1", "P2")
    shop.reader.run()
    plan_before = shop.reader.positions
    shop.add("P3")
    plan = shop.reader.plan()
    shop.cluster("SELECT pg_drop_replication_slot('shopsphere')")
    # between the plan and its task
    with pytest.raises(SourceError, match=r"replication slot .* does not exist"):
        shop.reader.read(plan)
    assert shop.reader.positions == plan_before
    shop.cluster("DELETE FROM products WHERE product_id = 'P1'")
    with pytest.raises(OffsetExpired, match="no longer exists"):
        shop.reader.plan()
    assert shop.reader.source.lag(shop.reader.positions)[PRODUCTS] == "replication slot missing"
    shop.resnapshot_all()
    assert shop.products() == shop.source_products() == ["P2", "P3"]


def test_a_slot_beyond_max_slot_wal_keep_size_is_an_error_until_all_is_resnapshotted(shop: Shop) -> None:
    """The WAL is that of rows of a published table, not of forced WAL switches."""
    shop.add("P1", "P2")
    shop.reader.run()
    shop.cluster("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    shop.cluster("SELECT pg_reload_conf()")
    try:
        shop.cluster(
            "INSERT INTO products (product_id, name) SELECT 'Q' || i, repeat(md5(i::text), 300) FROM generate_series(1, 6000) i"
        )
        shop.cluster("DELETE FROM products WHERE product_id = 'P1'")

        def is_lost() -> bool:
            shop.cluster("CHECKPOINT")
            shop.cluster("SELECT pg_switch_wal()")
            return shop.cluster("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'shopsphere'") == [("lost",)]

        wait_for(is_lost, "the slot was not lost")
    finally:
        shop.cluster("ALTER SYSTEM RESET max_slot_wal_keep_size")
        shop.cluster("SELECT pg_reload_conf()")
    with pytest.raises(OffsetExpired, match=rf"'shopsphere' is lost: the server removed WAL .*rebuild {PRODUCTS} {STORES}$"):
        shop.reader.plan()
    assert shop.reader.source.lag(shop.reader.positions)[PRODUCTS] == "replication slot lost"
    shop.resnapshot_all()
    shop.add("P3")
    shop.reader.run()
    assert shop.products() == shop.source_products()


# -- transactions ----------------------------------------------------------------------------------------------------


def test_transactions_open_over_several_runs_are_read_when_they_commit(shop: Shop) -> None:
    shop.add("P1")
    shop.reader.run()
    with psycopg.connect(shop.cluster.dsn) as long, psycopg.connect(shop.cluster.dsn) as never:
        long.execute("INSERT INTO products (product_id) VALUES ('long 1')")
        never.execute("INSERT INTO products (product_id) VALUES ('never')")
        for number in range(4):
            shop.add(f"short {number}")
            shop.reader.run()
            long.execute("INSERT INTO products (product_id) VALUES (%s)", [f"long in run {number}"])
            long.execute("UPDATE products SET name = %s WHERE product_id = 'long 1'", [f"run {number}"])
            assert not [name for name in shop.products() if name.startswith("long")]
        # a rolled back savepoint is no change
        long.execute("SAVEPOINT s")
        long.execute("INSERT INTO products (product_id) VALUES ('undone')")
        long.execute("ROLLBACK TO s")
        long.commit()
        never.rollback()
    shop.reader.run()
    assert shop.products() == shop.source_products()
    assert shop.reader.latest(PRODUCTS, ("product_id",))[("long 1",)]["name"] == "run 3"
    assert not shop.duplicate_positions()
    assert not shop.reader.plan().tasks


def test_the_initial_read_waits_for_open_transactions(shop: Shop) -> None:
    with psycopg.connect(shop.cluster.dsn) as open_, psycopg.connect(shop.cluster.dsn, autocommit=True) as look:
        open_.execute("INSERT INTO products (product_id) VALUES ('open')")
        shop.add("P1")
        failures: list[BaseException] = []

        def read() -> None:
            try:
                shop.reader.run()
            except BaseException as error:
                failures.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        waiting = "SELECT FROM pg_stat_activity WHERE query LIKE 'CREATE_REPLICATION_SLOT%' AND wait_event_type = 'Lock'"
        wait_for(lambda: look.execute(waiting).fetchone() is not None, "the initial read did not wait")
        open_.execute("INSERT INTO products (product_id) VALUES ('open too')")
        open_.commit()
        reading.join(60)
    assert not failures
    assert shop.products() == ["P1", "open", "open too"]


def test_a_transaction_that_stays_open_is_an_error_and_leaves_no_slot(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOCK_TIMEOUT", "500ms")
    with psycopg.connect(shop.cluster.dsn) as open_:
        open_.execute("INSERT INTO products (product_id) VALUES ('open')")
        with pytest.raises(SourceError, match=r"a transaction is still open after"):
            shop.reader.plan()
        assert shop.cluster("SELECT slot_name FROM pg_replication_slots") == []
        open_.commit()
    shop.reader.run()
    assert shop.products() == ["open"]


# -- types -----------------------------------------------------------------------------------------------------------

TYPES = """
CREATE TYPE grade AS ENUM ('good', 'so, so');
CREATE DOMAIN price AS numeric(10,3) CHECK (value >= 0);
CREATE TYPE size AS (width int, label text);
ALTER TABLE products
    ADD small smallint, ADD whole integer, ADD big bigint, ADD anything numeric, ADD wide numeric(50,10),
    ADD exact numeric(38,20),
    ADD rough double precision, ADD rougher real, ADD day date, ADD moment timestamptz, ADD wall timestamp, ADD clock timetz,
    ADD span interval, ADD flag boolean, ADD raw bytea, ADD id uuid, ADD doc jsonb, ADD plain json, ADD words text[],
    ADD grid int[][], ADD grade grade, ADD priced price, ADD boxed size, ADD net inet, ADD bits bit(4), ADD during tstzrange,
    ADD twice numeric GENERATED ALWAYS AS (list_price * 2) STORED, ADD paid money;
"""
ROWS = {
    "most": (
        "32767, 2147483647, 9223372036854775807, 'NaN', 1e39, 123456789012345678.12345678901234567890, 'Infinity', 'NaN', "
        "'9999-12-31', '9999-12-31 23:59:59.999999+00', 'infinity', '23:59:59.999999-12', '178000000 years', true, "
        "'\\x00ff', 'ffffffff-ffff-ffff-ffff-ffffffffffff', '{\"a\": [1, null, \"\\u00e9\"]}', '{\"b\" :  1,\"b\":2}', "
        "'{\"a,b\",NULL,\"\"}', '{{1,2},{3,4}}', 'so, so', 1.5, ROW(1, 'x'), '2001:db8::1/64', '1010', "
        "'[2026-01-01 00:00+00,infinity)', 12.34"
    ),
    "least": (
        "-32768, -2147483648, -9223372036854775808, '-Infinity', -1e39, -123456789012345678.12345678901234567890, '-Infinity', "
        "1e-37, '0001-01-01', '0001-01-01 00:00:00+00', '4713-01-01 BC', '00:00:00+14', '-1 mon +1 day -00:00:01', false, "
        "'', '00000000-0000-0000-0000-000000000000', 'null', '[]', '{}', '{}', 'good', 0, ROW(NULL, ''), '0.0.0.0', '0000', "
        "'empty', -12.34"
    ),
    "beyond": (
        "0, 0, 0, 0, 0, 0, 0, 0, '0044-03-15 BC', '0044-03-15 12:00:00+00 BC', '0044-03-15 BC', '12:00+00', '0', NULL, NULL, "
        "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL"
    ),
    "endless": (
        "0, 0, 0, 0, 0, 0, 0, 0, 'infinity', 'infinity', '-infinity', '12:00+00', '0', NULL, NULL, NULL, "
        "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL"
    ),
    "late": (
        "0, 0, 0, 0, 0, 0, 0, 0, '10000-01-01', '294276-12-31 23:59:59+00', '294276-12-31', '12:00+00', '0', NULL, NULL, NULL, "
        "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL"
    ),
}
COLUMNS = (
    "small, whole, big, anything, wide, exact, rough, rougher, day, moment, wall, clock, span, flag, raw, id, doc, plain, words, "
    "grid, grade, priced, boxed, net, bits, during, paid"
)


def test_values_of_every_type_are_equal_by_initial_read_and_stream(shop: Shop) -> None:
    shop.cluster("DROP TYPE IF EXISTS grade, size CASCADE; DROP DOMAIN IF EXISTS price CASCADE")
    shop.cluster(TYPES)

    def insert(name: str, values: str) -> None:
        shop.cluster(f"INSERT INTO products (product_id, list_price, {COLUMNS}) VALUES ('{name}', 1.25, {values})")

    for name, values in ROWS.items():
        insert(f"{name} read", values)
    shop.reader.run()
    for name, values in ROWS.items():
        insert(f"{name} streamed", values)
    shop.reader.run()
    rows = shop.reader.latest(PRODUCTS, ("product_id",))
    assert len(rows) == 2 * len(ROWS)

    def values_of(row: Any) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "product_id" and not name.startswith("_")}

    for name in ROWS:
        read, streamed = rows[(f"{name} read",)], rows[(f"{name} streamed",)]
        assert values_of(read) == values_of(streamed)
        assert read["_unreadable"] == streamed["_unreadable"]
    most, least = rows[("most read",)], rows[("least read",)]
    assert (most["small"], most["whole"], most["big"]) == (32767, 2147483647, 2**63 - 1)
    assert (least["small"], least["whole"], least["big"]) == (-32768, -(2**31), -(2**63))
    assert (most["anything"], least["anything"], most["rough"], most["rougher"]) == ("NaN", "-Infinity", "Infinity", "NaN")
    assert most["exact"] == Decimal("123456789012345678.12345678901234567890")
    assert least["exact"] == Decimal("-123456789012345678.12345678901234567890")
    assert most["wide"] == "1" + 39 * "0" + ".0000000000"
    assert most["moment"] == datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert least["moment"] == datetime(1, 1, 1, tzinfo=UTC)
    assert (most["flag"], least["flag"], rows[("beyond read",)]["flag"]) == (True, False, None)
    assert (most["raw"], least["raw"]) == ("\\x00ff", "\\x")
    assert json.loads(most["doc"]) == {"a": [1, None, "\u00e9"]}
    assert (least["doc"], most["plain"]) == ("null", '{"b" :  1,"b":2}')
    assert (most["words"], most["grid"], least["words"]) == ('{"a,b",NULL,""}', "{{1,2},{3,4}}", "{}")
    assert (most["grade"], most["priced"], most["boxed"]) == ("so, so", "1.500", "(1,x)")
    assert (most["net"], most["bits"], most["paid"]) == ("2001:db8::1/64", "1010", "$12.34")
    # values outside the range of dates are kept as text
    assert json.loads(rows[("beyond read",)]["_unreadable"]) == {"day": "0044-03-15 BC", "moment": "0044-03-15 12:00:00+00 BC"}
    assert json.loads(rows[("endless read",)]["_unreadable"]) == {"day": "infinity", "moment": "infinity"}
    assert json.loads(rows[("late read",)]["_unreadable"]) == {"day": "10000-01-01", "moment": "294276-12-31 23:59:59+00"}
    # PostgreSQL sends no generated columns unless the publication says so
    assert "twice" not in most


def test_generated_columns_that_are_published_are_read(shop: Shop) -> None:
    shop.cluster("ALTER TABLE products ADD twice numeric(18,2) GENERATED ALWAYS AS (list_price * 2) STORED")
    shop.cluster("ALTER PUBLICATION shopsphere SET (publish_generated_columns = stored)")
    shop.cluster("INSERT INTO products (product_id, list_price) VALUES ('read', 1.25)")
    shop.reader.run()
    shop.cluster("INSERT INTO products (product_id, list_price) VALUES ('streamed', 2.25)")
    shop.reader.run()
    rows = shop.reader.latest(PRODUCTS, ("product_id",))
    assert (rows[("read",)]["twice"], rows[("streamed",)]["twice"]) == (Decimal("2.50"), Decimal("4.50"))


def test_columns_added_and_dropped_between_two_runs(shop: Shop) -> None:
    shop.cluster("ALTER TABLE products ADD colour text")
    shop.cluster("INSERT INTO products (product_id, colour) VALUES ('P1', 'red')")
    shop.reader.run()
    # all of it is read by one run, which plans only with the columns at its end
    shop.cluster("INSERT INTO products (product_id, colour) VALUES ('P2', 'blue')")
    shop.cluster("ALTER TABLE products ADD fleeting integer")
    shop.cluster("INSERT INTO products (product_id, fleeting) VALUES ('P3', 3)")
    shop.cluster("ALTER TABLE products DROP fleeting")
    shop.cluster("ALTER TABLE products DROP colour")
    shop.cluster("INSERT INTO products (product_id) VALUES ('P4')")
    shop.cluster("ALTER TABLE products RENAME brand TO maker")
    shop.cluster("INSERT INTO products (product_id, maker) VALUES ('P5', 'm')")
    shop.reader.run()
    rows = {key[0]: row for key, row in shop.reader.latest(PRODUCTS, ("product_id",)).items()}
    assert [rows[name].get("colour") for name in ("P1", "P2", "P3", "P4")] == ["red", "blue", None, None]
    assert (rows["P3"]["fleeting"], rows["P4"].get("fleeting")) == (3, None)
    assert (rows["P5"]["maker"], rows["P5"]["brand"]) == ("m", None)
    # the same name with another type: an error that loses nothing
    shop.cluster("ALTER TABLE products ADD colour integer")
    shop.cluster("INSERT INTO products (product_id, colour) VALUES ('P6', 6)")
    with pytest.raises(SchemaConflict, match="column 'colour' is text, but the source now sends integer"):
        shop.reader.run()
    shop.cluster("ALTER TABLE products ALTER colour TYPE text")
    with pytest.raises(SchemaConflict, match="column 'colour' is text, but the source now sends integer"):
        shop.reader.run()
    shop.reader.source = PostgresSource(shop.settings.model_copy(update={"retyped_columns": "beside"}))
    shop.reader.run()
    assert shop.reader.latest(PRODUCTS, ("product_id",))[("P6",)]["colour__integer"] == 6


def test_several_tables_truncated_at_once_are_empty_at_once(shop: Shop) -> None:
    shop.add("P1", "P2")
    shop.cluster("INSERT INTO stores (store_id) VALUES ('S1')")
    shop.reader.run()
    with psycopg.connect(shop.cluster.dsn) as writing:
        writing.execute("INSERT INTO products (product_id) VALUES ('before')")
        writing.execute("TRUNCATE products, stores")
        writing.execute("INSERT INTO products (product_id) VALUES ('after')")
    shop.reader.run()
    assert shop.products() == shop.source_products() == ["after"]
    assert shop.reader.latest(STORES, ("store_id",)) == {}


def test_toast_values_that_an_update_does_not_change(shop: Shop) -> None:
    """With a full old row image the values are present, without it their columns are listed."""
    long = "x1y2" * 25_000
    shop.cluster("ALTER TABLE products ALTER name SET STORAGE EXTERNAL; ALTER TABLE stores ALTER name SET STORAGE EXTERNAL")
    shop.cluster("INSERT INTO products (product_id, name) VALUES ('P', %s)", long)
    shop.cluster("INSERT INTO stores (store_id, name) VALUES ('S', %s)", long)
    shop.reader.run()
    started = time.monotonic()
    for number in range(50):
        shop.cluster("UPDATE products SET category = %s", str(number))
        shop.cluster("UPDATE stores SET city = %s", str(number))
    rows = shop.reader.run()
    assert time.monotonic() - started < 60
    assert {row["name"] for row in rows[PRODUCTS]} == {long}
    assert {(row["name"], row["_unchanged"]) for row in rows[STORES]} == {(None, "name")}
    # the key changes and the value does not: the delete has the key, and the update lists the missing column
    shop.cluster("UPDATE stores SET store_id = 'S2'")
    moved = shop.reader.run()[STORES]
    assert [(row["_op"], row["store_id"], row["_unchanged"]) for row in moved] == [("d", "S", None), ("u", "S2", "name")]
