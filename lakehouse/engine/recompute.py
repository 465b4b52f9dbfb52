"""The recomputation of a step's table: extraction, affected groups and merge, in this process or on Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
from pyiceberg.manifest import DataFile

from lakehouse.engine.affected import AffectedGroups
from lakehouse.engine.extract import Extraction, extract, records_of_several_groups
from lakehouse.engine.merge import Merge, MergeResult, merge
from lakehouse.engine.plan import RefreshPlan
from lakehouse.engine.quarantine import EvaluatedGroups
from lakehouse.engine.step_tables import StepTables
from lakehouse.engine.upstream_table import UpstreamTable, batch_files, open_upstream
from lakehouse.expectations import ExpectationResult, combine_results
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.reader import File
from lakehouse.parallel import Blocks, TaskPool
from lakehouse.step import Context, Delta, Grouped
from lakehouse.table import Table

ONE_BATCH = 10**12
"""Rows per task where everything runs in this process."""


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """The result of a recomputation, not yet committed.

    extracted            the blocks of the extraction
    merges               the results of the merge tasks
    rows_changed         new rows upstream
    worker_cpu_seconds   CPU seconds used on Ray
    """

    extracted: Blocks
    merges: Sequence[MergeResult]
    rows_changed: int
    worker_cpu_seconds: float
    parallel: bool

    @property
    def files(self) -> list[DataFile]:
        """Return the data and delete files that were written."""
        return [file for part in self.merges for file in part.files]

    @property
    def rows_read(self) -> int:
        """Return the rows that the merges read."""
        return sum(part.rows_read for part in self.merges)

    @property
    def rows_written(self) -> int:
        """Return the rows written."""
        return sum(part.rows_written for part in self.merges)

    @property
    def rows_deleted(self) -> int:
        """Return the rows deleted or replaced."""
        return sum(part.rows_deleted for part in self.merges)

    @property
    def results(self) -> tuple[ExpectationResult, ...]:
        """Return the results of the expectations of rows."""
        return combine_results(result for part in self.merges for result in part.results)

    @property
    def evaluated(self) -> EvaluatedGroups:
        """Return the rows and groups that were evaluated, for the quarantine."""
        return EvaluatedGroups(
            quarantined=[part.quarantined for part in self.merges if part.quarantined is not None],
            groups=[part.groups for part in self.merges if part.groups is not None],
        )

    @property
    def found_truncation(self) -> bool:
        """Return whether a source table was emptied, which affects every group."""
        return any(True for _ in self.extracted.of("truncated"))


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """Recomputes the groups of a step that a plan asks for.

    replay  by upstream table, source positions to read again
    """

    tables: StepTables
    plan: RefreshPlan
    replay: Mapping[str, tuple[str, ...]]
    lake: Lake
    pool: TaskPool
    context: Context

    def run(self) -> Recomputed:
        """Extract, find the affected groups, merge."""
        upstream = self.tables.reads()
        new_files = self._new_files(upstream)
        expected = sum(file.rows for files in new_files.values() for file in files)
        parallel = expected >= self.pool.settings.inline_rows
        buckets = self._buckets(expected, parallel)
        extracted = self.pool.extract(
            extract,
            self._extractions(upstream, new_files, buckets, parallel),
            parallel=parallel and (self.plan.full or expected >= 4 * self.pool.settings.inline_rows),
        )
        changed = sum(int(table["rows"][0].as_py()) for name in new_files for table in extracted.of(f"count:{name}"))
        groups = None if self.plan.full else self._affected(upstream).find(extracted)
        merges, cpu = self._merge(groups, upstream, extracted, buckets, parallel)
        return Recomputed(
            extracted=extracted,
            merges=merges,
            rows_changed=changed,
            worker_cpu_seconds=cpu + extracted.cpu_seconds,
            parallel=parallel,
        )

    def _new_files(self, upstream: Mapping[str, UpstreamTable]) -> dict[str, Sequence[File]]:
        """Return the files to extract, by the name of the read."""
        files: dict[str, Sequence[File]] = {}
        for name, read in self.tables.step.reads.items():
            if not isinstance(read, Grouped | Delta):
                continue
            handle, since = self.tables.upstream[read.table.name], self.plan.since[read.table.name] or 0
            if self.plan.full or self.replay.get(read.table.name):
                files[name] = upstream[name].files
            elif handle.data_sequence > since:
                files[name] = handle.files(since=since)
        return files

    def _buckets(self, expected: int, parallel: bool) -> int:
        """Return the number of merge tasks. A step that expands its groups merges them in one task."""
        step = self.tables.step
        by_bucket = self.plan.full or any(isinstance(read, Delta) for read in step.reads.values())
        if not parallel or step.expand is not None or not by_bucket:
            return 1
        return max(1, math.ceil(expected / self.pool.settings.rows_per_task))

    def _extractions(
        self, upstream: Mapping[str, UpstreamTable], new_files: Mapping[str, Sequence[File]], buckets: int, parallel: bool
    ) -> list[Extraction]:
        step, full = self.tables.step, self.plan.full
        rows_per_task = self.pool.settings.rows_per_task if parallel else ONE_BATCH
        tasks = []
        for name, files in new_files.items():
            read = step.reads[name]
            shared = records_of_several_groups(read, upstream[name], step) if full and buckets > 1 else None
            for batch in batch_files(files, rows_per_task):
                task = Extraction(
                    step=step,
                    read_name=name,
                    upstream=replace(upstream[name], files=batch),
                    since=None if full else self.plan.since[read.table.name] or 0,
                    positions=self.replay.get(read.table.name, ()),
                    full=full,
                    buckets=buckets,
                    shared_records=shared,
                )
                tasks.append(task)
        return tasks

    def _affected(self, upstream: Mapping[str, UpstreamTable]) -> AffectedGroups:
        return AffectedGroups(tables=self.tables, upstream=upstream, plan=self.plan, lake=self.lake, context=self.context)

    def _merge(
        self,
        groups: pl.DataFrame | None,
        upstream: Mapping[str, UpstreamTable],
        extracted: Blocks,
        buckets: int,
        parallel: bool,
    ) -> tuple[list[MergeResult], float]:
        """Merge the groups (None: every group); return the results and the CPU seconds used on Ray."""
        if groups is not None and groups.height == 0:
            return [], 0.0
        step, target = self.tables.step, self.tables.target
        old = open_upstream(target)
        tasks = [
            Merge(
                step=step,
                bucket=bucket,
                buckets=buckets,
                groups=part,
                upstream=upstream,
                old=old,
                writer=target.writer,
                sequence=target.next_sequence,
                context=self.context,
                redefined=self.plan.redefined,
            )
            for bucket, part in _by_bucket(groups, step.target, buckets)
        ]
        return self.pool.map(merge, tasks, extracted, parallel=parallel and (len(tasks) > 1 or bool(extracted.refs)))


def _by_bucket(groups: pl.DataFrame | None, target: Table, buckets: int) -> Iterator[tuple[int, pl.DataFrame | None]]:
    for bucket in range(buckets):
        if groups is None or buckets == 1:
            yield bucket, groups
        else:
            part = groups.filter(group_hash(groups, target.group) % buckets == bucket)
            if part.height:
                yield bucket, part
