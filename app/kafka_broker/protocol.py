"""Kafka's protocol: error codes, supported requests, and primitive types."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")

NONE = 0
OFFSET_OUT_OF_RANGE = 1
CORRUPT_MESSAGE = 2
UNKNOWN_TOPIC_OR_PARTITION = 3
INVALID_TOPIC = 17
UNSUPPORTED_VERSION = 35
TOPIC_ALREADY_EXISTS = 36
INVALID_PARTITIONS = 37
UNSUPPORTED_FOR_MESSAGE_FORMAT = 43
OUT_OF_ORDER_SEQUENCE = 45
INVALID_PRODUCER_EPOCH = 47
INVALID_TXN_STATE = 48

PRODUCE, FETCH, LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, FIND_COORDINATOR = 0, 1, 2, 3, 8, 9, 10
API_VERSIONS, CREATE_TOPICS, DELETE_TOPICS, DELETE_RECORDS, INIT_PRODUCER_ID = 18, 19, 20, 21, 22
ADD_PARTITIONS_TO_TXN, END_TXN = 24, 26

SUPPORTED_VERSIONS: dict[int, tuple[int, int]] = {
    PRODUCE: (3, 7),
    FETCH: (4, 10),
    LIST_OFFSETS: (1, 2),
    METADATA: (1, 12),
    OFFSET_COMMIT: (2, 3),
    OFFSET_FETCH: (1, 3),
    FIND_COORDINATOR: (0, 1),
    API_VERSIONS: (0, 3),
    CREATE_TOPICS: (0, 4),
    DELETE_TOPICS: (0, 1),
    DELETE_RECORDS: (0, 1),
    INIT_PRODUCER_ID: (0, 1),
    ADD_PARTITIONS_TO_TXN: (0, 0),
    END_TXN: (0, 1),
}
FLEXIBLE_FROM = {METADATA: 9}
"""The version from which a request and its response have compact lengths and tagged fields."""
OPERATIONS_NOT_REQUESTED = -(1 << 31)
"""In place of the operations that a client is authorised for."""


class RequestReader:
    """Reads Kafka's primitive types from a request. compact: with compact lengths."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position, self.compact = memoryview(data), 0, False

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._position)
        self._position += struct.calcsize(form)
        return int(value)

    def int8(self) -> int:
        return self._number(">b")

    def int16(self) -> int:
        return self._number(">h")

    def int32(self) -> int:
        return self._number(">i")

    def int64(self) -> int:
        return self._number(">q")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.int8() & 0xFF
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def skip_tags(self) -> None:
        """Skip the tagged fields of a flexible version."""
        for _ in range(self.varint() if self.compact else 0):
            self.varint()
            self._take(self.varint())

    def uuid(self) -> bytes:
        return bytes(self._take(16))

    def nullable_text(self) -> str | None:
        length = self.varint() - 1 if self.compact else self.int16()
        return None if length < 0 else str(self._take(length), "utf-8")

    def text(self) -> str:
        return self.nullable_text() or ""

    def nullable_bytes(self) -> memoryview | None:
        length = self.int32()
        return None if length < 0 else self._take(length)

    def items(self, read: Callable[[], Item]) -> list[Item]:
        return self.nullable_items(read) or []

    def nullable_items(self, read: Callable[[], Item]) -> list[Item] | None:
        count = self.varint() - 1 if self.compact else self.int32()
        return None if count < 0 else [read() for _ in range(count)]

    def _take(self, length: int) -> memoryview:
        if self._position + length > len(self._data):
            raise ValueError("the request is shorter than its lengths")
        part = self._data[self._position : self._position + length]
        self._position += length
        return part


class ResponseWriter:
    """Writes Kafka's primitive types. Record batches are kept as separate parts, not copied. compact: with compact lengths."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.compact = False

    def int8(self, value: int) -> ResponseWriter:
        return self.raw(struct.pack(">b", value))

    def int16(self, value: int) -> ResponseWriter:
        return self.raw(struct.pack(">h", value))

    def int32(self, value: int) -> ResponseWriter:
        return self.raw(struct.pack(">i", value))

    def int64(self, value: int) -> ResponseWriter:
        return self.raw(struct.pack(">q", value))

    def varint(self, value: int) -> ResponseWriter:
        data = bytearray()
        while value > 0x7F:
            data.append(value & 0x7F | 0x80)
            value >>= 7
        return self.raw(bytes([*data, value]))

    def no_tags(self) -> ResponseWriter:
        """Write zero tagged fields in a flexible version, nothing in others."""
        return self.raw(b"\0") if self.compact else self

    def text(self, value: str | None) -> ResponseWriter:
        data = b"" if value is None else value.encode()
        length = -1 if value is None else len(data)
        return (self.varint(length + 1) if self.compact else self.int16(length)).raw(data)

    def bytes_(self, data: bytes) -> ResponseWriter:
        return self.int32(len(data)).raw(data)

    def items(self, values: Iterable[Item], write: Callable[[Item], object]) -> ResponseWriter:
        listed = list(values)
        if self.compact:
            self.varint(len(listed) + 1)
        else:
            self.int32(len(listed))
        for value in listed:
            write(value)
        return self

    def raw(self, data: bytes) -> ResponseWriter:
        self.parts.append(data)
        return self
