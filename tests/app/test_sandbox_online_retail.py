"""Real invoices in the sandbox: every line, in its month and country, to the penny."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition

from app import sandbox
from app.sandbox.online_retail import COUNTRY_CODES, country_codes, read_lines
from lakehouse.errors import SandboxError

REAL = Path(__file__).parents[3] / "shared/data/online_retail.parquet"
SCHEMA = {
    "InvoiceNo": pl.String,
    "StockCode": pl.String,
    "Description": pl.String,
    "Quantity": pl.Int64,
    "InvoiceDate": pl.Datetime("us"),
    "UnitPrice": pl.Float64,
    "CustomerID": pl.Float64,
    "Country": pl.String,
}
JANUARY, LATER, FEBRUARY = datetime(2011, 1, 31, 23, 59), datetime(2011, 1, 31, 23, 59, 30), datetime(2011, 2, 1, 0, 1)
LINES: list[tuple[Any, ...]] = [
    ("1001", "22423", "CAKE STAND, 3 TIER", 2, JANUARY, 12.75, 17850.0, "United Kingdom"),
    ("1001", "22423", "CAKE STAND, 3 TIER", 2, JANUARY, 12.75, 17850.0, "United Kingdom"),
    ("1001", "POST", "POSTAGE", 1, LATER, 0.001, 17850.0, "United Kingdom"),
    ("1001", "85123A", 'HEART "WHITE"', 3, FEBRUARY, 2.55, 17850.0, "United Kingdom"),
    ("C1002", "22423", "CAKE STAND", -1, FEBRUARY, 12.75, 17850.0, "EIRE"),
    ("A1003", "B", "Adjust bad debt", 1, FEBRUARY, -11062.06, None, "Unspecified"),
    ("1004", "22138", None, -10, FEBRUARY, 0.0, None, "European Community"),
    ("1005", "gift_0001_20", "", 1, FEBRUARY, 16.67, None, "Atlantis"),
    ("1005", "22423", "CAKE STAND, 3 TIER", 4, FEBRUARY, 10.95, None, "Lemuria"),
    ("01005", "22423", "CAKE STAND, 3 TIER", 1, FEBRUARY, 10.95, 1.0, None),
]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "invoices.parquet"
    pl.DataFrame(LINES, schema=SCHEMA, orient="row").write_parquet(file)
    return file


def test_every_line_has_its_month_and_country(small: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    addresses = sandbox.start(home, source_file=small)
    try:
        assert revenue(addresses) == expected(small)
        with psycopg.connect(addresses.postgres_dsn) as connection:
            assert connection.execute("SELECT count(*) FROM order_items").fetchone() == (len(LINES),)
            statuses = connection.execute("SELECT status, count(*) FROM orders GROUP BY 1 ORDER BY 1").fetchall()
            assert statuses == [("delivered", 6), ("returned", 2)]
            name = connection.execute("SELECT name FROM products WHERE product_id = '22423'").fetchone()
            assert name == ("CAKE STAND, 3 TIER",)
            assert connection.execute("SELECT count(*) FROM users").fetchone() == (2,)
            stores = connection.execute("SELECT store_id, name, kind, country FROM stores ORDER BY 1").fetchall()
            assert ("online-IE", "Online EIRE", "online", "IE") in stores
            assert len(stores) == 7
            odd = connection.execute("SELECT unit_price FROM order_items WHERE product_id = 'POST'").fetchone()
            assert odd == (Decimal("0.0010"),)
        on_hand: dict[tuple[str, str], int] = {}
        for event in sorted(stock_events(addresses), key=lambda event: (event["timestamp"], event["event_id"])):
            data = event["metadata"]
            sign = {"stock_received": 1, "stock_returned": 1, "stock_sold": -1, "stock_adjusted": -1}[event["event_type"]]
            place = data["store_id"], data["product_id"]
            on_hand[place] = on_hand.get(place, 0) + sign * data["quantity"]
            assert on_hand[place] >= 0, event
        assert len(on_hand) == 6
    finally:
        sandbox.stop(home)


def test_invoices_over_two_months_or_countries_are_two_orders(small: Path) -> None:
    lines = read_lines(small)
    orders = lines.group_by("order_id").agg(pl.col("InvoiceNo", "month", "Country").n_unique())
    assert orders.select(pl.col("InvoiceNo", "month", "Country").max()).row(0) == (1, 1, 1)
    assert lines.filter(pl.col("InvoiceNo") == "1001")["order_id"].n_unique() == 2
    assert {1001, 1004, 1005} <= set(lines["order_id"])
    assert lines.select("order_id", "line_no").is_unique().all()


def test_codes_are_one_to_one_and_do_not_depend_on_order() -> None:
    assert len(set(COUNTRY_CODES.values())) == len(COUNTRY_CODES)
    spellings = [*COUNTRY_CODES, *(f"Nowhere {number}" for number in range(200))]
    codes = country_codes(spellings)
    assert len(set(codes.values())) == len(spellings)
    assert all(len(code) == 2 for code in codes.values())
    assert codes == country_codes(spellings[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("InvoiceNo").alias("Invoice"), None),
        (pl.lit(0.123456).alias("UnitPrice"), "more than four decimals"),
        (pl.lit(None, pl.Int64).alias("Quantity"), "lines without"),
        (pl.lit("many").alias("Quantity"), "an unexpected type"),
    ],
)
def test_a_file_with_wrong_content_is_an_error(small: Path, change: pl.Expr, message: str | None) -> None:
    pl.read_parquet(small).with_columns(change).write_parquet(small)
    if message is None:
        read_lines(small)
    else:
        with pytest.raises(SandboxError, match=message):
            read_lines(small)


def test_a_missing_column_or_file_is_named_before_anything_starts(small: Path, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"nothing\.parquet cannot be read"):
        sandbox.start(tmp_path, source_file=tmp_path / "nothing.parquet")
    pl.read_parquet(small).drop("Country").write_parquet(small)
    with pytest.raises(SandboxError, match="lacks the columns Country"):
        sandbox.start(tmp_path, source_file=small)
    assert not (tmp_path / "sandbox").exists()


@pytest.mark.skipif(
    not REAL.exists(), reason=f"needs {REAL.name}, the UCI Online Retail data, in shared/data beside the repository"
)
def test_the_real_data_set_to_the_penny(tmp_path: Path) -> None:
    addresses = sandbox.start(tmp_path, source_file=REAL)
    try:
        found = revenue(addresses)
    finally:
        sandbox.stop(tmp_path)
    assert found == expected(REAL)
    assert sum(count for _, count in found.values()) == 541_909


def revenue(addresses: sandbox.Addresses) -> dict[tuple[str, str], tuple[Decimal, int]]:
    """Return revenue and lines per month and country, from PostgreSQL."""
    statement = """
        SELECT to_char(o.created_at, 'YYYY-MM'), s.name, sum(i.quantity * i.unit_price), count(*)
        FROM orders o JOIN order_items i USING (order_id) JOIN stores s USING (store_id) GROUP BY 1, 2"""
    with psycopg.connect(addresses.postgres_dsn) as connection:
        return {
            (month, name.removeprefix("Online ")): (total, count) for month, name, total, count in connection.execute(statement)
        }


def expected(file: Path) -> dict[tuple[str, str], tuple[Decimal, int]]:
    """Return revenue and lines per month and country, from the file."""
    frame = pl.read_parquet(file).group_by(pl.col("InvoiceDate").dt.strftime("%Y-%m"), pl.col("Country").fill_null("(none)"))
    sums = frame.agg(total=((pl.col("UnitPrice") * 10_000).round().cast(pl.Int64) * pl.col("Quantity")).sum(), count=pl.len())
    return {(month, country): (Decimal(total) / 10_000, count) for month, country, total, count in sums.iter_rows()}


def stock_events(addresses: sandbox.Addresses) -> list[dict[str, Any]]:
    consumer = Consumer({"bootstrap.servers": addresses.kafka_bootstrap, "group.id": "test", "log_level": 0})
    found: list[dict[str, Any]] = []
    for partition in range(4):
        _, high = consumer.get_watermark_offsets(TopicPartition("events", partition), timeout=10)
        consumer.assign([TopicPartition("events", partition, 0)])
        count = 0
        while count < high:
            taken = consumer.consume(high - count, timeout=1)
            count += len(taken)
            found += [json.loads(message.value() or b"") for message in taken]
    consumer.close()
    return found
