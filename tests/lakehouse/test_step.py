"""Declarations that would leave wrong rows without an error are refused."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pytest

from app.project import PROJECT
from lakehouse.step import Delta, Grouped, Parsed, Step, in_dependency_order, upstream_names
from lakehouse.table import Table, column

RECEIVED = Table(
    "bronze.payments",
    "Payments as received",
    (column("id", pa.int64(), "payment"), column("city", pa.string(), "city"), column("at", pa.int64(), "time")),
)
PAYMENTS = Table(
    "silver.payments",
    "Payments",
    (
        column("id", pa.int64(), "payment"),
        column("city", pa.string(), "city"),
        column("country", pa.string(), "country"),
        column("at", pa.int64(), "time"),
    ),
    key=("id",),
    tracked=("city",),
)
BY_CITY = Table("gold.cities", "Payments per city", (column("city", pa.string(), "city"),), key=("city",))


def no_rows(frames, context):
    return pl.DataFrame()


def grouped(table: Table, key: pl.Expr, target: Table = BY_CITY, **options) -> Step:
    return Step(target, {"payments": Grouped(table, ((key,),))}, no_rows, **options)


def test_group_keys_over_the_key_and_tracked_columns_are_accepted():
    grouped(PAYMENTS, pl.col("city"))
    grouped(PAYMENTS, pl.col("id").cast(pl.String))
    grouped(PAYMENTS, pl.when(pl.col("id") > 0).then("city"))


@pytest.mark.parametrize(
    "key",
    [
        pl.col("country"),
        pl.col("country").str.to_uppercase(),
        pl.when(pl.col("country") == "DE").then("city"),
        pl.coalesce("city", "country"),
    ],
)
def test_a_group_key_over_an_untracked_column_is_refused(key: pl.Expr):
    message = r"gold\.cities: the read 'payments' groups or orders by country of silver\.payments.*Add it to `tracked`"
    with pytest.raises(ValueError, match=message):
        grouped(PAYMENTS, key)


def test_every_key_of_a_read_is_checked():
    with pytest.raises(ValueError, match="country"):
        Step(BY_CITY, {"payments": Grouped(PAYMENTS, ((pl.col("city"),), (pl.col("country"),)))}, no_rows)


def test_an_untracked_order_of_histories_is_refused():
    history = Table(
        "gold.histories",
        "Payments of each city in the order of time",
        (column("city", pa.string(), "city"), column("at", pa.int64(), "time")),
        key=("city", "at"),
        group=("city",),
    )
    with pytest.raises(ValueError, match=r"by at of silver\.payments"):
        grouped(PAYMENTS, pl.col("city"), history, ordered_by="at")


def test_bronze_is_append_only_so_any_column_can_be_a_group_key():
    grouped(RECEIVED, pl.col("city"))


def test_rows_of_a_table_without_tombstones_cannot_be_grouped():
    with pytest.raises(ValueError, match=r"groups rows of gold\.cities, which keeps no tombstones"):
        grouped(BY_CITY, pl.col("city"), Table("gold.more", "More", (column("city", pa.string(), "city"),), key=("city",)))


def test_a_delta_read_must_declare_how_an_erasure_replaces_its_rows():
    with pytest.raises(ValueError, match=r"the Delta read 'new' of bronze\.payments.*Set `erase`"):
        Step(PAYMENTS, {"new": Delta(RECEIVED, lambda rows: Parsed(rows))}, no_rows)


def test_every_declared_step_comes_after_the_steps_it_reads():
    ordered = [step.target.name for step in in_dependency_order(PROJECT.all_steps)]
    maintained = set(ordered)
    for step in PROJECT.all_steps:
        for name in upstream_names(step) & maintained:
            assert ordered.index(name) < ordered.index(step.target.name)
