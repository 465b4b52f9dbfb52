"""PostgreSQL to bronze: a consistent initial read, then the logical replication stream, with no gap between.

The first plan creates the slot and reads every table under the snapshot that the slot exported. Later plans peek
at the slot up to the WAL position of that moment; the slot moves only by `acknowledge`. A table's position P says:
every change committed before P is in the table. So whatever repeats is skipped, table by table.

When the slot or the server is another one, all tables are read anew (`rebuild` of all of them at once), and only then
is a missing or lost slot made again. Positions say when that was (`slot`): a table with an older time than another was
not read anew with it, and lacks the changes in between.

What logical replication cannot tell: values that `ALTER TABLE ... ADD COLUMN ... DEFAULT` gives to rows already
read, and a change of the primary key in a table whose replica identity is another index.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import psycopg
import pyarrow as pa
import pyarrow.csv as pacsv
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from lakehouse.errors import CommitConflict, OffsetExpired, SchemaConflict, SourceError, UnknownColumn
from lakehouse.source import EPOCH, RESNAPSHOT, Plan, Position, Reached, Rows, Task, epoch, is_resnapshot
from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import INGESTED_AT, POSTGRES_EXTRA, POSTGRES_TABLES, row_schema
from pipelines.settings import PostgresSettings
from pipelines.sources.epochs import EpochMarkerTask, epoch_prefix
from pipelines.sources.postgres.pgoutput import Relation, RowChange, changes
from pipelines.sources.postgres.types import SourceColumn, beside, type_name, typed, widened

BATCH_ROWS = 100_000
BATCH_BYTES = 32 << 20
BLOCKS_PER_TASK = 4096
"""Blocks of 8 kB that one initial-read task takes."""
IDLE_WAL = 64 << 20
"""When so much WAL has gone by without a change for us, the position moves all the same, so that PostgreSQL can drop it."""
WAL_PER_ROW = 200
"""Bytes of WAL that a changed row leaves, roughly; fewer than most do, so that the estimate is rather high."""
PATIENCE = 20.0
"""Seconds to wait for a slot that another run is reading."""
ORIGIN = "origin"
"""Of a position: which table was read, see `Catalog`; positions of before that was recorded have none."""
RESERVED = frozenset({*(column.name for column in POSTGRES_EXTRA), INGESTED_AT.name})

T = TypeVar("T")


class SlotMoved(OffsetExpired, CommitConflict):
    """The slot is past all positions: another run committed meanwhile, or a reader that is none of ours took changes.

    A CommitConflict, so that the run is tried again with the positions of now; what is left then is an OffsetExpired.
    """


@dataclass(frozen=True)
class Catalog:
    """A published table as the source's catalogue has it now.

    origin  which table it is, and since when it is published: another one when it was made anew, or left the publication
            and joined it again
    """

    name: str
    columns: tuple[SourceColumn, ...]
    blocks: int
    rows: int
    splittable: bool
    row_filter: str | None
    storage: int
    origin: str = ""

    @property
    def table(self) -> str:
        """The bronze table it fills."""
        return POSTGRES_TABLES[self.name][0].name


@dataclass(frozen=True)
class SlotState:
    """What the server says about the slot, the publication and itself.

    written  how far its log is written
    left_out operations that the publication does not publish
    upto     how far it may be read: not beyond what the standbys have received that are to have everything first
             (synchronized_standby_slots); the server would let us wait for them, without end if one is away
    """

    written: int
    upto: int
    system: str
    timeline: int
    wal_level: str
    published: bool
    left_out: str
    slot_exists: bool
    plugin: str | None
    database: str | None
    wal_status: str | None
    confirmed: int | None
    this_database: str
    unwritten: bool


@dataclass
class PostgresSource:
    """The operational PostgreSQL database as a source of bronze rows."""

    settings: PostgresSettings = field(repr=False)
    name: str = "postgres"
    tables: tuple[str, ...] = tuple(table.name for table, _ in POSTGRES_TABLES.values())

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        read = {table: position for table in self.tables if (position := positions.get(table))}
        known = {table: position for table, position in read.items() if not is_resnapshot(position)}
        with _errors(self.settings), _connect(self.settings) as connection:
            state = _state(connection, self.settings)
            _check(state, self.settings, known, read)
            if state.wal_status == "lost":
                _drop_slot(connection, self.settings)
                state = _state(connection, self.settings)
            if state.unwritten:
                _flush(connection)
                state = _state(connection, self.settings)
            _check_not_restored(state, known, read)
            _check_timelines(state, self.settings, known, read)
            catalog = _catalog(connection, self.settings)
            _check_published(catalog, self.settings, read)
            _check_origins(catalog, self.settings, known)
            planned = {item.table: _planned(item, schemas.get(item.table), self.settings) for item in catalog}
            unread = [item for item in catalog if item.table not in known]
            if unread:
                return self._plan_initial(state, unread, read, schemas)
            assert state.confirmed is not None
            if state.upto <= state.confirmed:
                return Plan()
            if state.upto - state.confirmed < IDLE_WAL and not _decodable(connection, self.settings, state.upto):
                return Plan()
        return Plan(
            tasks=(
                StreamTask(self.settings, state.upto, state.system, state.timeline, known, planned, origins=_origins(catalog)),
            ),
            schemas=planned,
            rows=(state.upto - state.confirmed) // WAL_PER_ROW,
        )

    def _plan_initial(
        self, state: SlotState, unread: Sequence[Catalog], read: Mapping[str, Position], schemas: Mapping[str, pa.Schema]
    ) -> Plan:
        """Read `unread` under a snapshot; the tables that were read before are brought to the same moment."""
        known = {table: position for table, position in read.items() if not is_resnapshot(position)}
        with _snapshot(self.settings, [item.name for item in unread], temporary=state.slot_exists) as (start, exporting):
            holder = _connect(self.settings)
            try:
                snapshot, moment = _hold(holder, self.settings, exporting, unread)
                everything = _catalog(holder, self.settings)
            except BaseException:
                holder.close()
                raise
        try:
            planned = {item.table: _planned(item, schemas.get(item.table), self.settings) for item in everything}
            reading = [item for item in everything if item.table not in known]
            before = {item.name: item.storage for item in unread}
            if changed := [item.name for item in reading if before.get(item.name) != item.storage]:
                raise SourceError(f"PostgreSQL table '{changed[0]}' was being altered when the initial read began. Run again.")
            generations = {item.table: epoch(read.get(item.table)) for item in reading}
            ended = _still_followed(state, read)
            tasks: list[Task] = [
                EpochMarkerTask(table, planned[table], number, moment) for table, number in generations.items() if number
            ]
            for item in reading:
                edges = [*range(0, max(item.blocks, 1), BLOCKS_PER_TASK), None] if item.splittable else [None, None]
                for number, (first, last) in enumerate(pairwise(edges)):
                    place = f"{epoch_prefix(generations[item.table])}{start:016X}-{number:06d}"
                    tasks.append(
                        SnapshotTask(self.settings, item, planned[item.table], snapshot, place, moment, first or None, last)
                    )
            if (known or ended) and state.confirmed is not None and start > state.confirmed:
                # what the slot still holds of the tables that are read anew belongs to their history
                everyone = {**ended, **known}
                tasks.append(
                    StreamTask(
                        self.settings,
                        start,
                        state.system,
                        state.timeline,
                        everyone,
                        planned,
                        frozenset(ended),
                        _origins(everything),
                    )
                )
            slot = max(map(_slot_time, (known or read).values()), default=0)
            slot = slot if known or ended else max(moment, slot + 1)
        except BaseException:
            holder.close()
            raise
        return Plan(
            tasks=tuple(tasks),
            schemas=planned,
            positions={
                item.table: _position(start, state.system, state.timeline, slot, generations[item.table], item.origin)
                for item in reading
            },
            rows=sum(item.rows for item in reading),
            held=holder,
        )

    def acknowledge(self, plan: Plan) -> None:
        """Let the slot forget what the plan's stream task has read."""
        for task in plan.tasks:
            if isinstance(task, StreamTask):
                with _errors(self.settings), _connect(self.settings) as connection:
                    _advance(connection, self.settings, task.upto)

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """WAL between what is committed and what the server has written; 'up to date' when none of it concerns us."""
        known = {table: position for table in self.tables if (position := positions.get(table))}
        with _errors(self.settings), _connect(self.settings) as connection:
            state = _state(connection, self.settings)
            published = {item.table for item in _catalog(connection, self.settings)} if state.published else set()
            reached = max(_lsns(known).values(), default=0)
            behind = state.written - max(reached, state.confirmed or 0)
            readable = state.confirmed is not None and state.wal_status != "lost"
            waiting = state.upto < state.written
            current = (
                readable
                and not waiting
                and (behind <= 0 or (behind < IDLE_WAL and not _decodable(connection, self.settings, state.upto)))
            )
        if current:
            text = "up to date"
        elif readable:
            text = f"{_size(behind)} of WAL" + (", waiting for standbys" if waiting else "")
        else:
            text = f"replication slot {'lost' if state.slot_exists else 'gone'}"
        return {
            table: "not in the publication" if table not in published else text if table in known else "never read"
            for table in self.tables
        }


