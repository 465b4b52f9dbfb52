"""The PostgreSQL connector against a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo
from support.bronze_reading import Reader, live_rows_by_key

from lakehouse.errors import CommitConflict, OffsetExpired, SchemaConflict, SourceError, UnknownColumn
from lakehouse.source import Rows, restart_position
from pipelines.bronze.current_rows import current_rows
from pipelines.bronze.name_list import split_names
from pipelines.bronze.tables import POSTGRES_TABLES, TABLES
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres import connection, initial_read, slot
from pipelines.sources.postgres.checks import check_server
from pipelines.sources.postgres.replication_state import read_replication_state
from pipelines.sources.postgres.slot import peek_messages
from pipelines.sources.postgres.source import PostgresSource
from pipelines.sources.postgres.stream import StreamTask
from pipelines.sources.postgres.types import SourceColumn, parse_text, wider_type

PRODUCTS, STORES, USERS, ITEMS, RATES = (
    POSTGRES_TABLES[name][0].name for name in ("products", "stores", "users", "order_items", "exchange_rates")
)
CREATE_PRODUCTS = """
CREATE TABLE products (product_id text PRIMARY KEY, name text, category text, brand text, list_price numeric(18,2),
                       currency char(3), updated_at timestamptz);
"""
SCHEMA = f"""{CREATE_PRODUCTS}
CREATE TABLE stores (store_id text PRIMARY KEY, name text, kind text, city text, country char(2), updated_at timestamptz);
CREATE TABLE order_items (order_id bigint, line_no int, product_id text, quantity int, unit_price numeric(18,4),
                          PRIMARY KEY (order_id, line_no));
CREATE TABLE exchange_rates (rate_date date, currency char(3), to_base numeric(18,8), PRIMARY KEY (rate_date, currency));
CREATE TABLE elsewhere (id int PRIMARY KEY);
ALTER TABLE products REPLICA IDENTITY FULL;
ALTER TABLE order_items REPLICA IDENTITY FULL;
CREATE PUBLICATION shopsphere FOR ALL TABLES;
"""


class Shop:
    """A separate database with a connection that writes to it and a reader."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.name = str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.settings = PostgresSettings(dsn=dsn, slot=self.name)  # type: ignore[arg-type, call-arg]
        self.reader = Reader(PostgresSource(self.settings))

    def __call__(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(query, parameters or None)  # type: ignore[call-overload]
        while cursor.nextset():
            pass
        return cursor.fetchall() if cursor.description else []

    def add_products(self, first: int, last: int) -> None:
        self(
            "INSERT INTO products SELECT 'P' || i, 'name ' || i, NULL, 'b', i + 0.25, 'EUR', "
            f"timestamptz '2026-01-01 00:00+00' + make_interval(secs => i) FROM generate_series({first}, {last}) i"
        )

    def confirmed(self) -> str:
        return str(self("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", self.name)[0][0])


@contextmanager
def database(dsn: str, name: str, schema: str = SCHEMA) -> Iterator[Shop]:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        shop = Shop(make_conninfo(dsn, dbname=name))
        try:
            shop(schema)
            yield shop
        finally:
            shop.connection.close()
            admin.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (name,))
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


@pytest.fixture
def shop(servers: Any, request: pytest.FixtureRequest) -> Iterator[Shop]:
    with database(servers.postgres_dsn, f"b{abs(hash(request.node.nodeid)):x}_{time.time_ns():x}"[:40]) as shop:
        yield shop


def ops(rows: list[dict[str, Any]], *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("_op", *columns)) for row in rows]


def test_every_table_of_the_source_contract_is_declared() -> None:
    assert {table.name.split(".")[1] for table in TABLES} == {
        *(f"bronze_postgres__{name}" for name in POSTGRES_TABLES),
        "bronze_mongo__marketplace_orders",
        "bronze_kafka__events",
    }
    for table, key in POSTGRES_TABLES.values():
        assert not table.key
        assert set(key) <= set(table.schema.names)


def test_initial_read_converts_every_type(shop: Shop) -> None:
    shop.add_products(1, 3)
    shop("INSERT INTO products VALUES ('Q', E'say \"hi\",\\n\\\\. ok', '', NULL, -0.05, 'US', '2026-03-04 05:06:07.089+07')")
    shop("INSERT INTO exchange_rates VALUES ('2026-02-03', 'IDR', 0.00006123)")
    rows = shop.reader.run()
    assert len(rows[PRODUCTS]) == 4
    odd = next(row for row in rows[PRODUCTS] if row["product_id"] == "Q")
    assert odd["name"] == 'say "hi",\n\\. ok'
    assert odd["category"] == ""
    assert odd["brand"] is None
    assert odd["list_price"] == Decimal("-0.05")
    assert odd["currency"] == "US "
    assert odd["updated_at"] == datetime(2026, 3, 3, 22, 6, 7, 89000, UTC)
    assert odd["_op"] == "r"
    assert odd["_source_position"].endswith("-000000.0000000003")
    rate = rows[RATES][0]
    assert (rate["rate_date"], rate["to_base"]) == (date(2026, 2, 3), Decimal("0.00006123"))
    assert USERS not in rows
    assert shop.reader.source.lag(shop.reader.positions)[USERS] == "not in the publication"
    assert shop.reader.source.lag(shop.reader.positions)[PRODUCTS] == "up to date"


