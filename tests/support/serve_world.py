"""A small lakehouse of stock events for the tests of serving, filled like by `run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from lakehouse.engine.engine import Engine
from lakehouse.iceberg.schema import as_arrow
from lakehouse.step import Step
from pipelines.bronze.tables import EVENTS, row_schema
from pipelines.gold import inventory_health
from pipelines.silver import events_clean, inventory_snapshots
from pipelines.silver.inventory_snapshots import STOCK_LEVELS, STORE_PRODUCT, as_of
from serve.state.stock import StockState

T0 = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = (events_clean.STEP, inventory_snapshots.STEP, inventory_health.STEP)
KINDS = (
    "stock_received", "stock_incoming", "stock_reserved", "reservation_released", "stock_sold", "stock_returned",
    "stock_adjusted", "stock_transferred", "stock_counted", "safety_stock_set", "view_product",
)  # fmt: skip


def message(number: int, kind: str, hour: int, event_id: str, **metadata: Any) -> dict[str, Any]:
    """Return a bronze row with `number` as its offset."""
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
    """Return messages in the form that the connector returns."""
    columns = {name: [row.get(name) for row in rows] for name in row_schema(EVENTS).names}
    empty = pl.from_arrow(row_schema(EVENTS).empty_table())
    assert isinstance(empty, pl.DataFrame)
    return pl.DataFrame(columns, schema=empty.schema)


def ingest(engine: Engine, rows: list[dict[str, Any]], steps: Sequence[Step] = STEPS) -> None:
    """Ingest the messages and refresh the steps, like `run`."""
    handle = engine.lake.load(EVENTS)
    if rows:
        frame = bronze(rows).with_columns(
            pl.lit(T0).dt.cast_time_unit("us").alias("_ingested_at"), pl.lit(handle.next_sequence, pl.Int64).alias("_seq")
        )
        end = {"events:0": max(row["offset"] for row in rows) + 1}
        handle.commit(handle.writer.write(as_arrow(frame, handle.arrow_schema)), positions={"kafka": end})
    for step in steps:
        engine.refresh(step)


def figures_of(ledger: pl.DataFrame) -> dict[tuple[str, str], tuple[int, ...]]:
    last = as_of(ledger, T0 + timedelta(days=999))
    return {(row[0], row[1]): row[2:] for row in last.select(*STORE_PRODUCT, *STOCK_LEVELS, "available_to_promise").iter_rows()}


def figures_online(stock: StockState) -> dict[tuple[str, str], tuple[int, ...]]:
    return {pair: tuple(getattr(one, name) for name in (*STOCK_LEVELS, "available_to_promise")) for pair, one in stock}
