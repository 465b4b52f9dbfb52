"""The laws on the whole pipeline: the bronze rows of a real shop, in any order, duplicated, split into runs, give the
same silver and gold tables; so does a rebuild."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

import pipelines
from app import sandbox
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.errors import CommitConflict
from lakehouse.iceberg.maintenance import maintain
from lakehouse.iceberg.schema import as_arrow
from lakehouse.settings import RaySettings
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings

Bronze = Mapping[str, pl.DataFrame]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bronze, dict[str, str]]]:
    """Yield the bronze rows of a shop with two batches of later orders, and the digests after its runs."""
    home = tmp_path_factory.mktemp("laws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(home))
        sandbox.start(home, orders=250, seed=3)
        try:
            with open_engine(load_settings()) as engine:
                for orders in (0, 40, 40):
                    if orders:
                        sandbox.step(home, orders)
                    assert not run_once(engine, PROJECT, lambda name, report: None).errors
                bronze = {}
                for table in pipelines.BRONZE:
                    handle = engine.lake.load(table)
                    names = [name for name in handle.reader.schema.names if name != "_seq"]
                    bronze[table.name] = handle.read(names)
                yield bronze, digests(engine)
        finally:
            sandbox.stop(home)


def engine_in(home: Path, stack: list) -> Engine:
    context = open_engine(Settings(home=home, ray=RaySettings(inline_rows=10**9)))
    stack.append(context)
    return context.__enter__()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Engine]:
    """An engine on an empty lake."""
    stack: list = []
    yield engine_in(tmp_path, stack)
    stack[0].__exit__(None, None, None)


def digests(engine: Engine) -> dict[str, str]:
    return {name: digest(engine.lake.load(table)) for name, table in pipelines.TABLES.items() if table.layer != "bronze"}


def append(engine: Engine, name: str, rows: pl.DataFrame) -> None:
    handle = engine.lake.load(pipelines.TABLES[name])
    columns = pl.DataFrame(rows).with_columns(pl.lit(handle.next_sequence, pl.Int64).alias("_seq"))
    handle.evolve_schema(as_arrow_schema(rows))
    handle.commit(handle.writer.write(as_arrow(columns, handle.writer.schema)), positions={})


def as_arrow_schema(rows: pl.DataFrame):
    import pyarrow as pa

    schema = rows.clear().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    plain = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    return pa.schema([f.with_type(plain.get(f.type, f.type)) for f in schema])


def refresh_all(engine: Engine) -> list[str]:
    return [engine.refresh(step).status for step in pipelines.STEPS]


def arrivals(bronze: Bronze, chance: random.Random, runs: int) -> list[dict[str, pl.DataFrame]]:
    """Return the rows in random order, some of them twice, distributed over `runs` runs."""
    dealt: list[dict[str, pl.DataFrame]] = [{} for _ in range(runs)]
    for name, rows in bronze.items():
        twice = rows.sample(min(rows.height, 25), seed=chance.randrange(10**6))
        mixed = pl.concat([rows, twice]).sample(fraction=1.0, shuffle=True, seed=chance.randrange(10**6))
        hands = pl.Series([chance.randrange(runs) for _ in range(mixed.height)], dtype=pl.Int64)
        for number in range(runs):
            dealt[number][name] = mixed.filter(hands == number)
    return dealt


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_any_order_duplication_and_split_of_arrivals_gives_the_same_tables(shop, fresh, seed):
    bronze, expected = shop
    chance = random.Random(seed)
    for part in arrivals(bronze, chance, runs=4):
        for name, rows in part.items():
            if rows.height:
                append(fresh, name, rows)
        refresh_all(fresh)
    assert digests(fresh) == expected
    assert set(refresh_all(fresh)) == {"unchanged"}


@pytest.mark.slow
def test_a_rebuild_from_nothing_gives_the_same_tables(shop, fresh):
    bronze, expected = shop
    for name, rows in bronze.items():
        append(fresh, name, rows)
    refresh_all(fresh)
    assert digests(fresh) == expected
    for step in pipelines.STEPS:
        fresh.refresh(step, rebuild=True)
    assert digests(fresh) == expected


@pytest.mark.slow
@pytest.mark.parametrize("runs", [2, 3])
def test_maintenance_during_a_run_loses_nothing(shop, fresh, runs):
    bronze, expected = shop
    stop = threading.Event()
    done: list[str] = []

    def maintain_until_stopped() -> None:
        while not stop.is_set():
            for table in pipelines.TABLES.values():
                if fresh.lake.exists(table):
                    try:
                        maintain(fresh.lake, table, datetime.now(UTC))
                        done.append(table.name)
                    except CommitConflict:
                        done.append("conflict")

    maintainer = threading.Thread(target=maintain_until_stopped)
    maintainer.start()
    try:
        for part in arrivals(bronze, random.Random(9), runs=runs):
            for name, rows in part.items():
                if rows.height:
                    retry_on_conflict(lambda name=name, rows=rows: append(fresh, name, rows))
            refresh_all(fresh)
    finally:
        stop.set()
        maintainer.join()
    assert len(done) > len(pipelines.TABLES)
    assert digests(fresh) == expected


def retry_on_conflict(action) -> None:
    for _ in range(50):
        try:
            return action()
        except CommitConflict:
            continue
    raise AssertionError("every attempt met a conflict")