def test_initial_read_in_ranges_continues_with_the_stream_during_concurrent_writes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_read, "BLOCKS_PER_TASK", 4)
    shop.add_products(1, 3000)
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(shop.dsn) as writing:
            number = 10_000
            while not stop.is_set():
                number += 1
                writing.execute("INSERT INTO products VALUES (%s, 'new', NULL, NULL, 1, 'EUR', now())", (f"N{number}",))
                writing.execute(
                    "UPDATE products SET list_price = list_price + 1 WHERE product_id = %s", (f"P{number % 3000 + 1}",)
                )
                writing.execute("DELETE FROM products WHERE product_id = %s", (f"N{number - 7}",))
                writing.commit()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert len(shop.reader.plan().tasks) > 5
        for _ in range(4):
            shop.reader.run()
            time.sleep(0.05)
    finally:
        stop.set()
        writer.join()
    shop.reader.run()
    held = {key[0]: (row["list_price"], row["name"]) for key, row in shop.reader.latest(PRODUCTS, ("product_id",)).items()}
    assert held == {row[0]: (row[1], row[2]) for row in shop("SELECT product_id, list_price, name FROM products")}
    positions = [row["_source_position"] for row in shop.reader.rows[PRODUCTS] if row["_op"] != "r"]
    assert len(positions) == len(set(positions))


def test_rows_of_the_initial_read_have_unique_positions_before_every_change(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_read, "BLOCKS_PER_TASK", 4)
    monkeypatch.setattr(initial_read, "BATCH_ROWS", 70)
    shop.add_products(1, 1000)
    plan = shop.reader.plan()
    assert len(plan.tasks) > 3
    first, _ = shop.reader.read(plan)
    second, _ = shop.reader.read(plan)
    plan.held.close()
    assert first == second
    positions = [row["_source_position"] for row in first[PRODUCTS]]
    assert positions == sorted(set(positions))
    (lsn,) = {position[:16] for position in positions}
    assert max(positions) < f"{lsn}/{0:010d}"


def test_resnapshot_of_a_table_begins_an_epoch_with_a_marker(shop: Shop) -> None:
    shop.add_products(1, 3)
    shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
    shop.reader.run()
    shop("UPDATE products SET name = 'x' WHERE product_id = 'P1'; INSERT INTO stores VALUES ('T', 'two', 'store')")
    shop("DELETE FROM products WHERE product_id = 'P2'")
    before = list(shop.reader.rows[PRODUCTS])
    shop.reader.positions[PRODUCTS] = restart_position(shop.reader.positions[PRODUCTS])
    rows = shop.reader.run()
    found = sorted(rows[PRODUCTS], key=lambda row: row["_source_position"])
    # changes that the slot still had come first: they belong to the previous epoch
    assert ops(found, "product_id") == [("u", "P1"), ("d", "P2"), ("t", None), ("r", "P3"), ("r", "P1")]
    assert ops(rows[STORES], "store_id") == [("c", "T")]
    last, marker, *others = (row["_source_position"] for row in found[1:])
    assert marker == "~000001~"
    assert max(row["_source_position"] for row in before) < last < marker < min(others)
    assert abs((found[2]["_source_time"] - datetime.now(UTC)).total_seconds()) < 60
    shop.add_products(4, 4)
    shop("DELETE FROM stores WHERE store_id = 'S'")
    rows = shop.reader.run()
    assert rows[PRODUCTS][0]["_source_position"].startswith("~000001~")
    assert not rows[STORES][0]["_source_position"].startswith("~")
    assert sorted(key[0] for key in shop.reader.latest(PRODUCTS, ("product_id",))) == ["P1", "P3", "P4"]
    shop("TRUNCATE products")
    shop.reader.positions[PRODUCTS] = restart_position(shop.reader.positions[PRODUCTS])
    positions = sorted(row["_source_position"] for row in shop.reader.run()[PRODUCTS])
    assert positions[0].startswith("~000001~")
    assert positions[1:] == ["~000002~"]
    assert shop.reader.source.lag(shop.reader.positions)[PRODUCTS] == "up to date"
    assert not shop.reader.plan().tasks


def test_changes_come_in_order_with_the_values_that_the_server_sent(shop: Shop) -> None:
    shop.add_products(1, 2)
    shop.reader.run()
    with shop.connection.transaction():
        shop("INSERT INTO products VALUES ('A', 'a', NULL, NULL, 1, 'EUR', now())")
        shop("UPDATE products SET name = 'b' WHERE product_id = 'A'")
        shop("UPDATE products SET product_id = 'B' WHERE product_id = 'A'")
        shop("DELETE FROM products WHERE product_id = 'B'")
    rows = shop.reader.run()
    assert list(rows) == [PRODUCTS]
    changes = rows[PRODUCTS]
    assert ops(changes, "product_id", "name") == [
        ("c", "A", "a"),
        ("u", "A", "b"),
        ("d", "A", "b"),
        ("u", "B", "b"),
        ("d", "B", "b"),
    ]
    positions = [row["_source_position"] for row in changes]
    assert positions == sorted(positions)
    assert [position[-2:] for position in positions] == ["01", "02", "03", "04", "05"]
    assert len({position[:16] for position in positions}) == 1
    assert abs((changes[0]["_source_time"] - datetime.now(UTC)).total_seconds()) < 60


def test_deletes_without_full_replica_identity_have_only_the_key(shop: Shop) -> None:
    shop("INSERT INTO stores VALUES ('S1', 'one', 'store', 'X', 'DE', now()), ('S2', 'two', 'store', 'X', 'DE', now())")
    shop.reader.run()
    shop("UPDATE stores SET name = 'uno' WHERE store_id = 'S1'; UPDATE stores SET store_id = 'S3' WHERE store_id = 'S1'")
    shop("DELETE FROM stores WHERE store_id = 'S2'")
    assert ops(shop.reader.run()[STORES], "store_id", "name", "country") == [
        ("u", "S1", "uno", "DE"),
        ("d", "S1", None, None),
        ("u", "S3", "uno", "DE"),
        ("d", "S2", None, None),
    ]


