"""The run history: recorded once, shown by `status`, bounded by `maintain`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from support.project import use_project
from support.sales_lake import NOW, SALES, SALES_RECEIVED, SALES_STEP, TOTALS, TOTALS_STEP, receive, sales_engine

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError, SourceError
from lakehouse.expectations import ExpectationsFailed
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import maintain
from lakehouse.iceberg.reader import File, FileReader
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.query import query
from lakehouse.run_history import (
    EXPECTATION_RESULTS,
    OPERATIONS,
    RUNS,
    RunHistory,
    RunRecord,
    delete_old_days,
    last_results,
    past_runs,
)
from lakehouse.step import Step
from lakehouse.table import Table
from pipelines.silver.quarantine import QUARANTINE


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return sales_engine(tmp_path)


def run_and_record(engine: Engine, history: RunHistory | None = None, *more: ShopSphereError, kind: str = "run") -> RunRecord:
    """Refresh both steps as one run and record it."""
    record, results, errors = RunRecord(kind), [], list(more)
    for step in (SALES_STEP, TOTALS_STEP):
        try:
            results.append(engine.refresh(step))
        except ExpectationsFailed as error:
            errors.append(error)
    (history or RunHistory(engine.lake)).record(record, results, errors)
    return record


def sales_project(steps: tuple[Step, ...]) -> Project:
    """Return a project of the sales tables, without sources."""
    return Project(sources=lambda settings: (), source_tables=(SALES_RECEIVED,), steps=steps, quarantine=QUARANTINE)


def counts(engine: Engine) -> tuple[int, int]:
    """Return the number of rows in the tables of runs and of expectation results."""
    lake = engine.lake
    return tuple(lake.load(table).read(["run_id"]).height if lake.exists(table) else 0 for table in (RUNS, EXPECTATION_RESULTS))


def test_a_run_has_a_row_per_table_and_a_result_per_expectation(engine):
    receive(engine, (1, "north", 10), (2, "moon", 20))
    record = run_and_record(engine)
    assert counts(engine) == (2, 4 + 5)
    assert len(engine.lake.load(RUNS).iceberg_table.metadata.snapshots) == 1, "one commit per run"
    (past,) = past_runs(engine.lake, 10)
    assert (past.run_id, past.kind, past.tables, past.rows_written, past.warnings, past.errors) == (record.id, "run", 2, 4, 1, ())
    worst = next(result for result in last_results(engine.lake) if result.table == SALES.name)
    assert (worst.expectation, worst.outcome, worst.violations) == ("accepted(shop: east, north, south)", "warn", 1)
    rows = query(
        engine.lake, OPERATIONS, "SELECT examples FROM operations.expectation_results WHERE outcome = 'warn'"
    ).to_pylist()
    assert rows == [{"examples": "id=2"}]


def test_a_run_with_nothing_new_is_not_recorded(engine):
    receive(engine, (1, "north", 10))
    run_and_record(engine)
    before = {name: engine.lake.load(table).snapshot for name, table in OPERATIONS.items()}
    run_and_record(engine)
    assert {name: engine.lake.load(table).snapshot for name, table in OPERATIONS.items()} == before


def test_a_recurring_run_records_only_what_is_new(engine):
    history = RunHistory(engine.lake)
    receive(engine, (1, "north", 10))
    run_and_record(engine, history)
    runs, results = counts(engine)
    receive(engine, (2, "north", 5), position="2")
    run_and_record(engine, history)
    assert counts(engine) == (runs + 2, results), "the outcomes are unchanged"
    for _ in range(3):
        run_and_record(engine, history, SourceError("the source is unreachable"))
    assert counts(engine) == (runs + 3, results)
    receive(engine, (3, "north", -900), position="3")
    for _ in range(3):
        run_and_record(engine, history)
    assert counts(engine) == (runs + 3 + 2, results + 1), "one changed outcome, one error, one silver table"
    assert past_runs(engine.lake, 1)[0].errors[0].startswith(f"{TOTALS.name}: not published")
    assert next(r for r in last_results(engine.lake) if r.table == TOTALS.name).outcome == "fail"


def test_concurrent_runs_are_both_recorded(engine, tmp_path):
    receive(engine, (1, "north", 10))
    run_and_record(engine)
    result = StepResult(SALES.name, "changed", rows_written=1)
    with ThreadPoolExecutor(2) as pool:
        engines = [sales_engine(tmp_path) for _ in range(2)]
        list(pool.map(lambda engine: RunHistory(engine.lake).record(RunRecord("run"), [result]), engines))
    assert len(past_runs(engine.lake, 10)) == 3


def test_old_days_are_deleted_and_recent_ones_stay(engine):
    for days in (200, 100, 3):
        long_ago = RunRecord("run", started_at=datetime.now(UTC) - timedelta(days=days))
        RunHistory(engine.lake).record(long_ago, [StepResult(SALES.name, "changed")])
    assert delete_old_days(engine.lake, 120, datetime.now(UTC)) == 1
    assert len(past_runs(engine.lake, 10)) == 2
    for table in OPERATIONS.values():
        if engine.lake.exists(table):
            maintain(engine.lake, table, datetime.now(UTC))
    assert len(past_runs(engine.lake, 10)) == 2


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ValueError("north@example.org"), "gold.totals: unforeseen ValueError at tests/lakehouse/test_run_history.py:", 1),
        (KeyboardInterrupt(), "The run was stopped before its end.", 130),
    ],
)
def test_a_run_that_ends_early_is_recorded_with_its_changes(tmp_path, monkeypatch, capsys, error, message, code):
    from app.cli.main import main

    def transform(frames: object, context: object) -> None:
        raise error

    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    for source in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{source}__ENABLED", "false")
    use_project(monkeypatch, sales_project((SALES_STEP, replace(TOTALS_STEP, transform=transform))))
    receive(sales_engine(tmp_path), (1, "north", 10))
    assert main(["run"]) == code
    capsys.readouterr()
    assert main(["status", "--runs", "3", "--json"]) == 0
    (past,) = json.loads(capsys.readouterr().out)["runs"]
    assert (past["tables"], past["rows_written"]) == (1, 1), "silver.sales was written"
    assert len(past["errors"]) == 1
    assert past["errors"][0].startswith(message)
    assert "example.org" not in past["errors"][0]


@pytest.mark.parametrize("after", [1, 2])
def test_old_days_are_deleted_while_a_run_is_recorded(engine, monkeypatch, after):
    now = datetime.now(UTC)
    for days in (200, 3):
        long_ago = RunRecord("run", started_at=now - timedelta(days=days))
        RunHistory(engine.lake).record(long_ago, [StepResult(SALES.name, "changed")])
    load, loaded = Lake.load, 0

    def load_then_commit_elsewhere(lake: Lake, table: Table, **more: bool) -> TableHandle:
        nonlocal loaded
        handle = load(lake, table, **more)
        loaded += 1
        if loaded == after:  # in `delete_old_days`, or in `maintain` when it expires snapshots
            other = load(lake, table)
            other.commit(positions=other.positions, changes_rows=False)
        return handle

    monkeypatch.setattr(Lake, "load", load_then_commit_elsewhere)
    if after == 1:
        assert delete_old_days(engine.lake, 120, now) == 1
    else:
        assert maintain(engine.lake, RUNS, now + timedelta(days=9)).snapshots_expired
    assert loaded > after
    assert len(past_runs(engine.lake, 10)) == (1 if after == 1 else 2)


def test_a_run_and_its_record_count_the_same_tables(tmp_path, monkeypatch, capsys):
    from app.cli.main import main

    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    for source in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{source}__ENABLED", "false")
    use_project(monkeypatch, sales_project((SALES_STEP, TOTALS_STEP)))
    engine = sales_engine(tmp_path)
    receive(engine, (1, "north", 10))
    assert main(["run"]) == 0
    assert "2 of 2 tables changed" in capsys.readouterr().out
    receive(engine, (1, "north", 10), position="2", at=NOW)  # unchanged: neither silver nor gold has anything to write
    assert main(["run"]) == 0
    assert "0 of 2 tables changed" in capsys.readouterr().out
    assert [run.tables for run in past_runs(engine.lake, 2)] == [0, 2]


def test_the_newest_runs_are_read_without_older_days(engine, monkeypatch):
    for days in (9, 8, 3, 1):
        record = RunRecord("run", started_at=datetime.now(UTC) - timedelta(days=days))
        RunHistory(engine.lake).record(record, [StepResult(SALES.name, "changed", rows_written=days)])
    read: list[int] = []
    original = FileReader.read

    def counting(self: FileReader, files: list[File], *rest: object, **more: object) -> pl.DataFrame:
        read.append(len(files))
        return original(self, files, *rest, **more)

    monkeypatch.setattr(FileReader, "read", counting)
    assert [run.rows_written for run in past_runs(engine.lake, 2)] == [1, 3]
    assert sum(read) == 2
    assert [run.rows_written for run in past_runs(engine.lake, 10)] == [1, 3, 8, 9]


def test_a_manual_publication_is_recorded_with_the_published_snapshot(tmp_path, monkeypatch, capsys):
    from app.cli.main import main
    from lakehouse.status import TableStatus, with_expectations

    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    for source in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{source}__ENABLED", "false")
    use_project(monkeypatch, sales_project((SALES_STEP, TOTALS_STEP)))
    receive(sales_engine(tmp_path), (1, "north", -10))
    assert main(["run"]) == 1
    lake = sales_engine(tmp_path).lake

    def shown() -> tuple[str, str]:
        results = [result for result in last_results(lake) if result.table == TOTALS.name]
        found = with_expectations(TableStatus(table=TOTALS.name), lake, lake.load(TOTALS), results, NOW)
        return found.expectations, "; ".join(found.broken)

    assert shown()[0] == "1 fail"
    assert main(["publish", "totals"]) == 0
    assert shown()[0] == "1 warn"
    assert "within(amount >= 0): 1 of 1 rows violate it, published by hand, for example shop=north" in shown()[1]
    (row,) = query(
        lake, OPERATIONS, "SELECT snapshot FROM operations.expectation_results WHERE detail LIKE '%by hand'"
    ).to_pylist()
    assert row["snapshot"] == lake.load(TOTALS).snapshot.snapshot_id
    assert main(["run"]) == 0


def test_status_and_publish_on_the_command_line(tmp_path, monkeypatch, capsys):
    from app.cli.main import main
    from pipelines.gold import dim_date
    from pipelines.runner import open_engine
    from pipelines.settings import Settings
    from pipelines.silver.orders_unified import ORDERS_UNIFIED

    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    for source in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{source}__ENABLED", "false")
    assert main(["status", "--expectations", "--runs", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"expectations": [], "runs": []}
    assert main(["run"]) == 0
    assert main(["publish", "gold.dim_date"]) == 1
    assert "dim_date" in capsys.readouterr().err
    with open_engine(Settings(home=tmp_path)) as engine:
        handle = engine.lake.load(dim_date.DIM_DATE)
        handle.commit(positions={})
        handle.commit(positions=handle.positions, branch=AUDIT_BRANCH)
        assert engine.lake.load(ORDERS_UNIFIED) is not None
    assert main(["publish", "gold.dim_date", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] == "gold.dim_date"
    assert main(["status", "--runs", "3"]) == 0
    assert "publish" in capsys.readouterr().out
    assert main(["publish", "dim_date"]) == 1
    assert "no staged snapshot to publish" in capsys.readouterr().err
    assert main(["publish", "silver.products"]) == 1
    assert "tables keep their previous rows" in capsys.readouterr().err