@dataclass(frozen=True)
class SnapshotTask:
    """A range of blocks of a table, read under an exported snapshot.

    place        what the rows' positions begin with; '-' in it sorts before the '/' of every change at the same LSN
    first, last  blocks; None: from or to the end
    """

    settings: PostgresSettings = field(repr=False)
    source: Catalog
    schema: pa.Schema = field(repr=False)
    snapshot: str
    place: str
    moment: int
    first: int | None
    last: int | None

    def read(self) -> Iterator[Rows]:
        """Give the rows in batches."""
        names = [item.name for item in self.source.columns]
        targets = [_target(self.source.table, item, self.schema, self.settings) for item in self.source.columns]
        types = dict.fromkeys(names, pa.string())
        copy = sql.SQL("COPY (SELECT {} FROM {}.{} {}) TO STDOUT (FORMAT csv)").format(
            sql.SQL(", ").join(sql.Identifier(name) for name in names),
            sql.Identifier(self.settings.schema_name),
            sql.Identifier(self.source.name),
            sql.SQL(self._condition()),
        )
        with _errors(self.settings), _connect(self.settings) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(self.snapshot)))
            # so that a row has the same number each time
            cursor.execute("SET LOCAL synchronize_seqscans TO off")
            before = 0
            with cursor.copy(copy) as stream:
                for chunk in _chunks(stream):
                    text = pacsv.read_csv(
                        io.BytesIO(chunk),
                        pacsv.ReadOptions(column_names=names, block_size=len(chunk) + 1, use_threads=False),
                        pacsv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
                        pacsv.ConvertOptions(
                            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                        ),
                    )
                    yield Rows(self.source.table, self._rows(text, targets, before))
                    before += text.num_rows

    def _condition(self) -> str:
        parts = []
        if self.first is not None:
            parts.append(f"ctid >= '({self.first},0)'")
        if self.last is not None:
            parts.append(f"ctid < '({self.last},0)'")
        if self.source.row_filter:
            parts.append(f"({self.source.row_filter})")
        return f"WHERE {' AND '.join(parts)}" if parts else ""

    def _rows(self, text: pa.Table, targets: Sequence[str], before: int) -> pa.Table:
        count = text.num_rows
        return _table(
            self.schema,
            dict(zip(targets, (column.combine_chunks() for column in text.columns), strict=True)),
            op=_repeat("r", count),
            position=pa.array([f"{self.place}.{row:010d}" for row in range(before, before + count)], pa.string()),
            moment=_repeat(self.moment, count),
            unchanged=pa.nulls(count, pa.string()),
        )


