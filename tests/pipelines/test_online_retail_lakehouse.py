"""A real data set through all layers: revenue per month and country equals that of the file, to the penny."""

from __future__ import annotations

import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from app import sandbox
from app.cli.main import main
from app.sandbox.online_retail import COUNTRY_CODES

FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "online_retail.parquet"


def by_month_and_country(file: Path) -> dict[tuple[str, str], Decimal]:
    """Return the exact sum of Quantity x UnitPrice over all lines, per month of InvoiceDate and Country."""
    sums: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    lines = pl.read_parquet(file, columns=["InvoiceDate", "Quantity", "UnitPrice", "Country"])
    for moment, quantity, price, country in lines.iter_rows():
        sums[moment.strftime("%Y-%m"), COUNTRY_CODES[country]] += quantity * Decimal(repr(price))
    return dict(sums)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not FILE.exists(), reason=f"needs the UCI Online Retail data set at ../shared/data/{FILE.name}")
def test_revenue_per_month_and_country_equals_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    sandbox.start(tmp_path, source_file=FILE)
    try:
        assert main(["run", "--json"]) == 0
        capsys.readouterr()
        months = "SELECT strftime(order_date, '%Y-%m') AS month, country, sum(net_revenue) AS revenue"
        statement = f"{months} FROM gold.sales_daily GROUP BY ALL"
        assert main(["sql", statement, "--json"]) == 0
    finally:
        sandbox.stop(tmp_path)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(row["month"], row["country"]): Decimal(row["revenue"]) for row in rows}
    assert found == by_month_and_country(FILE)
