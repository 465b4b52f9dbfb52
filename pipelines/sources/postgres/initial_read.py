"""The initial read of tables, and their re-snapshots: block ranges in parallel under one exported snapshot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.csv as pacsv
from psycopg import sql

from lakehouse.errors import SourceError
from lakehouse.source import Plan, Position, Rows, Task, epoch, is_resnapshot
from pipelines.settings import PostgresSettings
from pipelines.sources.epochs import EpochMarkerTask, epoch_prefix
from pipelines.sources.postgres.catalog import PublishedTable, published_tables, table_origins
from pipelines.sources.postgres.checks import resumable_positions
from pipelines.sources.postgres.columns import planned_schema, target_column
from pipelines.sources.postgres.connection import connect
from pipelines.sources.postgres.errors import postgres_errors
from pipelines.sources.postgres.positions import slot_time, stored_position
from pipelines.sources.postgres.replication_state import ReplicationState
from pipelines.sources.postgres.rows import BATCH_BYTES, BATCH_ROWS, bronze_batch, repeated
from pipelines.sources.postgres.slot import exported_snapshot
from pipelines.sources.postgres.stream import StreamTask

BLOCKS_PER_TASK = 4096
"""Blocks of 8 kB that one task reads."""


def plan_initial_read(
    settings: PostgresSettings,
    state: ReplicationState,
    unread: Sequence[PublishedTable],
    stored: Mapping[str, Position],
    schemas: Mapping[str, pa.Schema],
) -> Plan:
    """Plan to read the `unread` tables under a snapshot, and to bring the other tables to the same LSN.

    stored: the positions of all tables that were ever read. The plan holds the connection that keeps the snapshot alive.
    """
    with exported_snapshot(settings, temporary=state.slot_exists) as (start, exported):
        holder = connect(settings)
        try:
            snapshot, moment = _hold_snapshot(holder, settings, exported, unread)
            published = published_tables(holder, settings)
        except BaseException:
            holder.close()
            raise
    try:
        planned = {item.bronze_table: planned_schema(item, schemas.get(item.bronze_table), settings) for item in published}
        _check_not_rewritten(unread, published, stored)
        read = InitialRead(
            settings=settings,
            state=state,
            stored=stored,
            published=published,
            schemas=planned,
            snapshot=snapshot,
            start=start,
            moment=moment,
        )
        return Plan(
            tasks=(*read.marker_tasks(), *read.snapshot_tasks(), *read.stream_tasks()),
            schemas=read.schemas,
            positions=read.positions(),
            rows=sum(item.rows for item in read.tables),
            held=holder,
        )
    except BaseException:
        holder.close()
        raise


def _hold_snapshot(
    holder: psycopg.Connection[Any], settings: PostgresSettings, exported: str, tables: Sequence[PublishedTable]
) -> tuple[str, int]:
    """Keep an exported snapshot alive, and prevent that the tables are rewritten under it, which snapshots do not survive.

    Returns the snapshot's name for the tasks, and its time in microseconds since 1970.
    """
    holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    holder.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(exported)))
    names = sql.SQL(", ").join(sql.Identifier(settings.schema_name, item.name) for item in tables)
    holder.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))
    row = holder.execute(
        "SELECT pg_export_snapshot(), (extract(epoch FROM transaction_timestamp()) * 1000000)::bigint"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def _continuing(stored: Mapping[str, Position]) -> dict[str, Position]:
    return {table: position for table, position in stored.items() if not is_resnapshot(position)}


def _check_not_rewritten(
    unread: Sequence[PublishedTable], published: Sequence[PublishedTable], stored: Mapping[str, Position]
) -> None:
    """Raise SourceError when a table was rewritten after it was listed and before it was locked."""
    continuing = _continuing(stored)
    before = {item.name: item.storage for item in unread}
    reading = [item for item in published if item.bronze_table not in continuing]
    if changed := [item.name for item in reading if before.get(item.name) != item.storage]:
        raise SourceError(f"PostgreSQL: table '{changed[0]}' was altered while the initial read began. Run again.")


@dataclass(frozen=True, kw_only=True)
class InitialRead:
    """What the tasks of an initial read are made from.

    stored    positions of all tables that were ever read, by bronze table
    schemas   planned columns, by bronze table
    snapshot  name of the snapshot that the tasks import
    start     LSN of the snapshot
    moment    time of the snapshot, in microseconds since 1970
    """

    settings: PostgresSettings = field(repr=False)
    state: ReplicationState
    stored: Mapping[str, Position]
    published: Sequence[PublishedTable]
    schemas: Mapping[str, pa.Schema]
    snapshot: str
    start: int
    moment: int

    @cached_property
    def continuing(self) -> dict[str, Position]:
        """Positions of the tables that are not read here."""
        return _continuing(self.stored)

    @cached_property
    def resumable(self) -> dict[str, Position]:
        """Previous positions of tables that are read here although the slot still has their next changes."""
        return resumable_positions(self.state, self.stored)

    @cached_property
    def tables(self) -> list[PublishedTable]:
        """The tables to read."""
        return [item for item in self.published if item.bronze_table not in self.continuing]

    @cached_property
    def epochs(self) -> dict[str, int]:
        """The epoch that the read begins, by bronze table."""
        return {item.bronze_table: epoch(self.stored.get(item.bronze_table)) for item in self.tables}

    def marker_tasks(self) -> list[Task]:
        """Return the markers of tables that are re-snapshotted."""
        epochs = {table: number for table, number in self.epochs.items() if number}
        return [EpochMarkerTask(table, self.schemas[table], number, self.moment) for table, number in epochs.items()]

    def snapshot_tasks(self) -> list[Task]:
        """Return the tasks that read the tables."""
        tasks: list[Task] = []
        for item in self.tables:
            table = item.bronze_table
            edges = [*range(0, max(item.blocks, 1), BLOCKS_PER_TASK), None] if item.splittable else [None, None]
            for number, (first, last) in enumerate(pairwise(edges)):
                tasks.append(
                    SnapshotTask(
                        settings=self.settings,
                        source=item,
                        schema=self.schemas[table],
                        snapshot=self.snapshot,
                        position_prefix=f"{epoch_prefix(self.epochs[table])}{self.start:016X}-{number:06d}",
                        moment=self.moment,
                        first=first or None,
                        last=last,
                    )
                )
        return tasks

    def stream_tasks(self) -> list[Task]:
        """Return the task that brings the other tables to the LSN of the snapshot, if the slot has changes for it.

        Changes that the slot still has for tables that are re-snapshotted are read too: they belong to their history.
        """
        confirmed = self.state.confirmed_lsn
        if not (self.continuing or self.resumable) or confirmed is None or self.start <= confirmed:
            return []
        return [
            StreamTask(
                settings=self.settings,
                upto=self.start,
                system=self.state.system,
                timeline=self.state.timeline,
                positions={**self.resumable, **self.continuing},
                schemas=self.schemas,
                resnapshotted=frozenset(self.resumable),
                origins=table_origins(self.published),
            )
        ]

    def positions(self) -> dict[str, Position]:
        """Return the positions of the tables once they are read, by bronze table."""
        newest = max(map(slot_time, (self.continuing or self.stored).values()), default=0)
        time = newest if self.continuing or self.resumable else max(self.moment, newest + 1)
        return {
            item.bronze_table: stored_position(
                lsn=self.start,
                system=self.state.system,
                timeline=self.state.timeline,
                slot_time=time,
                epoch=self.epochs[item.bronze_table],
                origin=item.origin,
            )
            for item in self.tables
        }


@dataclass(frozen=True, kw_only=True)
class SnapshotTask:
    """Reads a range of blocks of a table under an exported snapshot.

    position_prefix  what the rows' positions begin with; its '-' sorts before the '/' of every change at the same LSN
    moment           time of the snapshot, in microseconds since 1970
    first, last      first block, and the block after the last; None: from the beginning, to the end
    """

    settings: PostgresSettings = field(repr=False)
    source: PublishedTable
    schema: pa.Schema = field(repr=False)
    snapshot: str
    position_prefix: str
    moment: int
    first: int | None
    last: int | None

    def read(self) -> Iterator[Rows]:
        """Give the rows in batches."""
        table, columns = self.source.bronze_table, self.source.columns
        targets = [target_column(table, column, self.schema, self.settings) for column in columns]
        with postgres_errors(self.settings), connect(self.settings) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(self.snapshot)))
            # so that each row has the same number each time
            cursor.execute("SET LOCAL synchronize_seqscans TO off")
            count = 0
            with cursor.copy(self._copy_statement()) as stream:
                for chunk in _chunks(stream):
                    text = _parse_csv(chunk, [column.name for column in columns])
                    yield Rows(table, self._rows(text, targets, count))
                    count += text.num_rows

    def _copy_statement(self) -> sql.Composed:
        return sql.SQL("COPY (SELECT {} FROM {}.{} {}) TO STDOUT (FORMAT csv)").format(
            sql.SQL(", ").join(sql.Identifier(column.name) for column in self.source.columns),
            sql.Identifier(self.settings.schema_name),
            sql.Identifier(self.source.name),
            sql.SQL(self._condition()),
        )

    def _condition(self) -> str:
        conditions = []
        if self.first is not None:
            conditions.append(f"ctid >= '({self.first},0)'")
        if self.last is not None:
            conditions.append(f"ctid < '({self.last},0)'")
        if self.source.row_filter:
            conditions.append(f"({self.source.row_filter})")
        return f"WHERE {' AND '.join(conditions)}" if conditions else ""

    def _rows(self, text: pa.Table, targets: Sequence[str], first_number: int) -> pa.Table:
        count = text.num_rows
        positions = [f"{self.position_prefix}.{number:010d}" for number in range(first_number, first_number + count)]
        return bronze_batch(
            self.schema,
            dict(zip(targets, (column.combine_chunks() for column in text.columns), strict=True)),
            op=repeated("r", count),
            position=pa.array(positions, pa.string()),
            moment=repeated(self.moment, count),
            unchanged=pa.nulls(count, pa.string()),
        )


def _parse_csv(chunk: bytes, names: Sequence[str]) -> pa.Table:
    """Return the columns of COPY output as text."""
    return pacsv.read_csv(
        io.BytesIO(chunk),
        pacsv.ReadOptions(column_names=names, block_size=len(chunk) + 1, use_threads=False),
        pacsv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _chunks(stream: Any) -> Iterator[bytes]:
    """Give COPY output in chunks of whole rows and bounded size."""
    lines: list[bytes] = []
    size = 0
    for line in stream:
        lines.append(bytes(line))
        size += len(line)
        if size >= BATCH_BYTES or len(lines) >= BATCH_ROWS:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)