@dataclass(frozen=True)
class StreamTask:
    """The changes in the slot up to an LSN, for tables with a position. Peeks only: run again, it gives the same rows.

    Says Reached for the tables that got rows; when none did, for the first table, so that progress is always on record
    before the slot may move. ended: tables whose position the plan gives, because they are read anew after this.
    """

    settings: PostgresSettings = field(repr=False)
    upto: int
    system: str
    timeline: int
    positions: Mapping[str, Position]
    schemas: Mapping[str, pa.Schema] = field(repr=False)
    ended: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)
    batch_rows: int = BATCH_ROWS

    def read(self) -> Iterator[Rows | Reached]:
        """Give the changes in batches of bounded size, then the position reached."""
        filled: set[str] = set()
        with _errors(self.settings), _connect(self.settings) as connection:
            for rows in self.decode(_peek(connection, self.settings, self.upto)):
                filled.add(rows.table)
                yield rows
        for table in sorted(filled - self.ended) or sorted(self.positions.keys() - self.ended)[:1]:
            before, origin = self.positions[table], self.origins.get(table, "")
            yield Reached(table, _position(self.upto, self.system, self.timeline, _slot_time(before), epoch(before), origin))

    def decode(self, messages: Iterator[bytes]) -> Iterator[Rows]:
        """Rows from the slot's messages."""
        buffers: dict[str, Buffer] = {}
        lsns = _lsns(self.positions)
        floors = {name: lsns[table.name] for name, (table, _) in POSTGRES_TABLES.items() if table.name in lsns}
        for change in changes(messages, _key_of):
            relation = change.relation
            if relation.name not in floors or relation.schema != self.settings.schema_name:
                continue
            if change.commit_lsn < floors[relation.name]:
                continue
            buffer = buffers.get(relation.name)
            if buffer is None or buffer.relation is not relation:
                if buffer:
                    yield buffer.take()
                table = POSTGRES_TABLES[relation.name][0].name
                before = epoch_prefix(epoch(self.positions[table]))
                buffer = buffers[relation.name] = Buffer(table, relation, self.schemas[table], self.settings, before)
            buffer.add(change)
            if len(buffer) >= self.batch_rows or buffer.size >= BATCH_BYTES:
                yield buffer.take()
        for name in sorted(buffers):
            if buffers[name]:
                yield buffers[name].take()


class Buffer:
    """Changes of one table that wait to become a batch, by column: lists of bytes cost the garbage collector nothing."""

    def __init__(self, table: str, relation: Relation, schema: pa.Schema, settings: PostgresSettings, before: str) -> None:
        """For changes with the columns of `relation`; `before`: goes before positions. Raises UnknownColumn, SchemaConflict."""
        self.table, self.relation, self.schema, self.before = table, relation, schema, before
        self.targets = [_target(table, column, schema, settings) for column in relation.columns]
        self._clear()

    def _clear(self) -> None:
        self.columns: list[list[bytes | None]] = [[] for _ in self.targets]
        self.ops: list[str] = []
        self.positions: list[str] = []
        self.times: list[int] = []
        self.unchanged: list[str | None] = []
        self.size = 0

    def __len__(self) -> int:
        return len(self.ops)

    def add(self, change: RowChange) -> None:
        """Take a change."""
        for column, value in zip(self.columns, change.values, strict=True):
            column.append(value)
        self.ops.append(change.op)
        self.positions.append(f"{self.before}{change.commit_lsn:016X}/{change.number:010d}")
        self.times.append(change.time)
        self.unchanged.append(change.unchanged)
        self.size += change.size

    def take(self) -> Rows:
        """All changes so far as a batch; the buffer is empty afterwards."""
        rows = _table(
            self.schema,
            {target: _text(values) for target, values in zip(self.targets, self.columns, strict=True)},
            op=pa.array(self.ops, pa.string()),
            position=pa.array(self.positions, pa.string()),
            moment=pa.array(self.times, pa.int64()),
            unchanged=pa.array([self._unchanged(names) for names in self.unchanged], pa.string()),
        )
        self._clear()
        return Rows(self.table, rows)

    def _unchanged(self, names: str | None) -> str | None:
        if names is None:
            return None
        targets = {column.name: target for column, target in zip(self.relation.columns, self.targets, strict=True)}
        return ",".join(targets[name] for name in names.split(","))


