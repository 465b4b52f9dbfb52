"""One bad row of a source is quarantined with a reason, and every other row goes on to gold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import psycopg
import pytest

from app import sandbox
from app.project import PROJECT
from lakehouse.engine.engine import Engine
from pipelines.bronze.current_rows import unreadable_rows
from pipelines.bronze.name_list import join_names, split_names
from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.fact_orders import FACT_ORDERS
from pipelines.runner import open_engine, run_once
from pipelines.settings import load_settings
from pipelines.silver.order_items_unified import MAX_INTEGER, ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED, PLAUSIBLE_TIMES
from pipelines.silver.quarantine import QUARANTINE

GOOD, BAD = 800_000, 900_000
TIMES = (None, "infinity", "-infinity", "9999-12-31", "2062-05-05", "0001-01-01", "0044-03-15 BC", "1970-01-01")
TOTALS = ("99999999999999999.00", "-10000000000000.00", "NaN")
QUANTITIES = (5_000_000_000, -(2**40))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, psycopg.Connection]]:
    """Yield an engine with up-to-date tables, and a connection to the source, whose columns were widened since."""
    home: Path = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(home))
        sandbox.start(home, orders=120, seed=5)
        try:
            with open_engine(load_settings()) as engine:
                run(engine)
                dsn = load_settings().postgres.dsn.get_secret_value()
                with psycopg.connect(dsn, autocommit=True) as connection:
                    connection.execute("ALTER TABLE orders ALTER created_at DROP NOT NULL, ALTER total_amount TYPE numeric(20,2)")
                    connection.execute("ALTER TABLE order_items ALTER quantity TYPE bigint, ALTER line_no TYPE bigint")
                    yield engine, connection
        finally:
            sandbox.stop(home)


def run(engine: Engine) -> None:
    done = run_once(engine, PROJECT, lambda name, result: None)
    assert not done.errors, [str(error) for error in done.errors]


def place(
    source: psycopg.Connection, number: int, *, created: str | None = "2026-01-03", total: str = "10.00", quantity: int = 1
):
    """Insert a copy of an order with one line, with some values replaced."""
    source.execute(
        "INSERT INTO orders "
        "(order_id, user_id, source, status, currency, total_amount, card_fingerprint, created_at, updated_at) "
        "SELECT %s, user_id, source, 'paid', currency, %s::numeric, 'card-x', %s::timestamptz, updated_at "
        "FROM orders WHERE user_id IS NOT NULL ORDER BY order_id LIMIT 1",
        (number, total, created),
    )
    source.execute("INSERT INTO order_items VALUES (%s, 1, 'P0001', %s, 10)", (number, quantity))


def numbers(engine: Engine, table, number: int) -> set[int]:
    """Return the order ids of a table from a number on, 100 at most."""
    ids = engine.lake.load(table).read(["order_id"])["order_id"].cast(pl.Int64, strict=False).drop_nulls()
    return {one - number for one in ids if number <= one < number + 100}


def test_a_bad_row_is_quarantined_and_the_others_go_on(shop: tuple[Engine, psycopg.Connection]) -> None:
    engine, source = shop
    before = engine.lake.load(COHORT_RETENTION).read(["cohort_month"]).height
    for number, created in enumerate(TIMES):
        place(source, BAD + number, created=created)
        place(source, GOOD + number)
    for number, total in enumerate(TOTALS, len(TIMES)):
        place(source, BAD + number, total=total)
    for number, quantity in enumerate(QUANTITIES, len(TIMES) + len(TOTALS)):
        place(source, BAD + number, quantity=quantity)
    source.execute("INSERT INTO order_items VALUES (%s, %s, 'P0001', 1, 10)", (GOOD, 2**40))
    run(engine)
    timed = set(range(len(TIMES)))
    others = set(range(len(TIMES), len(TIMES) + len(TOTALS) + len(QUANTITIES)))
    assert numbers(engine, FACT_ORDERS, GOOD) == timed
    assert numbers(engine, FACT_ORDERS, BAD) == others, "without the value that is in quarantine"
    assert numbers(engine, ORDERS_UNIFIED, BAD) == others
    assert engine.lake.load(COHORT_RETENTION).read(["cohort_month"]).height < before + 10
    assert engine.lake.load(CUSTOMER_360).read(["net_revenue"])["net_revenue"].null_count() == 0
    quarantined = engine.lake.load(QUARANTINE).read(["source_table", "reason"])
    counts = dict(quarantined.group_by("source_table", "reason").len().select("reason", "len").iter_rows())
    assert counts["breaks not_null(placed_at)"] == 4, "NULL, both infinities and a year before 1"
    assert sum(count for reason, count in counts.items() if reason.startswith("breaks within(")) == 4
    assert counts["total_amount: a value that the column's type cannot hold"] == len(TOTALS)
    assert counts["quantity: a value that the column's type cannot hold"] == len(QUANTITIES)
    assert counts["line_no: a value that the column's type cannot hold"] == 1
    items = engine.lake.load(ORDER_ITEMS_UNIFIED).read(["order_id", "line_no"]).filter(pl.col("order_id") == str(GOOD))
    assert items["line_no"].to_list() == [1]


def test_a_row_that_is_corrected_at_its_source_leaves_the_quarantine(shop: tuple[Engine, psycopg.Connection]) -> None:
    engine, source = shop
    number = 99
    place(source, BAD + number, created="9999-12-31")
    run(engine)
    assert number not in numbers(engine, FACT_ORDERS, BAD)
    source.execute("UPDATE orders SET created_at = '2026-01-04' WHERE order_id = %s", (BAD + number,))
    run(engine)
    assert number in numbers(engine, FACT_ORDERS, BAD)
    assert f'"{BAD + number}"' not in str(engine.lake.load(QUARANTINE).read(["original"])["original"].to_list())


def test_limits_are_exclusive_and_deleted_rows_are_not_judged() -> None:
    rows = pl.DataFrame(
        {
            "quantity": [None, 0, MAX_INTEGER - 1, 1 - MAX_INTEGER, MAX_INTEGER, -MAX_INTEGER, MAX_INTEGER],
            "price": pl.Series([Decimal(1)] * 7, dtype=pl.Decimal(38, 4)),
            "_op": ["c", "c", "c", "c", "c", "c", "d"],
            "_source_position": list("abcdefg"),
        }
    )
    parsed = unreadable_rows(rows, {"quantity": MAX_INTEGER, "price": 10, "missing": 1})
    assert parsed.rejected is not None
    assert sorted(parsed.rejected["source_position"]) == ["e", "f"]
    assert parsed.rows.height == rows.height


def test_the_bounds_of_plausible_times_exclude_placeholders() -> None:
    earliest, latest = PLAUSIBLE_TIMES
    assert earliest > datetime(1970, 1, 2, tzinfo=UTC)
    assert latest < datetime(2062, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("names", [["a"], ["a,b", "c%2Cd", "%", ",,"], ["Größe, cm", "a b", '"']])
def test_any_column_name_survives_in_a_list(names: list[str]) -> None:
    assert split_names(join_names(names)) == names
