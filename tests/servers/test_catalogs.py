"""The same source data through every catalog and store gives the same tables, digest by digest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from servers.aws_server import BUCKET, aws_server
from servers.rest_catalog import rest_catalog

import pipelines
from app import sandbox
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import maintain
from pipelines.rebuild import rebuild_tables
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(480)]

Properties = dict[str, str]


@pytest.fixture
def catalogs(tmp_path: Path) -> Iterator[dict[str, Properties]]:
    """Yield the properties of every catalog with every store, by name."""
    with ExitStack() as stack:
        aws = stack.enter_context(aws_server())
        found = {}
        for store, properties in (("files", None), ("s3", aws)):
            own = properties or {}

            def warehouse(catalog: str, store: str = store) -> str:
                return f"s3://{BUCKET}/{catalog}" if store == "s3" else f"file://{tmp_path / catalog}"

            database = f"sqlite:///{tmp_path / f'{store}.db'}"
            found[f"sqlite-{store}"] = {"type": "sql", "uri": database, "warehouse": warehouse("sqlite"), **own}
            address = stack.enter_context(rest_catalog(tmp_path / f"rest-{store}", warehouse("rest"), properties))
            found[f"rest-{store}"] = {"type": "rest", "uri": address, **own}
            # a Glue account has one namespace, so each store gets a separate server
            account = aws if store == "s3" else stack.enter_context(aws_server())
            glue = {f"glue.{name.removeprefix('s3.')}": value for name, value in account.items()}
            found[f"glue-{store}"] = {"type": "glue", **glue, "warehouse": warehouse("glue"), **own}
        yield found


def with_catalog(name: str, properties: Properties) -> Settings:
    """Return the settings with another catalog and a separate replication slot."""
    settings = load_settings()
    return load_settings(
        catalog=settings.catalog.model_copy(update={"properties": properties}),
        postgres=settings.postgres.model_copy(update={"slot": name.replace("-", "_")}),
    )


def digests(lake: Lake) -> dict[str, str]:
    return {name: digest(lake.load(table)) for name, table in pipelines.TABLES.items()}


def test_every_catalog_and_store_has_the_same_tables(catalogs, tmp_path, monkeypatch):
    home = tmp_path / "shop"
    monkeypatch.setenv("SHOPSPHERE_HOME", str(home))
    sandbox.start(home, orders=300, seed=21)
    derived = [name for name, table in pipelines.TABLES.items() if table.layer != "bronze" and name != "silver.quarantine"]
    later = datetime.now(UTC) + timedelta(days=30)
    try:
        lakes = {name: with_catalog(name, properties) for name, properties in catalogs.items()}
        for stage in range(3):
            if stage:
                sandbox.step(home, 40)
            found = {}
            for name, settings in lakes.items():
                with open_engine(settings) as engine:
                    assert not run_once(engine, PROJECT, lambda name, report: None).errors
                    if stage == 1:  # the third run must not need the removed files
                        for table in pipelines.TABLES.values():
                            maintain(engine.lake, table, later)
                    if stage == 2:
                        before = digests(engine.lake)
                        rebuild_tables(engine, PROJECT, derived)
                    if stage:
                        found[name] = digests(engine.lake)
                        assert stage == 1 or found[name] == before, f"{name}: a rebuild changed rows"
            if not stage:
                continue
            first = found["sqlite-files"]
            assert all(rows == first for rows in found.values()), {name: rows for name, rows in found.items() if rows != first}
            assert not any(first[f"gold.{table}"].startswith("0-") for table in ("fact_orders", "sales_daily", "dim_users"))
    finally:
        sandbox.stop(home)
