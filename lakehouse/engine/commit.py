"""The commit of a step's table: files, positions, fingerprint and counts in one snapshot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyiceberg.manifest import DataFile

from lakehouse.engine.audit import can_be_staged, check_expectations, discard_stale, evaluate_audit
from lakehouse.engine.fingerprint import definition_fingerprint
from lakehouse.engine.plan import RefreshPlan
from lakehouse.engine.recompute import Recomputed
from lakehouse.expectations import (
    ExpectationResult,
    combine_results,
    results_to_json,
    total_violations_after,
    with_total_violations,
)
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS, FINGERPRINT, ROWS, ROWS_CHANGED, VIOLATIONS
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.step import Context, Step


@dataclass(frozen=True, kw_only=True)
class TableEvaluation:
    """The expectations of a whole table after a recomputation.

    live_rows         of the table afterwards; None when unknown
    total_violations  violating rows of the whole table, by expectation; None when unknown
    """

    results: tuple[ExpectationResult, ...]
    live_rows: int | None
    total_violations: Mapping[str, int] | None

    @property
    def failed(self) -> bool:
        """Return whether an expectation of severity fail is violated."""
        return any(result.outcome == "fail" for result in self.results)


def evaluate_table(target: TableHandle, done: Recomputed, *, full: bool) -> TableEvaluation:
    """Return the results for the whole table. Raises ExpectationsFailed if rows failed that cannot be staged."""
    rows_before = _live_rows_before(target)
    live_rows = _live_rows_after(rows_before, done, full)
    totals = _total_violations(target, done, full)
    results = tuple(with_total_violations(result, totals) for result in done.results)
    if not can_be_staged(target.table, results):
        results = check_expectations(target.table, results, rows_before=rows_before, rows=live_rows)
    return TableEvaluation(results=results, live_rows=live_rows, total_violations=totals)


def _live_rows_before(target: TableHandle) -> int | None:
    """Return the live rows of the table; None when they were never counted."""
    if (stored := target.snapshot_property(ROWS)) is not None:
        return int(stored)
    return 0 if target.snapshot is None else None


def _live_rows_after(before: int | None, done: Recomputed, full: bool) -> int | None:
    now = sum(part.live_rows for part in done.merges)
    if full:
        return now
    return None if before is None else before + now - sum(part.live_rows_before for part in done.merges)


def _total_violations(target: TableHandle, done: Recomputed, full: bool) -> dict[str, int] | None:
    stored = target.snapshot_property(VIOLATIONS)
    before = {} if full or target.snapshot is None else json.loads(stored) if stored is not None else None
    replaced: Counter[str] = Counter()
    for part in done.merges:
        replaced.update(part.violations_before)
    return total_violations_after(before, replaced, done.results)


def commit_refresh(
    target: TableHandle, plan: RefreshPlan, done: Recomputed, evaluation: TableEvaluation
) -> tuple[int | None, tuple[ExpectationResult, ...]]:
    """Commit a recomputation, unless nothing has changed. A gold table is staged, audited and published.

    Return the id of the current snapshot and the results. Raises ExpectationsFailed, and then the snapshot stays staged.
    """
    if not _has_changes(target, plan, done, evaluation):
        return target.snapshot.snapshot_id if target.snapshot else None, evaluation.results
    # rows that violate a new expectation may be stored already: then a snapshot without files is staged
    staged = (bool(done.files) or evaluation.failed) and target.table.layer == "gold"
    snapshot = target.commit(
        done.files,
        positions=plan.positions,
        changes_rows=bool(done.files),
        properties=_properties(plan, done, evaluation, staged),
        branch=AUDIT_BRANCH if staged else None,
    )
    if not staged:
        discard_stale(target)
        return snapshot, evaluation.results
    results = evaluate_audit(target)
    target.publish()
    return snapshot, results


def _has_changes(target: TableHandle, plan: RefreshPlan, done: Recomputed, evaluation: TableEvaluation) -> bool:
    uncounted = evaluation.total_violations is not None and target.snapshot_property(VIOLATIONS) is None
    moved = plan.positions != target.positions or plan.fingerprint != target.snapshot_property(FINGERPRINT)
    return bool(done.files) or moved or uncounted


def _properties(plan: RefreshPlan, done: Recomputed, evaluation: TableEvaluation, staged: bool) -> dict[str, str]:
    properties = {ROWS_CHANGED: str(done.rows_written), FINGERPRINT: plan.fingerprint}
    if evaluation.live_rows is not None:
        properties[ROWS] = str(evaluation.live_rows)
    if evaluation.total_violations is not None:
        properties[VIOLATIONS] = json.dumps(evaluation.total_violations, sort_keys=True)
    if staged:
        properties[EXPECTATIONS] = results_to_json(evaluation.results)
    return properties


def commit_full_build(
    step: Step,
    context: Context,
    target: TableHandle,
    upstream: Mapping[str, TableHandle],
    *,
    files: Sequence[DataFile],
    rows: int,
    results: Iterable[ExpectationResult],
) -> tuple[int, tuple[ExpectationResult, ...]]:
    """Replace all rows of a table that was computed outside the engine, as a rebuild of its step would.

    target    loaded before the upstream tables were read
    upstream  by table name, as they were read
    rows      number of rows in `files`
    results   of the expectations of rows, part by part; together they cover every row

    Return the snapshot id and the results for the whole table. Raises ExpectationsFailed, and then nothing is committed.
    """
    row_results = combine_results(results)
    before = target.snapshot_property(ROWS)
    checked = check_expectations(step.target, row_results, rows_before=int(before) if before else None, rows=rows)
    snapshot = target.commit(
        files,
        positions={name: handle.position for name, handle in upstream.items()},
        removed_paths=frozenset(file.path for file in target.files()),
        properties={
            FINGERPRINT: definition_fingerprint(step, context),
            ROWS: str(rows),
            VIOLATIONS: json.dumps(total_violations_after({}, {}, row_results), sort_keys=True),
        },
    )
    return snapshot, checked
