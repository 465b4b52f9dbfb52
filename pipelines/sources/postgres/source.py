"""PostgreSQL to bronze: a consistent initial read, then the logical replication stream, without a gap between them.

The first plan creates the slot and reads every table under the snapshot that the slot exported. Later plans peek at the slot up
to the LSN of that moment; only `acknowledge` advances it. A table's position P means that every change committed before P is in
the table, so changes that are delivered twice are skipped, table by table.

When the slot or the server was replaced, all tables are re-snapshotted (`rebuild` of all of them at once), and only then is a
missing or lost slot re-created.

Logical replication does not carry the values that `ALTER TABLE ... ADD COLUMN ... DEFAULT` gives to existing rows, nor a change
of the primary key in a table whose replica identity is another index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pyarrow as pa

from lakehouse.source import Plan, Position, is_resnapshot
from pipelines.bronze.tables import POSTGRES_TABLES
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres.catalog import check_origins, check_published, published_tables, table_origins
from pipelines.sources.postgres.checks import check_not_restored, check_server, check_timelines
from pipelines.sources.postgres.columns import planned_schema
from pipelines.sources.postgres.connection import connect
from pipelines.sources.postgres.errors import postgres_errors
from pipelines.sources.postgres.initial_read import plan_initial_read
from pipelines.sources.postgres.positions import table_lsns
from pipelines.sources.postgres.replication_state import ReplicationState, flush_commits, read_replication_state
from pipelines.sources.postgres.slot import advance_slot, drop_slot, has_changes
from pipelines.sources.postgres.stream import StreamTask

IDLE_WAL = 64 << 20
"""After so many bytes of WAL without a published change the position moves anyway, so that PostgreSQL can remove the WAL."""
WAL_PER_ROW = 200
"""Bytes of WAL per changed row. Most rows need more, so that row counts are overestimated."""


@dataclass
class PostgresSource:
    """A PostgreSQL database as a source of bronze rows."""

    settings: PostgresSettings = field(repr=False)
    name: str = "postgres"
    tables: tuple[str, ...] = tuple(table.name for table, _ in POSTGRES_TABLES.values())

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        stored = {table: position for table in self.tables if (position := positions.get(table))}
        continuing = {table: position for table, position in stored.items() if not is_resnapshot(position)}
        with postgres_errors(self.settings), connect(self.settings) as connection:
            state = self._checked_state(connection, continuing, stored)
            published = published_tables(connection, self.settings)
            check_published(published, self.settings, stored)
            check_origins(published, self.settings, continuing)
            planned = {
                item.bronze_table: planned_schema(item, schemas.get(item.bronze_table), self.settings) for item in published
            }
            unread = [item for item in published if item.bronze_table not in continuing]
            if unread:
                return plan_initial_read(self.settings, state, unread, stored, schemas)
            assert state.confirmed_lsn is not None
            behind = state.readable_lsn - state.confirmed_lsn
            if behind <= 0 or (behind < IDLE_WAL and not has_changes(connection, self.settings, state.readable_lsn)):
                return Plan()
        task = StreamTask(
            settings=self.settings,
            upto=state.readable_lsn,
            system=state.system,
            timeline=state.timeline,
            positions=continuing,
            schemas=planned,
            origins=table_origins(published),
        )
        return Plan(tasks=(task,), schemas=planned, rows=behind // WAL_PER_ROW)

    def _checked_state(
        self, connection: psycopg.Connection[Any], continuing: Mapping[str, Position], stored: Mapping[str, Position]
    ) -> ReplicationState:
        """Return the server's state when the server has every change that comes next; a lost slot is dropped."""
        state = read_replication_state(connection, self.settings)
        check_server(state, self.settings, continuing, stored)
        if state.wal_status == "lost":
            drop_slot(connection, self.settings)
            state = read_replication_state(connection, self.settings)
        if state.has_unflushed_commits:
            flush_commits(connection)
            state = read_replication_state(connection, self.settings)
        check_not_restored(state, continuing, stored)
        check_timelines(state, self.settings, continuing, stored)
        return state

    def acknowledge(self, plan: Plan) -> None:
        """Let the server remove the WAL that the plan's stream task has read."""
        for task in plan.tasks:
            if isinstance(task, StreamTask):
                with postgres_errors(self.settings), connect(self.settings) as connection:
                    advance_slot(connection, self.settings, task.upto)

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Return how much WAL is not committed to bronze yet; 'up to date' when it has no change of a published table."""
        stored = {table: position for table in self.tables if (position := positions.get(table))}
        with postgres_errors(self.settings), connect(self.settings) as connection:
            state = read_replication_state(connection, self.settings)
            tables = published_tables(connection, self.settings) if state.publication_exists else []
            text = self._slot_lag(connection, state, stored)
        published = {item.bronze_table for item in tables}
        return {
            table: "not in the publication" if table not in published else text if table in stored else "never read"
            for table in self.tables
        }

    def _slot_lag(self, connection: psycopg.Connection[Any], state: ReplicationState, stored: Mapping[str, Position]) -> str:
        if state.confirmed_lsn is None or state.wal_status == "lost":
            return f"replication slot {'lost' if state.slot_exists else 'missing'}"
        behind = state.flushed_lsn - max(*table_lsns(stored).values(), state.confirmed_lsn, 0)
        if state.readable_lsn < state.flushed_lsn:
            return f"{_wal_size(behind)} of WAL, waiting for standbys"
        if behind <= 0 or (behind < IDLE_WAL and not has_changes(connection, self.settings, state.readable_lsn)):
            return "up to date"
        return f"{_wal_size(behind)} of WAL"


def _wal_size(count: int) -> str:
    size = float(max(count, 0))
    for unit in ("bytes", "kB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"
