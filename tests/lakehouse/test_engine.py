"""The engine on small tables of every kind of step: any order, duplication and split into runs gives equal tables."""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cloudpickle
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from pyiceberg.table.metadata import TableMetadataV2
from sqlalchemy import event
from support import engines
from support.property_tests import property_test

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.engine.quarantine import update_quarantine
from lakehouse.errors import CommitConflict, QueryError, ShopSphereError
from lakehouse.iceberg.compaction import compact
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.maintenance import delete_orphans, expire
from lakehouse.iceberg.schema import as_arrow
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.query import query
from lakehouse.step import Broadcast, Delta, Grouped, Parsed, Step
from lakehouse.table import TIMESTAMP, Table, column, year
from pipelines.settings import BusinessSettings

BRONZE = Table(
    "bronze.accounts",
    "Changes of accounts",
    (
        column("id", pa.int64(), "id"),
        column("city", pa.string(), "city"),
        column("amount", pa.int64(), "amount"),
        column("at", TIMESTAMP, "moment"),
        column("raw", pa.binary(), "as received"),
        column("_op", pa.string(), "operation"),
        column("_source_position", pa.string(), "position"),
        column("_source_time", TIMESTAMP, "time"),
    ),
)
RATES = Table(
    "silver.rates", "Rate per city", (column("city", pa.string(), "city"), column("rate", pa.int64(), "rate")), key=("city",)
)
ACCOUNTS = Table(
    "silver.accounts",
    "Accounts now",
    (
        column("id", pa.int64(), "id"),
        column("city", pa.string(), "city"),
        column("amount", pa.int64(), "amount"),
        column("rated", pa.int64(), "amount * rate"),
    ),
    key=("id",),
    tracked=("city",),
)
CITIES = Table(
    "gold.cities",
    "Totals",
    (column("city", pa.string(), "city"), column("accounts", pa.int64(), "n"), column("amount", pa.int64(), "sum")),
    key=("city",),
)
EVENTS = Table(
    "silver.events",
    "Each event once",
    (
        column("id", pa.int64(), "id"),
        column("city", pa.string(), "city"),
        column("amount", pa.int64(), "amount"),
        column("at", TIMESTAMP, "moment"),
    ),
    key=("id",),
    tracked=("city", "at"),
)
LEDGER = Table(
    "silver.ledger",
    "Running balance per city",
    (
        column("city", pa.string(), "city"),
        column("at", TIMESTAMP, "moment"),
        column("id", pa.int64(), "id"),
        column("balance", pa.int64(), "balance"),
    ),
    key=("city", "at", "id"),
    group=("city",),
)
QUARANTINE = Table(
    "silver.quarantine",
    "Unreadable rows",
    (
        column("source_table", pa.string(), "table"),
        column("source_position", pa.string(), "position"),
        column("reason", pa.string(), "why"),
        column("original", pa.binary(), "bytes"),
        column("_source_time", TIMESTAMP, "time"),
    ),
    key=("source_table", "source_position"),
)


