"""Prints the results of steps: after `run`, `rebuild`, `replay` and in the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from app.cli.errors import describe
from app.cli.output import Output, ShowProgress
from lakehouse.format_bytes import format_bytes

if TYPE_CHECKING:
    from lakehouse.engine.step_result import StepResult
    from lakehouse.expectations import ExpectationResult
    from pipelines.runner import ProgressCallback, RunResult

STEP_COLUMNS = ("step", "status", "rows read", "rows written", "deleted", "written", "seconds", "cpu s")


def step_progress(show: ShowProgress) -> ProgressCallback:
    """Return a callback that shows a run's progress: one bar, or one line, per table."""

    def on_step(table: str, result: StepResult | None) -> None:
        show(table, 1 if result else 0, 1)

    return on_step


def print_run(output: Output, run: RunResult) -> None:
    """Print the results of a run: a table and a summary, or one JSON object."""
    if output.as_json:
        output.json(
            {
                "steps": [step_json(result) for result in run.results],
                "errors": [describe(error) for error in run.errors],
                "seconds": run.seconds,
                "cpu_seconds": run.cpu_seconds,
            }
        )
        return
    print_steps(output, run.results)
    for check in [check for result in run.results for check in result.results if check.outcome != "pass"]:
        output.say(f"{check.outcome}: {check.table}: {check}")
    # a step that only read upstream rows has the status "read"
    changed = sum(result.status == "changed" for result in run.results)
    output.say(f"{changed} of {len(run.results)} tables changed, in {run.seconds:.1f} s ({run.cpu_seconds:.1f} CPU s).")


def step_json(result: StepResult) -> dict[str, Any]:
    """Return the result of a step for JSON output."""
    return {**asdict(result), "results": [expectation_json(one) for one in result.results]}


def expectation_json(result: ExpectationResult) -> dict[str, Any]:
    """Return the result of an expectation for JSON output, in which the total has the name `standing`."""
    fields = asdict(result)
    standing = fields.pop("total_violations")
    return {**fields, "standing": standing}


def print_steps(output: Output, results: Sequence[StepResult]) -> None:
    """Print a table of the steps that did something."""
    rows = [
        (
            result.table,
            result.status + (" (Ray)" if result.parallel else ""),
            result.rows_read,
            result.rows_written,
            result.rows_deleted,
            format_bytes(result.bytes_written),
            result.seconds,
            result.cpu_seconds,
        )
        for result in results
        if result.status != "unchanged"
    ]
    if rows:
        output.table(STEP_COLUMNS, rows)