def _text(values: Sequence[bytes | None]) -> pa.Array:
    """Text as PostgreSQL sent it; bytes that are no UTF-8 (an SQL_ASCII database) are written as \\xNN."""
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return pa.array([None if value is None else value.decode("utf-8", "backslashreplace") for value in values], pa.string())


def _table(
    schema: pa.Schema, text: Mapping[str, pa.Array], *, op: pa.Array, position: pa.Array, moment: pa.Array, unchanged: pa.Array
) -> pa.Table:
    """A batch of bronze rows from columns of text; columns that the source does not have (any more) are null."""
    count = len(op)
    troubles: dict[int, dict[str, str]] = {}
    columns: dict[str, pa.Array] = {
        "_op": op,
        "_source_position": position,
        "_source_time": moment.cast(TIMESTAMP),
        "_unchanged": unchanged,
    }
    for name, values in text.items():
        columns[name], unreadable = typed(values, schema.field(name).type)
        for row, value in unreadable:
            troubles.setdefault(row, {})[name] = value
    columns["_unreadable"] = (
        pa.array([json.dumps(troubles[row], sort_keys=True) if row in troubles else None for row in range(count)], pa.string())
        if troubles
        else pa.nulls(count, pa.string())
    )
    return pa.table(
        [columns[item.name] if item.name in columns else pa.nulls(count, item.type) for item in schema], schema=schema
    )


def _repeat(value: str | int, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string() if isinstance(value, str) else pa.int64()), count)


def _key_of(schema: str, table: str) -> tuple[str, ...]:
    return POSTGRES_TABLES[table][1] if table in POSTGRES_TABLES else ()


def _column_name(column: SourceColumn) -> str:
    """A source column that has the name of one of bronze's own gets '__source' behind it."""
    return f"{column.name}__source" if column.name in RESERVED else column.name


def _target(table: str, column: SourceColumn, schema: pa.Schema, settings: PostgresSettings) -> str:
    """Which planned column takes the values. Raises UnknownColumn (the engine adds it, and tries again) and SchemaConflict."""
    name, type_ = _column_name(column), column.arrow_type
    if name not in schema.names:
        raise UnknownColumn(table, name, type_name(type_), type_)
    established = schema.field(name).type
    wider = widened(established, type_)
    if wider == established:
        return name
    if wider is not None:
        raise UnknownColumn(table, name, type_name(type_), wider)
    if settings.retyped_columns == "error":
        raise _conflict(table, name, established, type_)
    other = beside(name, type_)
    if other not in schema.names:
        raise UnknownColumn(table, other, type_name(type_), type_)
    return other


def _conflict(table: str, name: str, established: pa.DataType, arriving: pa.DataType) -> SchemaConflict:
    return SchemaConflict(
        table,
        name,
        type_name(established),
        type_name(arriving),
        f'Change the source back to {type_name(established)}, or set postgres.retyped_columns = "beside" '
        f"(SHOPSPHERE_POSTGRES__RETYPED_COLUMNS=beside) to store the new values in '{beside(name, arriving)}'.",
    )


def _planned(source: Catalog, today: pa.Schema | None, settings: PostgresSettings) -> pa.Schema:
    """The columns to fill: today's, the declared and the source's. Raises SchemaConflict."""
    declared = row_schema(POSTGRES_TABLES[source.name][0])
    types = {item.name: item.type for item in today if item.name != INGESTED_AT.name} if today is not None else {}
    types |= {item.name: item.type for item in declared if item.name not in types}
    for column in source.columns:
        name, type_ = _column_name(column), column.arrow_type
        wider = widened(types.get(name, type_), type_)
        if wider is not None:
            types[name] = wider
        elif settings.retyped_columns == "error":
            raise _conflict(source.table, name, types[name], type_)
        else:
            types[beside(name, type_)] = type_
    return pa.schema([pa.field(name, type_) for name, type_ in types.items()])


def _chunks(stream: Any) -> Iterator[bytes]:
    """COPY output in pieces of whole rows and bounded size."""
    pieces: list[bytes] = []
    size = 0
    for piece in stream:
        pieces.append(bytes(piece))
        size += len(piece)
        if size >= BATCH_BYTES or len(pieces) >= BATCH_ROWS:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


# -- the server ------------------------------------------------------------------------------------------------------