def newest(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.sort("_source_position", "_op").unique("id", keep="last", maintain_order=True).filter(pl.col("_op") != "d")


def transform_accounts(frames, context):
    rates = frames["rates"].select("city", "rate")
    rows = newest(frames["rows"]).join(rates, on="city", how="left")
    return rows.select("id", "city", "amount", (pl.col("amount") * pl.col("rate").fill_null(1)).alias("rated"))


def transform_cities(frames, context):
    return (
        frames["accounts"].group_by("city").agg(pl.len().cast(pl.Int64).alias("accounts"), pl.col("rated").sum().alias("amount"))
    )


def parse_events(rows: pl.DataFrame) -> Parsed:
    bad = rows.filter(pl.col("raw") == b"bad")
    good = rows.filter((pl.col("raw") != b"bad") & (pl.col("_op") != "d"))
    return Parsed(
        good.select("id", "city", "amount", "at"),
        bad.select(
            pl.lit("bad bytes").alias("reason"),
            pl.col("_source_position").alias("source_position"),
            pl.col("raw").alias("original"),
        ),
        rows.filter(pl.col("raw") != b"bad")["_source_position"],
    )


def transform_events(frames, context):
    rows = pl.concat([frames["new"], frames["old"]])
    return rows.sort("at", "city", "amount").unique("id", keep="first", maintain_order=True)


def replace_erased(rows, context):
    return rows


def transform_ledger(frames, context):
    opening = frames["opening"].select("city", pl.col("balance").alias("start"))
    rows = frames["events"].sort("at", "id").join(opening, on="city", how="left")
    return rows.select(
        "city", "at", "id", (pl.col("amount").cum_sum().over("city") + pl.col("start").fill_null(0)).alias("balance")
    )


STEPS = (
    Step(
        ACCOUNTS,
        {
            "rows": Grouped(BRONZE, ((pl.col("id"),),)),
            "rates": Broadcast(RATES, affects=lambda new: pl.col("city").is_in(new["city"].implode())),
        },
        transform_accounts,
    ),
    Step(CITIES, {"accounts": Grouped(ACCOUNTS, ((pl.col("city"),),))}, transform_cities),
    Step(EVENTS, {"new": Delta(BRONZE, parse_events, erase=replace_erased)}, transform_events),
    Step(
        LEDGER,
        {"events": Grouped(EVENTS, ((pl.col("city"),),), columns=("city", "at", "id", "amount"))},
        transform_ledger,
        ordered_by="at",
    ),
)
START = datetime(2026, 1, 1, tzinfo=UTC)


def make_engine(home: Path, **ray) -> Engine:
    """Return an engine with the quarantine table of this module."""
    return engines.make_engine(home, quarantine=QUARANTINE, **ray)


def bronze_rows(rows: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "id": id_,
                "city": city,
                "amount": amount,
                "at": START + timedelta(minutes=minute),
                "raw": b"bad" if amount == 0 else b"good",
                "_op": op,
                "_source_position": f"{number:06d}",
                "_source_time": START,
            }
            for number, id_, city, amount, minute, op in rows
        ]
    )


def append(engine: Engine, rows: pl.DataFrame, table: Table = BRONZE) -> None:
    handle: TableHandle = engine.lake.load(table)
    sequence = handle.next_sequence
    columns = as_arrow(
        rows.with_columns(pl.lit(sequence).alias("_seq"), pl.lit(0).alias("_group_hash"), pl.lit(False).alias("_deleted")),
        handle.writer.schema,
    )
    handle.commit(handle.writer.write(columns), positions={})


def set_rates(engine: Engine, rates: dict[str, int]) -> None:
    table = Table("bronze.rates", "rates", (column("city", pa.string(), "c"), column("rate", pa.int64(), "r")))
    append(engine, pl.DataFrame({"city": list(rates), "rate": list(rates.values())}), table)
    step = Step(
        RATES, {"rows": Grouped(table, ((pl.col("city"),),))}, lambda f, c: f["rows"].group_by("city").agg(pl.col("rate").max())
    )
    engine.refresh(step)


def run(engine: Engine, **options) -> list[str]:
    return [engine.refresh(step, **options).status for step in STEPS]


def digests(engine: Engine) -> dict[str, str]:
    return digests_with(engine, EVENTS)


def digests_with(engine: Engine, events: Table) -> dict[str, str]:
    return {t.name: digest(engine.lake.load(t)) for t in (ACCOUNTS, CITIES, events, LEDGER, QUARANTINE)}


histories = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from(["x", "y", "z"]),
        st.integers(0, 5),
        st.integers(0, 30),
        st.sampled_from(["c", "u", "u", "d"]),
    ),
    min_size=1,
    max_size=14,
)


@property_test(histories, st.data(), fast=6, slow=25, suppress_health_check=list(HealthCheck))
def test_any_order_duplication_and_split_gives_equal_tables(history, data):
    rows = [(number, *item) for number, item in enumerate(history)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        whole = make_engine(Path(one))
        append(whole, bronze_rows(rows))
        set_rates(whole, {"x": 2, "y": 3})
        run(whole)
        expected = digests(whole)

        shuffled = data.draw(st.permutations(rows + data.draw(st.lists(st.sampled_from(rows), max_size=3))))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(shuffled)), max_size=3)))
        parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
        split = make_engine(Path(many))
        rate_after = data.draw(st.integers(0, len(parts)))
        for number, part in enumerate(parts):
            if number == rate_after:
                set_rates(split, {"x": 2, "y": 3})
            if part:
                append(split, bronze_rows(part))
            run(split)
        if rate_after == len(parts):
            set_rates(split, {"x": 2, "y": 3})
            run(split)
        assert digests(split) == expected
        assert run(split) == ["unchanged"] * len(STEPS)
        run(split, rebuild=True)
        assert digests(split) == expected