def test_unsent_toast_values_are_listed_or_taken_from_the_old_row_image(shop: Shop) -> None:
    shop("ALTER TABLE stores ALTER name SET STORAGE EXTERNAL; ALTER TABLE products ALTER name SET STORAGE EXTERNAL")
    shop("INSERT INTO stores VALUES ('S', repeat('x', 9000), 'store'); INSERT INTO products VALUES ('P', repeat('y', 9000))")
    shop.reader.run()
    shop("UPDATE stores SET city = 'Z'; UPDATE products SET brand = 'Z'")
    rows = shop.reader.run()
    assert ops(rows[STORES], "name", "city", "_unchanged") == [("u", None, "Z", "name")]
    assert ops(rows[PRODUCTS], "name", "brand", "_unchanged") == [("u", "y" * 9000, "Z", None)]


def test_any_column_name_can_be_unsent(shop: Shop) -> None:
    names = ("width, cm", "a%2Cb", "two words", "dims.width")
    for name in names:
        shop(f'ALTER TABLE stores ADD "{name}" text; ALTER TABLE stores ALTER "{name}" SET STORAGE EXTERNAL')
    columns = ", ".join(f'"{name}"' for name in names)
    values = ", ".join(["repeat('x', 9000)"] * len(names))
    shop(f"INSERT INTO stores (store_id, {columns}) VALUES ('S', {values})")
    (inserted,) = shop.reader.run()[STORES]
    shop("UPDATE stores SET city = 'Z'")
    (updated,) = shop.reader.run()[STORES]
    assert set(split_names(updated["_unchanged"])) == set(names)
    (current,) = current_rows(pl.DataFrame([inserted, updated], infer_schema_length=None), ("store_id",)).to_dicts()
    assert [len(current[name]) for name in names] == [9000] * len(names)


def test_truncate_is_a_row_without_a_key(shop: Shop) -> None:
    shop.add_products(1, 2)
    shop.reader.run()
    shop("TRUNCATE products, stores")
    shop.add_products(7, 7)
    rows = shop.reader.run()
    assert ops(rows[PRODUCTS], "product_id") == [("t", None), ("c", "P7")]
    assert ops(rows[STORES], "store_id") == [("t", None)]
    assert list(shop.reader.latest(PRODUCTS, ("product_id",))) == [("P7",)]


def test_a_plan_without_changes_is_fast_and_moves_no_position(shop: Shop) -> None:
    shop.add_products(1, 100)
    shop.reader.run()
    shop("SELECT pg_logical_emit_message(true, 'another', 'client')")
    before = shop.confirmed()
    started = time.monotonic()
    plan = shop.reader.plan()
    assert time.monotonic() - started < 3
    assert not plan.tasks
    assert not plan.positions
    assert shop.confirmed() == before


def test_changes_of_other_tables_still_move_the_position(shop: Shop) -> None:
    shop.add_products(1, 1)
    shop.reader.run()
    before = dict(shop.reader.positions)
    shop("INSERT INTO elsewhere VALUES (1)")
    assert shop.reader.run() == {}
    moved = [table for table in before if shop.reader.positions[table] != before[table]]
    assert len(moved) == 1
    assert not shop.reader.plan().tasks
    assert shop.reader.source.lag(shop.reader.positions)[PRODUCTS] == "up to date"


def test_only_tables_with_new_rows_get_a_new_position(shop: Shop) -> None:
    shop.reader.run()
    before = dict(shop.reader.positions)
    shop.add_products(1, 1)
    shop.reader.run()
    assert [table for table in before if shop.reader.positions[table] != before[table]] == [PRODUCTS]


def test_a_crash_before_the_acknowledgement_neither_duplicates_nor_loses_rows(shop: Shop) -> None:
    shop.reader.run()
    shop.add_products(1, 50)
    plan = shop.reader.plan()
    first, positions = shop.reader.read(plan)
    repeated, _ = shop.reader.read(plan)
    assert repeated == first
    assert shop.reader.read(shop.reader.plan())[0] == first
    shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
    # The products were committed, the crash came before the stores' commit and the acknowledgement.
    shop.reader.positions[PRODUCTS] = positions[PRODUCTS]
    shop.add_products(51, 51)
    rows = shop.reader.run()
    assert [row["product_id"] for row in rows[PRODUCTS]] == ["P51"]
    assert [row["store_id"] for row in rows[STORES]] == ["S"]
    shop.reader.source.acknowledge(plan)
    assert not shop.reader.plan().tasks


def test_a_crash_during_the_initial_read_repeats_it_for_the_missing_tables(shop: Shop) -> None:
    shop.add_products(1, 10)
    plan = shop.reader.plan()
    plan.held.close()
    shop.add_products(11, 12)
    shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
    shop.reader.run()
    assert len(shop.reader.rows[PRODUCTS]) == 12
    del shop.reader.positions[STORES], shop.reader.rows[STORES]
    shop.add_products(13, 13)
    shop("INSERT INTO stores VALUES ('T', 'two', 'store')")
    rows = shop.reader.run()
    assert ops(rows[STORES], "store_id") == [("r", "S"), ("r", "T")]
    assert ops(rows[PRODUCTS], "product_id") == [("c", "P13")]
    shop("UPDATE stores SET name = 'x' WHERE store_id = 'S'")
    assert ops(shop.reader.run()[STORES], "store_id") == [("u", "S")]
    assert len(shop("SELECT 1 FROM pg_replication_slots WHERE database = %s", shop.name)) == 1


