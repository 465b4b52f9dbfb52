"""The log of one partition: a file of record batches and an index in memory.

`<topic>/<partition>.log` contains record batches (magic 2) as the producer compressed them, with their offsets written in.
The index is rebuilt from their headers at the start; a batch torn by a crash is cut off.
"""

from __future__ import annotations

import bisect
import os
import struct
from array import array
from pathlib import Path

from app.kafka_broker.protocol import (
    CORRUPT_MESSAGE,
    INVALID_PRODUCER_EPOCH,
    NONE,
    OUT_OF_ORDER_SEQUENCE,
    UNSUPPORTED_FOR_MESSAGE_FORMAT,
)
from app.kafka_broker.record_batch import (
    ABORT,
    CONTROL,
    HEADER_BYTES,
    MAGIC,
    SEQUENCE_MASK,
    TRANSACTIONAL,
    RecordBatch,
    batch_header,
    control_batch,
)


class PartitionLog:
    """A partition's file, and an index of its batches: base offset, position in the file, newest timestamp.

    start, end      the first offset, and the one after the last
    producers       producer -> (epoch, last sequence number, base offset of that batch), to recognise repeated batches
    open            open transactions: producer -> (epoch, first offset)
    aborted         aborted transactions: (producer, first offset, offset of the marker)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._start_path = path.with_suffix(".start")
        self.start = int(self._start_path.read_text()) if self._start_path.exists() else 0
        self.end = 0
        self._size = 0
        self._offsets, self._positions, self._newest = array("q"), array("q"), array("q")
        self.producers: dict[int, tuple[int, int, int]] = {}
        self.open: dict[int, tuple[int, int]] = {}
        self.aborted: list[tuple[int, int, int]] = []
        self._recover()
        self.end = max(self.end, self.start)

    def _recover(self) -> None:
        length = os.fstat(self._file).st_size
        while self._size + HEADER_BYTES <= length:
            header = os.pread(self._file, HEADER_BYTES, self._size)
            batch = batch_header(header, 0)
            (base,) = struct.unpack_from(">q", header)
            torn = batch.magic != MAGIC or batch.bytes < HEADER_BYTES or self._size + batch.bytes > length
            if torn or base < self.end:
                break
            self._index(batch, base, self._marker(self._size) if batch.attributes & CONTROL else None)
        if self._size < length:
            os.ftruncate(self._file, self._size)

    def _marker(self, position: int) -> int:
        """Return ABORT or COMMIT: the key of the only record of the control batch at this position."""
        return int.from_bytes(os.pread(self._file, 2, position + HEADER_BYTES + 7), "big")

    @property
    def stable(self) -> int:
        """The first offset that an open transaction may still abort; `end` when there is none."""
        return min((first for _, first in self.open.values()), default=self.end)

    def end_transaction(self, producer: int, epoch: int, marker: int, now: int) -> None:
        """Write the marker that ends a producer's transaction."""
        batch = control_batch(producer, epoch, marker, now, self.end)
        os.pwrite(self._file, batch, self._size)
        self._index(batch_header(batch, 0), self.end, marker)

    def _index(self, batch: RecordBatch, base: int, marker: int | None = None) -> None:
        if marker is not None:
            opened = self.open.pop(batch.producer_id, None)
            if opened is not None and marker == ABORT:
                self.aborted.append((batch.producer_id, opened[1], base))
        elif batch.attributes & TRANSACTIONAL:
            self.open.setdefault(batch.producer_id, (batch.producer_epoch, base))
        self._offsets.append(base)
        self._positions.append(self._size)
        self._newest.append(batch.max_timestamp)
        if batch.producer_id >= 0 and batch.base_sequence >= 0:
            self.producers[batch.producer_id] = (batch.producer_epoch, batch.last_sequence, base)
        self.end = base + batch.last_delta + 1
        self._size += batch.bytes

    def append(self, records: memoryview) -> tuple[int, int]:
        """Append batches and return (error code, offset of the first record)."""
        batches, error = _split(records)
        if error != NONE:
            return error, -1
        first = -1
        for at, batch in batches:
            error, repeated_at = self._check_sequence(batch)
            if error != NONE:
                return error, -1
            if repeated_at >= 0:
                first = repeated_at if first < 0 else first
                continue
            first = self.end if first < 0 else first
            self._write(records[at : at + batch.bytes])
            self._index(batch, self.end)
        return NONE, first

    def _check_sequence(self, batch: RecordBatch) -> tuple[int, int]:
        """Return (error code, base offset of the same batch when it is a repetition, else -1)."""
        known = self.producers.get(batch.producer_id) if batch.producer_id >= 0 else None
        if known is None or batch.producer_epoch > known[0]:
            return NONE, -1
        if batch.producer_epoch < known[0]:
            return INVALID_PRODUCER_EPOCH, -1
        if batch.last_sequence == known[1]:
            return NONE, known[2]
        in_order = batch.base_sequence == (known[1] + 1) & SEQUENCE_MASK
        return (NONE if in_order else OUT_OF_ORDER_SEQUENCE), -1

    def _write(self, records: memoryview) -> None:
        data = bytearray(records)
        struct.pack_into(">q", data, 0, self.end)
        struct.pack_into(">i", data, 12, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, memoryview(data)[written:], self._size + written)

    def read(self, offset: int, limit: int, below: int) -> bytes:
        """Return whole batches, from the one with `offset` to the last one before `below`: about `limit` bytes, at least one."""
        if offset >= below or not self._offsets:
            return b""
        index = max(0, bisect.bisect_right(self._offsets, offset) - 1)
        position = self._positions[index]
        stop = bisect.bisect_right(self._positions, position + max(limit, 1)) - 1
        until = self._positions[stop] if stop > index and position + limit < self._size else self._size
        if stop <= index:
            until = self._positions[index + 1] if index + 1 < len(self._positions) else self._size
        if below < self.end:
            until = min(until, self._positions[bisect.bisect_left(self._offsets, below)])
        return os.pread(self._file, until - position, position)

    def at_time(self, timestamp: int) -> tuple[int, int]:
        """Return (timestamp, offset) of the first batch with a record that is not older, or (-1, -1).

        Exact to the batch, and never later than the exact answer.
        """
        for newest, base in zip(self._newest, self._offsets, strict=True):
            if newest >= timestamp and base + 1 > self.start:
                return newest, base
        return -1, -1

    def delete_before(self, offset: int) -> int:
        """Delete the records before an offset (-1: all records) and return the new first offset."""
        self.start = max(self.start, self.end if offset < 0 else offset)
        self._start_path.write_text(str(self.start))
        return self.start

    def close(self) -> None:
        os.close(self._file)


def _split(records: memoryview) -> tuple[list[tuple[int, RecordBatch]], int]:
    """Return (position, header) of each batch, and an error code."""
    batches: list[tuple[int, RecordBatch]] = []
    at = 0
    while at < len(records):
        if at + HEADER_BYTES > len(records):
            return [], CORRUPT_MESSAGE
        batch = batch_header(records, at)
        if batch.magic != MAGIC:
            return [], UNSUPPORTED_FOR_MESSAGE_FORMAT
        if batch.bytes < HEADER_BYTES or at + batch.bytes > len(records) or batch.last_delta < 0:
            return [], CORRUPT_MESSAGE
        batches.append((at, batch))
        at += batch.bytes
    return batches, NONE