def test_a_rerun_commits_nothing(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    run(engine)
    before = [engine.lake.load(step.target).snapshot.snapshot_id for step in STEPS]
    assert run(engine) == ["unchanged"] * len(STEPS)
    assert [engine.lake.load(step.target).snapshot.snapshot_id for step in STEPS] == before


def test_a_stale_writer_fails_instead_of_repeating_rows(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    zombie = engine.lake.load(BRONZE)
    append(engine, bronze_rows([(1, 2, "y", 5, 0, "c")]))
    files = zombie.writer.write(bronze_rows([(1, 2, "y", 5, 0, "c")]))
    with pytest.raises(CommitConflict, match=r"bronze\.accounts"):
        zombie.commit(files, positions={})
    assert engine.lake.load(BRONZE).read(["id"]).height == 2


def test_deletes_and_new_rows_are_one_snapshot(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "x", 1, 0, "c")]))
    run(engine)
    append(engine, bronze_rows([(2, 1, "y", 7, 1, "u")]))
    before = len(engine.lake.load(ACCOUNTS).iceberg_table.metadata.snapshots)
    run(engine)
    handle = engine.lake.load(ACCOUNTS)
    assert len(handle.iceberg_table.metadata.snapshots) == before + 1
    seen = handle.iceberg_table.scan().to_arrow().to_pylist()
    assert sorted((r["id"], r["city"], r["_deleted"]) for r in seen) == [(1, "x", True), (1, "y", False), (2, "x", False)]
    assert engine.lake.load(CITIES).read(["city", "amount"]).sort("city").rows() == [("x", 1), ("y", 7)]


def test_a_correction_releases_its_row_from_quarantine(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "x", 0, 0, "c")]))
    run(engine)
    assert engine.lake.load(QUARANTINE).read(["source_position", "reason"]).rows() == [("000001", "bad bytes")]
    append(engine, bronze_rows([(1, 2, "x", 9, 0, "fix")]))
    run(engine)
    assert engine.lake.load(QUARANTINE).read(["source_position"]).height == 0
    assert sorted(engine.lake.load(EVENTS).read(["id", "amount"]).rows()) == [(1, 5), (2, 9)]


def test_an_unreadable_correction_leaves_the_received_row_in_quarantine(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 0, 0, "c")]).with_columns(_source_time=START + timedelta(hours=1)))
    append(engine, bronze_rows([(0, 1, "y", 0, 0, "fix")]))
    run(engine)
    kept = engine.lake.load(QUARANTINE).read(["source_position", "original", "_source_time"])
    assert kept.rows() == [("000000", b"bad", START + timedelta(hours=1))]


def test_rejected_rows_are_parsed_again_in_one_call(tmp_path):
    """`parse` is called once for all positions, however many rows were rejected."""
    engine, calls = make_engine(tmp_path), []

    def counting(rows: pl.DataFrame) -> Parsed:
        calls.append(rows.height)
        return parse_events(rows)

    append(engine, bronze_rows([(n, n, "x", n % 2, 0, "c") for n in range(200)]))
    engine.refresh(replace(STEPS[2], reads={"new": Delta(BRONZE, counting, erase=replace_erased)}))
    assert engine.lake.load(QUARANTINE).read(["source_position"]).height == 100
    assert len(calls) <= 4


@pytest.mark.slow
def test_ray_and_driver_give_equal_tables(tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rows = [(n, n % 700, "xyz"[n % 3], n % 7, n % 50, "u" if n % 11 else "d") for n in range(5000)]
    inline, spread = make_engine(tmp_path / "a"), make_engine(tmp_path / "b", inline_rows=0, rows_per_task=700, cpus=2)
    try:
        for engine in (inline, spread):
            for part in (rows[:3000], rows[3000:]):
                for start in range(0, len(part), 1000):
                    append(engine, bronze_rows(part[start : start + 1000]))
                run(engine)
        assert digests(spread) == digests(inline)
    finally:
        spread.pool.close()


def test_a_slow_copy_of_the_job_cannot_bring_back_a_released_row(tmp_path, monkeypatch):
    slow, quick = make_engine(tmp_path), make_engine(tmp_path)
    append(slow, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "x", 0, 0, "c")]))
    step, meanwhile = STEPS[2], []

    def late(*arguments, **options):
        if not meanwhile:
            meanwhile.append("the quick copy runs")
            quick.refresh(step)
            append(quick, bronze_rows([(1, 2, "x", 9, 0, "fix")]))
            quick.refresh(step)
        return update_quarantine(*arguments, **options)

    monkeypatch.setattr("lakehouse.engine.engine.update_quarantine", late)
    slow.refresh(step)
    assert slow.lake.load(QUARANTINE).read(["source_position"]).height == 0
    assert sorted(slow.lake.load(EVENTS).read(["id", "amount"]).rows()) == [(1, 5), (2, 9)]


