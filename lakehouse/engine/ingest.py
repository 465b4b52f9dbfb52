"""Ingestion: read the new rows of a source into its bronze tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.engine.step_result import StepResult, Stopwatch
from lakehouse.errors import SourceError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.iceberg.writer import FileWriter
from lakehouse.parallel import Blocks, TaskPool
from lakehouse.source import Plan, Position, Reached, Rows, Source, Task, restart_position
from lakehouse.table import SEQUENCE, Table

IngestTransform = Callable[[str, pa.Table], pa.Table]
"""transform(table, source rows) -> as many rows with the same columns, to be stored instead. Picklable."""
ROWS_PER_FILE = 250_000
"""Rows of a bronze table that are collected before they are written to a file."""


@dataclass(frozen=True)
class WrittenRows:
    """The files that one task wrote for one bronze table, and the position that it reached."""

    files: tuple[DataFile, ...] = ()
    rows_written: int = 0
    position: Position | None = None


@dataclass(frozen=True, kw_only=True)
class Ingestion:
    """One attempt to ingest the new rows of a source. The tables are loaded before the source is read, and committed once.

    load_transform  called after the tables were loaded: a writer that changes the transform commits to them afterwards, so
                    that rows stored by an outdated transform conflict
    """

    source: Source
    lake: Lake
    pool: TaskPool
    clock: Callable[[], datetime]
    load_transform: Callable[[], IngestTransform | None]

    def run(
        self,
        tables: Mapping[str, Table],
        *,
        extra_columns: Mapping[str, Sequence[pa.Field]],
        resnapshot: frozenset[str],
    ) -> list[StepResult]:
        """Ingest, commit each table, and acknowledge to the source.

        extra_columns  columns to add, by table
        resnapshot     tables to read from the beginning
        """
        watch = Stopwatch()
        handles = {name: self.lake.load(table) for name, table in tables.items() if name in self.source.tables}
        for name, handle in handles.items():
            if name not in resnapshot:
                self._check_position(handle)
        positions = {name: handle.positions.get(self.source.name) for name, handle in handles.items()}
        positions |= {name: restart_position(positions[name]) for name in resnapshot & positions.keys()}
        for name, handle in handles.items():
            if extra_columns.get(name):
                handle.evolve_schema(pa.schema(list(extra_columns[name])))
        transform = self.load_transform()
        plan = self.source.plan(positions, {name: source_schema(handle) for name, handle in handles.items()})
        try:
            written, worker_cpu_seconds, parallel = self._read(plan, handles, transform)
        finally:
            if plan.held is not None and hasattr(plan.held, "close"):
                plan.held.close()
        results = []
        for name, handle in handles.items():
            parts = [by_table[name] for by_table in written if name in by_table]
            result = self._commit(plan, handle, parts, positions[name])
            results.append(
                replace(
                    result,
                    seconds=watch.seconds,
                    cpu_seconds=watch.cpu_seconds + worker_cpu_seconds,
                    worker_cpu_seconds=worker_cpu_seconds,
                    parallel=parallel,
                )
            )
            # reading is accounted to the first table
            watch, worker_cpu_seconds = Stopwatch(), 0.0
        if plan.tasks:
            self.source.acknowledge(plan)
        return results

    def _check_position(self, handle: TableHandle) -> None:
        """Raise SourceError if a table has rows of the source and no position: reading would skip or double rows."""
        if self.source.name not in handle.positions and handle.has_rows:
            name = handle.table.name
            raise SourceError(
                f"{name} has rows, but no position of '{self.source.name}': another program has removed the snapshots and table "
                "properties that stored it. The table must be read from the beginning.",
                remedy="rebuild",
                remedy_tables=[name],
            )

    def _read(
        self, plan: Plan, handles: Mapping[str, TableHandle], transform: IngestTransform | None
    ) -> tuple[list[dict[str, WrittenRows]], float, bool]:
        """Run the plan's tasks; return the rows written by each, the CPU seconds used on Ray, and whether Ray was used."""
        for name, handle in handles.items():
            if name in plan.schemas:
                handle.evolve_schema(plan.schemas[name])
        if not plan.tasks:
            return [], 0.0, False
        targets = {name: (handle.writer, handle.next_sequence) for name, handle in handles.items()}
        parallel = len(plan.tasks) > 1 and (plan.rows is None or plan.rows >= self.pool.settings.inline_rows)
        function = partial(write_source_rows, targets=targets, at=self.clock(), transform=transform)
        written, cpu = self.pool.map(function, plan.tasks, Blocks(), parallel=parallel)
        return written, cpu, parallel

    def _commit(self, plan: Plan, handle: TableHandle, parts: Sequence[WrittenRows], stored: Position | None) -> StepResult:
        """Commit the files of a table with the position reached, if there is anything new."""
        name = handle.table.name
        files = [file for part in parts for file in part.files]
        rows = sum(part.rows_written for part in parts)
        reached = next((part.position for part in reversed(parts) if part.position is not None), plan.positions.get(name))
        snapshot = None
        if files or (plan.tasks and reached is not None and reached != stored):
            position: Any = reached if reached is not None else stored
            snapshot = handle.commit(files, positions={self.source.name: position}, changes_rows=bool(files))
        return StepResult(
            name,
            "changed" if files else "unchanged",
            rows_read=rows,
            rows_changed=rows,
            rows_written=rows,
            bytes_written=sum(file.file_size_in_bytes for file in files),
            snapshot=snapshot,
        )