def test_a_table_added_to_the_publication_later_is_read(servers: Any) -> None:
    schema = SCHEMA.replace("FOR ALL TABLES", "FOR TABLE products")
    with database(servers.postgres_dsn, f"later_{time.time_ns():x}", schema) as shop:
        shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
        shop.add_products(1, 1)
        assert list(shop.reader.run()) == [PRODUCTS]
        shop("ALTER PUBLICATION shopsphere ADD TABLE stores")
        shop("INSERT INTO stores VALUES ('T', 'two', 'store')")
        assert ops(shop.reader.run()[STORES], "store_id") == [("r", "S"), ("r", "T")]
        shop("ALTER PUBLICATION shopsphere DROP TABLE stores")
        with pytest.raises(SourceError, match="stores left publication 'shopsphere'"):
            shop.reader.plan()


REPLACEMENTS = {
    "dropped and re-created": ("DROP TABLE products", CREATE_PRODUCTS),
    "swapped with another table": (
        "CREATE TABLE products_new (LIKE products INCLUDING ALL)",
        "ALTER TABLE products RENAME TO products_old",
        "ALTER TABLE products_new RENAME TO products",
    ),
    "left and joined again": (
        "ALTER PUBLICATION shopsphere DROP TABLES IN SCHEMA public",
        "DELETE FROM products WHERE product_id = 'P1'",
        "ALTER PUBLICATION shopsphere ADD TABLES IN SCHEMA public",
    ),
    "published one by one": ("ALTER PUBLICATION shopsphere SET TABLE products, stores, order_items, exchange_rates",),
    "publication re-created": (
        "DROP PUBLICATION shopsphere",
        "DELETE FROM products WHERE product_id = 'P1'",
        "CREATE PUBLICATION shopsphere FOR TABLES IN SCHEMA public",
    ),
}


@pytest.mark.parametrize("statements", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_replaced_table_is_an_error_until_it_is_resnapshotted(servers: Any, statements: tuple[str, ...]) -> None:
    schema = SCHEMA.replace("FOR ALL TABLES", "FOR TABLES IN SCHEMA public")
    with database(servers.postgres_dsn, f"replaced_{time.time_ns():x}", schema) as shop:
        shop.add_products(1, 2)
        shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
        shop.reader.run()
        shop("UPDATE products SET name = 'moved'; TRUNCATE stores; ALTER TABLE products ADD COLUMN more int DEFAULT 1")
        shop.reader.run()  # the same tables still
        for statement in statements:
            shop(statement)
        shop.add_products(5, 6)
        with pytest.raises(
            OffsetExpired, match=rf"products.* was re-created, or left publication.*rebuild .*{PRODUCTS}"
        ) as error:
            shop.reader.run()
        named = str(error.value).rpartition("rebuild ")[2].split()
        shop.reader.positions |= {table: restart_position(shop.reader.positions[table]) for table in named}  # type: ignore[dict-item]
        shop.reader.run()
        shop.add_products(7, 7)
        shop.reader.run()
        there = sorted(shop("SELECT product_id FROM products"))
        assert sorted(shop.reader.latest(PRODUCTS, ("product_id",))) == there


def test_a_position_without_an_origin_continues(shop: Shop) -> None:
    shop.add_products(1, 1)
    shop.reader.run()
    (origin,) = {position.pop("origin") for table, position in shop.reader.positions.items() if table == PRODUCTS}  # type: ignore[attr-defined]
    shop.add_products(2, 2)
    shop.reader.run()
    assert shop.reader.positions[PRODUCTS]["origin"] == origin


def test_only_published_columns_and_rows_are_read(servers: Any) -> None:
    schema = SCHEMA.replace("FOR ALL TABLES", "FOR TABLE products (product_id, name) WHERE (product_id > 'P5')")
    with database(servers.postgres_dsn, f"part_{time.time_ns():x}", schema) as shop:
        shop("ALTER TABLE products REPLICA IDENTITY DEFAULT")
        shop.add_products(1, 9)
        assert sorted(row["product_id"] for row in shop.reader.run()[PRODUCTS]) == ["P6", "P7", "P8", "P9"]
        shop("UPDATE products SET name = 'x' WHERE product_id IN ('P1', 'P7')")
        assert ops(shop.reader.run()[PRODUCTS], "product_id", "name", "brand") == [("u", "P7", "x", None)]


def test_columns_added_between_and_during_runs_are_read(shop: Shop) -> None:
    shop.add_products(1, 1)
    shop.reader.run()
    shop.add_products(2, 2)
    shop("ALTER TABLE products ADD COLUMN weight numeric(10,3), ADD COLUMN tags text[], ADD COLUMN passing bigint")
    shop("INSERT INTO products VALUES ('W', 'w', NULL, NULL, 1, 'EUR', now(), 1.5, '{a,b}', 7)")
    shop("ALTER TABLE products DROP COLUMN passing, DROP COLUMN brand")
    shop("INSERT INTO products VALUES ('X', 'x', NULL, 1, 'EUR', now(), 2.5, NULL)")
    rows = shop.reader.run()[PRODUCTS]
    assert ops(rows, "product_id", "weight", "tags", "passing", "brand") == [
        ("c", "P2", None, None, None, "b"),
        ("c", "W", Decimal("1.500"), "{a,b}", 7, None),
        ("c", "X", Decimal("2.500"), None, None, None),
    ]
    schema = shop.reader.schemas[PRODUCTS]
    assert schema.field("weight").type == pa.decimal128(10, 3)
    assert schema.field("tags").type == pa.string()


def test_columns_follow_types_that_become_wider(shop: Shop) -> None:
    shop("INSERT INTO order_items VALUES (1, 1, 'P', 2, 3.5)")
    shop.reader.run()
    shop("ALTER TABLE order_items ALTER quantity TYPE bigint, ALTER unit_price TYPE numeric(22,4)")
    shop("INSERT INTO order_items VALUES (1, 2, 'P', 5000000000, 3.5)")
    assert ops(shop.reader.run()[ITEMS], "quantity") == [("c", 5_000_000_000)]
    assert shop.reader.schemas[ITEMS].field("quantity").type == pa.int64()
    assert shop.reader.schemas[ITEMS].field("unit_price").type == pa.decimal128(22, 4)
    shop("ALTER TABLE order_items ALTER quantity TYPE int USING quantity % 10")
    shop("INSERT INTO order_items VALUES (1, 3, 'P', 6, 3.5)")
    assert ops(shop.reader.run()[ITEMS], "quantity")[-1] == ("c", 6)
    assert shop.reader.schemas[ITEMS].field("quantity").type == pa.int64()


def test_an_incompatible_type_is_an_error_that_loses_nothing(shop: Shop) -> None:
    shop("INSERT INTO order_items VALUES (1, 1, 'P', 2, 3.5)")
    shop.reader.run()
    shop("INSERT INTO order_items VALUES (1, 2, 'P', 2, 3.5)")
    shop("ALTER TABLE order_items ALTER quantity TYPE text")
    shop("INSERT INTO order_items VALUES (1, 3, 'P', 'two', 3.5)")
    with pytest.raises(SchemaConflict, match=r"order_items: column 'quantity' is integer, but the source now sends text.*beside"):
        shop.reader.run()
    shop("ALTER TABLE order_items ALTER quantity TYPE int USING 7")
    # The catalog is compatible again, but the stream still has rows from before.
    with pytest.raises(SchemaConflict, match="quantity"):
        shop.reader.run()
    beside = Reader(
        PostgresSource(shop.settings.model_copy(update={"retyped_columns": "beside"})),
        shop.reader.rows,
        shop.reader.positions,
        shop.reader.schemas,
    )
    assert ops(beside.run()[ITEMS], "line_no", "quantity", "quantity__text") == [("c", 2, 2, None), ("c", 3, None, "two")]
    shop("INSERT INTO order_items VALUES (1, 4, 'P', 9, 3.5)")
    assert ops(beside.run()[ITEMS], "line_no", "quantity", "quantity__text") == [("c", 4, 9, None)]


def test_values_of_a_retyped_column_go_to_a_second_column(shop: Shop) -> None:
    reader = Reader(PostgresSource(shop.settings.model_copy(update={"retyped_columns": "beside"})))
    shop("INSERT INTO order_items VALUES (1, 1, 'P', 2, 3.5)")
    reader.run()
    shop("ALTER TABLE order_items ALTER unit_price TYPE numeric(18,2)")
    shop("UPDATE order_items SET unit_price = 4.25")
    assert ops(reader.run()[ITEMS], "unit_price", "unit_price__numeric_18_2") == [("u", None, Decimal("4.25"))]


@pytest.mark.parametrize("way", ["initial", "stream"])
def test_values_that_the_column_type_cannot_hold_are_kept_as_text(shop: Shop, way: str) -> None:
    if way == "stream":
        shop.reader.run()
    shop("""INSERT INTO products (product_id, list_price, updated_at) VALUES ('a', 'NaN', 'infinity'), ('b', 1, '0044-03-15 BC'),
            ('c', 1, '0001-01-01'), ('d', 1, '9999-12-31 23:59:59.999999'), ('e', 1, '12026-01-01'), ('f', 1, '-infinity')""")
    rows = {row["product_id"]: row for row in shop.reader.run()[PRODUCTS]}
    assert json.loads(rows["a"]["_unreadable"]) == {"list_price": "NaN", "updated_at": "infinity"}
    assert rows["a"]["list_price"] is None
    assert json.loads(rows["b"]["_unreadable"]) == {"updated_at": "0044-03-15 00:00:00+00 BC"}
    assert rows["c"]["updated_at"] == datetime(1, 1, 1, tzinfo=UTC)
    assert rows["d"]["updated_at"] == datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)
    assert json.loads(rows["e"]["_unreadable"]) == {"updated_at": "12026-01-01 00:00:00+00"}
    assert json.loads(rows["f"]["_unreadable"]) == {"updated_at": "-infinity"}
    assert rows["c"]["_unreadable"] is None