def test_a_rebuild_does_not_use_stored_rows(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "y", 5, 0, "c")]))
    run(engine)

    def stricter(rows: pl.DataFrame) -> Parsed:
        return parse_events(rows.filter(pl.col("city") != "y"))

    engine.refresh(replace(STEPS[2], reads={"new": Delta(BRONZE, stricter, erase=replace_erased)}), rebuild=True)
    assert engine.lake.load(EVENTS).read(["id"]).rows() == [(1,)]


def test_a_re_created_upstream_table_replaces_the_rows_of_the_old_one(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "y", 5, 0, "c")]))
    set_rates(engine, {"x": 2, "y": 3})
    run(engine)
    engine.lake.catalog.drop_table(BRONZE.name)
    run(engine)
    append(engine, bronze_rows([(0, 1, "x", 7, 0, "c")]))
    run(engine)
    assert engine.lake.load(ACCOUNTS).read(["id", "amount"]).rows() == [(1, 7)]
    assert engine.lake.load(EVENTS).read(["id", "amount"]).rows() == [(1, 7)]
    engine.lake.catalog.drop_table(RATES.name)
    run(engine)
    assert engine.lake.load(ACCOUNTS).read(["id", "rated"]).rows() == [(1, 7)]


def test_a_changed_business_setting_recomputes_everything(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    step = replace(
        STEPS[0],
        transform=lambda frames, context: transform_accounts(frames, context).with_columns(city=pl.lit(context.base_currency)),
    )
    engine.refresh(step)
    assert engine.refresh(step).status == "unchanged"
    engine.context = BusinessSettings(base_currency="EUR")
    assert engine.refresh(step).rows_written > 0
    assert engine.lake.load(ACCOUNTS).read(["city"]).rows() == [("EUR",)]
    assert engine.refresh(step).status == "unchanged"


def test_a_new_declared_column_is_filled(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    engine.refresh(STEPS[0])
    wider = replace(ACCOUNTS, columns=(*ACCOUNTS.columns, column("twice", pa.int64(), "amount * 2")))
    step = replace(
        STEPS[0], target=wider, transform=lambda f, c: transform_accounts(f, c).with_columns(twice=pl.col("amount") * 2)
    )
    engine.refresh(step)
    assert engine.lake.load(wider).read(["id", "twice"]).rows() == [(1, 10)]


@pytest.mark.parametrize("rows_per_task", [10**9, 2])
def test_a_changed_group_duplicates_no_row(tmp_path, rows_per_task):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(n, n, "xyz"[n % 3], 5, 0, "c") for n in range(9)]))
    run(engine)
    step = replace(
        STEPS[2],
        target=replace(EVENTS, group=("id", "city")),
        reads={"new": Grouped(BRONZE, ((pl.col("id"), pl.col("city")),))},
        transform=lambda frames, context: newest(frames["new"]).select("id", "city", "amount", "at"),
    )
    engine.refresh(step)
    append(engine, bronze_rows([(20 + n, n, "xyz"[n % 3], 7, 0, "u") for n in range(9)]))
    engine.refresh(step)
    assert sorted(engine.lake.load(EVENTS).read(["id", "amount"]).rows()) == [(n, 7) for n in range(9)]
    hashes = engine.lake.load(EVENTS).read(["id", "city", "_group_hash"])
    assert (hashes["_group_hash"] == group_hash(hashes, ("id", "city"))).all()


