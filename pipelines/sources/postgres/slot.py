"""The logical replication slot: create it with a snapshot, peek at its changes, advance and drop it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from lakehouse.errors import SourceError
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres.connection import LOCK_TIMEOUT, connect
from pipelines.sources.postgres.positions import format_lsn, parse_lsn

SLOT_BUSY_SECONDS = 20.0
"""How long to wait for a slot that another run is reading."""
FETCH_MESSAGES = 20_000

T = TypeVar("T")


@contextmanager
def exported_snapshot(settings: PostgresSettings, *, temporary: bool) -> Iterator[tuple[int, str]]:
    """Create the slot, or a temporary one for tables that are added later; yield its LSN and the snapshot that it exports.

    The snapshot can be imported until the context is left. The slot is created with FAILOVER, so that standbys can keep a copy of
    it (sync_replication_slots, since PostgreSQL 17).
    """
    name = f"{settings.slot[:40]}_{time.time_ns():x}" if temporary else settings.slot
    with connect(settings, replication="database") as connection:
        failover = ", FAILOVER" if connection.info.server_version >= 170_000 and not temporary else ""
        command = (
            f"CREATE_REPLICATION_SLOT {{}} {'TEMPORARY' if temporary else ''} LOGICAL pgoutput (SNAPSHOT 'export'{failover})"
        )
        try:
            row = connection.execute(sql.SQL(command).format(sql.Identifier(name))).fetchone()
        except psycopg.errors.LockNotAvailable:
            raise SourceError(
                "PostgreSQL: a replication slot cannot be created before all transactions that are open at that moment have "
                f"ended, and a transaction is still open after {LOCK_TIMEOUT}. List them: SELECT pid, xact_start FROM "
                "pg_stat_activity ORDER BY xact_start. Run again when it has ended."
            ) from None
        assert row is not None
        yield parse_lsn(row[1]), row[2]


def retry_while_slot_busy(connection: psycopg.Connection[Any], settings: PostgresSettings, action: Callable[[], T]) -> T:
    """Call `action` and retry it while another run is using the slot. Raises SourceError after SLOT_BUSY_SECONDS."""
    deadline = time.monotonic() + SLOT_BUSY_SECONDS
    while True:
        try:
            return action()
        except psycopg.errors.ObjectInUse:
            connection.rollback()
            if time.monotonic() > deadline:
                raise SourceError(
                    f"PostgreSQL: replication slot '{settings.slot}' is being read by another run. Run again when that has ended."
                ) from None
            time.sleep(0.2)


def has_changes(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> bool:
    """Return whether the slot holds a change of a published table before the LSN `upto`."""
    query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(_peek_call(settings, upto, 1))
    row = retry_while_slot_busy(connection, settings, lambda: connection.execute(query).fetchone())
    return bool(row and row[0])


def peek_messages(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> Iterator[bytes]:
    """Give the slot's pgoutput messages up to the LSN `upto`, fetched in bounded batches. The slot does not move."""
    query = sql.SQL("SELECT data FROM {}").format(_peek_call(settings, upto, None))

    def begin() -> tuple[psycopg.ServerCursor[Any], list[tuple[bytes]]]:
        connection.execute("BEGIN")
        cursor = psycopg.ServerCursor(connection, "changes")
        cursor.format = psycopg.pq.Format.BINARY
        cursor.execute(query, binary=True)
        return cursor, cursor.fetchmany(FETCH_MESSAGES)

    cursor, batch = retry_while_slot_busy(connection, settings, begin)
    while batch:
        for (message,) in batch:
            yield message
        batch = cursor.fetchmany(FETCH_MESSAGES)
    cursor.close()
    connection.rollback()


def advance_slot(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> None:
    """Let the server discard the WAL before the LSN `upto`. Does nothing when the slot is already there."""
    query = sql.SQL(
        "SELECT pg_replication_slot_advance(slot_name, {upto}::pg_lsn) FROM pg_replication_slots "
        "WHERE slot_name = {slot} AND confirmed_flush_lsn < {upto}::pg_lsn"
    ).format(upto=sql.Literal(format_lsn(upto)), slot=sql.Literal(settings.slot))
    retry_while_slot_busy(connection, settings, lambda: connection.execute(query).fetchall())


def drop_slot(connection: psycopg.Connection[Any], settings: PostgresSettings) -> None:
    """Drop the slot."""
    query = sql.SQL("SELECT pg_drop_replication_slot({})").format(sql.Literal(settings.slot))
    retry_while_slot_busy(connection, settings, lambda: connection.execute(query).fetchall())


def _peek_call(settings: PostgresSettings, upto: int, transactions: int | None) -> sql.Composed:
    return sql.SQL(
        "pg_logical_slot_peek_binary_changes({}, {}::pg_lsn, {}, 'proto_version', '1', 'publication_names', {})"
    ).format(
        sql.Literal(settings.slot),
        sql.Literal(format_lsn(upto)),
        sql.Literal(transactions),
        sql.Literal('"' + settings.publication.replace('"', '""') + '"'),
    )
