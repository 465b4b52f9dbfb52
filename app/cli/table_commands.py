"""The commands that read tables: status, sql, digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output
from app.cli.step_report import expectation_json
from app.project import PROJECT
from lakehouse.format_bytes import format_bytes
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from lakehouse.expectations import ExpectationResult
    from lakehouse.run_history import PastRun
    from lakehouse.status import TableStatus

STATUS_COLUMNS = ("table", "rows", "snapshot", "lag", "expectations", "last run", "files", "size", "position")
RESULT_COLUMNS = ("table", "expectation", "severity", "outcome", "rows", "violations", "in the table", "details")
RUN_COLUMNS = ("run", "kind", "started", "seconds", "tables changed", "rows written", "failed expectations", "errors")


def status(
    expectations: Annotated[bool, typer.Option("--expectations", help="Show the latest result of every expectation")] = False,
    runs: Annotated[int, typer.Option(min=0, help="Show the last N runs that changed a table or had an error")] = 0,
    json: Json = False,
) -> None:
    """Show each table's rows, snapshot, position, lag behind its source, last run and expectation results."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.run_history import last_results, past_runs
    from lakehouse.status import statuses

    output, lake = Output(json), Lake(load_settings())
    if not expectations and not runs:
        tables = statuses(lake, PROJECT)
        output.json([asdict(table) for table in tables]) if json else print_statuses(output, tables)
        return
    results, past = last_results(lake) if expectations else [], past_runs(lake, runs) if runs else []
    if json:
        output.json({"expectations": [expectation_json(result) for result in results], "runs": [asdict(run) for run in past]})
        return
    if expectations:
        print_results(output, results)
    if runs:
        print_runs(output, past)


def print_statuses(output: Output, tables: Sequence[TableStatus]) -> None:
    """Print one line per table."""
    from lakehouse.status import short_position

    output.table(
        STATUS_COLUMNS,
        [
            (
                table.table,
                table.rows,
                str(table.snapshot or ""),
                table.lag,
                table.expectations,
                table.last_run,
                table.files,
                format_bytes(table.bytes),
                _shortened(short_position(table.position), 60),
            )
            for table in tables
        ],
    )


def print_results(output: Output, results: Sequence[ExpectationResult]) -> None:
    """Print the latest result of every expectation."""
    rows = [
        (
            result.table,
            _shortened(result.expectation, 60),
            result.severity,
            result.outcome,
            result.rows,
            result.violations,
            result.total_violations,
            result.detail or "; ".join(result.examples),
        )
        for result in results
    ]
    output.table(RESULT_COLUMNS, rows)


def print_runs(output: Output, runs: Sequence[PastRun]) -> None:
    """Print the newest runs, then their errors."""
    output.table(
        RUN_COLUMNS,
        [
            (run.run_id, run.kind, run.started_at, run.seconds, run.tables, run.rows_written, run.warnings, len(run.errors))
            for run in runs
        ],
    )
    for run in runs:
        for error in run.errors:
            output.say(f"{run.run_id}: {error}")


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def sql(statement: Annotated[str, typer.Argument(help="One SELECT; tables as layer.name")], json: Json = False) -> None:
    """Run SQL over all tables, e.g. "SELECT * FROM gold.sales_daily FOR TIMESTAMP AS OF '2026-01-31 12:00:00'"."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.query import query
    from lakehouse.run_history import OPERATIONS

    output = Output(json)
    rows = query(Lake(load_settings()), {**PROJECT.tables, **OPERATIONS}, statement)
    if json:
        output.json(rows.to_pylist())
    else:
        output.table(rows.schema.names, [list(row.values()) for row in rows.to_pylist()])


def digest(tables: Annotated[list[str] | None, typer.Argument(help="Tables; all by default")] = None, json: Json = False) -> None:
    """Print a digest of each table's business columns, independent of row order, files and runs."""
    from lakehouse.digest import digest as digest_of
    from lakehouse.iceberg.catalog import Lake

    output, lake = Output(json), Lake(load_settings())
    chosen = [PROJECT.find_table(name) for name in tables] if tables else list(PROJECT.tables.values())
    digests = {table.name: digest_of(lake.load(table)) for table in chosen}
    if json:
        output.json(digests)
    else:
        output.table(("table", "digest"), list(digests.items()))


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (status, sql, digest):
        app.command()(command)
