"""The sandbox's data on real servers: the same tables as on the sandbox's servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from servers.kafka_broker import Broker
from servers.mongo_servers import FerretDB, MongoJava, MongoWire
from servers.postgres_cluster import Cluster

import pipelines
from app import sandbox
from app.project import PROJECT
from app.sandbox import history
from app.sandbox.schema import create_sources
from app.sandbox.servers import Addresses
from lakehouse.digest import business_columns, digest
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.reader import live_rows
from lakehouse.settings import RaySettings
from pipelines.rebuild import rebuild_tables
from pipelines.runner import open_engine, run_once
from pipelines.settings import KafkaSettings, MongoSettings, PostgresSettings, Settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
ORDERS, SEED, STEPS = 200, 11, (15, 25)


def run(settings: Settings) -> None:
    with open_engine(settings) as engine:
        assert run_once(engine, PROJECT, lambda name, report: None).errors == ()


def tables(settings: Settings) -> dict[str, Any]:
    """Return digests of all silver and gold tables. For accounts over time, return the rows without the time of a delete, which
    comes from the clock of the server."""
    lake, found = Lake(settings), {}
    for step in pipelines.STEPS:
        handle = lake.load(step.target)
        found[step.target.name] = digest(handle)
        if step.target.name in ("silver.users_scd", "gold.dim_users"):
            frame = handle.reader.read(handle.files(), business_columns(handle), live_rows(handle.table, None))
            timeless = pl.when(pl.col("closed_by").ne_missing("delete")).then("valid_to").alias("valid_to")
            found[step.target.name] = sorted(frame.with_columns(timeless).iter_rows(), key=repr)
    return found


def configured(home: Path, addresses: Addresses) -> Settings:
    return Settings(
        home=home,
        postgres=PostgresSettings(dsn=addresses.postgres_dsn),  # type: ignore[arg-type, call-arg]
        mongo=MongoSettings(uri=addresses.mongo_uri),  # type: ignore[arg-type, call-arg]
        kafka=KafkaSettings(bootstrap_servers=addresses.kafka_bootstrap),  # type: ignore[call-arg]
        ray=RaySettings(inline_rows=10**9),  # type: ignore[call-arg]
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield the tables from the sandbox's servers."""
    home = tmp_path_factory.mktemp("sandbox")
    addresses = sandbox.start(home, orders=ORDERS, seed=SEED)
    try:
        settings = configured(home, addresses)
        run(settings)
        for orders in STEPS:
            sandbox.step(home, orders)
            run(settings)
        yield tables(settings)
    finally:
        sandbox.stop(home)


@contextmanager
def real_servers(directory: Path, mongo: MongoWire) -> Iterator[Addresses]:
    # the messages are old: retention would delete them at once
    with Broker(directory / "kafka", {"log.retention.ms": "-1"}) as broker, Cluster(directory / "postgres") as postgres, mongo:
        yield Addresses(postgres.dsn, mongo.uri, broker.bootstrap)


@pytest.mark.parametrize("kind", [FerretDB, MongoJava])
def test_real_servers_give_the_same_tables(tmp_path: Path, kind: type[MongoWire], expected: dict[str, Any]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with real_servers(tmp_path, kind(tmp_path / "mongo")) as addresses:
        settings = configured(home, addresses)
        create_sources(addresses)
        history.fill(addresses, home, ORDERS, SEED, "USD", None)
        run(settings)
        for orders in STEPS:
            history.simulate_more(addresses, home, orders, None)
            run(settings)
        found = tables(settings)
        assert {name for name in found if found[name] != expected[name]} == set()
        bronze = [name for source in pipelines.enabled_sources(settings) for name in source.tables]
        with open_engine(settings) as engine:
            rebuild_tables(engine, PROJECT, [*bronze, *(step.target.name for step in pipelines.STEPS)])
        rebuilt = tables(settings)
        assert {name for name in found if found[name] != rebuilt[name]} == set()
