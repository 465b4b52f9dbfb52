"""The headers of record batches, and the control batches that end transactions."""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEADER_BYTES = 61
MAGIC = 2
TRANSACTIONAL, CONTROL = 0x10, 0x20
ABORT, COMMIT = 0, 1
SEQUENCE_MASK = 0x7FFFFFFF


@dataclass(frozen=True)
class RecordBatch:
    """The header of a record batch. `bytes` includes the header."""

    bytes: int
    magic: int
    attributes: int
    last_delta: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int

    @property
    def last_sequence(self) -> int:
        """The producer's sequence number of the last record."""
        return (self.base_sequence + self.last_delta) & SEQUENCE_MASK


def batch_header(data: bytes | memoryview, at: int) -> RecordBatch:
    """Return the header of the batch at position `at`, of which `data` has at least HEADER_BYTES bytes."""
    length, _, magic, _, attributes, last_delta, _, newest, producer, epoch, sequence = struct.unpack_from(
        ">iibIhiqqqhi", data, at + 8
    )
    return RecordBatch(length + 12, magic, attributes, last_delta, newest, producer, epoch, sequence)


def control_batch(producer: int, epoch: int, marker: int, now: int, offset: int) -> bytes:
    """Return the batch that ends a transaction. marker: ABORT or COMMIT. now: milliseconds since 1970."""
    # one record: length 16, attributes, time and offset deltas, a key of 4 bytes (version, type), a value of 6, no headers
    record = bytes([32, 0, 0, 0, 8]) + struct.pack(">hh", 0, marker) + bytes([12]) + struct.pack(">hi", 0, 0) + bytes([0])
    checked = struct.pack(">hiqqqhii", TRANSACTIONAL | CONTROL, 0, now, now, producer, epoch, -1, 1) + record
    return struct.pack(">qiibI", offset, len(checked) + 9, 0, MAGIC, crc32c(checked)) + checked


def crc32c(data: bytes) -> int:
    """Return the Castagnoli checksum. Bit by bit, so only for the few bytes of a marker."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF
