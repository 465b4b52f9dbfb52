"""Commits over a REST catalog with concurrent writers, lost responses and kills: rows are neither lost nor duplicated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from servers.faulty_proxy import FAULTS, Fault, faulty_proxy
from servers.rest_catalog import rest_catalog

import pipelines
from app import sandbox
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.schema import as_arrow
from lakehouse.settings import CatalogSettings
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a REST catalog with a local warehouse."""
    folder = tmp_path_factory.mktemp("rest")
    with rest_catalog(folder, f"file://{folder / 'warehouse'}") as address:
        yield address


@pytest.fixture
def lake(tmp_path, rest) -> Lake:
    return lake_at(tmp_path, rest)


def lake_at(home: Path, address: str) -> Lake:
    return Lake(Settings(home=home, catalog=CatalogSettings(properties={"type": "rest", "uri": address})))


def stores(first: int, count: int = 10) -> pl.DataFrame:
    return pl.DataFrame({"store_id": [f"S{n}" for n in range(first, first + count)], "_seq": [0] * count})


@pytest.fixture
def empty(lake) -> Iterator[Lake]:
    """Yield a lake without gold.dim_stores."""
    if lake.exists(DIM_STORES):
        lake.catalog.drop_table(DIM_STORES.name)
    yield lake
    lake.catalog.drop_table(DIM_STORES.name)


def test_of_two_concurrent_writers_one_commits(empty):
    lake = empty
    for stage in range(2):  # an empty table, and one with a snapshot
        one, other = lake.load(DIM_STORES), lake.load(DIM_STORES)
        one.commit(one.writer.write(stores(100 * stage)), positions={"a": stage})
        with pytest.raises(CommitConflict, match="another writer"):
            other.commit(other.writer.write(stores(100 * stage + 50)), positions={"a": -1})
        now = lake.load(DIM_STORES)
        assert now.positions == {"a": stage}
        assert now.read(["store_id"]).height == 10 * (stage + 1)


def test_a_commit_to_another_branch_fails_a_concurrent_commit_but_not_the_next(empty):
    lake = empty
    first = lake.load(DIM_STORES)
    first.commit(first.writer.write(stores(0)), positions={"a": 0})
    late = lake.load(DIM_STORES)
    table = lake.catalog.load_table(DIM_STORES.name)
    table.manage_snapshots().create_branch(table.metadata.current_snapshot_id, "audit").commit()
    table = lake.catalog.load_table(DIM_STORES.name)
    table.append(as_arrow(stores(50), late.arrow_schema), branch="audit")
    with pytest.raises(CommitConflict):  # the sequence number of its rows is taken now
        late.commit(late.writer.write(stores(90)), positions={"a": 1})
    again = lake.load(DIM_STORES)
    again.commit(again.writer.write(stores(90)), positions={"a": 1})
    assert lake.load(DIM_STORES).read(["store_id"]).height == 20


@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_with_a_lost_response_is_neither_lost_nor_duplicated(empty, rest, tmp_path, fault: Fault):
    with faulty_proxy(rest, lambda number, table: fault if number == 1 else "none") as proxy:
        lake = lake_at(tmp_path, proxy.address)
        first = lake.load(DIM_STORES)
        first.commit(first.writer.write(stores(0)), positions={"a": 0})
        handle = lake.load(DIM_STORES)
        with pytest.raises(CommitConflict):
            handle.commit(handle.writer.write(stores(10)), positions={"a": 1})
        now = lake.load(DIM_STORES)
        arrived = now.positions == {"a": 1}
        assert arrived == (fault != "unsent")
        # complete or absent: every file of the snapshot exists
        assert now.read(["store_id"]).height == (20 if arrived else 10)
        if not arrived:
            now.commit(now.writer.write(stores(10)), positions={"a": 1})
        assert sorted(lake.load(DIM_STORES).read(["store_id"])["store_id"]) == sorted(stores(0, 20)["store_id"])


def over_rest(address: str, slot: str) -> Settings:
    settings = load_settings()
    properties = {"type": "rest", "uri": address}
    return load_settings(
        catalog=settings.catalog.model_copy(update={"properties": properties}),
        postgres=settings.postgres.model_copy(update={"slot": slot}),
    )


def digests(lake: Lake) -> dict[str, str]:
    return {name: digest(lake.load(table)) for name, table in pipelines.TABLES.items()}


def run_undisturbed(settings: Settings) -> dict[str, str]:
    with open_engine(settings) as engine:
        assert not run_once(engine, PROJECT, lambda name, report: None).errors
        return digests(engine.lake)


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Iterator[Path]:
    """Start a sandbox in SHOPSPHERE_HOME; yield its directory."""
    home = tmp_path / "shop"
    monkeypatch.setenv("SHOPSPHERE_HOME", str(home))
    sandbox.start(home, orders=200, seed=5)
    try:
        yield home
    finally:
        sandbox.stop(home)


@pytest.fixture
def own_rest(tmp_path) -> Iterator[str]:
    with rest_catalog(tmp_path / "rest", f"file://{tmp_path / 'rest' / 'warehouse'}") as address:
        yield address


def test_runs_with_lost_responses_give_the_same_tables(shop, own_rest):
    chance = random.Random(11)

    def choose(number: int, table: str) -> Fault:
        return chance.choice(FAULTS) if chance.random() < 0.3 else "none"

    with faulty_proxy(own_rest, choose) as proxy:
        for stage in range(2):
            if stage:
                sandbox.step(shop, 40)
            expected = run_undisturbed(load_settings())
            assert run_undisturbed(over_rest(proxy.address, "faulty")) == expected
            faults = {fault for _, fault in proxy.done} - {"none"}
        assert faults == set(FAULTS), "too few commits for every fault"


def app(settings: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment(address: str, slot: str) -> dict[str, str]:
    properties = json.dumps({"type": "rest", "uri": address})
    return {"SHOPSPHERE_CATALOG__PROPERTIES": properties, "SHOPSPHERE_POSTGRES__SLOT": slot}


def test_kills_before_and_after_a_commit_arrives(shop, own_rest):
    """Each run is killed during its n-th commit, alternately before and after the catalog has received it."""
    running: list[subprocess.Popen[str]] = []
    strike = {"at": -1, "arrived": False}

    def before(number: int, arrived: bool) -> None:
        if number == strike["at"] and arrived == strike["arrived"]:
            running[-1].send_signal(signal.SIGKILL)
            running[-1].wait()

    with faulty_proxy(own_rest, lambda number, table: "none", before) as proxy:
        given = environment(proxy.address, "killed")
        for stage, offsets in enumerate(((0, 9), (2, 5))):
            if stage:
                sandbox.step(shop, 40)
            for number, offset in enumerate(offsets):
                strike.update(at=len(proxy.done) + offset, arrived=number % 2 == 1)
                running.append(app(given, "run"))
                _, errors = running[-1].communicate(timeout=200)
                assert running[-1].returncode == -signal.SIGKILL, errors[-2000:]
            strike.update(at=-1)
            assert run_undisturbed(over_rest(proxy.address, "killed")) == run_undisturbed(load_settings())


def test_two_concurrent_runs_duplicate_no_rows(shop, own_rest):
    given = environment(own_rest, "both")
    for stage in range(2):
        if stage:
            sandbox.step(shop, 40)
        both = [app(given, "run"), app(given, "run")]
        for process in both:
            _, errors = process.communicate(timeout=200)
            assert "Traceback" not in errors
            assert process.returncode in (0, 1), errors[-2000:]
        assert run_undisturbed(over_rest(own_rest, "both")) == run_undisturbed(load_settings())