def test_a_source_column_with_a_reserved_name_is_renamed(shop: Shop) -> None:
    shop("ALTER TABLE products ADD COLUMN _op text")
    shop("INSERT INTO products VALUES ('a', NULL, NULL, NULL, 1, 'EUR', now(), 'custom')")
    assert ops(shop.reader.run()[PRODUCTS], "_op__source") == [("r", "custom")]


def test_a_large_transaction_comes_in_bounded_batches(shop: Shop) -> None:
    shop.reader.run()
    shop("INSERT INTO products (product_id) SELECT 'P' || i FROM generate_series(1, 50000) i; DELETE FROM products")
    (task,) = shop.reader.plan().tasks
    assert isinstance(task, StreamTask)
    batches = [item.rows for item in replace(task, batch_rows=7000).read() if isinstance(item, Rows)]
    assert max(batch.num_rows for batch in batches) <= 7000
    positions = pa.chunked_array([column for batch in batches for column in batch["_source_position"].chunks]).to_pylist()
    assert len(positions) == 100_000
    assert positions == sorted(set(positions))


def test_decoding_with_any_batch_size_gives_the_same_rows(shop: Shop) -> None:
    shop.reader.run()
    shop.add_products(1, 5)
    shop("UPDATE products SET product_id = 'Q' || product_id; INSERT INTO stores VALUES ('S', 'x', 'store')")
    shop("ALTER TABLE products ADD COLUMN extra int; INSERT INTO products (product_id, extra) VALUES ('Z', 1)")
    shop("DELETE FROM products WHERE product_id < 'QP3'; TRUNCATE stores")
    (task,) = shop.reader.plan().tasks
    assert isinstance(task, StreamTask)
    with psycopg.connect(shop.dsn) as reading:
        messages = list(peek_messages(reading, shop.settings, task.upto))
    whole: dict[str, list[Any]] = {}
    for rows in task.decode(iter(messages)):
        whole.setdefault(rows.table, []).extend(rows.rows.to_pylist())

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(1, 20))
    def same(batch_rows: int) -> None:
        split: dict[str, list[Any]] = {}
        for rows in replace(task, batch_rows=batch_rows).decode(iter(messages)):
            assert rows.rows.num_rows <= batch_rows
            split.setdefault(rows.table, []).extend(rows.rows.to_pylist())
        assert split == whole

    same()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_split_into_runs_gives_the_same_table(servers: Any, data: st.DataObject) -> None:
    keys = st.integers(0, 5)
    steps = data.draw(st.lists(st.tuples(st.sampled_from("iudkr"), keys, keys, st.integers(0, 99)), min_size=5, max_size=25))
    with database(servers.postgres_dsn, f"split_{time.time_ns():x}") as shop:
        for kind, one, other, value in steps:
            if kind == "i":
                shop(f"INSERT INTO order_items VALUES ({one}, 1, 'P', {value}, 1) ON CONFLICT DO NOTHING")
            elif kind == "u":
                shop(f"UPDATE order_items SET quantity = {value} WHERE order_id = {one}")
            elif kind == "d":
                shop(f"DELETE FROM order_items WHERE order_id = {one}")
            elif kind == "k":
                shop(
                    f"UPDATE order_items SET order_id = {other} WHERE order_id = {one} AND NOT EXISTS "
                    f"(SELECT FROM order_items WHERE order_id = {other})"
                )
            else:
                shop.reader.run()
        shop.reader.run()
        held = live_rows_by_key(data.draw(st.permutations(shop.reader.rows.get(ITEMS, []))), ("order_id", "line_no"))
        assert {key: row["quantity"] for key, row in held.items()} == {
            (row[0], row[1]): row[2] for row in shop("SELECT order_id, line_no, quantity FROM order_items")
        }


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_missing_slot_is_an_error(shop: Shop) -> None:
    shop.reader.run()
    shop("SELECT pg_drop_replication_slot(%s)", shop.name)
    everything = " ".join(sorted(shop.reader.positions))
    message = rf"slot '.*' no longer exists, so the changes since .* are lost.*python -m app rebuild {everything}$"
    with pytest.raises(OffsetExpired, match=message):
        shop.reader.plan()
    shop.reader.positions[PRODUCTS] = restart_position(shop.reader.positions[PRODUCTS])
    with pytest.raises(OffsetExpired, match=message):
        shop.reader.plan()


