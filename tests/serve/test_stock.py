"""Online stock equals silver's after the same events, for any split, order and repetition."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.engines import make_engine
from support.property_tests import property_test
from support.serve_world import KINDS, bronze, figures_of, figures_online, ingest, message

from lakehouse.engine.engine import Engine
from pipelines.silver import events_clean, inventory_snapshots
from pipelines.silver.inventory_snapshots import EVENT_COLUMNS, INVENTORY_SNAPSHOTS, STORE_PRODUCT
from serve.state.lake_snapshot import newest_chain, read_lake_snapshot
from serve.state.stock import StockState

SentEvent = tuple[str, int, str, dict[str, Any]]
SENT_EVENTS: st.SearchStrategy[SentEvent] = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 4),
    st.integers(0, 14).map(str),
    st.fixed_dictionaries(
        {
            "store_id": st.sampled_from(["S1", "S2"]),
            "product_id": st.sampled_from(["P1", "P1", "P2"]),
            "quantity": st.sampled_from([1, 2, 3, 5, 8, 0]),
            "to_store_id": st.sampled_from(["S2", "S3"]),
            "purchase_order": st.sampled_from([None, "A", "B"]),
            "reserved": st.sampled_from([None, True, False]),
            "sign": st.sampled_from([1, -1]),
        }
    ),
)


def bronze_rows(sent: list[SentEvent], first: int = 0) -> list[dict[str, Any]]:
    return [message(number, kind, hour, name, **metadata) for number, (kind, hour, name, metadata) in enumerate(sent, first)]


def apply_in_batches(stock: StockState, tail: list[dict[str, Any]], data: st.DataObject) -> None:
    """Apply messages in batches of any size; all changed pairs must have been reported."""
    before, reported = figures_online(stock), set()
    while tail:
        size = data.draw(st.integers(1, len(tail)))
        reported |= stock.apply(bronze(tail[:size]))
        tail = tail[size:]
    after = figures_online(stock)
    assert {pair for pair in after.keys() | before.keys() if after.get(pair) != before.get(pair)} <= reported


@pytest.fixture(scope="module")
def filled_lakehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, list[dict[str, Any]]]:
    """A lakehouse with some messages, and these messages."""
    random = Random(5)
    engine = make_engine(tmp_path_factory.mktemp("filled"))
    sent = [
        (
            kind,
            hour % 4,
            str(number),
            {
                "store_id": random.choice(["S1", "S2"]),
                "product_id": random.choice(["P1", "P2"]),
                "quantity": random.randint(1, 9),
                "to_store_id": "S3",
                "purchase_order": random.choice([None, "A"]),
                "sign": 1,
            },
        )
        for number, (kind, hour) in enumerate((random.choice(KINDS), random.randint(0, 3)) for _ in range(10))
    ]
    rows = bronze_rows(sent)
    ingest(engine, rows)
    return engine, rows


@property_test(
    st.lists(SENT_EVENTS, min_size=1, max_size=12), st.data(), fast=50, slow=150, suppress_health_check=[HealthCheck.too_slow]
)
def test_messages_after_the_snapshot_update_figures_like_silver(
    filled_lakehouse: tuple[Engine, list[dict[str, Any]]], sent: list[SentEvent], data: st.DataObject
) -> None:
    engine, before = filled_lakehouse
    rows = [*bronze_rows(sent, len(before)), *data.draw(st.lists(st.sampled_from(before), max_size=2))]
    rows += data.draw(st.lists(st.sampled_from(rows), max_size=3))
    stock = StockState(read_lake_snapshot(newest_chain(engine.lake)), engine.context)
    apply_in_batches(stock, rows, data)
    parsed = events_clean.parse_events(bronze([*before, *rows])).rows
    events = events_clean.transform({"events": parsed}, engine.context)
    both = pl.concat([events.select(STORE_PRODUCT), events.select(pl.col("to_store_id").alias("store_id"), "product_id")])
    groups = both.drop_nulls().unique().with_columns(since=pl.lit(None, pl.Datetime("us", "UTC")))
    ledger = inventory_snapshots.transform({"events": events.select(EVENT_COLUMNS), "groups": groups}, engine.context)
    assert figures_online(stock) == figures_of(ledger)


@given(st.lists(SENT_EVENTS, min_size=1, max_size=25), st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
def test_online_stock_equals_silver(sent: list[SentEvent], data: st.DataObject) -> None:
    rows = bronze_rows(sent)
    split = data.draw(st.integers(0, len(rows)))
    with tempfile.TemporaryDirectory() as home:
        engine = make_engine(Path(home))
        ingest(engine, rows[:split])
        snapshot = read_lake_snapshot(newest_chain(engine.lake))
        if snapshot.events.files:
            assert snapshot.offsets == {"events:0": split}
        else:  # no events, or only unreadable ones: the topic is read from its beginning
            assert snapshot.offsets in ({}, {"events:0": split})
        stock = StockState(snapshot, engine.context)
        # messages in the snapshot may be repeated: a consumer may start at an earlier offset
        apply_in_batches(stock, rows[data.draw(st.integers(0, split)) :], data)
        ingest(engine, rows[split:])
        silver = engine.lake.load(INVENTORY_SNAPSHOTS).read(INVENTORY_SNAPSHOTS.schema.names)
        assert figures_online(stock) == figures_of(silver)
        for product in ("P1", "P2"):
            online = stock.history(product=product).sort(INVENTORY_SNAPSHOTS.key)
            assert online.equals(silver.filter(product_id=product).sort(INVENTORY_SNAPSHOTS.key))
