"""The incremental engine: sources into bronze, steps into silver and gold.

A refresh of a step:
1. load the target, then everything upstream, so that a commit to the target in between makes ours fail (step_tables.py);
2. compare the stored positions with the upstream tables: is there work, and of which kind (plan.py);
3. extract the new rows and find the groups that they affect: every group in a full refresh (extract.py, affected.py);
4. merge, bucket by bucket of groups: gather all rows of the groups, transform, evaluate expectations, compare with the stored
   rows, write data files and position deletes (merge.py);
5. write rejected rows to quarantine (quarantine.py);
6. commit once, with the positions. A gold table's commit goes to a branch, is audited there, and published when its
   expectations hold (audit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pyarrow as pa

from lakehouse.engine.audit import discard_stale, evaluate_audit, freshness_results
from lakehouse.engine.commit import commit_refresh, evaluate_table
from lakehouse.engine.ingest import Ingestion, IngestTransform
from lakehouse.engine.plan import RefreshKind, RefreshPlan, plan_refresh
from lakehouse.engine.quarantine import update_quarantine
from lakehouse.engine.recompute import Recomputation, Recomputed
from lakehouse.engine.step_result import StepResult, Stopwatch
from lakehouse.engine.step_tables import StepTables, load_step_tables
from lakehouse.errors import UnknownColumn
from lakehouse.expectations import ExpectationResult
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.snapshot_properties import ROWS, ROWS_CHANGED
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.parallel import TaskPool
from lakehouse.retry import retry_commit
from lakehouse.source import Source
from lakehouse.step import Context, Step
from lakehouse.table import Table

Replay = Mapping[str, tuple[str, ...]]
"""Source positions to read again, by upstream table."""
OnStart = Callable[[Step, TableHandle, Mapping[str, TableHandle]], None]
"""on_start(step, target, upstream tables by name)"""


@dataclass
class Engine:
    """Runs sources and steps against a lake.

    quarantine             the table of rejected rows
    on_start               called when a refresh has found work, before it starts
    load_ingest_transform  called at the beginning of each attempt to ingest; returns the function that is applied to source
                           rows before they are stored, or None
    """

    lake: Lake
    pool: TaskPool
    context: Context
    quarantine: Table
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    on_start: OnStart = field(default=lambda step, target, upstream: None)
    load_ingest_transform: Callable[[], IngestTransform | None] = field(default=lambda: None)

    def refresh(self, step: Step, *, rebuild: bool = False, replay: Replay | None = None) -> StepResult:
        """Bring a step's table up to date.

        rebuild  recompute every group, whatever has changed
        replay   source positions to read again

        Raises ExpectationsFailed when the new rows violate an expectation of severity fail.
        """
        return retry_commit(lambda: self._refresh(step, rebuild, replay or {}))

    def ingest(
        self, source: Source, tables: Mapping[str, Table], *, resnapshot: frozenset[str] = frozenset()
    ) -> list[StepResult]:
        """Read the new rows of a source into its bronze tables, and acknowledge them to the source after the commit.

        tables      the bronze tables, by name
        resnapshot  tables to read from the beginning; their earlier rows stay, and silver takes each row once
        """
        ingestion = Ingestion(
            source=source,
            lake=self.lake,
            pool=self.pool,
            clock=self.clock,
            load_transform=self.load_ingest_transform,
        )
        extra: dict[str, list[pa.Field]] = {}

        def attempt() -> list[StepResult]:
            while True:
                try:
                    return ingestion.run(tables, extra_columns=extra, resnapshot=resnapshot)
                except UnknownColumn as error:
                    found = pa.field(error.column, error.arrow_type)
                    known = extra.setdefault(error.table, [])
                    if found in known:
                        raise
                    known[:] = [*(f for f in known if f.name != found.name), found]

        return retry_commit(attempt)

    def _refresh(self, step: Step, rebuild: bool, replay: Replay) -> StepResult:
        watch = Stopwatch()
        tables = load_step_tables(self.lake, step, self.quarantine)
        replayed = any(replay.get(name) for name in tables.upstream)
        plan = plan_refresh(tables.state(self.context), rebuild=rebuild, replay=replayed)
        if plan.kind is RefreshKind.UNCHANGED:
            discard_stale(tables.target)
            return StepResult(step.target.name, "unchanged", seconds=watch.seconds, cpu_seconds=watch.cpu_seconds)
        if plan.kind is RefreshKind.PUBLISH_STAGED:
            return self._publish_staged(tables, watch)
        self.on_start(step, tables.target, tables.upstream)
        _commit_empty_snapshot(tables.target)
        plan, done = self._recompute(tables, plan, replay)
        evaluation = evaluate_table(tables.target, done, full=plan.full)
        update_quarantine(tables, done.extracted, done.evaluated, full=plan.full, reparse_all=plan.full or replayed)
        snapshot, results = commit_refresh(tables.target, plan, done, evaluation)
        return StepResult(
            step.target.name,
            "rebuilt" if rebuild else "changed" if done.files else "read",
            rows_read=done.rows_read + (0 if plan.full else done.rows_changed),
            rows_changed=done.rows_changed,
            rows_written=done.rows_written,
            rows_deleted=done.rows_deleted,
            bytes_written=sum(file.file_size_in_bytes for file in done.files),
            seconds=watch.seconds,
            cpu_seconds=watch.cpu_seconds + done.worker_cpu_seconds,
            worker_cpu_seconds=done.worker_cpu_seconds,
            parallel=done.parallel,
            snapshot=snapshot,
            results=(*results, *self._freshness(tables.target)),
        )

    def _recompute(self, tables: StepTables, plan: RefreshPlan, replay: Replay) -> tuple[RefreshPlan, Recomputed]:
        """Recompute the affected groups: all of them once a source table turns out to have been emptied."""

        def recompute(plan: RefreshPlan) -> Recomputed:
            return Recomputation(
                tables=tables, plan=plan, replay=replay, lake=self.lake, pool=self.pool, context=self.context
            ).run()

        done = recompute(plan)
        if not plan.full and done.found_truncation:
            plan = replace(plan, kind=RefreshKind.FULL, reason="a source table was emptied")
            done = recompute(plan)
        return plan, done

    def _publish_staged(self, tables: StepTables, watch: Stopwatch) -> StepResult:
        """Publish a snapshot that an earlier refresh has staged. Raises ExpectationsFailed."""
        target = tables.target
        results = evaluate_audit(target)
        self.on_start(tables.step, target, tables.upstream)
        snapshot = target.publish()
        return StepResult(
            target.table.name,
            "changed",
            rows_written=int(target.snapshot_property(ROWS_CHANGED) or 0),
            seconds=watch.seconds,
            cpu_seconds=watch.cpu_seconds,
            snapshot=snapshot,
            results=(*results, *self._freshness(target)),
        )

    def _freshness(self, target: TableHandle) -> tuple[ExpectationResult, ...]:
        return freshness_results(target, self.clock()) if self.lake.settings.freshness else ()


def _commit_empty_snapshot(target: TableHandle) -> None:
    """Give a new gold table an empty snapshot: a branch starts at a snapshot, and readers of a first snapshot that is refused
    see an empty table."""
    if target.snapshot is None and target.table.layer == "gold":
        target.commit(positions={}, changes_rows=False, properties={ROWS: "0"})