def test_a_missing_slot_is_re_created_when_all_tables_are_resnapshotted(shop: Shop) -> None:
    shop.add_products(1, 5)
    shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
    shop.reader.run()
    shop("SELECT pg_drop_replication_slot(%s)", shop.name)
    shop("DELETE FROM products WHERE product_id < 'P3'")
    before = dict(shop.reader.positions)
    shop.reader.positions = {table: restart_position(position) for table, position in before.items()}
    # a crash after the slot was created and before any commit: the previous positions detect it
    plan = shop.reader.plan()
    plan.held.close()
    shop.add_products(6, 6)
    with pytest.raises(OffsetExpired, match="another client read"):
        shop.reader.source.plan(before, shop.reader.schemas)
    # a crash after only the products were committed
    plan = shop.reader.plan()
    rows, positions = shop.reader.read(plan)
    plan.held.close()
    halfway = {**before, PRODUCTS: positions[PRODUCTS]}
    rest = sorted(before.keys() - {PRODUCTS})
    with pytest.raises(
        OffsetExpired, match=rf"was re-created, .* not re-snapshotted then: {', '.join(rest)}\. .*rebuild {' '.join(rest)}$"
    ):
        shop.reader.source.plan(halfway, shop.reader.schemas)
    shop.reader.rows[PRODUCTS] += rows[PRODUCTS]
    shop.reader.positions = {
        table: position if table == PRODUCTS else restart_position(position) for table, position in halfway.items()
    }
    shop("INSERT INTO stores VALUES ('T', 'two', 'store'); DELETE FROM stores WHERE store_id = 'S'")
    shop.reader.run()
    shop.add_products(7, 7)
    shop.reader.run()
    assert sorted(key[0] for key in shop.reader.latest(PRODUCTS, ("product_id",))) == ["P3", "P4", "P5", "P6", "P7"]
    assert sorted(key[0] for key in shop.reader.latest(STORES, ("store_id",))) == ["T"]


