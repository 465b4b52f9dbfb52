"""Checks before a plan: whether the slot and the server still have every change that comes after the stored positions.

In all of them, `stored` are the positions of all tables that were ever read, and `continuing` those of the tables that continue
with the change stream. The others are to be re-snapshotted.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import EPOCH, RESNAPSHOT, Position, epoch, is_resnapshot
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres.connection import connect
from pipelines.sources.postgres.errors import SlotAdvancedElsewhere, resnapshot_hint
from pipelines.sources.postgres.positions import format_lsn, last_read_lsn, parse_lsn, slot_time, table_lsns
from pipelines.sources.postgres.replication_state import ReplicationState


def check_server(
    state: ReplicationState, settings: PostgresSettings, continuing: Mapping[str, Position], stored: Mapping[str, Position]
) -> None:
    """Raise SourceError when the server cannot deliver changes, OffsetExpired when it no longer has the next ones."""
    _check_configuration(state, settings, stored)
    _check_system(state, continuing, stored)
    if state.slot_exists:
        _check_slot(state, settings, continuing, stored)
    elif continuing:
        raise OffsetExpired(
            f"PostgreSQL: replication slot '{settings.slot}' no longer exists, so the changes since "
            f"{format_lsn(max(table_lsns(continuing).values()))} are lost. {resnapshot_hint(stored)}"
        )


def _check_configuration(state: ReplicationState, settings: PostgresSettings, stored: Mapping[str, Position]) -> None:
    if state.wal_level != "logical":
        raise SourceError(
            f"PostgreSQL: wal_level is '{state.wal_level}', expected 'logical'. Set wal_level = logical and restart the server."
        )
    if not state.publication_exists:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' does not exist in database '{state.current_database}'. Create it: "
            f"CREATE PUBLICATION {settings.publication} FOR TABLES IN SCHEMA {settings.schema_name}, or set postgres.publication."
        )
    if state.unpublished_operations:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' does not publish {state.unpublished_operations}, so changes are "
            f"being missed. ALTER PUBLICATION {settings.publication} SET (publish = 'insert, update, delete, truncate')"
            + (f". {resnapshot_hint(stored)}" if stored else ", then run again.")
        )


def _check_system(state: ReplicationState, continuing: Mapping[str, Position], stored: Mapping[str, Position]) -> None:
    systems = {str(position["system"]) for position in continuing.values() if position.get("system")}
    if state.system and systems - {state.system}:
        raise OffsetExpired(
            f"PostgreSQL: the server's system identifier is {state.system}, but the tables were read from server "
            f"{', '.join(sorted(systems - {state.system}))}. Correct postgres.dsn (SHOPSPHERE_POSTGRES__DSN). If the server was "
            f"replaced: {resnapshot_hint(stored)}"
        )


def _check_slot(
    state: ReplicationState, settings: PostgresSettings, continuing: Mapping[str, Position], stored: Mapping[str, Position]
) -> None:
    if state.slot_plugin != "pgoutput" or state.slot_database != state.current_database:
        raise SourceError(
            f"PostgreSQL: replication slot '{settings.slot}' is {state.slot_plugin or 'physical'} of database "
            f"'{state.slot_database}', expected pgoutput of '{state.current_database}'. Set postgres.slot to another name."
        )
    if state.wal_status == "lost" and (continuing or not stored):
        drop = f"If nothing else uses it: SELECT pg_drop_replication_slot('{settings.slot}'), then run again."
        raise OffsetExpired(
            f"PostgreSQL: replication slot '{settings.slot}' is lost: the server removed WAL that was not read yet. "
            + (resnapshot_hint(stored) if stored else drop)
        )
    times = {table: slot_time(position) for table, position in continuing.items()}
    if left_behind := sorted(table for table, time in times.items() if time < max(times.values())):
        raise OffsetExpired(
            f"PostgreSQL: replication slot '{settings.slot}' was re-created, and changes are missing in tables that were not "
            f"re-snapshotted then: {', '.join(left_behind)}. {resnapshot_hint(left_behind)}"
        )
    read = last_read_lsn(continuing, stored)
    if read is not None and state.confirmed_lsn is not None and state.confirmed_lsn > read:
        raise SlotAdvancedElsewhere(
            f"PostgreSQL: another client read from replication slot '{settings.slot}': the changes from {format_lsn(read)} "
            f"to {format_lsn(state.confirmed_lsn)} are lost. Give each client its own slot (postgres.slot). "
            + resnapshot_hint(stored)
        )


def check_not_restored(state: ReplicationState, continuing: Mapping[str, Position], stored: Mapping[str, Position]) -> None:
    """Raise OffsetExpired when the server is at an earlier point in time than the tables: other changes follow in its WAL."""
    read = last_read_lsn(continuing, stored)
    if read is not None and read > state.flushed_lsn:
        raise OffsetExpired(
            f"PostgreSQL: the server's WAL ends at {format_lsn(state.flushed_lsn)}, but its tables were read up to "
            f"{format_lsn(read)}: it was restored to an earlier point in time. {resnapshot_hint(stored)}"
        )


def check_timelines(
    state: ReplicationState, settings: PostgresSettings, continuing: Mapping[str, Position], stored: Mapping[str, Position]
) -> None:
    """Raise OffsetExpired when tables were read past the LSN at which the server's history left the timeline they were read on.

    The server's WAL has other changes there. A timeline begins with each promotion of a standby.
    """
    timelines = {int(position.get("timeline", state.timeline)) for position in continuing.values()}
    if timelines <= {state.timeline}:
        return
    ends = _timeline_ends(settings, state.timeline) | {state.timeline: state.flushed_lsn}
    for table, lsn in table_lsns(continuing).items():
        timeline = int(continuing[table].get("timeline", state.timeline))
        if lsn > ends.get(timeline, -1):
            history = (
                f"left timeline {timeline} at {format_lsn(ends[timeline])}" if timeline in ends else f"has no timeline {timeline}"
            )
            raise OffsetExpired(
                f"PostgreSQL: the server was promoted or restored (timeline {state.timeline}) and {history}, but {table} was "
                f"read up to {format_lsn(lsn)} of that timeline: the server does not have the last changes that were read. "
                + resnapshot_hint(stored)
            )


def _timeline_ends(settings: PostgresSettings, timeline: int) -> dict[int, int]:
    """Return the LSN at which the history of a timeline left each earlier timeline."""
    with connect(settings, replication="database") as connection:
        row = connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline))).fetchone()
    assert row is not None
    text = row[1].decode() if isinstance(row[1], bytes) else str(row[1])
    lines = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {int(line[0]): parse_lsn(line[1]) for line in lines}


def resumable_positions(state: ReplicationState, stored: Mapping[str, Position]) -> dict[str, Position]:
    """Return the previous positions of tables that are re-snapshotted although the slot still has all of their next changes."""
    if state.confirmed_lsn is None or state.wal_status == "lost":
        return {}
    newest = max(map(slot_time, stored.values()), default=0)
    current = {table: position for table, position in stored.items() if slot_time(position) == newest}
    same_system = all(not state.system or position.get("system") in ("", None, state.system) for position in current.values())
    read = max(table_lsns(current).values(), default=-1)
    if not same_system or not state.confirmed_lsn <= read <= state.flushed_lsn:
        return {}
    return {
        table: {name: value for name, value in position.items() if name != RESNAPSHOT} | {EPOCH: epoch(position) - 1}
        for table, position in current.items()
        if is_resnapshot(position)
    }
