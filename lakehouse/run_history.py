"""The history of runs and of expectation results, as tables: `operations.runs` and `operations.expectation_results`.

Each run appends once to each table, at its end, and only what is new: a recurring run does not repeat results and errors that
it has already recorded. Maintenance deletes days beyond the retention.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import ExpectationResult, ExpectationsFailed
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.compaction import MAX_ATTEMPTS
from lakehouse.iceberg.errors import committing
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.schema import polars_schema
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.retry import retry_commit
from lakehouse.table import SEQUENCE, TIMESTAMP, Partition, Table, column

RUNS = Table(
    "operations.runs",
    doc="History of runs: one row per table that a run changed or read for, and one per error.",
    columns=(
        column("run_id", pa.string(), "The run; also in OpenLineage events.", required=True),
        column("kind", pa.string(), "run, rebuild, replay, publish, train, monitor.", required=True),
        column("started_at", TIMESTAMP, "Start of the run.", required=True),
        column("ended_at", TIMESTAMP, "End of the run.", required=True),
        column("table", pa.string(), "Table; null for an error that concerns no table."),
        column("status", pa.string(), "changed, rebuilt, published, read (nothing to change), failed.", required=True),
        column("rows_read", pa.int64(), "Rows read."),
        column("rows_written", pa.int64(), "Rows written, including tombstones."),
        column("rows_deleted", pa.int64(), "Rows deleted or replaced."),
        column("bytes_written", pa.int64(), "Bytes written to data files."),
        column("seconds", pa.float64(), "Wall-clock time of this table."),
        column("cpu_seconds", pa.float64(), "CPU time of this table, including workers."),
        column("snapshot", pa.int64(), "Snapshot that was committed."),
        column("error", pa.string(), "Error message."),
    ),
    partition_by=(Partition("started_at", "day"),),
    sort_by=("started_at", "table"),
)

EXPECTATION_RESULTS = Table(
    "operations.expectation_results",
    doc="Results of expectations: one row per evaluation. A recurring run records only new results.",
    columns=(
        column("run_id", pa.string(), "The run, as in operations.runs.", required=True),
        column("judged_at", TIMESTAMP, "End of the run.", required=True),
        column("table", pa.string(), "Table.", required=True),
        column("expectation", pa.string(), "Expectation, as in docs/reference/tables.md.", required=True),
        column("severity", pa.string(), "warn, quarantine, fail.", required=True),
        column("outcome", pa.string(), "pass, or the severity.", required=True),
        column("rows", pa.int64(), "Rows evaluated: those of the recomputed groups.", required=True),
        column("violations", pa.int64(), "Rows that violate it; 1 for a table that does.", required=True),
        column("examples", pa.string(), "Keys of some of these rows."),
        column("detail", pa.string(), "Measured value, for expectations of tables."),
        column("snapshot", pa.int64(), "Snapshot that was published; null if none was."),
        column(
            "standing",
            pa.int64(),
            "Rows of the whole table that violate it, evaluated in this run or before; null if they were not counted.",
        ),
    ),
    partition_by=(Partition("judged_at", "day"),),
    sort_by=("judged_at", "table", "expectation"),
)

OPERATIONS: dict[str, Table] = {table.name: table for table in (RUNS, EXPECTATION_RESULTS)}
"""Tables that are queried and maintained, but are not part of the project: status and digests leave them out."""


@dataclass(frozen=True)
class RunRecord:
    """One run of a kind: run, rebuild, replay, publish, train, monitor."""

    kind: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class RunHistory:
    """Records runs. Remembers what this process has recorded, so that a recurring run does not repeat it."""

    lake: Lake
    _outcomes: dict[tuple[str, str], tuple[str, int, int | None]] = field(default_factory=dict)
    _errors: frozenset[str] = frozenset()

    def record(self, run: RunRecord, steps: Sequence[StepResult], errors: Sequence[ShopSphereError] = ()) -> None:
        """Append the changes, errors and expectation results of a run that are new. Raises ShopSphereError."""
        ended_at = datetime.now(UTC)
        changed = [step for step in steps if step.status != "unchanged"]
        new_errors = [error for error in errors if str(error) not in self._errors]
        results = [*_results_of_steps(steps), *_results_of_errors(new_errors)]
        new_results = [
            (result, snapshot)
            for result, snapshot in results
            if self._outcomes.get((result.table, result.expectation)) != _outcome(result)
        ]
        rows = [
            *(_step_row(run, ended_at, step) for step in changed),
            *(_error_row(run, ended_at, error) for error in new_errors),
        ]
        self._append(RUNS, rows)
        self._append(EXPECTATION_RESULTS, [_result_row(run, ended_at, result, snapshot) for result, snapshot in new_results])
        self._outcomes |= {(result.table, result.expectation): _outcome(result) for result, _ in results}
        self._errors = frozenset(str(error) for error in errors)

    def _append(self, table: Table, rows: list[dict[str, Any]]) -> None:
        attempted: list[int] = []

        def attempt() -> None:
            with committing(table.name):
                handle = self.lake.load(table)
            if attempted and _has_run(handle, rows[0]["run_id"], since=attempted[0] - 1):
                return  # committed by an earlier attempt, of which the response was lost
            attempted.append(handle.next_sequence)
            frame = pl.DataFrame(rows, schema=polars_schema(table.schema)).sort(table.sort_by)
            stamped = frame.with_columns(pl.lit(handle.next_sequence, pl.Int64).alias(SEQUENCE))
            handle.commit(handle.writer.write(stamped), positions={})

        if rows:
            retry_commit(attempt)


def _has_run(handle: TableHandle, run_id: str, since: int) -> bool:
    """Return whether rows of a run were committed after the sequence `since`."""
    rows = handle.reader.read(handle.files(since=since), ["run_id"], (pl.col("run_id") == run_id) & (pl.col(SEQUENCE) > since))
    return rows.height > 0


def _outcome(result: ExpectationResult) -> tuple[str, int, int | None]:
    """Return the part of a result that makes it new when it changes."""
    return result.outcome, result.violations, result.total_violations


def _results_of_steps(steps: Iterable[StepResult]) -> list[tuple[ExpectationResult, int | None]]:
    return [(result, step.snapshot) for step in steps for result in step.results]


def _results_of_errors(errors: Iterable[ShopSphereError]) -> list[tuple[ExpectationResult, int | None]]:
    return [(result, None) for error in errors if isinstance(error, ExpectationsFailed) for result in error.results]


def _step_row(run: RunRecord, ended_at: datetime, step: StepResult) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "kind": run.kind,
        "started_at": run.started_at,
        "ended_at": ended_at,
        "table": step.table,
        "status": step.status,
        "rows_read": step.rows_read,
        "rows_written": step.rows_written,
        "rows_deleted": step.rows_deleted,
        "bytes_written": step.bytes_written,
        "seconds": step.seconds,
        "cpu_seconds": step.cpu_seconds,
        "snapshot": step.snapshot,
    }


def _error_row(run: RunRecord, ended_at: datetime, error: ShopSphereError) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "kind": run.kind,
        "started_at": run.started_at,
        "ended_at": ended_at,
        "table": getattr(error, "table", None),
        "status": "failed",
        "error": str(error),
    }


def _result_row(run: RunRecord, ended_at: datetime, result: ExpectationResult, snapshot: int | None) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "judged_at": ended_at,
        "table": result.table,
        "expectation": result.expectation,
        "severity": result.severity,
        "outcome": result.outcome,
        "rows": result.rows,
        "violations": result.violations,
        "examples": "; ".join(result.examples) or None,
        "detail": result.detail or None,
        "snapshot": snapshot,
        "standing": result.total_violations,
    }


def _read_all(lake: Lake, table: Table) -> pl.DataFrame:
    if not lake.exists(table):
        return pl.DataFrame(schema=polars_schema(table.schema))
    return lake.load(table).read(table.schema.names)


def last_results(lake: Lake) -> list[ExpectationResult]:
    """Return the last result of each expectation, sorted by table, the worst first."""
    rows = (
        _read_all(lake, EXPECTATION_RESULTS).sort("judged_at").unique(["table", "expectation"], keep="last", maintain_order=True)
    )
    order = pl.col("outcome").replace_strict({"fail": 0, "quarantine": 1, "warn": 2, "pass": 3}, default=4)
    return [
        ExpectationResult(
            row["table"],
            row["expectation"],
            row["severity"],
            row["outcome"],
            rows=row["rows"],
            violations=row["violations"],
            examples=tuple((row["examples"] or "").split("; ")) if row["examples"] else (),
            detail=row["detail"] or "",
            total_violations=row["standing"],
        )
        for row in rows.sort("table", order, "expectation").to_dicts()
    ]


def _newest_runs(lake: Lake, limit: int) -> tuple[pl.DataFrame, int]:
    """Return the rows of at least `limit` of the newest runs, and the oldest day read (in days since 1970)."""
    if not lake.exists(RUNS):
        return pl.DataFrame(schema=polars_schema(RUNS.schema)), 0
    handle = lake.load(RUNS)
    files = handle.files()
    found: list[pl.DataFrame] = []
    day = 0
    for day in sorted({_day(file) for file in files}, reverse=True):
        found.append(handle.reader.read([file for file in files if _day(file) == day], RUNS.schema.names))
        if sum(part["run_id"].n_unique() for part in found) >= limit:
            break
    return pl.concat(found) if found else handle.reader.read((), RUNS.schema.names), day


def _read_since(lake: Lake, table: Table, day: int) -> pl.DataFrame:
    """Return the rows of a day (in days since 1970) and later."""
    if not lake.exists(table):
        return pl.DataFrame(schema=polars_schema(table.schema))
    handle = lake.load(table)
    return handle.reader.read([file for file in handle.files() if _day(file) >= day], table.schema.names)


def _day(file: File) -> int:
    """Return the partition of a file, in days since 1970. Both tables are partitioned by day."""
    return int(file.partition[0])


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A run of the history. tables: number changed. warnings: number of expectations that did not pass."""

    run_id: str
    kind: str
    started_at: datetime
    seconds: float
    tables: int
    rows_written: int
    warnings: int
    errors: tuple[str, ...]


