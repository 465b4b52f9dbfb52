"""Decodes the pgoutput protocol, version 1: messages of a logical replication slot as changes of rows.

https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from pipelines.bronze.name_list import join_names
from pipelines.sources.postgres.types import SourceColumn

EPOCH_MICROSECONDS = 946_684_800_000_000
"""2000-01-01, from which PostgreSQL counts time, in microseconds since 1970."""

Value = bytes | None
Values = list[Value]

_INT16 = Struct(">H").unpack_from
_INT32 = Struct(">I").unpack_from
_BEGIN = Struct(">QqI").unpack_from
_HEAD = Struct(">BI").unpack_from
_TRUNCATE = Struct(">IB").unpack_from
_TEXT, _NULL, _UNCHANGED = b"tnu"
_OLD, _NEW = b"ON"
_IGNORED = frozenset(b"CYOM")


@dataclass(frozen=True)
class Relation:
    """A table as the stream describes it. key: indexes of the columns that identify a row."""

    schema: str
    name: str
    columns: tuple[SourceColumn, ...]
    key: tuple[int, ...]


class RowChange(NamedTuple):
    """A change of one row.

    op         c, u, d or t (TRUNCATE: all values are null)
    number     number of the change within its transaction, from 1
    time       commit time, in microseconds since 1970
    values     text by the relation's columns; null for values that were not sent
    unchanged  comma-separated names of the columns that the update did not change and the server did not send
    size       bytes of the message
    """

    relation: Relation
    op: str
    commit_lsn: int
    number: int
    time: int
    values: Values
    unchanged: str | None
    size: int


KeyOf = Callable[[str, str], Sequence[str]]
"""Returns, for a schema and a table, the columns that identify a row; empty: those that the server marks as such."""


def decode_messages(messages: Iterable[bytes], key_of: KeyOf) -> Iterator[RowChange]:
    """Give the changes in messages of whole transactions, in their order. Raises ValueError on an unknown kind of message."""
    relations: dict[int, Relation] = {}
    commit_lsn = time = number = 0
    for message in messages:
        kind, size = message[0], len(message)
        if kind == 0x49:  # Insert
            number += 1
            values, unsent = _row_image(message, 6)
            relation = relations[_INT32(message, 1)[0]]
            yield RowChange(relation, "c", commit_lsn, number, time, values, _names(relation, unsent), size)
        elif kind == 0x55:  # Update
            relation = relations[_INT32(message, 1)[0]]
            image = message[5]
            old: Values | None = None
            at = 6
            if image != _NEW:
                at = _image_end(message, 6) + 1
            values, unsent = _row_image(message, at)
            if image != _NEW and (unsent or not _is_same_through_key(message, at, relation)):
                old, _ = _row_image(message, 6)
                if unsent and image == _OLD:
                    for index in unsent:
                        values[index] = old[index]
                    unsent = None
                if _changes_key(relation, old, values, unsent or ()):
                    number += 1
                    yield RowChange(relation, "d", commit_lsn, number, time, old, None, size)
            number += 1
            yield RowChange(relation, "u", commit_lsn, number, time, values, _names(relation, unsent), size)
        elif kind == 0x44:  # Delete
            number += 1
            values, _ = _row_image(message, 6)
            yield RowChange(relations[_INT32(message, 1)[0]], "d", commit_lsn, number, time, values, None, size)
        elif kind == 0x42:  # Begin
            commit_lsn, time, _ = _BEGIN(message, 1)
            time += EPOCH_MICROSECONDS
            number = 0
        elif kind == 0x52:  # Relation
            identity, relation = _relation(message, key_of)
            relations[identity] = relation
        elif kind == 0x54:  # Truncate
            count, _ = _TRUNCATE(message, 1)
            truncated = [relations[_INT32(message, 6 + 4 * index)[0]] for index in range(count)]
            for place, relation in enumerate(truncated, number + 1):
                yield RowChange(relation, "t", commit_lsn, place, time, [None] * len(relation.columns), None, size)
            number += count
        elif kind not in _IGNORED:
            raise ValueError(f"unknown kind of pgoutput message: {chr(kind)!r}")


def _names(relation: Relation, indexes: Sequence[int] | None) -> str | None:
    if not indexes:
        return None
    return join_names(relation.columns[index].name for index in indexes)


def _changes_key(relation: Relation, old: Values, new: Values, unsent: Sequence[int]) -> bool:
    """Return whether an update changed the key; False when the old image lacks key columns."""
    return any(old[index] != new[index] and index not in unsent for index in relation.key) and all(
        old[index] is not None for index in relation.key
    )


def _is_same_through_key(message: bytes, new: int, relation: Relation) -> bool:
    """Return whether the old image (at 6) and the new one are equal up to the last key column; faster than decoding both."""
    at = 8
    for _ in range(max(relation.key, default=-1) + 1):
        at += 5 + _INT32(message, at + 1)[0] if message[at] == _TEXT else 1
    return message[8:at] == message[new + 2 : new + at - 6]


def _image_end(message: bytes, at: int) -> int:
    """Return where the row image at `at` ends."""
    (count,) = _INT16(message, at)
    at += 2
    for _ in range(count):
        kind, length = _HEAD(message, at)
        at += 5 + length if kind == _TEXT else 1
    return at


def _row_image(message: bytes, at: int) -> tuple[Values, list[int] | None]:
    """Return the values of the row image at `at`, and the indexes of those that were not sent."""
    (count,) = _INT16(message, at)
    at += 2
    values: Values = []
    add = values.append
    unsent: list[int] | None = None
    for index in range(count):
        kind = message[at]
        if kind == _TEXT:
            start = at + 5
            at = start + _INT32(message, at + 1)[0]
            add(message[start:at])
        elif kind == _NULL:
            add(None)
            at += 1
        elif kind == _UNCHANGED:
            add(None)
            unsent = [index] if unsent is None else [*unsent, index]
            at += 1
        else:
            raise ValueError(f"unknown kind of pgoutput value: {chr(kind)!r}")
    return values, unsent


def _relation(message: bytes, key_of: KeyOf) -> tuple[int, Relation]:
    """Return the id of a relation and its description."""
    (identity,) = _INT32(message, 1)
    schema, at = _text(message, 5)
    name, at = _text(message, at)
    (count,) = _INT16(message, at + 1)
    at += 3
    columns, marked = [], []
    for index in range(count):
        if message[at] & 1:
            marked.append(index)
        column, at = _text(message, at + 1)
        (type_id,), (modifier,) = _INT32(message, at), Struct(">i").unpack_from(message, at + 4)
        columns.append(SourceColumn(column, type_id, modifier))
        at += 8
    wanted = key_of(schema or "pg_catalog", name)
    key = [index for index, column in enumerate(columns) if column.name in wanted]
    identifying = key if key and len(key) == len(wanted) else marked
    return identity, Relation(schema or "pg_catalog", name, tuple(columns), tuple(identifying))


def _text(message: bytes, at: int) -> tuple[str, int]:
    """Return the null-terminated string at `at`, and where the next field begins."""
    end = message.index(0, at)
    return message[at:end].decode(), end + 1