@pytest.mark.parametrize(
    ("before", "type_", "recreated"),
    [
        (pa.int32(), pa.string(), True),
        (pa.int32(), pa.decimal128(20, 2), True),
        (pa.int32(), pa.int64(), False),
        (pa.decimal128(18, 2), pa.decimal128(20, 2), False),
        (pa.decimal128(18, 2), pa.decimal128(20, 4), True),
    ],
    ids=str,
)
def test_a_changed_column_type(tmp_path, before, type_, recreated):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    narrow = replace(CITIES, columns=(CITIES.columns[0], column("accounts", before, "n"), CITIES.columns[2]))
    engine.refresh(STEPS[0])
    engine.refresh(replace(STEPS[1], target=narrow))
    before = engine.lake.load(narrow).metadata.table_uuid
    other = replace(CITIES, columns=(CITIES.columns[0], column("accounts", type_, "n"), CITIES.columns[2]))
    engine.refresh(replace(STEPS[1], target=other))
    assert engine.lake.load(other).arrow_schema.field("accounts").type == type_
    assert str(engine.lake.load(other).read(["accounts"]).item()).startswith("1")
    assert (engine.lake.load(other).metadata.table_uuid != before) is recreated


def test_a_key_with_fewer_columns(tmp_path):
    engine = make_engine(tmp_path)
    fine = replace(EVENTS, key=("id", "city"), group=("id", "city"), tracked=())
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 1, "y", 5, 0, "u"), (2, 2, "x", 5, 0, "c")]))

    def transform_fine(frames, context):
        return frames["new"].select("id", "city", "amount", "at").unique(["id", "city"])

    engine.refresh(
        replace(
            STEPS[2], target=fine, reads={"new": Grouped(BRONZE, ((pl.col("id"), pl.col("city")),))}, transform=transform_fine
        )
    )
    assert engine.lake.load(fine).read(["id"]).height == 3
    step = replace(
        STEPS[2],
        target=replace(EVENTS, tracked=()),
        reads={"new": Grouped(BRONZE, ((pl.col("id"),),))},
        transform=lambda frames, context: newest(frames["new"]).select("id", "city", "amount", "at"),
    )
    engine.refresh(step)
    assert sorted(engine.lake.load(EVENTS).read(["id", "city"]).rows()) == [(1, "y"), (2, "x")]


def test_two_versions_of_a_declaration_do_not_drop_each_others_table(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "x", 5, 0, "c")]))
    engine.refresh(STEPS[0])
    narrow = replace(CITIES, columns=(CITIES.columns[0], column("accounts", pa.int32(), "n"), CITIES.columns[2]))
    found = set()
    for number, table in enumerate((narrow, CITIES, narrow, CITIES, narrow)):
        append(engine, bronze_rows([(10 + number, 10 + number, "x", 5, 0, "c")]))
        engine.refresh(STEPS[0])
        engine.refresh(replace(STEPS[1], target=table))
        found.add(engine.lake.load(table).metadata.table_uuid)
        assert engine.lake.load(table).read(["accounts"]).item() == 3 + number
    assert len(found) == 1


def test_a_changed_partitioning(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "y", 5, 0, "c")]))
    run(engine)
    expected = digests(engine)
    cut = replace(EVENTS, partition_by=(year("at"),))
    engine.refresh(replace(STEPS[2], target=cut))
    assert [str(f.transform) for f in engine.lake.load(cut).iceberg_table.spec().fields] == ["year"]
    run_after = [engine.refresh(replace(STEPS[2], target=cut)).status, engine.refresh(STEPS[3]).status]
    assert run_after[0] == "unchanged"
    assert digests_with(engine, cut) == expected


