"""The offsets behind the figures: after compaction and expiry, during a run, and when an upstream snapshot has expired."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.engines import make_engine
from support.serve_world import STEPS, figures_of, figures_online, ingest, message

from lakehouse.engine.engine import Engine
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import maintain
from lakehouse.table import Table
from pipelines.bronze.tables import EVENTS
from pipelines.gold.inventory_health import INVENTORY_HEALTH
from pipelines.settings import Settings
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS
from serve.state.lake_snapshot import StateError, newest_chain, read_lake_snapshot
from serve.state.stock import StockState

TABLES: tuple[Table, ...] = (EVENTS, EVENTS_CLEAN, INVENTORY_SNAPSHOTS, INVENTORY_HEALTH)


def received(number: int, event_id: str = "") -> dict[str, object]:
    return message(number, "stock_received", number % 5, event_id or f"e{number}", store_id="S1", product_id="P1", quantity=1)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = make_engine(tmp_path)
    for start in (0, 4, 8):
        ingest(engine, [received(number) for number in range(start, start + 4)])
    return engine


def test_empty_lakehouse_has_no_offsets(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    snapshot = read_lake_snapshot(newest_chain(engine.lake))
    assert (snapshot.offsets, snapshot.stock.height, len(snapshot.event_id_hashes), snapshot.committed_at) == ({}, 0, 0, None)


def test_offsets_are_those_behind_the_figures_not_of_bronze(engine: Engine) -> None:
    assert newest_chain(engine.lake).offsets == {"events:0": 12}
    # a run that has finished bronze, then each step
    ingest(engine, [received(12)], steps=())
    for step in STEPS:
        assert newest_chain(engine.lake).offsets == {"events:0": 12}
        engine.refresh(step)
    assert newest_chain(engine.lake).offsets == {"events:0": 13}


def test_events_without_stock_advance_the_offsets(engine: Engine) -> None:
    ingest(engine, [message(12, "view_product", 1, "v1")])
    assert newest_chain(engine.lake).offsets == {"events:0": 13}


def test_snapshot_is_unchanged_by_compaction_and_expiry(engine: Engine) -> None:
    before = newest_chain(engine.lake)
    stock = figures_online(StockState(read_lake_snapshot(before), engine.context))
    lake = Lake(Settings(home=engine.lake.settings.home, snapshot_retention_hours=0))
    for table in TABLES:
        maintain(lake, table, datetime.now(UTC) + timedelta(hours=1))
    chain = newest_chain(engine.lake)
    assert chain.offsets == before.offsets
    snapshot = read_lake_snapshot(chain)
    assert figures_online(StockState(snapshot, engine.context)) == stock
    assert len(snapshot.event_id_hashes) == 12
    ledger = engine.lake.load(INVENTORY_SNAPSHOTS).read(INVENTORY_SNAPSHOTS.schema.names)
    assert stock == figures_of(ledger)


def test_expired_upstream_snapshot_is_an_error_with_instructions(engine: Engine) -> None:
    """Bronze was updated, but silver was not for longer than snapshots are retained."""
    handle = engine.lake.load(EVENTS)
    handle.commit([], positions={"kafka": {"events:0": 20}}, changes_rows=True)
    lake = Lake(Settings(home=engine.lake.settings.home, snapshot_retention_hours=0))
    maintain(lake, EVENTS, datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(StateError, match="python -m app run"):
        newest_chain(engine.lake)
