"""Expectations are evaluated on recomputed rows; readers never see a snapshot that violates one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from support.sales_lake import (
    NOW,
    SALES,
    SALES_RECEIVED,
    SALES_STEP,
    TOTALS,
    TOTALS_STEP,
    receive,
    sales_engine,
    transform_sales,
)

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import CommitConflict, QueryError
from lakehouse.expectations import (
    ExpectationsFailed,
    accepted,
    evaluate,
    evaluate_freshness,
    evaluate_row_count_drift,
    fresh,
    not_null,
    results_from_json,
    row_count_drift,
    unique,
    within,
)
from lakehouse.iceberg.maintenance import expire, maintain
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS, VIOLATIONS
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.query import query
from lakehouse.step import Delta, Parsed, Step
from lakehouse.table import column
from pipelines.silver.quarantine import QUARANTINE


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return sales_engine(tmp_path)


def run(engine: Engine) -> tuple[StepResult, StepResult]:
    return engine.refresh(SALES_STEP), engine.refresh(TOTALS_STEP)


def totals(engine: Engine) -> dict[str, int]:
    return dict(engine.lake.load(TOTALS).read(["shop", "amount"]).sort("shop").iter_rows())


def outcomes(report: StepResult) -> dict[str, tuple[str, int]]:
    return {result.expectation: (result.outcome, result.violations) for result in report.results}


def quarantined(engine: Engine) -> list[tuple[str, str]]:
    return sorted(engine.lake.load(QUARANTINE).read(["source_position", "reason"]).iter_rows())


# declarations


def test_required_columns_and_the_key_imply_expectations():
    assert [str(rule) for rule in SALES.rules[:2]] == ["not_null(id, shop)", "unique(id)"]
    assert replace(SALES, key=("id", "shop"), group=("id",)).rules[1] == unique("id", "shop")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (not_null("nowhere"), "no column \\['nowhere'\\]"),
        (unique("shop"), "evaluated group by group"),
        (fresh("amount", hours=1), "use a date or timestamp column"),
        (row_count_drift(0.5, severity="quarantine"), "cannot be quarantined"),
    ],
)
def test_an_invalid_declaration_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        replace(SALES, expectations=(rule,))


def test_a_step_that_builds_on_its_own_rows_cannot_quarantine():
    changes = Delta(SALES_RECEIVED, parse=lambda rows: Parsed(rows), erase=lambda rows, context: rows)
    with pytest.raises(ValueError, match="order of arrival"):
        Step(SALES, {"rows": changes}, transform_sales)
    with pytest.raises(ValueError, match="order of arrival"):
        replace(SALES_STEP, ordered_by="at")


# evaluation of rows


def test_each_kind_of_expectation_counts_violations():
    rows = pl.DataFrame(
        {"k": [1, 2, 3, 4], "a": [None, 1, 2, 2], "b": ["x", "y", None, "x"], "c": [0.0, 5.0, None, float("nan")]}
    )
    rules = (not_null("a", "b"), unique("a"), accepted("b", {"x"}), within("c", 1, 4), within("c", None, 5), within("c", 0, None))
    evaluation = evaluate("t", rules, rows, ["k"])
    assert [(str(result.expectation), result.violations, result.examples) for result in evaluation.results] == [
        ("not_null(a, b)", 2, ("k=1", "k=3")),
        ("unique(a)", 2, ("k=3", "k=4")),
        ("accepted(b: x)", 1, ("k=2",)),
        ("within(1 <= c <= 4)", 3, ("k=1", "k=2", "k=4")),
        ("within(c <= 5)", 1, ("k=4",)),
        ("within(c >= 0)", 1, ("k=4",)),
    ]
    assert evaluation.failed
    assert evaluation.accepted.equals(rows)


def test_ranges_support_every_ordered_type():
    rows = pl.DataFrame(
        {
            "k": [1, 2, 3],
            "money": pl.Series([None, "-0.0001", "5"]).cast(pl.Decimal(20, 4)),
            "at": pl.Series([NOW, NOW - timedelta(days=1), None], dtype=pl.Datetime("us", "UTC")),
            "day": [NOW.date(), (NOW - timedelta(days=1)).date(), None],
        }
    )
    rules = (within("money", Decimal("0"), None), within("at", NOW, None), within("day", NOW.date(), None))
    assert [result.examples for result in evaluate("t", rules, rows, ["k"]).results] == [("k=2",)] * 3


def test_no_rows_violate_nothing():
    rows = pl.DataFrame(schema={"k": pl.Int64, "a": pl.String})
    evaluation = evaluate("t", (not_null("a"), unique("k"), accepted("a", {"x"}), within("k", 0, 1)), rows, ["k"])
    assert {result.outcome for result in evaluation.results} == {"pass"}


def test_drift_passes_without_enough_earlier_rows():
    rule = row_count_drift(0.5, at_least=100)
    assert evaluate_row_count_drift("t", rule, None, 5_000).outcome == "pass"
    assert evaluate_row_count_drift("t", rule, 0, 5_000).outcome == "pass"
    assert evaluate_row_count_drift("t", rule, 90, 10).outcome == "pass"
    assert evaluate_row_count_drift("t", rule, 200, 101).outcome == "pass"
    assert evaluate_row_count_drift("t", rule, 200, 99).outcome == "warn"
    assert evaluate_row_count_drift("t", rule, 200, 301).outcome == "warn"


def test_freshness_is_measured_against_the_clock():
    rule = fresh("at", hours=24)
    assert evaluate_freshness("t", rule, None, NOW).outcome == "pass"
    assert evaluate_freshness("t", rule, NOW - timedelta(hours=24), NOW).outcome == "pass"
    assert evaluate_freshness("t", rule, NOW - timedelta(hours=25), NOW).outcome == "warn"
    assert evaluate_freshness("t", rule, NOW + timedelta(hours=1), NOW).outcome == "pass"


# effects of a run


def test_warnings_keep_the_row(engine):
    receive(engine, (1, "north", 10), (2, "moon", 20))
    sales, _ = run(engine)
    assert outcomes(sales)["accepted(shop: east, north, south)"] == ("warn", 1)
    assert totals(engine) == {"moon": 20, "north": 10}


def test_a_warning_lasts_as_long_as_the_violating_rows(engine):
    rule = "accepted(shop: east, north, south)"
    receive(engine, (1, "north", 10), (2, "moon", 20), (3, "moon", 30))
    run(engine)
    receive(engine, (4, "north", 10), position="2")
    sales, _ = run(engine)
    (found,) = [result for result in sales.results if result.expectation == rule]
    assert (found.outcome, found.rows, found.violations, found.total_violations) == ("warn", 1, 0, 2)
    assert str(found) == f"{rule}: 0 of 1 rows violate it, 2 in the whole table"
    receive(engine, (2, "south", 20), (5, "mars", 1), position="3")
    sales, _ = run(engine)
    (found,) = [result for result in sales.results if result.expectation == rule]
    assert (found.rows, found.violations, found.total_violations) == (2, 1, 2)
    receive(engine, (3, "moon", 30), (5, "mars", 1), position="4", op="d")
    assert outcomes(run(engine)[0])[rule] == ("pass", 0)


def test_any_split_into_runs_counts_the_same_violations(tmp_path):
    chance = random.Random(8)
    sales = [(chance.randrange(9), chance.choice(["north", "moon", "mars"]), 1, f"{n:03}") for n in range(24)]
    counted = set()
    for number, size in enumerate((5, 24)):
        engine = sales_engine(tmp_path / str(number))
        for start in range(0, 24, size):
            for id_, shop, amount, position in sales[start : start + size]:
                receive(engine, (id_, shop, amount), position=position)
            run(engine)
            maintain(engine.lake, SALES, NOW)
        counted.add(engine.lake.load(SALES).snapshot_property(VIOLATIONS))
        broken = engine.lake.load(SALES).read(["shop"], ~pl.col("shop").is_in(["north", "south", "east"])).height
        assert (
            json.loads(engine.lake.load(SALES).snapshot_property(VIOLATIONS))["accepted(shop: east, north, south)"] == broken > 0
        )
    assert len(counted) == 1


def test_rows_published_by_hand_only_warn_and_block_no_others(engine):
    receive(engine, (1, "north", -10))
    refused(engine)
    engine.lake.load(TOTALS).publish()
    receive(engine, (2, "south", 5), position="2")
    _, report = run(engine)
    (found,) = [result for result in report.results if result.expectation == "within(amount >= 0)"]
    assert (found.outcome, found.violations, found.total_violations) == ("warn", 0, 1)
    assert totals(engine) == {"north": -10, "south": 5}


def test_a_row_stays_in_quarantine_until_it_is_valid(engine):
    receive(engine, (1, "north", 10), (2, "north", 2_000_000))
    sales, _ = run(engine)
    assert outcomes(sales)["within(-1000 <= amount <= 1000000)"] == ("quarantine", 1)
    assert totals(engine) == {"north": 10}
    assert quarantined(engine) == [('{"id":"2"}', "breaks within(-1000 <= amount <= 1000000)")]
    receive(engine, (3, "north", 1), position="2")
    run(engine)
    assert len(quarantined(engine)) == 1, "other groups do not affect it"
    receive(engine, (2, "north", 20), position="3")
    run(engine)
    assert quarantined(engine) == []
    assert totals(engine) == {"north": 31}
    receive(engine, (2, "north", 3_000_000), position="4")
    run(engine)
    assert totals(engine) == {"north": 11}, "the earlier valid version is not kept"
    receive(engine, (2, "north", 3_000_000), position="5", op="d")
    run(engine)
    assert quarantined(engine) == []


def test_a_table_with_its_own_reason_column_can_quarantine(engine):
    table = replace(SALES, columns=(*SALES.columns, column("reason", pa.string(), "why it was sold")))
    step = replace(
        SALES_STEP,
        target=table,
        transform=lambda frames, context: transform_sales(frames, context).with_columns(reason=pl.lit("x")),
    )
    receive(engine, (1, "north", 10), (2, "north", 2_000_000))
    engine.refresh(step)
    assert quarantined(engine) == [('{"id":"2"}', "breaks within(-1000 <= amount <= 1000000)")]
    assert engine.lake.load(table).read(["id", "reason"]).rows() == [(1, "x")]


@pytest.mark.parametrize("orders", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_any_order_and_split_gives_equal_tables_and_quarantine(tmp_path, orders):
    chance = random.Random(5)
    sales = [(chance.randrange(12), "north", chance.choice([5, 70, 2_000_000]), str(n)) for n in range(60)]
    found = []
    for number in range(orders):
        engine = sales_engine(tmp_path / str(number))
        chance.shuffle(sales)
        for start in range(0, 60, 60 // (number + 1)):
            for id_, shop, amount, position in sales[start : start + 60 // (number + 1)]:
                receive(engine, (id_, shop, amount), position=f"{int(position):03}")
            run(engine)
        found.append((digest(engine.lake.load(SALES)), digest(engine.lake.load(TOTALS)), quarantined(engine)))
        for step in (SALES_STEP, TOTALS_STEP):
            engine.refresh(step, rebuild=True)
        found.append((digest(engine.lake.load(SALES)), digest(engine.lake.load(TOTALS)), quarantined(engine)))
    assert found[0][2], "some row is quarantined"
    assert all(one == found[0] for one in found)


def test_a_changed_expectation_is_evaluated_on_all_rows(engine):
    receive(engine, (1, "north", 10), (2, "north", 20))
    run(engine)
    stricter = replace(SALES_STEP, target=replace(SALES, expectations=(within("amount", 0, 15, severity="quarantine"),)))
    report = engine.refresh(stricter)
    assert outcomes(report)["within(0 <= amount <= 15)"] == ("quarantine", 1)
    assert quarantined(engine) == [('{"id":"2"}', "breaks within(0 <= amount <= 15)")]
    engine.refresh(SALES_STEP)
    assert quarantined(engine) == []


def test_a_silver_table_that_fails_is_not_committed(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    before = engine.lake.load(SALES).snapshot
    receive(engine, (2, None, 20), position="2")
    with pytest.raises(ExpectationsFailed, match=r"silver.sales: not published.*not_null\(id, shop\): 1 of 1 rows.*id=2"):
        engine.refresh(SALES_STEP)
    assert engine.lake.load(SALES).snapshot == before
    receive(engine, (2, "south", 20), position="3")
    run(engine)
    assert totals(engine) == {"north": 10, "south": 20}


def test_row_counts_are_stored_in_each_snapshot(engine):
    receive(engine, (1, "north", 10), (2, "south", 20), (3, "east", 5))
    run(engine)
    receive(engine, (2, "south", 20), position="2", op="d")
    receive(engine, (4, "east", 2_000_000), position="2")
    _, report = run(engine)
    for table in (SALES, TOTALS):
        handle = engine.lake.load(table)
        assert int(handle.snapshot_property("shopsphere.rows")) == handle.read([table.key[0]]).height == 2
    assert outcomes(report)["row_count_drift(50%)"] == ("pass", 0)
    receive(engine, (1, "north", 10), (3, "east", 5), position="3", op="d")
    _, report = run(engine)
    assert outcomes(report)["row_count_drift(50%)"] == ("pass", 0), "tables below three rows are exempt"
    maintain(engine.lake, SALES, NOW)
    assert engine.lake.load(SALES).snapshot_property("shopsphere.rows") == "0"


def test_freshness_warns_and_publishes(engine):
    receive(engine, (1, "north", 10), at=NOW - timedelta(hours=30))
    _, report = run(engine)
    assert outcomes(report)["fresh(newest: 24 h)"] == ("warn", 1)
    assert totals(engine) == {"north": 10}
    receive(engine, (2, "north", 10), position="2")
    _, report = run(engine)
    assert outcomes(report)["fresh(newest: 24 h)"] == ("pass", 0)


# staged snapshots


def refused(engine: Engine) -> ExpectationsFailed:
    with pytest.raises(ExpectationsFailed) as caught:
        run(engine)
    return caught.value


def test_a_refused_snapshot_can_be_inspected_on_its_branch(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", -500), position="2")
    error = refused(engine)
    assert "within(amount >= 0): 1 of 1 rows violate it, for example shop=north" in str(error)
    assert "staged snapshot is on branch 'shopsphere_audit'" in str(error)
    assert "example.org" not in str(error)
    assert totals(engine) == {"north": 10}
    tables = {table.name: table for table in (SALES, TOTALS)}
    seen = query(engine.lake, tables, "SELECT amount FROM gold.totals FOR VERSION AS OF 'shopsphere_audit'").to_pylist()
    assert seen == [{"amount": -490}]
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert query(engine.lake, tables, f"SELECT amount FROM gold.totals FOR TIMESTAMP AS OF '{later}'").to_pylist() == [
        {"amount": 10}
    ]
    with pytest.raises(QueryError, match="no snapshot nothing, nor a branch"):
        query(engine.lake, tables, "SELECT amount FROM gold.totals FOR VERSION AS OF 'nothing'")


def test_a_refused_snapshot_is_not_rebuilt_without_new_rows(engine):
    receive(engine, (1, "north", -10))
    first = refused(engine)
    staged = engine.lake.load(TOTALS).staged
    again = refused(engine)
    assert engine.lake.load(TOTALS).staged == staged
    assert str(again) == str(first)
    receive(engine, (2, "north", 15), position="2")
    run(engine)
    handle = engine.lake.load(TOTALS)
    assert totals(engine) == {"north": 5}
    assert handle.staged is None
    assert staged.snapshot_id not in {s.snapshot_id for s in handle.iceberg_table.metadata.snapshots}, (
        "the refused snapshot is deleted"
    )


def test_a_staged_snapshot_can_be_published_by_hand(engine):
    receive(engine, (1, "north", -10))
    refused(engine)
    assert totals(engine) == {}
    handle = engine.lake.load(TOTALS)
    handle.publish()
    assert totals(engine) == {"north": -10}
    assert run(engine)[1].status == "unchanged"


def test_a_stale_staged_snapshot_is_not_published(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", -500), position="2")
    refused(engine)
    stale = engine.lake.load(TOTALS)
    other = engine.lake.load(TOTALS)
    other.commit(positions=other.positions, changes_rows=False)
    with pytest.raises(CommitConflict):
        stale.publish()
    with pytest.raises(CommitConflict, match="does not continue"):
        engine.lake.load(TOTALS).publish()
    assert totals(engine) == {"north": 10}


def test_a_stale_staged_snapshot_is_discarded(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", -500), position="2")
    refused(engine)
    receive(engine, (2, "north", -500), position="3", op="d")
    _, report = run(engine)
    assert report.status == "read", "the table is unchanged: nothing is staged"
    assert engine.lake.load(TOTALS).staged is None
    receive(engine, (2, "north", -500), position="4")
    refused(engine)
    receive(engine, (2, "north", -500), position="5", op="d")
    engine.refresh(SALES_STEP)
    handle = engine.lake.load(TOTALS)
    behind = {SALES.name: engine.lake.load(SALES).position}
    handle.commit(positions={**handle.positions, **behind}, changes_rows=False)  # as if it was killed right afterwards
    assert engine.lake.load(TOTALS).staged is not None
    assert engine.refresh(TOTALS_STEP).status == "unchanged"
    assert engine.lake.load(TOTALS).staged is None
    assert totals(engine) == {"north": 10}


def test_of_two_concurrent_staged_snapshots_one_is_published(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", 5), position="2")
    engine.refresh(SALES_STEP)
    slow, quick = engine.lake.load(TOTALS), engine.lake.load(TOTALS)
    slow.commit(positions={}, branch=AUDIT_BRANCH)
    with pytest.raises(CommitConflict):
        quick.commit(positions={}, branch=AUDIT_BRANCH)
    engine.refresh(TOTALS_STEP)
    with pytest.raises(CommitConflict):
        slow.publish()
    assert totals(engine) == {"north": 15}


def test_maintenance_keeps_a_recent_staged_snapshot_and_deletes_an_old_one_with_its_files(engine, tmp_path):
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", -500), position="2")
    refused(engine)
    assert expire(engine.lake, TOTALS, 1, datetime.now(UTC)) == 0
    assert engine.lake.load(TOTALS).staged is not None
    expire(engine.lake, TOTALS, 0, datetime.now(UTC) + timedelta(seconds=1))
    handle = engine.lake.load(TOTALS)
    assert handle.staged is None
    assert [s.snapshot_id for s in handle.iceberg_table.metadata.snapshots] == [handle.snapshot.snapshot_id]
    maintain(engine.lake, TOTALS, datetime.now(UTC) + timedelta(days=30))
    left = {path.name for path in (tmp_path / "warehouse" / "gold" / "totals" / "data").rglob("*.parquet")}
    assert left == {Path(file.path).name for file in engine.lake.load(TOTALS).files()}
    refused(engine)
    assert totals(engine) == {"north": 10}


@pytest.mark.slow
def test_readers_never_see_a_refused_snapshot(tmp_path):
    engine, reader = sales_engine(tmp_path), sales_engine(tmp_path)
    receive(engine, (1, "north", 10))
    run(engine)
    stop, seen = threading.Event(), []

    def poll() -> None:
        while not stop.is_set():
            seen.append(tuple(reader.lake.load(TOTALS).read(["amount"])["amount"].to_list()))

    watching = threading.Thread(target=poll)
    watching.start()
    balance, chance = 10, random.Random(3)
    try:
        for number in range(2, 14):
            amount = chance.choice([-300, 400])
            balance += amount
            receive(engine, (number, "north", amount), position=f"{number:02}")
            engine.refresh(SALES_STEP)
            if balance < 0:
                with pytest.raises(ExpectationsFailed):
                    engine.refresh(TOTALS_STEP)
            else:
                engine.refresh(TOTALS_STEP)
    finally:
        stop.set()
        watching.join()
    assert len(set(seen)) > 1, "the table changed while it was read"
    assert all(len(rows) == 1 and rows[0] >= 0 for rows in seen)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import sales_lake as here
from lakehouse.iceberg.table_handle import TableHandle
engine = here.sales_engine(Path({home!r}))
if {before}:
    TableHandle.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
else:
    publish = TableHandle.publish
    TableHandle.publish = lambda self: (publish(self), os.kill(os.getpid(), signal.SIGKILL))
engine.refresh(here.TOTALS_STEP)
"""


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_around_publishing_loses_and_exposes_nothing(tmp_path, before):
    engine = sales_engine(tmp_path)
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", 5), position="2")
    engine.refresh(SALES_STEP)
    code = KILLED.format(tests=str(Path(__file__).parents[1]), home=str(tmp_path), before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (engine.lake.load(TOTALS).staged is not None) == before
    assert totals(engine) == {"north": 10 if before else 15}
    report = engine.refresh(TOTALS_STEP)
    assert totals(engine) == {"north": 15}
    assert report.status == ("changed" if before else "unchanged")
    assert engine.lake.load(TOTALS).staged is None
    if before:
        assert report.rows_written == 1
        assert report.rows_read == 0, "the staged snapshot of the killed run is audited and published, not built again"


def test_positions_and_rows_are_in_one_snapshot(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    handle = engine.lake.load(TOTALS)
    assert handle.positions[SALES.name] == engine.lake.load(SALES).position
    assert {r.outcome for r in results_from_json(handle.snapshot_property(EXPECTATIONS))} == {"pass"}


def test_stored_rows_that_violate_a_new_expectation_are_refused(engine):
    receive(engine, (1, "north", 10))
    run(engine)
    stricter = replace(TOTALS_STEP, target=replace(TOTALS, expectations=(within("amount", 11, None),)))
    for _ in range(2):
        with pytest.raises(ExpectationsFailed, match="amount >= 11"):
            engine.refresh(stricter)
    assert engine.refresh(TOTALS_STEP).status in ("read", "changed", "unchanged")
    assert totals(engine) == {"north": 10}
