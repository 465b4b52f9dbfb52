"""The change stream: the slot's changes as bronze rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from lakehouse.source import Position, Reached, Rows, epoch
from pipelines.bronze.name_list import join_names, split_names
from pipelines.bronze.tables import POSTGRES_TABLES
from pipelines.settings import PostgresSettings
from pipelines.sources.epochs import epoch_prefix
from pipelines.sources.postgres.columns import target_column
from pipelines.sources.postgres.connection import connect
from pipelines.sources.postgres.errors import postgres_errors
from pipelines.sources.postgres.pgoutput import Relation, RowChange, decode_messages
from pipelines.sources.postgres.positions import slot_time, stored_position, table_lsns
from pipelines.sources.postgres.rows import BATCH_BYTES, BATCH_ROWS, bronze_batch, text_array
from pipelines.sources.postgres.slot import peek_messages


@dataclass(frozen=True, kw_only=True)
class StreamTask:
    """Reads the slot's changes up to an LSN, for tables that have a position. It only peeks, so it is repeatable.

    Gives Reached for the tables that received rows. When none did, it does so for the first table, so that progress is always
    recorded before the slot may move.

    positions     of the tables that are read, by bronze table
    resnapshotted tables of these whose next position the plan sets, because they are re-snapshotted after this task
    origins       see `PublishedTable`
    """

    settings: PostgresSettings = field(repr=False)
    upto: int
    system: str
    timeline: int
    positions: Mapping[str, Position]
    schemas: Mapping[str, pa.Schema] = field(repr=False)
    resnapshotted: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)
    batch_rows: int = BATCH_ROWS

    def read(self) -> Iterator[Rows | Reached]:
        """Give the changes in batches of bounded size, then the positions reached."""
        filled: set[str] = set()
        with postgres_errors(self.settings), connect(self.settings) as connection:
            for rows in self.decode(peek_messages(connection, self.settings, self.upto)):
                filled.add(rows.table)
                yield rows
        for table in sorted(filled - self.resnapshotted) or sorted(self.positions.keys() - self.resnapshotted)[:1]:
            position = stored_position(
                lsn=self.upto,
                system=self.system,
                timeline=self.timeline,
                slot_time=slot_time(self.positions[table]),
                epoch=epoch(self.positions[table]),
                origin=self.origins.get(table, ""),
            )
            yield Reached(table, position)

    def decode(self, messages: Iterator[bytes]) -> Iterator[Rows]:
        """Give the rows of the slot's messages. Changes before a table's position are skipped: it has them already."""
        buffers: dict[str, ChangeBuffer] = {}
        lsns = table_lsns(self.positions)
        first_lsns = {name: lsns[table.name] for name, (table, _) in POSTGRES_TABLES.items() if table.name in lsns}
        for change in decode_messages(messages, _primary_key):
            relation = change.relation
            if relation.name not in first_lsns or relation.schema != self.settings.schema_name:
                continue
            if change.commit_lsn < first_lsns[relation.name]:
                continue
            buffer = buffers.get(relation.name)
            if buffer is None or buffer.relation is not relation:
                if buffer:
                    yield buffer.take()
                buffer = buffers[relation.name] = self._buffer(relation)
            buffer.add(change)
            if len(buffer) >= self.batch_rows or buffer.size >= BATCH_BYTES:
                yield buffer.take()
        for name in sorted(buffers):
            if buffers[name]:
                yield buffers[name].take()

    def _buffer(self, relation: Relation) -> ChangeBuffer:
        table = POSTGRES_TABLES[relation.name][0].name
        schema = self.schemas[table]
        targets = [target_column(table, column, schema, self.settings) for column in relation.columns]
        return ChangeBuffer(table, relation, schema, targets, epoch_prefix(epoch(self.positions[table])))


class ChangeBuffer:
    """Changes of one table that wait to become a batch, by column: lists of bytes add no work for the garbage collector."""

    def __init__(self, table: str, relation: Relation, schema: pa.Schema, targets: list[str], prefix: str) -> None:
        """For changes with the columns of `relation`. targets: the bronze column of each; prefix: see `epoch_prefix`."""
        self.table, self.relation, self.schema, self.targets, self.prefix = table, relation, schema, targets, prefix
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
        """Append a change."""
        for column, value in zip(self.columns, change.values, strict=True):
            column.append(value)
        self.ops.append(change.op)
        self.positions.append(f"{self.prefix}{change.commit_lsn:016X}/{change.number:010d}")
        self.times.append(change.time)
        self.unchanged.append(change.unchanged)
        self.size += change.size

    def take(self) -> Rows:
        """Return all changes as a batch and empty the buffer."""
        rows = bronze_batch(
            self.schema,
            {target: text_array(values) for target, values in zip(self.targets, self.columns, strict=True)},
            op=pa.array(self.ops, pa.string()),
            position=pa.array(self.positions, pa.string()),
            moment=pa.array(self.times, pa.int64()),
            unchanged=pa.array([self._bronze_names(names) for names in self.unchanged], pa.string()),
        )
        self._clear()
        return Rows(self.table, rows)

    def _bronze_names(self, names: str | None) -> str | None:
        if names is None:
            return None
        targets = {column.name: target for column, target in zip(self.relation.columns, self.targets, strict=True)}
        return join_names(targets[name] for name in split_names(names))


def _primary_key(schema: str, table: str) -> tuple[str, ...]:
    return POSTGRES_TABLES[table][1] if table in POSTGRES_TABLES else ()
