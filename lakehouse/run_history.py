"""What runs did and how expectations came out, as tables: `operations.runs` and `operations.expectation_results`.

Each run appends once to each, at its end, and only when it did or found something new: a run that goes on for ever
(`run --every 5s`) does not fill them with what it has said before. `maintain` drops days beyond the retention.
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

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import ExpectationResult, ExpectationsFailed
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.compaction import MAX_ATTEMPTS
from lakehouse.iceberg.errors import committing
from lakehouse.iceberg.reader import File
from lakehouse.iceberg.schema import polars_schema
from lakehouse.retry import retry_commit
from lakehouse.table import SEQUENCE, TIMESTAMP, Partition, Table, column

RUNS = Table(
    "operations.runs",
    doc="What each run did: one row a table that it changed or read for, and one an error.",
    columns=(
        column("run_id", pa.string(), "The run; also in OpenLineage events.", required=True),
        column("kind", pa.string(), "run, rebuild, replay, publish, train, monitor.", required=True),
        column("started_at", TIMESTAMP, "When the run began.", required=True),
        column("ended_at", TIMESTAMP, "When it ended.", required=True),
        column("table", pa.string(), "Table; null for an error that is about none."),
        column("status", pa.string(), "changed, rebuilt, published, read (nothing to change), failed.", required=True),
        column("rows_read", pa.int64(), "Rows read."),
        column("rows_written", pa.int64(), "Rows written, tombstones too."),
        column("rows_deleted", pa.int64(), "Rows deleted or replaced."),
        column("bytes_written", pa.int64(), "Bytes of the files written."),
        column("seconds", pa.float64(), "Wall-clock time of this table."),
        column("cpu_seconds", pa.float64(), "CPU time of this table, workers included."),
        column("snapshot", pa.int64(), "Snapshot that was made."),
        column("error", pa.string(), "What went wrong, as it was said."),
    ),
    partition_by=(Partition("started_at", "day"),),
    sort_by=("started_at", "table"),
)

RESULTS = Table(
    "operations.expectation_results",
    doc="How expectations came out: one row each time one is judged. A run that goes on for ever notes only what is new.",
    columns=(
        column("run_id", pa.string(), "The run, as in operations.runs.", required=True),
        column("judged_at", TIMESTAMP, "End of the run.", required=True),
        column("table", pa.string(), "Table.", required=True),
        column("expectation", pa.string(), "What is expected, as in docs/reference/tables.md.", required=True),
        column("severity", pa.string(), "warn, quarantine, fail.", required=True),
        column("outcome", pa.string(), "pass, or the severity.", required=True),
        column("rows", pa.int64(), "Rows that were judged: those of the groups that were recomputed.", required=True),
        column("violations", pa.int64(), "Rows that break it; 1 for a table that does.", required=True),
        column("examples", pa.string(), "Keys of a few of them."),
        column("detail", pa.string(), "What was measured, for expectations of tables."),
        column("snapshot", pa.int64(), "Snapshot that was published; null when it was not."),
        column(
            "standing",
            pa.int64(),
            "Rows of the whole table that break it, judged in this run or before; null where they were not counted.",
        ),
    ),
    partition_by=(Partition("judged_at", "day"),),
    sort_by=("judged_at", "table", "expectation"),
)

OPERATIONS: dict[str, Table] = {table.name: table for table in (RUNS, RESULTS)}
"""In the catalog, for `sql` and `maintain`; not among the business tables of `status` and `digest`."""


@dataclass(frozen=True)
class RunRecord:
    """One run: a pass, a rebuild, a replay, a training."""

    kind: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class RunHistory:
    """Notes runs; remembers what it has noted, so that the same is not noted again and again by one process."""

    lake: Lake
    _outcomes: dict[tuple[str, str], tuple[str, int, int | None]] = field(default_factory=dict)
    _errors: frozenset[str] = frozenset()

    def note(self, engine: Engine, run: RunRecord, reports: Sequence[StepResult], errors: Sequence[ShopSphereError] = ()) -> None:
        """Append what is new about a run. Raises ShopSphereError."""
        ended = datetime.now(UTC)
        busy = [report for report in reports if report.status != "unchanged"]
        said = frozenset(str(error) for error in errors)
        failed = [error for error in errors if str(error) not in self._errors]
        results = [*_of_reports(reports), *_of_errors(failed)]
        fresh = [
            (result, snapshot)
            for result, snapshot in results
            if self._outcomes.get((result.table, result.expectation)) != _came_out(result)
        ]
        rows = [*(_done(run, ended, report) for report in busy), *(_failed(run, ended, error) for error in failed)]
        self._append(engine, RUNS, rows)
        self._append(engine, RESULTS, [_result(run, ended, result, snapshot) for result, snapshot in fresh])
        self._outcomes |= {(result.table, result.expectation): _came_out(result) for result, _ in results}
        self._errors = said

    def _append(self, engine: Engine, table: Table, rows: list[dict[str, Any]]) -> None:
        def attempt() -> None:
            with committing(table.name):
                handle = self.lake.load(table)
            frame = pl.DataFrame(rows, schema=polars_schema(table.schema)).sort(table.sort_by)
            stamped = frame.with_columns(pl.lit(handle.next_sequence, pl.Int64).alias(SEQUENCE))
            handle.commit(handle.writer.write(stamped), positions={})

        if rows:
            retry_commit(attempt)


def _came_out(result: ExpectationResult) -> tuple[str, int, int | None]:
    return result.outcome, result.violations, result.total_violations


def _of_reports(reports: Iterable[StepResult]) -> list[tuple[ExpectationResult, int | None]]:
    return [(result, report.snapshot) for report in reports for result in report.results]


def _of_errors(errors: Iterable[ShopSphereError]) -> list[tuple[ExpectationResult, int | None]]:
    return [(result, None) for error in errors if isinstance(error, ExpectationsFailed) for result in error.results]


def _done(run: RunRecord, ended: datetime, report: StepResult) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "kind": run.kind,
        "started_at": run.started_at,
        "ended_at": ended,
        "table": report.table,
        "status": report.status,
        "rows_read": report.rows_read,
        "rows_written": report.rows_written,
        "rows_deleted": report.rows_deleted,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "cpu_seconds": report.cpu_seconds,
        "snapshot": report.snapshot,
    }


def _failed(run: RunRecord, ended: datetime, error: ShopSphereError) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "kind": run.kind,
        "started_at": run.started_at,
        "ended_at": ended,
        "table": getattr(error, "table", None),
        "status": "failed",
        "error": str(error),
    }


def _result(run: RunRecord, ended: datetime, result: ExpectationResult, snapshot: int | None) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "judged_at": ended,
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


def _read(lake: Lake, table: Table) -> pl.DataFrame:
    if not lake.exists(table):
        return pl.DataFrame(schema=polars_schema(table.schema))
    return lake.load(table).read(table.schema.names)


def last_results(lake: Lake) -> list[ExpectationResult]:
    """How every expectation came out when it was judged last, the worst of each table first."""
    rows = _read(lake, RESULTS).sort("judged_at").unique(["table", "expectation"], keep="last", maintain_order=True)
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


def _newest(lake: Lake, limit: int) -> tuple[pl.DataFrame, int]:
    """What is noted of so many of the newest runs, at least; and the day, since 1970, of the oldest of them."""
    if not lake.exists(RUNS):
        return pl.DataFrame(schema=polars_schema(RUNS.schema)), 0
    handle = lake.load(RUNS)
    files = handle.files()
    found: list[pl.DataFrame] = []
    first = 0
    for first in sorted({_day(file) for file in files}, reverse=True):
        found.append(handle.reader.read([file for file in files if _day(file) == first], RUNS.schema.names))
        if sum(part["run_id"].n_unique() for part in found) >= limit:
            break
    return pl.concat(found) if found else handle.reader.read((), RUNS.schema.names), first


def _since(lake: Lake, table: Table, day: int) -> pl.DataFrame:
    """The rows of a day, since 1970, and those after it."""
    if not lake.exists(table):
        return pl.DataFrame(schema=polars_schema(table.schema))
    handle = lake.load(table)
    return handle.reader.read([file for file in handle.files() if _day(file) >= day], table.schema.names)


def _day(file: File) -> int:
    """Days since 1970: both tables are partitioned by them."""
    return int(file.partition[0])


@dataclass(frozen=True)
class PastRun:
    """A run as `status --runs` shows it."""

    run_id: str
    kind: str
    started_at: datetime
    seconds: float
    tables: int
    """Tables that changed."""
    rows_written: int
    warnings: int
    """Expectations that did not hold."""
    errors: tuple[str, ...]


def past_runs(lake: Lake, limit: int) -> list[PastRun]:
    """The newest runs that did or found something, the newest first. Reads no day before that of the oldest of them."""
    runs, first = _newest(lake, limit)
    broken = _since(lake, RESULTS, first).filter(pl.col("outcome") != "pass").group_by("run_id").len("warnings")
    found = (
        runs.group_by("run_id", "kind", "started_at")
        .agg(
            (pl.col("ended_at").max() - pl.col("started_at").first()).dt.total_milliseconds().alias("ms"),
            pl.col("status").is_in(["changed", "rebuilt", "published"]).sum().alias("tables"),
            pl.col("rows_written").sum(),
            pl.col("error").drop_nulls().sort().alias("errors"),
        )
        .join(broken, on="run_id", how="left")
        .sort("started_at", "run_id", descending=True)
        .head(limit)
    )
    return [
        PastRun(
            row["run_id"],
            row["kind"],
            row["started_at"],
            row["ms"] / 1000,
            row["tables"],
            row["rows_written"],
            row["warnings"] or 0,
            tuple(row["errors"]),
        )
        for row in found.to_dicts()
    ]


def delete_old_days(lake: Lake, retention_days: float, now: datetime) -> int:
    """Drop the days of both tables that ended longer ago than the retention; gives how many files. No row is rewritten."""
    limit = (now - timedelta(days=retention_days)).date()
    first = (limit - datetime(1970, 1, 1, tzinfo=UTC).date()).days

    def drop(table: Table) -> int:
        handle = lake.load(table)
        old = frozenset(file.path for file in handle.files() if _day(file) < first)
        if old:
            handle.commit(positions={}, removed_paths=old, changes_rows=False)
        return len(old)

    return sum(
        retry_commit(partial(drop, table), attempts=MAX_ATTEMPTS, missing_files=False)
        for table in OPERATIONS.values()
        if lake.exists(table)
    )
