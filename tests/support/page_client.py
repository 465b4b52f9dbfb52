"""What tests of pages share: search, and rows of tables."""

from __future__ import annotations

from typing import Any

import polars as pl
from starlette.testclient import TestClient

from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.settings import Settings

PAGES = ("/", "/stock", "/stock?product_id=P0001", "/fraud", "/freshness")


def table_rows(settings: Settings, table: Table) -> pl.DataFrame:
    """Return all rows of a table."""
    return Lake(settings).load(table).read(table.schema.names)


def search(client: TestClient, text: str) -> Any:
    """Submit the search form without following a redirect."""
    return client.post("/customers", data={"q": text}, follow_redirects=False)


def richest_customer(settings: Settings) -> str:
    """Return the master_user_id of the person with most channels, then accounts."""
    people = table_rows(settings, CUSTOMER_360).sort("channels", "accounts", "records", "master_user_id", descending=True)
    return str(people["master_user_id"][0])