def past_runs(lake: Lake, limit: int) -> list[PastRun]:
    """Return the newest recorded runs, the newest first. Reads no day before that of the oldest of them."""
    runs, first_day = _newest_runs(lake, limit)
    results = _read_since(lake, EXPECTATION_RESULTS, first_day)
    warnings = results.filter(pl.col("outcome") != "pass").group_by("run_id").len("warnings")
    found = (
        runs.group_by("run_id", "kind", "started_at")
        .agg(
            (pl.col("ended_at").max() - pl.col("started_at").first()).dt.total_milliseconds().alias("ms"),
            pl.col("status").is_in(["changed", "rebuilt", "published"]).sum().alias("tables"),
            pl.col("rows_written").sum(),
            pl.col("error").drop_nulls().sort().alias("errors"),
        )
        .join(warnings, on="run_id", how="left")
        .sort("started_at", "run_id", descending=True)
        .head(limit)
    )
    return [
        PastRun(
            run_id=row["run_id"],
            kind=row["kind"],
            started_at=row["started_at"],
            seconds=row["ms"] / 1000,
            tables=row["tables"],
            rows_written=row["rows_written"],
            warnings=row["warnings"] or 0,
            errors=tuple(row["errors"]),
        )
        for row in found.to_dicts()
    ]


def delete_old_days(lake: Lake, retention_days: float, now: datetime) -> int:
    """Delete the days of both tables that ended longer ago than the retention; return the number of files.

    Whole files are removed, so that no row is rewritten.
    """
    limit = (now - timedelta(days=retention_days)).date()
    first_day = (limit - datetime(1970, 1, 1, tzinfo=UTC).date()).days

    def drop(table: Table) -> int:
        handle = lake.load(table)
        old = frozenset(file.path for file in handle.files() if _day(file) < first_day)
        if old:
            handle.commit(positions={}, removed_paths=old, changes_rows=False)
        return len(old)

    return sum(
        retry_commit(partial(drop, table), attempts=MAX_ATTEMPTS, missing_files=False)
        for table in OPERATIONS.values()
        if lake.exists(table)
    )
