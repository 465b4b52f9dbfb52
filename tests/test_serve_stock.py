"""Online stock is what silver says when it has read the same events: any split, order and repetition."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from shop_history import make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lakehouse.engine import Engine
from lakehouse.iceberg import as_arrow
from pipelines.bronze.tables import EVENTS, row_schema
from pipelines.gold import inventory_health
from pipelines.silver import events_clean, inventory_snapshots
from pipelines.silver.inventory_snapshots import FIGURES, GROUP, INVENTORY_SNAPSHOTS, as_of
from serve.base import newest_chain, open_base
from serve.stock import Stock

T0 = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = (events_clean.STEP, inventory_snapshots.STEP, inventory_health.STEP)
KINDS = (
    "stock_received", "stock_incoming", "stock_reserved", "reservation_released", "stock_sold", "stock_returned",
    "stock_adjusted", "stock_transferred", "stock_counted", "safety_stock_set", "view_product",
)  # fmt: skip


def message(number: int, kind: str, hour: int, event_id: str, **metadata: Any) -> dict[str, Any]:
    """A bronze row; its offset is `number`."""
    moment = T0 + timedelta(hours=hour)
    value = {"event_id": event_id, "event_type": kind, "timestamp": moment.isoformat(), "metadata": metadata}
    return {
        "topic": "events",
        "partition": 0,
        "offset": number,
        "value": json.dumps(value).encode(),
        "_op": "c",
        "_source_position": f"events/00000/{number:019d}",
        "_source_time": T0,
    }


def bronze(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Messages as the connector gives them."""
    columns = {name: [row.get(name) for row in rows] for name in row_schema(EVENTS).names}
    empty = pl.from_arrow(row_schema(EVENTS).empty_table())
    assert isinstance(empty, pl.DataFrame)
    return pl.DataFrame(columns, schema=empty.schema)


def ingest(engine: Engine, rows: list[dict[str, Any]]) -> None:
    """What `run` does with the messages."""
    handle = engine.lake.load(EVENTS)
    if rows:
        frame = bronze(rows).with_columns(
            pl.lit(T0).dt.cast_time_unit("us").alias("_ingested_at"), pl.lit(handle.sequence, pl.Int64).alias("_seq")
        )
        end = {"events:0": max(row["offset"] for row in rows) + 1}
        handle.commit(handle.writer.write(as_arrow(frame, handle.arrow_schema)), positions={"kafka": end})
    for step in STEPS:
        engine.refresh(step)


def figures_of_silver(engine: Engine) -> dict[tuple[str, str], tuple[int, ...]]:
    ledger = engine.lake.load(INVENTORY_SNAPSHOTS).read(INVENTORY_SNAPSHOTS.schema.names)
    last = as_of(ledger, T0 + timedelta(days=999))
    return {(row[0], row[1]): row[2:] for row in last.select(*GROUP, *FIGURES, "available_to_promise").iter_rows()}


def figures_online(stock: Stock) -> dict[tuple[str, str], tuple[int, ...]]:
    return {pair: tuple(getattr(one, name) for name in (*FIGURES, "available_to_promise")) for pair, one in stock}


@st.composite
def messages(draw: st.DrawFn) -> list[tuple[str, int, str, dict[str, Any]]]:
    one = st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 12),
        st.integers(0, 25).map(str),
        st.fixed_dictionaries(
            {
                "store_id": st.sampled_from(["S1", "S2"]),
                "product_id": st.sampled_from(["P1", "P2"]),
                "quantity": st.integers(0, 9),
                "to_store_id": st.sampled_from(["S2", "S3"]),
                "purchase_order": st.sampled_from([None, "A", "B"]),
                "reserved": st.sampled_from([None, True, False]),
                "sign": st.sampled_from([1, -1]),
            }
        ),
    )
    return draw(st.lists(one, min_size=1, max_size=30))


@given(messages(), st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_online_stock_is_silvers(sent: list[tuple[str, int, str, dict[str, Any]]], data: st.DataObject) -> None:
    rows = [message(number, kind, hour, name, **metadata) for number, (kind, hour, name, metadata) in enumerate(sent)]
    rows += [dict(row, offset=len(rows) + n) for n, row in enumerate(data.draw(st.lists(st.sampled_from(rows), max_size=6)))]
    split = data.draw(st.integers(0, len(rows)))
    with tempfile.TemporaryDirectory() as home:
        engine = make_engine(Path(home))
        ingest(engine, rows[:split])
        base = open_base(newest_chain(engine.lake))
        assert base.offsets == ({"events:0": split} if split else {})
        stock = Stock(base, engine.context)
        # what the snapshot knows may come again: a consumer may start earlier than it has to
        tail = rows[data.draw(st.integers(0, split)) :]
        before = figures_online(stock)
        told = set()
        while tail:
            size = data.draw(st.integers(1, len(tail)))
            told |= stock.apply(bronze(tail[:size]))
            tail = tail[size:]
        ingest(engine, rows[split:])
        now = figures_online(stock)
        assert now == figures_of_silver(engine)
        assert {pair for pair in now.keys() | before.keys() if now.get(pair) != before.get(pair)} <= told
        for product in ("P1", "P2"):
            online = stock.history(product=product).sort(INVENTORY_SNAPSHOTS.key)
            silver = engine.lake.load(INVENTORY_SNAPSHOTS).read(online.columns, pl.col("product_id") == product)
            assert online.equals(silver.sort(INVENTORY_SNAPSHOTS.key))
