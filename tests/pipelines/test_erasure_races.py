"""The removal of history beside another run: tables downstream read every deleted row before it is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.sales_lake import SALES, SALES_RECEIVED, SALES_STEP, TOTALS, TOTALS_STEP, receive, sales_engine

from lakehouse.engine.engine import Engine
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.rewrite import PurgeResult, has_tombstones, purge_history
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.table import Table
from pipelines.privacy import history
from pipelines.privacy.context import ErasureContext
from pipelines.privacy.history import MAX_ROUNDS, forget_history
from pipelines.silver.quarantine import QUARANTINE

PROJECT = Project(
    sources=lambda settings: (), source_tables=(SALES_RECEIVED,), steps=(SALES_STEP, TOTALS_STEP), quarantine=QUARANTINE
)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Return an engine whose lake has one sale of the shop north, in all tables."""
    engine = sales_engine(tmp_path)
    receive(engine, (1, "north", 10), (2, "north", 20))
    engine.refresh(SALES_STEP)
    engine.refresh(TOTALS_STEP)
    return engine


def context_of(engine: Engine) -> ErasureContext:
    return ErasureContext(
        engine=engine,
        project=PROJECT,
        refresh_on_demand=lambda engine: None,
        search_models=lambda lake, needles: pytest.fail("not part of this stage"),
        scores_topic=lambda: "",
        on_progress=lambda stage, done, total: None,
    )


def move_sale(engine: Engine, position: str, shop: str = "south") -> None:
    """Move sale 1 to a shop, as another run does that ends before it refreshes gold: silver keeps a tombstone in its old shop."""
    receive(engine, (1, shop, 10), position=position)
    engine.refresh(SALES_STEP)


def totals(engine: Engine) -> dict[str, int]:
    return dict(engine.lake.load(TOTALS).read(["shop", "amount"]).iter_rows())


def before_purge(monkeypatch: pytest.MonkeyPatch, action: Callable[[Table], None]) -> None:
    """Call `action(table)` before each purge of a table."""
    purge = history.purge_history

    def act_and_purge(lake, table: Table, **arguments) -> PurgeResult:
        action(table)
        return purge(lake, table, **arguments)

    monkeypatch.setattr(history, "purge_history", act_and_purge)


def test_a_tombstone_of_a_concurrent_run_stays_until_gold_has_read_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = iter(["2"])

    def move_once(table: Table) -> None:
        if table == SALES and (position := next(moves, None)):
            move_sale(engine, position)

    before_purge(monkeypatch, move_once)
    forget_history(context_of(engine))
    engine.refresh(TOTALS_STEP)
    assert totals(engine) == {"north": 20, "south": 10}


def test_a_tombstone_that_gold_has_not_read_is_removed_after_a_refresh(engine: Engine) -> None:
    move_sale(engine, "2")
    results = {result.table: result for result in forget_history(context_of(engine))}
    assert results[SALES.name].tombstones == 1
    assert totals(engine) == {"north": 20, "south": 10}
    silver = engine.lake.load(SALES)
    assert not has_tombstones(silver, silver.data_sequence)
    assert set(silver.read(["shop"], tombstones=True)["shop"]) == {"north", "south"}


def test_a_tombstone_that_gold_does_not_read_keeps_the_erasure_in_progress(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_sale(engine, "2")
    refreshes = []
    monkeypatch.setattr(history, "refresh_all", refreshes.append)
    with pytest.raises(ShopSphereError, match=r"silver\.sales: .* gold\.totals has not read them"):
        forget_history(context_of(engine))
    assert len(refreshes) == MAX_ROUNDS
    engine.refresh(TOTALS_STEP)
    assert totals(engine) == {"north": 20, "south": 10}


def test_tombstones_that_no_table_reads_are_removed_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    move_sale(engine, "2")
    monkeypatch.setattr(history, "refresh_all", lambda context: pytest.fail("no table has to be refreshed"))
    forget_history(replace(context_of(engine), project=replace(PROJECT, steps=(SALES_STEP,))))
    assert engine.lake.load(SALES).read(["shop"], tombstones=True)["shop"].to_list().count("north") == 1


def test_a_purge_of_another_erasure_does_not_end_the_search_for_tombstones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lakehouse.retry.time.sleep", lambda seconds: None)
    move_sale(engine, "2")
    pending = [True]

    def search_beside_another_erasure(handle: TableHandle, until: int) -> bool:
        if pending:
            pending.clear()
            engine.refresh(TOTALS_STEP)
            purge_history(engine.lake, SALES, tombstones_read_to=until)
        return has_tombstones(handle, until)

    monkeypatch.setattr(history, "has_tombstones", search_beside_another_erasure)
    forget_history(context_of(engine))
    assert not pending
    assert not has_tombstones(engine.lake.load(SALES), engine.lake.load(SALES).data_sequence)
    assert totals(engine) == {"north": 20, "south": 10}