def source_schema(handle: TableHandle) -> pa.Schema:
    """Return the columns of a bronze table that its source fills."""
    return pa.schema([field for field in handle.arrow_schema if field.name not in (SEQUENCE, "_ingested_at")])


def write_source_rows(
    task: Task,
    blocks: Blocks,
    *,
    targets: Mapping[str, tuple[FileWriter, int]],
    at: datetime,
    transform: IngestTransform | None = None,
) -> dict[str, WrittenRows]:
    """Run a task of a source and write its rows, collected to files of useful size. Return what was written, by table.

    targets  writer and sequence, by table
    at       the ingestion time of the rows
    """
    written: dict[str, WrittenRows] = {}
    collected: dict[str, list[pa.Table]] = {}

    def flush(name: str) -> None:
        rows = pa.concat_tables(collected.pop(name), promote_options="permissive")
        rows = transform(name, rows) if transform is not None else rows
        writer, sequence = targets[name]
        files = writer.write(_stamp_source_rows(rows, writer.schema, sequence, at))
        before = written.get(name, WrittenRows())
        written[name] = replace(before, files=(*before.files, *files), rows_written=before.rows_written + rows.num_rows)

    for item in task.read():
        if isinstance(item, Reached):
            written[item.table] = replace(written.get(item.table, WrittenRows()), position=item.position)
        elif isinstance(item, Rows) and item.rows.num_rows:
            collected.setdefault(item.table, []).append(item.rows)
            if sum(rows.num_rows for rows in collected[item.table]) >= ROWS_PER_FILE:
                flush(item.table)
    for name in list(collected):
        flush(name)
    return written


def _stamp_source_rows(rows: pa.Table, schema: pa.Schema, sequence: int, at: datetime) -> pa.Table:
    """Return the rows with all columns of the table; those that the source does not send are null."""
    columns = []
    for field in schema:
        if field.name == SEQUENCE:
            columns.append(pa.repeat(pa.scalar(sequence, field.type), rows.num_rows))
        elif field.name == "_ingested_at":
            columns.append(pa.repeat(pa.scalar(at, field.type), rows.num_rows))
        elif field.name in rows.schema.names:
            columns.append(rows.column(field.name).cast(field.type))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    return pa.table(columns, schema=schema)