def test_a_lost_slot_is_re_created_when_all_tables_are_resnapshotted(shop: Shop) -> None:
    shop.add_products(1, 3)
    shop.reader.run()
    shop("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    shop("SELECT pg_reload_conf()")
    try:
        for _ in range(4):
            shop("CREATE TABLE filler (id int); DROP TABLE filler; SELECT pg_switch_wal()")
        shop("CHECKPOINT")
        assert shop("SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", shop.name) == [("lost",)]
        shop("DELETE FROM products WHERE product_id = 'P1'")
        with pytest.raises(OffsetExpired, match=rf"is lost: .* python -m app rebuild {' '.join(sorted(shop.reader.positions))}$"):
            shop.reader.run()
        with pytest.raises(OffsetExpired, match=r"is lost: .*pg_drop_replication_slot\('.*'\), then run again"):
            shop.reader.source.plan({}, {})
    finally:
        shop("ALTER SYSTEM RESET max_slot_wal_keep_size")
        shop("SELECT pg_reload_conf()")
    shop.reader.positions = {table: restart_position(position) for table, position in shop.reader.positions.items()}
    shop.reader.run()
    shop.add_products(4, 4)
    shop.reader.run()
    assert sorted(key[0] for key in shop.reader.latest(PRODUCTS, ("product_id",))) == ["P2", "P3", "P4"]


def test_another_reader_of_the_slot_is_detected(shop: Shop) -> None:
    shop.reader.run()
    shop.add_products(1, 1)
    Reader(shop.reader.source, {}, dict(shop.reader.positions)).run()
    with pytest.raises(OffsetExpired, match="another client read from replication slot") as error:
        shop.reader.plan()
    assert isinstance(error.value, CommitConflict)


def test_another_server_is_detected(shop: Shop) -> None:
    shop.reader.run()
    shop.reader.positions = {table: {**position, "system": "1"} for table, position in shop.reader.positions.items()}
    with pytest.raises(OffsetExpired, match="but the tables were read from server 1"):
        shop.reader.plan()


def test_a_busy_slot_is_retried_and_then_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.reader.run()
    shop.add_products(1, 1)
    command = f"START_REPLICATION SLOT {shop.name} LOGICAL 0/0 (proto_version '1', publication_names 'shopsphere')"
    other = psycopg.connect(shop.dsn, autocommit=True, replication="database")
    other.pgconn.send_query(command.encode())
    other.pgconn.flush()
    time.sleep(0.5)
    monkeypatch.setattr(slot, "SLOT_BUSY_SECONDS", 0.5)
    with pytest.raises(SourceError, match="is being read by another run"):
        shop.reader.plan()
    monkeypatch.setattr(slot, "SLOT_BUSY_SECONDS", 20.0)
    timer = threading.Timer(0.7, other.close)
    timer.start()
    assert len(shop.reader.run()[PRODUCTS]) == 1


def test_a_locked_table_is_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOCK_TIMEOUT", "200ms")
    with psycopg.connect(shop.dsn) as other:
        other.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(SourceError, match="lock timeout"):
            shop.reader.plan()
    assert shop.reader.run() == {}
    assert PRODUCTS in shop.reader.positions


def test_wrong_settings_are_errors_without_secrets(shop: Shop) -> None:
    secret = "s3cr3t-word"

    def message(**changes: Any) -> str:
        dsn = changes.pop("dsn", None) or make_conninfo(shop.dsn, **{"password": secret, **changes})
        source = PostgresSource(PostgresSettings(dsn=dsn))  # type: ignore[arg-type, call-arg]
        assert secret not in repr(source)
        with pytest.raises(SourceError) as error:
            source.plan({}, {})
        text = str(error.value)
        assert secret not in text
        assert "\n" not in text
        return text

    assert "Check that the server is running" in message(host="127.0.0.1", port=1, connect_timeout=2)
    assert "database" in message(dbname="nowhere", password=None)
    assert "not a valid libpq connection string" in message(dsn=f"postgres:/{secret} broken")
    for password in (f"odd@{secret}", f"odd/{secret}", f"5432/{secret}", f"odd@5/{secret}"):
        assert "percent-encoded" in message(dsn=f"postgresql://reader:{password}@127.0.0.1:1/shopsphere")
    for password in ("o%40d%2F", "o?d#", "o:d"):
        assert "Check that the server is running" in message(
            dsn=f"postgresql://reader:{password}@127.0.0.1:1/shop?application_name=a@b/c"
        )
    with pytest.raises(SourceError, match="SHOPSPHERE_POSTGRES__DSN"):
        PostgresSource(PostgresSettings()).plan({}, {})  # type: ignore[call-arg]
    wrong = shop.settings.model_copy(update={"publication": "nothing"})
    with pytest.raises(SourceError, match=r"publication 'nothing' does not exist.*CREATE PUBLICATION"):
        PostgresSource(wrong).plan({}, {})


def test_a_wrong_password_and_missing_privileges_are_errors(shop: Shop) -> None:
    role = f"r{time.time_ns():x}"
    shop(f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    try:
        dsn = make_conninfo(shop.dsn, user=role, password="right")
        source = PostgresSource(PostgresSettings(dsn=dsn, slot=shop.name))  # type: ignore[arg-type, call-arg]
        with pytest.raises(SourceError, match="The role needs REPLICATION"):
            source.plan({}, {})
        shop(f"ALTER ROLE {role} REPLICATION")
        with pytest.raises(SourceError, match=r"permission denied.*SELECT on the published tables"):
            source.plan({}, {})
        wrong = PostgresSource(PostgresSettings(dsn=make_conninfo(dsn, password="wr0ng-one")))  # type: ignore[arg-type, call-arg]
        with pytest.raises(SourceError, match="Correct user and password") as error:
            wrong.plan({}, {})
        assert "wr0ng-one" not in str(error.value)
    finally:
        shop(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_publication_without_all_operations_is_an_error(shop: Shop) -> None:
    shop("ALTER PUBLICATION shopsphere SET (publish = 'insert')")
    with pytest.raises(SourceError, match=r"does not publish update, delete, truncate.*ALTER PUBLICATION.*then run again"):
        shop.reader.run()
    shop("ALTER PUBLICATION shopsphere SET (publish = 'insert, update, delete, truncate')")
    shop.add_products(1, 2)
    shop.reader.run()
    shop("ALTER PUBLICATION shopsphere SET (publish = 'insert, update, truncate')")
    shop("DELETE FROM products WHERE product_id = 'P1'")
    with pytest.raises(SourceError, match=rf"does not publish delete, so changes are being missed.*rebuild .*{PRODUCTS}"):
        shop.reader.run()
    shop("ALTER PUBLICATION shopsphere SET (publish = 'insert, update, delete, truncate')")
    shop.reader.positions = {table: restart_position(position) for table, position in shop.reader.positions.items()}  # type: ignore[misc]
    shop.reader.run()
    assert list(shop.reader.latest(PRODUCTS, ("product_id",))) == [("P2",)]


def test_rows_hidden_by_a_policy_are_an_error(shop: Shop) -> None:
    role = f"r{time.time_ns():x}"
    shop.add_products(1, 2)
    shop(f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'right'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    shop("ALTER TABLE products ENABLE ROW LEVEL SECURITY; CREATE POLICY one ON products USING (product_id = 'P1')")
    try:
        dsn = make_conninfo(shop.dsn, user=role, password="right")
        shop.reader.source = PostgresSource(PostgresSettings(dsn=dsn, slot=shop.name))  # type: ignore[arg-type, call-arg]
        with pytest.raises(SourceError, match=r"row-level security policy.*BYPASSRLS"):
            shop.reader.run()
        shop(f"ALTER ROLE {role} BYPASSRLS")
        shop.reader.run()
        assert sorted(shop.reader.latest(PRODUCTS, ("product_id",))) == [("P1",), ("P2",)]
    finally:
        shop(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_server_states_that_the_test_server_cannot_have(shop: Shop) -> None:
    with psycopg.connect(shop.dsn) as admin:
        state = read_replication_state(admin, shop.settings)
    for changed, text in (
        ({"wal_level": "replica"}, "wal_level is 'replica', expected 'logical'. Set wal_level = logical"),
        ({"slot_exists": True, "slot_plugin": "wal2json", "slot_database": state.current_database}, "expected pgoutput"),
        (
            {"slot_exists": True, "slot_plugin": "pgoutput", "slot_database": state.current_database, "wal_status": "lost"},
            "is lost",
        ),
    ):
        with pytest.raises(SourceError, match=text):
            check_server(replace(state, **changed), shop.settings, {}, {})


def test_a_column_that_is_not_in_the_plan_is_named(shop: Shop) -> None:
    shop.reader.run()
    shop("ALTER TABLE products ADD COLUMN dropped bigint; INSERT INTO products (product_id) VALUES ('a')")
    shop("ALTER TABLE products DROP COLUMN dropped")
    plan = shop.reader.plan()
    with pytest.raises(UnknownColumn) as error:
        shop.reader.read(plan)
    assert (error.value.table, error.value.column, error.value.arrow_type) == (PRODUCTS, "dropped", pa.int64())


# -- types -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.none() | st.decimals(places=2, min_value=-(10**9), max_value=10**9) | st.just(Decimal("NaN"))))
def test_numbers_are_exact_or_reported(values: list[Decimal | None]) -> None:
    text = [None if value is None else str(value) if value.is_nan() else f"{value:f}" for value in values]
    read, unreadable = parse_text(pa.array(text, pa.string()), pa.decimal128(18, 2))
    assert [value for value in read.to_pylist() if value is not None] == [v for v in values if v is not None and v.is_finite()]
    assert [row for row, _ in unreadable] == [
        row for row, value in enumerate(values) if value is not None and not value.is_finite()
    ]


def test_types_map_to_exact_types_or_text() -> None:
    numeric = 1700
    assert SourceColumn("a", numeric, (18 << 16 | 4) + 4).arrow_type == pa.decimal128(18, 4)
    assert SourceColumn("a", numeric, -1).arrow_type == pa.string()
    assert SourceColumn("a", numeric, (1000 << 16 | 4) + 4).arrow_type == pa.string()
    assert SourceColumn("a", numeric, (3 << 16 | 5) + 4).arrow_type == pa.string()
    assert SourceColumn("a", 701, -1).arrow_type == pa.string()
    assert wider_type(pa.int64(), pa.int32()) == pa.int64()
    assert wider_type(pa.decimal128(10, 2), pa.decimal128(12, 2)) == pa.decimal128(12, 2)
    assert wider_type(pa.decimal128(10, 2), pa.decimal128(12, 4)) is None
    assert wider_type(pa.int32(), pa.string()) is None


def test_a_server_restored_to_an_earlier_point_in_time_is_detected(shop):
    """Its WAL continues with other changes at LSNs that were read before; they would be skipped as already read."""
    shop.add_products(1, 2)
    shop.reader.run()
    for table, position in list(shop.reader.positions.items()):
        high, low = position["lsn"].split("/")
        shop.reader.positions[table] = {**position, "lsn": f"{int(high, 16) + 1:X}/{low}"}
    shop.add_products(3, 6)
    with pytest.raises(OffsetExpired, match=r"restored to an earlier point in time.*rebuild .*products"):
        shop.reader.run()


def test_a_rebuild_of_all_tables_interrupted_between_two_commits_loses_no_history(shop: Shop) -> None:
    shop.add_products(1, 2)
    shop("INSERT INTO stores VALUES ('S', 'one', 'store')")
    shop.reader.run()
    shop("UPDATE products SET name = 'between' WHERE product_id = 'P1'; UPDATE products SET name = 'now' WHERE product_id = 'P1'")
    shop("UPDATE stores SET name = 'two' WHERE store_id = 'S'")
    before = dict(shop.reader.positions)
    shop.reader.positions = {table: restart_position(position) for table, position in before.items()}
    plan = shop.reader.plan()
    rows, positions = shop.reader.read(plan)
    plan.held.close()
    # only the stores were committed, and the slot was not acknowledged
    shop.reader.rows[STORES].extend(rows[STORES])
    shop.reader.positions = {**before, STORES: positions[STORES]}
    found = shop.reader.run()
    assert [row["name"] for row in found[PRODUCTS]] == ["between", "now"]
    assert STORES not in found
    assert shop.reader.latest(STORES, ("store_id",))[("S",)]["name"] == "two"