def _connect(settings: PostgresSettings, **options: Any) -> psycopg.Connection[Any]:
    """A connection on which values print the same whatever the server's defaults are."""
    dsn = settings.dsn.get_secret_value()
    if not dsn:
        raise SourceError(
            "PostgreSQL: postgres.dsn is not set. Set it (SHOPSPHERE_POSTGRES__DSN), or switch the source off "
            "(SHOPSPHERE_POSTGRES__ENABLED=false)."
        )
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        given = None
    # else libpq takes a part of the password for the host or the database, and errors would name it
    if given is None or _splits_password(dsn):
        raise SourceError(
            "PostgreSQL: postgres.dsn is no libpq connection string or URI. Write it like "
            "postgresql://user:password@host:5432/shopsphere (special characters in the password as %XX)."
        ) from None
    connection = psycopg.connect(
        dsn,
        autocommit=True,
        **{"connect_timeout": 10, **given, "client_encoding": "utf8", "application_name": "shopsphere", **options},
    )
    connection.execute(
        "SET datestyle TO 'ISO, YMD'; SET timezone TO 'UTC'; SET intervalstyle TO 'postgres'; SET extra_float_digits TO 1; "
        # rows that a policy hides from the role would be missing from the first read, and come by the stream: an error
        "SET row_security TO off; SET bytea_output TO 'hex'; SET lock_timeout TO '30s'; SET statement_timeout TO 0; "
        "SET idle_in_transaction_session_timeout TO 0"
    )
    # So that a killed run does not keep the slot busy; not every server can look.
    with suppress(psycopg.Error):
        connection.execute("SET client_connection_check_interval TO '2s'")
    return connection


def _splits_password(dsn: str) -> bool:
    """Whether a URI has an '@' or '/' within the password that is not written as %40 or %2F."""
    _, uri, rest = dsn.partition("://")
    authority, _, path = rest.partition("/")
    return bool(uri) and (authority.count("@") > 1 or "@" in path.partition("?")[0])


WAYS_OUT = {
    "28P01": "Correct user and password in postgres.dsn (SHOPSPHERE_POSTGRES__DSN).",
    "28000": "Correct the user in postgres.dsn, or let it in (pg_hba.conf; the role needs LOGIN and REPLICATION).",
    "3D000": "Correct the database in postgres.dsn (SHOPSPHERE_POSTGRES__DSN).",
    "42501": "The role needs REPLICATION, SELECT on the published tables, and BYPASSRLS if they have row level security.",
    "53300": "Raise max_connections, or use fewer tasks.",
    "53400": "Raise max_replication_slots, or drop a slot that nobody reads.",
    "55P03": "A table is locked. Run again when the lock is gone.",
}


@contextmanager
def _errors(settings: PostgresSettings) -> Iterator[None]:
    """PostgreSQL's errors as SourceError: one line, no password, with a way out."""
    try:
        yield
    except psycopg.Error as error:
        text = " ".join((error.diag.message_primary or str(error) or type(error).__name__).split())
        for secret in _secrets(settings):
            text = text.replace(secret, "***")
        code = error.sqlstate or ""
        way_out = WAYS_OUT.get(code or _code_in(text))
        if way_out is None:
            way_out = "Run again." if code else "See that it runs and that postgres.dsn (SHOPSPHERE_POSTGRES__DSN) is right."
        raise SourceError(f"PostgreSQL: {text.rstrip('.')}. {way_out}") from None
    except pa.ArrowInvalid as error:
        raise SourceError(f"PostgreSQL: rows cannot be read: {' '.join(str(error).split())[:300]}") from None


def _code_in(text: str) -> str:
    """The SQLSTATE of a failed log-in, which libpq gives only as text."""
    if "password authentication failed" in text or "no password supplied" in text:
        return "28P01"
    if "does not exist" in text and "database" in text:
        return "3D000"
    if "permission denied" in text:
        return "42501"
    return "28000" if "role" in text or "pg_hba" in text else ""


def _secrets(settings: PostgresSettings) -> list[str]:
    try:
        given = conninfo_to_dict(settings.dsn.get_secret_value())
    except psycopg.ProgrammingError:
        return []
    return [str(given[name]) for name in ("password", "sslpassword") if given.get(name)]


def _state(connection: psycopg.Connection[Any], settings: PostgresSettings) -> SlotState:
    row = connection.execute(
        """
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
        """,
        {"publication": settings.publication, "slot": settings.slot},
    ).fetchone()
    assert row is not None
    if row[0] is None:
        raise SourceError("PostgreSQL: the server is a standby. Point postgres.dsn (SHOPSPHERE_POSTGRES__DSN) at the primary.")
    written = int(row[0])
    return SlotState(
        written=written,
        upto=written if row[1] is None else min(written, int(row[1])),
        system=row[2],
        timeline=int(row[3], 16),
        wal_level=row[4],
        published=row[5],
        left_out=row[6],
        slot_exists=row[7],
        plugin=row[8],
        database=row[9],
        wal_status=row[10],
        confirmed=None if row[11] is None else int(row[11]),
        this_database=row[12],
        unwritten=bool(row[13]),
    )


def _flush(connection: psycopg.Connection[Any]) -> None:
    """Have the server write out what it has committed asynchronously: only written WAL can be decoded.

    A transaction that writes some WAL (a message that nobody asked for) and commits synchronously does it.
    """
    with connection.transaction():
        connection.execute("SET LOCAL synchronous_commit TO on")
        connection.execute("SELECT pg_logical_emit_message(true, 'shopsphere', '')")


