"""A lakehouse of two steps: the current version of each sale, and the totals per shop."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
from support.engines import make_engine

from lakehouse.engine.engine import Engine
from lakehouse.expectations import (
    accepted,
    fresh,
    row_count_drift,
    within,
)
from lakehouse.iceberg.schema import as_arrow
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column

NOW = datetime(2026, 3, 1, tzinfo=UTC)


SALES_RECEIVED = Table(
    "bronze.sales",
    "Sales as received",
    (
        column("id", pa.int64(), "sale"),
        column("shop", pa.string(), "shop"),
        column("amount", pa.int64(), "amount"),
        column("buyer", pa.string(), "e-mail of the buyer"),
        column("at", TIMESTAMP, "moment"),
        column("_op", pa.string(), "operation"),
        column("_source_position", pa.string(), "position"),
    ),
)


SALES = Table(
    "silver.sales",
    "The newest version of each sale",
    (
        column("id", pa.int64(), "sale", required=True),
        column("shop", pa.string(), "shop", required=True),
        column("amount", pa.int64(), "amount"),
        column("buyer", pa.string(), "e-mail of the buyer"),
        column("at", TIMESTAMP, "moment"),
    ),
    key=("id",),
    tracked=("shop",),
    expectations=(
        within("amount", -1_000, 1_000_000, severity="quarantine"),
        accepted("shop", {"north", "south", "east"}, severity="warn"),
    ),
)


TOTALS = Table(
    "gold.totals",
    "Sum per shop",
    (
        column("shop", pa.string(), "shop", required=True),
        column("sales", pa.int64(), "sales", required=True),
        column("amount", pa.int64(), "sum"),
        column("newest", TIMESTAMP, "newest sale"),
    ),
    key=("shop",),
    expectations=(within("amount", 0, None), fresh("newest", hours=24), row_count_drift(0.5, at_least=3)),
)


def transform_sales(frames, context):
    rows = frames["rows"].sort("_source_position", "amount").unique("id", keep="last", maintain_order=True)
    return rows.filter(pl.col("_op") != "d").select(SALES.schema.names)


def transform_totals(frames, context):
    return (
        frames["sales"]
        .group_by("shop")
        .agg(pl.len().cast(pl.Int64).alias("sales"), pl.col("amount").sum(), pl.col("at").max().alias("newest"))
    )


SALES_STEP = Step(SALES, {"rows": Grouped(SALES_RECEIVED, keys=((pl.col("id"),),))}, transform_sales)


TOTALS_STEP = Step(TOTALS, {"sales": Grouped(SALES, keys=((pl.col("shop"),),))}, transform_totals)


def sales_engine(home: Path) -> Engine:
    """Return an engine whose clock stands at NOW."""
    return make_engine(home, clock=lambda: NOW)


def receive(engine: Engine, *sales: tuple[int, str | None, int], position: str = "1", op: str = "i", at: datetime = NOW) -> None:
    handle = engine.lake.load(SALES_RECEIVED)
    rows = pl.DataFrame(
        [
            {
                "id": id_,
                "shop": shop,
                "amount": amount,
                "buyer": f"{id_}@example.org",
                "at": at,
                "_op": op,
                "_source_position": position,
            }
            for id_, shop, amount in sales
        ]
    ).with_columns(pl.lit(handle.next_sequence, pl.Int64).alias("_seq"))
    handle.commit(handle.writer.write(as_arrow(rows, handle.writer.schema)), positions={})
