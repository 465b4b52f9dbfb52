"""The state of the server, its replication slot and its publication, as one query reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from lakehouse.errors import SourceError
from pipelines.settings import PostgresSettings


@dataclass(frozen=True, kw_only=True)
class ReplicationState:
    """State of the server, the slot and the publication.

    flushed_lsn             how far the WAL is written to disk
    readable_lsn            how far it may be read: not beyond what the standbys in synchronized_standby_slots have received (the
                            server itself would wait for them, forever if one is down)
    unpublished_operations  operations that the publication does not publish, as text
    confirmed_lsn           how far the slot has been acknowledged; None without a slot
    has_unflushed_commits   whether asynchronous commits may not be on disk yet
    """

    flushed_lsn: int
    readable_lsn: int
    system: str
    timeline: int
    wal_level: str
    publication_exists: bool
    unpublished_operations: str
    slot_exists: bool
    slot_plugin: str | None
    slot_database: str | None
    wal_status: str | None
    confirmed_lsn: int | None
    current_database: str
    has_unflushed_commits: bool


QUERY = """
    SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_flush_lsn() - '0/0'::pg_lsn END,
           CASE WHEN to_jsonb(s)->>'failover' = 'true' THEN
               (SELECT min(coalesce(p.restart_lsn, '0/0') - '0/0'::pg_lsn)
                FROM unnest(string_to_array(current_setting('synchronized_standby_slots', true), ',')) AS named(slot)
                LEFT JOIN pg_replication_slots p ON p.slot_name = trim(named.slot)) END,
           CASE WHEN has_function_privilege('pg_control_system()', 'execute')
                THEN (SELECT system_identifier::text FROM pg_control_system()) ELSE '' END,
           CASE WHEN pg_is_in_recovery() THEN '0' ELSE left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) END,
           current_setting('wal_level'),
           p.oid IS NOT NULL,
           concat_ws(', ', CASE WHEN NOT p.pubinsert THEN 'insert' END, CASE WHEN NOT p.pubupdate THEN 'update' END,
                     CASE WHEN NOT p.pubdelete THEN 'delete' END, CASE WHEN NOT p.pubtruncate THEN 'truncate' END),
           s.slot_name IS NOT NULL, s.plugin, s.database, s.wal_status,
           s.confirmed_flush_lsn - '0/0'::pg_lsn, current_database(),
           current_setting('synchronous_commit') = 'off' AND NOT pg_is_in_recovery()
               AND pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn() > 40
    FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = %(slot)s
    LEFT JOIN pg_publication p ON p.pubname = %(publication)s
"""


def read_replication_state(connection: psycopg.Connection[Any], settings: PostgresSettings) -> ReplicationState:
    """Read the state. Raises SourceError when the server is a standby."""
    row = connection.execute(QUERY, {"publication": settings.publication, "slot": settings.slot}).fetchone()
    assert row is not None
    if row[0] is None:
        raise SourceError("PostgreSQL: the server is a standby. Point postgres.dsn (SHOPSPHERE_POSTGRES__DSN) at the primary.")
    flushed = int(row[0])
    return ReplicationState(
        flushed_lsn=flushed,
        readable_lsn=flushed if row[1] is None else min(flushed, int(row[1])),
        system=row[2],
        timeline=int(row[3], 16),
        wal_level=row[4],
        publication_exists=row[5],
        unpublished_operations=row[6],
        slot_exists=row[7],
        slot_plugin=row[8],
        slot_database=row[9],
        wal_status=row[10],
        confirmed_lsn=None if row[11] is None else int(row[11]),
        current_database=row[12],
        has_unflushed_commits=bool(row[13]),
    )


def flush_commits(connection: psycopg.Connection[Any]) -> None:
    """Have the server flush transactions that committed asynchronously: only flushed WAL can be decoded.

    A transaction that writes some WAL (a logical message without a reader) and commits synchronously does that.
    """
    with connection.transaction():
        connection.execute("SET LOCAL synchronous_commit TO on")
        connection.execute("SELECT pg_logical_emit_message(true, 'shopsphere', '')")