def _check(state: SlotState, settings: PostgresSettings, known: Mapping[str, Position], read: Mapping[str, Position]) -> None:
    """Raises SourceError when the server cannot give changes, OffsetExpired when it no longer has those that come next.

    known: the tables to go on with. read: all that were ever read; those that are not known are read anew.
    """
    if state.wal_level != "logical":
        raise SourceError(f"PostgreSQL: wal_level is '{state.wal_level}'. Set wal_level = logical and restart the server.")
    if not state.published:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' does not exist in database '{state.this_database}'. "
            f"CREATE PUBLICATION {settings.publication} FOR TABLES IN SCHEMA {settings.schema_name}, or set postgres.publication."
        )
    again = f"Read the tables anew: python -m app rebuild {' '.join(sorted(read))}"
    if state.left_out:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' leaves out {state.left_out}, so changes are being missed. "
            f"ALTER PUBLICATION {settings.publication} SET (publish = 'insert, update, delete, truncate')"
            + (f". {again}" if read else ", and run again.")
        )
    systems = {str(position["system"]) for position in known.values() if position.get("system")}
    if state.system and systems - {state.system}:
        raise OffsetExpired(
            f"PostgreSQL: this is another server (system {state.system}) than the tables were read from "
            f"({', '.join(sorted(systems - {state.system}))}). Correct postgres.dsn. {again}"
        )
    if not state.slot_exists:
        if known:
            raise OffsetExpired(
                f"PostgreSQL: replication slot '{settings.slot}' is gone, and with it the changes since "
                f"{_lsn_text(max(_lsns(known).values()))}. {again}"
            )
        return
    if state.plugin != "pgoutput" or state.database != state.this_database:
        raise SourceError(
            f"PostgreSQL: replication slot '{settings.slot}' is {state.plugin or 'physical'} of database '{state.database}', "
            f"expected pgoutput of '{state.this_database}'. Set postgres.slot to another name."
        )
    if state.wal_status == "lost" and (known or not read):
        way_out = again if read else f"If it is nobody's: SELECT pg_drop_replication_slot('{settings.slot}'), and run again."
        raise OffsetExpired(
            f"PostgreSQL: replication slot '{settings.slot}' is lost: the server dropped WAL that was not read yet. {way_out}"
        )
    times = {table: _slot_time(position) for table, position in known.items()}
    if left_behind := sorted(table for table, time in times.items() if time < max(times.values())):
        raise OffsetExpired(
            f"PostgreSQL: replication slot '{settings.slot}' was made anew, but {', '.join(left_behind)} not read anew with it. "
            f"Read what is missing: python -m app rebuild {' '.join(left_behind)}"
        )
    reached = _reached(known, read)
    if reached is not None and state.confirmed is not None and state.confirmed > reached:
        raise SlotMoved(
            f"PostgreSQL: somebody else read from replication slot '{settings.slot}': the changes from {_lsn_text(reached)} "
            f"to {_lsn_text(state.confirmed)} are gone. Give each reader a slot of its own (postgres.slot). {again}"
        )


def _reached(known: Mapping[str, Position], read: Mapping[str, Position]) -> int | None:
    """How far the slot was read; None when no table goes on with it.

    Only tables that got rows have moved, so it is the table that moved last that tells, also when it is to be read anew.
    """
    if not known:
        return None
    newest = max(map(_slot_time, known.values()))
    return max(_lsns({table: p for table, p in read.items() if _slot_time(p) == newest}).values())


def _check_not_restored(state: SlotState, known: Mapping[str, Position], read: Mapping[str, Position]) -> None:
    """Raises OffsetExpired when the server is at an earlier moment than the tables: its log goes on with other changes."""
    reached = _reached(known, read)
    if reached is not None and reached > state.written:
        raise OffsetExpired(
            f"PostgreSQL: the server is at {_lsn_text(state.written)}, but its tables were read up to {_lsn_text(reached)}: "
            f"it was restored to an earlier moment. Read the tables anew: python -m app rebuild {' '.join(sorted(read))}"
        )


def _check_timelines(
    state: SlotState, settings: PostgresSettings, known: Mapping[str, Position], read: Mapping[str, Position]
) -> None:
    """Raises OffsetExpired when tables were read past the moment at which the server's history left that of the server they
    were read from: its log has other changes there. A timeline begins with each promotion of a standby."""
    before = {int(position.get("timeline", state.timeline)) for position in known.values()}
    if before <= {state.timeline}:
        return
    left = _timelines(settings, state.timeline) | {state.timeline: state.written}
    for table, lsn in _lsns(known).items():
        timeline = int(known[table].get("timeline", state.timeline))
        if lsn > left.get(timeline, -1):
            where = (
                f"left timeline {timeline} at {_lsn_text(left[timeline])}" if timeline in left else f"has no timeline {timeline}"
            )
            raise OffsetExpired(
                f"PostgreSQL: the server was promoted or restored (timeline {state.timeline}) and {where}, but {table} was read "
                f"up to {_lsn_text(lsn)} of that: what was read last is not in the server. "
                f"Read the tables anew: python -m app rebuild {' '.join(sorted(read))}"
            )