def test_reading_a_table_never_re_creates_it(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    run(engine)
    other = replace(CITIES, columns=(CITIES.columns[0], column("accounts", pa.string(), "n"), CITIES.columns[2]))
    assert engine.lake.load(other).read(["accounts"]).item() == 1
    assert engine.lake.load(CITIES).read(["accounts"]).item() == 1


def test_a_re_created_quarantine_table_is_filled_again(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c"), (1, 2, "x", 0, 0, "c")]))
    run(engine)
    engine.lake.catalog.drop_table(QUARANTINE.name)
    run(engine)
    assert engine.lake.load(QUARANTINE).read(["source_position"]).rows() == [("000001",)]
    assert run(engine) == ["unchanged"] * len(STEPS)


def test_values_with_the_same_concatenation_have_different_digests(tmp_path):
    engine, found = make_engine(tmp_path), []
    for number, row in enumerate([("a\x1f=b", "c"), ("a", "b\x1f=c"), ("1:a", ""), ("", "1:a"), ("a1:", "b"), ("a", "1:b")]):
        table = Table(f"silver.pair{number}", "p", (column("l", pa.string(), "l"), column("r", pa.string(), "r")), key=("l",))
        append(engine, pl.DataFrame([row], schema=["l", "r"], orient="row"), table)
        found.append(digest(engine.lake.load(table)))
    assert len(set(found)) == len(found)


def test_a_full_catalog_disk_is_no_commit_conflict(tmp_path):
    engine = make_engine(tmp_path)
    handle = engine.lake.load(BRONZE)
    files = handle.writer.write(bronze_rows([(0, 1, "x", 5, 0, "c")]))

    @event.listens_for(engine.lake.catalog.engine, "before_cursor_execute")
    def full(connection, cursor, statement, parameters, context, many):
        if statement.startswith("UPDATE"):
            raise sqlite3.OperationalError("database or disk is full")  # SQLite's error when its journal cannot grow

    with pytest.raises(ShopSphereError, match="full") as caught:
        handle.commit(files, positions={})
    assert not isinstance(caught.value, CommitConflict)


def test_table_suffixes_in_sql_are_kept_and_unsupported_time_travel_is_refused(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(n, n, "xyz"[n % 3], 5, 0, "c") for n in range(6)]))
    run(engine)
    tables = {table.name: table for table in (ACCOUNTS, CITIES)}

    def ask(statement: str) -> list[dict]:
        return query(engine.lake, tables, statement).to_pylist()

    assert ask("SELECT count(*) AS n FROM silver.accounts TABLESAMPLE reservoir(2 ROWS)") == [{"n": 2}]
    assert len(ask("SELECT count(*) AS n FROM (PIVOT silver.accounts ON city USING sum(amount) GROUP BY id)")) == 1
    assert ask("SELECT count(*) AS n FROM (PIVOT silver.accounts ON city USING sum(amount) GROUP BY id)") == [{"n": 6}]
    assert "amount" in ask("SELECT to_json(t)::VARCHAR AS j FROM silver.accounts t WHERE t.id = 1")[0]["j"]
    assert ask("SELECT count(*) AS n FROM silver.accounts a NATURAL JOIN (SELECT city FROM gold.cities) c") == [{"n": 6}]
    assert ask("SELECT t.b AS city FROM silver.accounts AS t(a, b, c, d) WHERE t.a = 1") == [{"city": "y"}]
    assert ask("SELECT t.id AS of FROM silver.accounts t WHERE t.id = 1") == [{"of": 1}]
    later = "FOR TIMESTAMP AS OF TIMESTAMP '2100-01-01'"
    assert ask(f"SELECT count(*) AS n FROM silver.accounts {later}") == [{"n": 6}]
    for clause in ("FOR SYSTEM_TIME AS OF '2020-01-01'", "AT (VERSION => 1)", "AT (TIMESTAMP => '2020-01-01')"):
        with pytest.raises(QueryError, match=r"FOR VERSION AS OF|cannot be read"):
            ask(f"SELECT count(*) FROM silver.accounts {clause}")


def test_a_property_is_found_without_reading_the_whole_snapshot_history(tmp_path, monkeypatch):
    engine = make_engine(tmp_path)
    for number in range(5):
        append(engine, bronze_rows([(number, 1, "x", 5, 0, "c")]))
    asked = []
    by_id = TableMetadataV2.snapshot_by_id
    monkeypatch.setattr(TableMetadataV2, "snapshot_by_id", lambda self, number: asked.append(number) or by_id(self, number))
    handle = engine.lake.load(BRONZE)
    assert handle.snapshot_property("shopsphere.shape") is None
    assert len(asked) <= 1


