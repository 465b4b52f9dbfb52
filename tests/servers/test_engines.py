"""Gold in Spark and DuckDB through the REST catalog: the same results as `sql`, including position deletes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from servers.rest_catalog import BUILD, require_built, rest_catalog

import pipelines
from app import sandbox
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import maintain
from lakehouse.query import query
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]
STATEMENTS = (
    "SELECT count(*), sum(net_revenue), sum(units), count(user_key) FROM gold.fact_orders",
    "SELECT channel, store_id, sum(net_revenue), sum(orders), sum(units) FROM gold.sales_daily GROUP BY channel, store_id",
    "SELECT d.year, d.month, sum(f.net_revenue) FROM gold.fact_orders f JOIN gold.dim_date d ON d.date_key = f.date_key "
    "GROUP BY d.year, d.month",
    "SELECT u.country, count(*), sum(f.total_base) FROM gold.fact_orders f JOIN gold.dim_users u ON u.user_key = f.user_key "
    "GROUP BY u.country",
    "SELECT s.kind, sum(h.on_hand), sum(h.shrinkage_units) FROM gold.inventory_health h "
    "JOIN gold.dim_stores s ON s.store_id = h.store_id JOIN gold.dim_products p ON p.product_id = h.product_id GROUP BY s.kind",
    "SELECT count(*), sum(orders_pos) FROM gold.customer_360",
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, str]]:
    """Yield the settings of a lakehouse with data in a REST catalog, and the catalog's address."""
    folder = tmp_path_factory.mktemp("engines")
    home = folder / "shop"
    with rest_catalog(folder / "rest", f"file://{folder / 'warehouse'}") as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(home))
        patch.setenv("SHOPSPHERE_CATALOG__PROPERTIES", json.dumps({"type": "rest", "uri": address}))
        sandbox.start(home, orders=300, seed=21)
        try:
            settings = load_settings()
            for stage in range(2):
                if stage:
                    sandbox.step(home, 40)
                with open_engine(settings) as engine:
                    assert not run_once(engine, PROJECT, lambda name, report: None).errors
        finally:
            sandbox.stop(home)
        yield settings, address


def query_engine(engine: str, address: str, *statements: str) -> list[list[list[object]]]:
    """Return the rows of each statement in another engine."""
    python = require_built(BUILD / "engines" / "bin" / "python")
    require_built(BUILD / "iceberg-spark")
    script = Path(__file__).with_name("iceberg_engines.py")
    done = subprocess.run([str(python), str(script), engine, address, *statements], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def normalized(value: object) -> object:
    """Return a value as text, decimals without trailing zeros."""
    try:
        return str(Decimal(str(value)).normalize()) if value is not None else None
    except ArithmeticError:
        return str(value)


def sorted_rows(found: list[list[object]]) -> list[list[object]]:
    """Return normalized rows in an order that all engines share."""
    return sorted([[normalized(value) for value in row] for row in found], key=repr)


def expected_rows(lake: Lake) -> list[list[list[object]]]:
    """Return the rows of each statement in `sql`."""
    tables = [query(lake, pipelines.TABLES, statement) for statement in STATEMENTS]
    return [
        sorted_rows([list(values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)])
        for table in tables
    ]


@pytest.mark.parametrize("engine", ["duckdb", "spark"])
def test_another_engine_returns_the_same_results(shop, engine):
    settings, address = shop
    lake = Lake(settings)
    changed = ("gold.fact_orders", "gold.sales_daily", "gold.customer_360")
    deleted = [name for name in changed if any(file.deletes for file in lake.load(pipelines.TABLES[name]).files())]
    assert deleted, "there are no position deletes, so the test proves nothing"
    found = query_engine(engine, address, *STATEMENTS)
    assert [sorted_rows(part) for part in found] == expected_rows(lake)


def test_spark_shows_comments_and_its_compaction_keeps_the_rows(shop):
    settings, address = shop
    lake = Lake(settings)
    table = pipelines.TABLES["gold.sales_daily"]
    before = digest(lake.load(table))
    described, *_ = query_engine(
        "spark",
        address,
        "DESCRIBE TABLE EXTENDED gold.sales_daily",
        "CALL shop.system.rewrite_data_files(table => 'gold.sales_daily', options => map('rewrite-all', 'true'))",
    )
    comments = {name: comment for name, _, comment in described}
    assert comments["order_date"] == table.columns[0].doc
    assert next(kind for name, kind, _ in described if name == "Comment") == table.doc
    with open_engine(settings) as engine:
        assert digest(engine.lake.load(table)) == before
        maintain(engine.lake, table, datetime.now(UTC) + timedelta(days=30))
        assert digest(engine.lake.load(table)) == before
        step = next(step for step in pipelines.STEPS if step.target.name == table.name)
        assert engine.refresh(step).status == "unchanged"
        assert engine.refresh(step, rebuild=True).rows_written == 0