def _timelines(settings: PostgresSettings, timeline: int) -> dict[int, int]:
    """Where the history of a timeline left each one before it."""
    with _connect(settings, replication="database") as connection:
        row = connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline))).fetchone()
    assert row is not None
    text = row[1].decode() if isinstance(row[1], bytes) else str(row[1])
    lines = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {int(line[0]): _lsn(line[1]) for line in lines}


def _still_followed(state: SlotState, read: Mapping[str, Position]) -> dict[str, Position]:
    """The tables that are read anew although the slot holds all that comes next, with the positions they end at."""
    if state.confirmed is None or state.wal_status == "lost":
        return {}
    newest = max(map(_slot_time, read.values()), default=0)
    current = {table: position for table, position in read.items() if _slot_time(position) == newest}
    same = all(not state.system or position.get("system") in ("", None, state.system) for position in current.values())
    reached = max(_lsns(current).values(), default=-1)
    if not same or not state.confirmed <= reached <= state.written:
        return {}
    return {
        table: {name: value for name, value in position.items() if name != RESNAPSHOT} | {EPOCH: epoch(position) - 1}
        for table, position in current.items()
        if is_resnapshot(position)
    }


def _check_published(catalog: Sequence[Catalog], settings: PostgresSettings, known: Mapping[str, Position]) -> None:
    published = {item.table for item in catalog}
    if not published:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' has none of the tables "
            f"{', '.join(POSTGRES_TABLES)} of schema '{settings.schema_name}'. "
            f"ALTER PUBLICATION {settings.publication} ADD TABLE ..."
        )
    if dropped := [name for name, (table, _) in POSTGRES_TABLES.items() if table.name in known and table.name not in published]:
        raise SourceError(
            f"PostgreSQL: {', '.join(dropped)} left publication '{settings.publication}', so changes are being missed. "
            f"ALTER PUBLICATION {settings.publication} ADD TABLE ..., then python -m app rebuild "
            f"{' '.join(POSTGRES_TABLES[name][0].name for name in dropped)}"
        )


def _origins(catalog: Sequence[Catalog]) -> dict[str, str]:
    return {item.table: item.origin for item in catalog}


def _check_origins(catalog: Sequence[Catalog], settings: PostgresSettings, known: Mapping[str, Position]) -> None:
    """Raises OffsetExpired when a table is not the one that was read, or was not published all the time since."""
    before = {table: position[ORIGIN] for table, position in known.items() if ORIGIN in position}
    if others := [item for item in catalog if before.get(item.table, item.origin) != item.origin]:
        raise OffsetExpired(
            f"PostgreSQL: {', '.join(item.name for item in others)} was made anew, or left publication "
            f"'{settings.publication}' and joined it again, so changes are missing. "
            f"Read it anew: python -m app rebuild {' '.join(item.table for item in others)}"
        )


def _catalog(connection: psycopg.Connection[Any], settings: PostgresSettings) -> list[Catalog]:
    """The published tables that bronze knows, with the published columns."""
    by_schema = "SELECT oid FROM pg_publication_namespace WHERE pnpubid = b.oid AND pnnspid = n.oid"
    joined = sql.SQL(
        "coalesce((SELECT oid FROM pg_publication_rel WHERE prpubid = b.oid AND prrelid = c.oid), ({}), 0)"  # 0: all tables
    ).format(sql.SQL(by_schema if connection.info.server_version >= 150_000 else "NULL"))
    query = sql.SQL(
        """
        SELECT p.tablename, to_jsonb(p)->>'rowfilter', c.relkind = 'r', greatest(c.reltuples, 0)::bigint,
               pg_relation_size(c.oid) / current_setting('block_size')::int, coalesce(pg_relation_filenode(c.oid)::bigint, 0),
               (SELECT json_agg(json_build_array(a.attname, a.atttypid::bigint, a.atttypmod) ORDER BY a.attnum)
                FROM pg_attribute a
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                  AND coalesce(to_jsonb(p)->'attnames' ? a.attname, a.attgenerated = '')),
               concat_ws('/', c.oid, b.oid, {joined})
        FROM pg_publication_tables p
        JOIN pg_publication b ON b.pubname = p.pubname
        JOIN pg_namespace n ON n.nspname = p.schemaname
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
        WHERE p.pubname = %s AND p.schemaname = %s AND p.tablename = ANY(%s)
        """
    ).format(joined=joined)
    rows = connection.execute(query, (settings.publication, settings.schema_name, list(POSTGRES_TABLES))).fetchall()
    found = {row[0]: row for row in rows}
    return [
        Catalog(
            name=name,
            columns=tuple(SourceColumn(*column) for column in found[name][6] or ()),
            blocks=found[name][4],
            rows=found[name][3] or found[name][4] * 80,
            splittable=found[name][2],
            row_filter=found[name][1],
            storage=found[name][5],
            origin=found[name][7],
        )
        for name in POSTGRES_TABLES
        if name in found
    ]