def test_a_change_in_a_column_that_is_not_read_affects_nothing(tmp_path):
    engine = make_engine(tmp_path)
    goods = Table(
        "bronze.goods",
        "goods",
        (*(column(n, pa.string(), n) for n in ("city", "kind", "price", "_op")), column("_source_position", pa.string(), "p")),
    )
    kept = Table("silver.goods", "goods", tuple(column(n, pa.string(), n) for n in ("city", "kind", "price")), key=("city",))

    def newest_goods(frames, context):
        rows = frames["rows"].sort("_source_position").unique("city", keep="last", maintain_order=True)
        return rows.filter(pl.col("_op") != "d").select("city", "kind", "price")

    keep = Step(kept, {"rows": Grouped(goods, ((pl.col("city"),),))}, newest_goods)
    named = replace(CITIES, columns=(*CITIES.columns, column("kind", pa.string(), "k")))
    step = Step(
        named,
        {
            "accounts": Grouped(ACCOUNTS, ((pl.col("city"),),)),
            "goods": Broadcast(
                kept,
                columns=("city", "kind"),
                affects=lambda new: pl.col("city").is_in(new["city"].implode()),
            ),
        },
        lambda frames, context: transform_cities(frames, context).join(frames["goods"], on="city", how="left"),
    )
    append(engine, bronze_rows([(n, n, "xyz"[n % 3], 5, 0, "c") for n in range(9)]))
    engine.refresh(STEPS[0])
    number = iter(range(100))

    def change(*rows: tuple[str, str, str, str]) -> tuple[int, dict[str, str | None]]:
        frame = [(*row, f"{next(number):06d}") for row in rows]
        append(engine, pl.DataFrame(frame, schema=["city", "kind", "price", "_op", "_source_position"], orient="row"), goods)
        engine.refresh(keep)
        report = engine.refresh(step)
        return report.rows_read, dict(engine.lake.load(named).read(["city", "kind"]).rows())

    assert change(("x", "a", "1", "c"), ("y", "a", "1", "c"))[1] == {"x": "a", "y": "a", "z": None}
    assert change(("x", "a", "2", "u"), ("y", "a", "2", "u")) == (0, {"x": "a", "y": "a", "z": None})
    assert change(("x", "b", "2", "u"))[1] == {"x": "b", "y": "a", "z": None}
    assert change(("y", "a", "2", "d"))[1] == {"x": "b", "y": None, "z": None}
    assert change(("y", "a", "2", "c"))[1] == {"x": "b", "y": "a", "z": None}
    assert engine.refresh(step).status == "unchanged"


def test_commits_of_other_engines_keep_positions(tmp_path):
    engine = make_engine(tmp_path)
    handle = engine.lake.load(BRONZE)
    rows = as_arrow(bronze_rows([(0, 1, "x", 5, 0, "c")]), handle.writer.schema)
    handle.commit(handle.writer.write(rows), positions={"kafka": {"events:0": 100}})
    engine.lake.load(BRONZE).iceberg_table.append(rows)
    assert engine.lake.load(BRONZE).positions == {"kafka": {"events:0": 100}}
    # nor does a later maintenance
    assert expire(engine.lake, BRONZE, 24, datetime.now(UTC) + timedelta(days=30)) == 0
    assert engine.lake.load(BRONZE).positions == {"kafka": {"events:0": 100}}
    assert engine.lake.load(BRONZE).data_sequence > 0


def test_expiry_is_measured_from_the_time_a_snapshot_was_replaced(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, bronze_rows([(0, 1, "x", 5, 0, "c")]))
    append(engine, bronze_rows([(1, 2, "y", 5, 0, "c")]))
    reader = engine.lake.load(BRONZE)
    long_after = datetime.now(UTC) + timedelta(days=8)
    compact(engine.lake, BRONZE)
    # just compacted, though the snapshot before it is eight days old
    assert expire(engine.lake, BRONZE, 24 * 9, long_after) == 0
    assert delete_orphans(engine.lake, BRONZE, 24, long_after) == (0, 0)
    assert reader.read(["id"]).height == 2
    assert expire(engine.lake, BRONZE, 24 * 7, long_after) == 2
    assert delete_orphans(engine.lake, BRONZE, 24, long_after)[0] > 0
    assert engine.lake.load(BRONZE).read(["id"]).height == 2


@pytest.mark.parametrize("commits", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_other_readers_see_the_same_rows(tmp_path, commits):
    """PyIceberg's own reader reads our position deletes and manifests."""
    engine = make_engine(tmp_path)
    for number in range(commits):
        append(engine, bronze_rows([(number, number % 5, "xyz"[number % 3], number, number, "u")]))
        run(engine)
    for table in (ACCOUNTS, CITIES, LEDGER):
        handle = engine.lake.load(table)
        theirs = pl.from_arrow(handle.iceberg_table.scan().to_arrow())
        if table.keeps_tombstones:
            theirs = theirs.filter(~pl.col("_deleted"))
        names = [c.name for c in table.columns]
        assert theirs.select(names).sort(table.key).equals(handle.read(names).sort(table.key))
        assert handle.iceberg_table.scan().count() == pl.from_arrow(handle.iceberg_table.scan().to_arrow()).height
