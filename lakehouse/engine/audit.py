"""Write-audit-publish: a gold table's new snapshot is staged on a branch, evaluated there, and published when its expectations
hold. Other tables are evaluated before their commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from lakehouse.expectations import (
    ExpectationResult,
    ExpectationsFailed,
    Fresh,
    RowCountDrift,
    Unique,
    evaluate_freshness,
    evaluate_row_count_drift,
    results_from_json,
)
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS, ROWS
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import Table


def can_be_staged(table: Table, results: Iterable[ExpectationResult]) -> bool:
    """Return whether rows that violate expectations can be written to a branch: in gold, with one row per key."""
    unique_key = str(Unique(table.key))
    return table.layer == "gold" and not any(r.outcome == "fail" and r.expectation == unique_key for r in results)


def evaluate_audit(target: TableHandle) -> tuple[ExpectationResult, ...]:
    """Evaluate the staged snapshot by its summary: all expectations but freshness. Raises ExpectationsFailed."""
    staged, current = target.staged, target.snapshot
    assert staged is not None
    rows = target.snapshot_property(ROWS, staged.snapshot_id)
    before = target.snapshot_property(ROWS, current.snapshot_id) if current else None
    return check_expectations(
        target.table,
        results_from_json(target.snapshot_property(EXPECTATIONS, staged.snapshot_id)),
        rows_before=int(before) if before else None,
        rows=int(rows) if rows else None,
        branch=AUDIT_BRANCH,
    )


def check_expectations(
    table: Table,
    row_results: Sequence[ExpectationResult],
    *,
    rows_before: int | None,
    rows: int | None,
    branch: str = "",
) -> tuple[ExpectationResult, ...]:
    """Add the results for the number of rows to those of the rows. Raises ExpectationsFailed if one of them failed.

    rows    live rows; None when unknown, and then their number is not evaluated
    branch  of the staged snapshot, for the error
    """
    drifts = [rule for rule in table.rules if isinstance(rule, RowCountDrift)] if row_results else []
    results = (
        *row_results,
        *(evaluate_row_count_drift(table.name, rule, rows_before, rows) for rule in drifts if rows is not None),
    )
    if any(result.outcome == "fail" for result in results):
        raise ExpectationsFailed(table.name, results, branch)
    return results


def freshness_results(target: TableHandle, now: datetime) -> tuple[ExpectationResult, ...]:
    """Evaluate the freshness expectations of a table."""
    rules = [rule for rule in target.table.rules if isinstance(rule, Fresh)]
    return tuple(evaluate_freshness(target.table.name, rule, target.max_value(rule.columns[0]), now) for rule in rules)


def discard_stale(target: TableHandle) -> None:
    """Discard a staged snapshot that no longer continues the table: a later run has replaced its rows."""
    if target.staged is not None and target.staged_is_stale:
        target.discard_staged()