@contextmanager
def _snapshot(settings: PostgresSettings, tables: Sequence[str], *, temporary: bool) -> Iterator[tuple[int, str]]:
    """Create the slot, or a temporary one for tables that joined later; its LSN and the snapshot that it exports.

    Since PostgreSQL 17 standbys can keep a copy of the slot (sync_replication_slots), if it is made for that.
    """
    name = f"{settings.slot[:40]}_{time.time_ns():x}" if temporary else settings.slot
    with _connect(settings, replication="database") as connection:
        failover = ", FAILOVER" if connection.info.server_version >= 170_000 and not temporary else ""
        command = (
            f"CREATE_REPLICATION_SLOT {{}} {'TEMPORARY' if temporary else ''} LOGICAL pgoutput (SNAPSHOT 'export'{failover})"
        )
        try:
            row = connection.execute(sql.SQL(command).format(sql.Identifier(name))).fetchone()
        except psycopg.errors.LockNotAvailable:
            raise SourceError(
                "PostgreSQL: a slot begins when the transactions of its time are over, and a transaction that is open in some "
                "session has not ended. See which: SELECT pid, xact_start FROM pg_stat_activity ORDER BY xact_start. Run again "
                "when it has ended."
            ) from None
        assert row is not None
        yield _lsn(row[1]), row[2]


def _hold(
    holder: psycopg.Connection[Any], settings: PostgresSettings, snapshot: str, tables: Sequence[Catalog]
) -> tuple[str, int]:
    """Keep the snapshot alive, and the tables from being rewritten under it (which snapshots do not survive).

    Gives the snapshot's name for the tasks, and its time.
    """
    holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    holder.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
    names = sql.SQL(", ").join(sql.Identifier(settings.schema_name, item.name) for item in tables)
    holder.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))
    row = holder.execute(
        "SELECT pg_export_snapshot(), (extract(epoch FROM transaction_timestamp()) * 1000000)::bigint"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def _patiently(connection: psycopg.Connection[Any], settings: PostgresSettings, action: Callable[[], T]) -> T:
    """Do something with the slot; while another run is at it, wait."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except psycopg.errors.ObjectInUse:
            connection.rollback()
            if time.monotonic() > deadline:
                raise SourceError(
                    f"PostgreSQL: replication slot '{settings.slot}' is being read by another run. Run again when that is done."
                ) from None
            time.sleep(0.2)


def _peek_call(settings: PostgresSettings, upto: int, transactions: int | None) -> sql.Composed:
    return sql.SQL(
        "pg_logical_slot_peek_binary_changes({}, {}::pg_lsn, {}, 'proto_version', '1', 'publication_names', {})"
    ).format(
        sql.Literal(settings.slot),
        sql.Literal(_lsn_text(upto)),
        sql.Literal(transactions),
        sql.Literal('"' + settings.publication.replace('"', '""') + '"'),
    )


def _decodable(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> bool:
    """Whether the slot holds a change of a published table before `upto`."""
    query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(_peek_call(settings, upto, 1))
    row = _patiently(connection, settings, lambda: connection.execute(query).fetchone())
    return bool(row and row[0])


def _peek(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> Iterator[bytes]:
    """The slot's messages up to `upto`, fetched in bounded batches."""
    query = sql.SQL("SELECT data FROM {}").format(_peek_call(settings, upto, None))

    def begin() -> tuple[psycopg.ServerCursor[Any], list[tuple[bytes]]]:
        connection.execute("BEGIN")
        cursor = psycopg.ServerCursor(connection, "changes")
        cursor.format = psycopg.pq.Format.BINARY
        cursor.execute(query, binary=True)
        return cursor, cursor.fetchmany(20_000)

    cursor, batch = _patiently(connection, settings, begin)
    while batch:
        for (message,) in batch:
            yield message
        batch = cursor.fetchmany(20_000)
    cursor.close()
    connection.rollback()


def _drop_slot(connection: psycopg.Connection[Any], settings: PostgresSettings) -> None:
    query = sql.SQL("SELECT pg_drop_replication_slot({})").format(sql.Literal(settings.slot))
    _patiently(connection, settings, lambda: connection.execute(query).fetchall())


def _advance(connection: psycopg.Connection[Any], settings: PostgresSettings, upto: int) -> None:
    query = sql.SQL(
        "SELECT pg_replication_slot_advance(slot_name, {upto}::pg_lsn) FROM pg_replication_slots "
        "WHERE slot_name = {slot} AND confirmed_flush_lsn < {upto}::pg_lsn"
    ).format(upto=sql.Literal(_lsn_text(upto)), slot=sql.Literal(settings.slot))
    _patiently(connection, settings, lambda: connection.execute(query).fetchall())


def _position(lsn: int, system: str, timeline: int, slot: int, number: int, origin: str) -> dict[str, Any]:
    """A position as it is stored. slot: see `_slot_time`. number: of the generation. origin: see `Catalog`."""
    position: dict[str, Any] = {"lsn": _lsn_text(lsn), "system": system, "timeline": timeline}
    position |= {ORIGIN: origin} if origin else {}
    return position | ({"slot": slot} if slot else {}) | ({EPOCH: number} if number else {})


def _slot_time(position: Position) -> int:
    """When the tables were last read all together, in microseconds since 1970; 0 where that was not recorded yet."""
    return int(position.get("slot", 0))


def _lsns(positions: Mapping[str, Position]) -> dict[str, int]:
    return {table: _lsn(position["lsn"]) for table, position in positions.items()}


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def _lsn_text(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def _size(count: int) -> str:
    size = float(max(count, 0))
    for unit in ("bytes", "kB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"
