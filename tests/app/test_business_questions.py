"""The business questions are valid SQL over the declared gold columns and compute what they claim."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from app.demo.business_questions import BEST_CUSTOMERS, CHURNING, QUESTIONS, RETENTION, REVENUE, SHRINKAGE, BusinessQuestion
from lakehouse.table import Table
from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.gold.fact_orders import FACT_ORDERS
from pipelines.gold.inventory_shrinkage import INVENTORY_SHRINKAGE
from pipelines.gold.sales_daily import SALES_DAILY

TABLES = (SALES_DAILY, FACT_ORDERS, CUSTOMER_360, COHORT_RETENTION, INVENTORY_SHRINKAGE, DIM_STORES)


class GoldInMemory:
    """The gold tables in memory."""

    def __init__(self) -> None:
        self.connection = duckdb.connect()
        self.connection.execute("CREATE SCHEMA gold; SET TimeZone = 'UTC'")
        for table in TABLES:
            self.put(table)

    def put(self, table: Table, *rows: dict[str, Any]) -> None:
        """Replace the rows of a table; columns that are not given are null."""
        arrow = pa.table(
            {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in table.schema},
            schema=pa.schema([f.with_nullable(True) for f in table.schema]),
        )
        self.connection.register("rows", arrow)
        self.connection.execute(f"CREATE OR REPLACE TABLE {table.name} AS SELECT * FROM rows")
        self.connection.unregister("rows")

    def ask(self, question: BusinessQuestion) -> list[dict[str, Any]]:
        """The rows of an question."""
        cursor = self.connection.execute(question.sql)
        names = [item[0] for item in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


@pytest.fixture
def lake() -> Iterator[GoldInMemory]:
    lake = GoldInMemory()
    yield lake
    lake.connection.close()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_questions_run_on_empty_tables(lake: GoldInMemory, question: BusinessQuestion) -> None:
    assert lake.ask(question) == []
    assert question.title.endswith("?")
    assert question.explanation.endswith(".")
    assert "\n" not in question.explanation


def test_revenue_by_month_and_channel(lake: GoldInMemory) -> None:
    days = [
        (date(2026, 1, 1), "web", "100"),
        (date(2026, 1, 2), "pos", "100"),
        (date(2026, 2, 1), "web", "110.015"),
        (date(2026, 2, 1), "pos", "0.005"),
    ]
    lake.put(SALES_DAILY, *({"order_date": day, "channel": channel, "net_revenue": Decimal(net)} for day, channel, net in days))
    newest, before = lake.ask(REVENUE)
    assert (before["month"], before["web"], before["total"], before["trend_percent"]) == ("2026-01", 100, 200, None)
    assert (newest["month"], newest["days"], newest["marketplace"], float(newest["total"])) == ("2026-02", 1, 0, 110.02)
    assert float(newest["trend_percent"]) == pytest.approx(10.0)


def test_best_customers_that_each_channel_sees_in_part(lake: GoldInMemory) -> None:
    person = {"channels": 2, "apparent_customers": 3, "orders_web": 1, "orders_pos": 1, "orders_marketplace": 0}
    lake.put(
        CUSTOMER_360,
        {**person, "master_user_id": "M-1", "net_revenue": Decimal(100)},
        {**person, "master_user_id": "M-2", "net_revenue": Decimal(900), "apparent_customers": 1},
    )
    lake.put(
        FACT_ORDERS,
        {"master_user_id": "M-1", "channel": "web", "net_revenue": Decimal(60)},
        {"master_user_id": "M-1", "channel": "pos", "net_revenue": Decimal(40)},
        {"master_user_id": "M-2", "channel": "web", "net_revenue": Decimal(900)},
        {"master_user_id": None, "channel": "pos", "net_revenue": Decimal(7)},
    )
    (row,) = lake.ask(BEST_CUSTOMERS)
    assert (row["customer"], row["looks_like"], row["best_single_view"], row["unseen_percent"]) == ("M-1", 3, 60, 40)


def test_shrinkage_by_store(lake: GoldInMemory) -> None:
    lake.put(DIM_STORES, {"store_id": "S1", "city": "Bandung"})
    lake.put(
        INVENTORY_SHRINKAGE,
        {
            "store_id": "S1",
            "product_id": "P1",
            "expected_units": 100,
            "shrinkage_units": 10,
            "shrinkage_value_base": Decimal("99.50"),
        },
        {
            "store_id": "S1",
            "product_id": "P2",
            "expected_units": 100,
            "shrinkage_units": -2,
            "shrinkage_value_base": Decimal("-1"),
        },
        {"store_id": "S2", "product_id": "P1", "expected_units": 0, "shrinkage_units": 1, "shrinkage_value_base": None},
    )
    first, second = lake.ask(SHRINKAGE)
    assert (first["store"], first["city"], first["missing"], first["missing_percent"], first["worst_product"]) == (
        "S1",
        "Bandung",
        8,
        4.0,
        "P1",
    )
    assert float(first["value_lost"]) == 98.5
    assert (second["store"], second["missing_percent"], second["value_lost"]) == ("S2", None, None)


def test_retention_of_cohorts(lake: GoldInMemory) -> None:
    cohort = {"scope": "all", "cohort_month": date(2026, 1, 1), "customers": 8}
    lake.put(COHORT_RETENTION, {**cohort, "months_since": 0, "retention": 1.0}, {**cohort, "months_since": 1, "retention": 0.125})
    (row,) = lake.ask(RETENTION)
    assert (row["cohort"], row["customers"], row["month_1"], row["month_2"]) == ("2026-01", 8, 12.5, None)


def test_customers_about_to_churn(lake: GoldInMemory) -> None:
    def at(month: int) -> datetime:
        return datetime(2026, month, 1, tzinfo=UTC)

    customer = {"orders": 3, "net_revenue": Decimal(10), "expected_gap_days": 31.0}
    lake.put(
        CUSTOMER_360,
        {**customer, "master_user_id": "M-1", "last_order_at": at(4), "expected_next_order_at": at(5), "churn_after": at(7)},
        {**customer, "master_user_id": "M-2", "last_order_at": at(1), "expected_next_order_at": at(2), "churn_after": at(4)},
        {**customer, "master_user_id": "M-3", "last_order_at": at(6), "expected_next_order_at": at(7), "churn_after": at(9)},
    )
    (row,) = lake.ask(CHURNING)
    assert (row["customer"], row["churn_percent"]) == ("M-1", 86)
