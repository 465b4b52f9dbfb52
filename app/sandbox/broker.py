"""A small Kafka-protocol broker: one node, record batches kept as bytes on disk. Standard library only.

Speaks what librdkafka needs to produce, fetch exact offsets, look up watermarks and timestamps, and make
or empty topics: ApiVersions, Metadata, Produce, Fetch, ListOffsets, CreateTopics, DeleteTopics,
DeleteRecords, FindCoordinator, OffsetCommit and OffsetFetch; InitProducerId, AddPartitionsToTxn and EndTxn
for idempotent and transactional producers (with markers, aborted transactions and the last stable offset;
what is open when the broker stops is aborted). No consumer group membership, no retention, no TLS.

Why an own broker: of the two others that a wheel brings, librdkafka's mock cluster keeps only the newest
5 MiB of a partition, and tansu (memory only, so gone after a stop) answered with a high watermark below what
it had acknowledged: 189,664 of 200,000 messages right after a clean flush. A reader that trusts watermarks,
as ours does, cannot work on that.

A partition is one file `<topic>/<partition>.log` of record batches (Kafka's magic 2) as the producer
compressed them, with the offset written in; the index is rebuilt from their headers at the start, and a batch
torn by a crash is cut off. The file `id` beside them is the topic's id. Timestamp look-ups are exact to the batch, and
never later than the exact answer.

Run: `python broker.py --directory D --port P [--partitions 4]`. Stops on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import os
import shutil
import signal
import struct
import time
import uuid
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

Item = TypeVar("Item")

NODE_ID = 1
HEADER_BYTES = 61
MAX_REQUEST_BYTES = 128 << 20

NONE = 0
OFFSET_OUT_OF_RANGE = 1
CORRUPT_MESSAGE = 2
UNKNOWN_TOPIC_OR_PARTITION = 3
INVALID_TOPIC = 17
UNSUPPORTED_VERSION = 35
TOPIC_ALREADY_EXISTS = 36
INVALID_PARTITIONS = 37
INVALID_REQUEST = 42
INVALID_PRODUCER_EPOCH = 47
INVALID_TXN_STATE = 48
OUT_OF_ORDER_SEQUENCE = 45
UNSUPPORTED_FOR_MESSAGE_FORMAT = 43

PRODUCE, FETCH, LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, FIND_COORDINATOR = 0, 1, 2, 3, 8, 9, 10
API_VERSIONS, CREATE_TOPICS, DELETE_TOPICS, DELETE_RECORDS, INIT_PRODUCER_ID = 18, 19, 20, 21, 22
ADD_PARTITIONS_TO_TXN, END_TXN = 24, 26
TRANSACTIONAL, CONTROL = 0x10, 0x20
NOT_ASKED = -(1 << 31)
"""Instead of the operations that somebody may do."""
ABORT, COMMIT = 0, 1

SUPPORTED: dict[int, tuple[int, int]] = {
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


FLEXIBLE = {METADATA: 9}
"""From which version on a request and its answer have compact lengths and tagged fields."""


class Reader:
    """Reads Kafka's primitive types from a request; `compact`: with compact lengths."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.compact = memoryview(data), 0, False

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
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

    def tags(self) -> None:
        """Skip the tagged fields of a flexible version."""
        for _ in range(self.varint() if self.compact else 0):
            self.varint()
            self._take(self.varint())

    def uuid(self) -> bytes:
        return bytes(self._take(16))

    def text(self) -> str | None:
        length = self.varint() - 1 if self.compact else self.int16()
        return None if length < 0 else str(self._take(length), "utf-8")

    def name(self) -> str:
        return self.text() or ""

    def block(self) -> memoryview | None:
        length = self.int32()
        return None if length < 0 else self._take(length)

    def items(self, read: Callable[[], Item]) -> list[Item]:
        return self.some_items(read) or []

    def some_items(self, read: Callable[[], Item]) -> list[Item] | None:
        """The items; None when null was sent instead."""
        count = self.varint() - 1 if self.compact else self.int32()
        return None if count < 0 else [read() for _ in range(count)]

    def _take(self, length: int) -> memoryview:
        if self.at + length > len(self.data):
            raise ValueError("request is shorter than it says")
        part = self.data[self.at : self.at + length]
        self.at += length
        return part


class Writer:
    """Writes Kafka's primitive types; blocks of records are kept apart, not copied. `compact`: with compact lengths."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.compact = False

    def int8(self, value: int) -> Writer:
        return self._put(struct.pack(">b", value))

    def int16(self, value: int) -> Writer:
        return self._put(struct.pack(">h", value))

    def int32(self, value: int) -> Writer:
        return self._put(struct.pack(">i", value))

    def int64(self, value: int) -> Writer:
        return self._put(struct.pack(">q", value))

    def varint(self, value: int) -> Writer:
        data = bytearray()
        while value > 0x7F:
            data.append(value & 0x7F | 0x80)
            value >>= 7
        return self._put(bytes([*data, value]))

    def tags(self) -> Writer:
        """No tagged fields, in a flexible version."""
        return self._put(b"\0") if self.compact else self

    def text(self, value: str | None) -> Writer:
        data = b"" if value is None else value.encode()
        length = -1 if value is None else len(data)
        return (self.varint(length + 1) if self.compact else self.int16(length))._put(data)

    def block(self, data: bytes) -> Writer:
        return self.int32(len(data))._put(data)

    def raw(self, data: bytes) -> Writer:
        return self._put(data)

    def items(self, values: Iterable[Item], write: Callable[[Item], object]) -> Writer:
        listed = list(values)
        if self.compact:
            self.varint(len(listed) + 1)
        else:
            self.int32(len(listed))
        for value in listed:
            write(value)
        return self

    def _put(self, data: bytes) -> Writer:
        self.parts.append(data)
        return self


@dataclass(frozen=True)
class RecordBatch:
    """What the header of a record batch says."""

    bytes: int
    magic: int
    attributes: int
    last_delta: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int


def batch_header(data: bytes | memoryview, at: int) -> RecordBatch:
    """The batch that begins at `at`; `data` holds at least its first HEADER_BYTES bytes."""
    length, _, magic, _, attributes, last_delta, _, newest, producer, epoch, sequence = struct.unpack_from(
        ">iibIhiqqqhi", data, at + 8
    )
    return RecordBatch(length + 12, magic, attributes, last_delta, newest, producer, epoch, sequence)


def control_batch(producer: int, epoch: int, marker: int, now: int, offset: int) -> bytes:
    """The batch with which a transaction ends."""
    # One record: length 16, attributes, time and offset deltas, a key of 4 bytes (version, type), a value of 6, no headers.
    record = bytes([32, 0, 0, 0, 8]) + struct.pack(">hh", 0, marker) + bytes([12]) + struct.pack(">hi", 0, 0) + bytes([0])
    checked = struct.pack(">hiqqqhii", TRANSACTIONAL | CONTROL, 0, now, now, producer, epoch, -1, 1) + record
    return struct.pack(">qiibI", offset, len(checked) + 9, 0, 2, crc32c(checked)) + checked


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit: only for the few bytes of a marker."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


class TopicPartition:
    """One partition: its file, and an index of its batches (three numbers each)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.start_path = path.with_suffix(".start")
        self.start = int(self.start_path.read_text()) if self.start_path.exists() else 0
        self.end = 0
        self.size = 0
        self.offsets, self.places, self.newest = array("q"), array("q"), array("q")
        self.producers: dict[int, tuple[int, int, int]] = {}
        # Open transactions (producer -> epoch, first offset), and the aborted ones (producer, first offset, marker's offset).
        self.open: dict[int, tuple[int, int]] = {}
        self.aborted: list[tuple[int, int, int]] = []
        self._recover()
        self.end = max(self.end, self.start)

    def _recover(self) -> None:
        length = os.fstat(self.file).st_size
        while self.size + HEADER_BYTES <= length:
            header = os.pread(self.file, HEADER_BYTES, self.size)
            batch = batch_header(header, 0)
            (base,) = struct.unpack_from(">q", header)
            if batch.magic != 2 or batch.bytes < HEADER_BYTES or self.size + batch.bytes > length or base < self.end:
                break
            self._note(batch, base, self._marker(self.size) if batch.attributes & CONTROL else None)
        if self.size < length:
            os.ftruncate(self.file, self.size)

    def _marker(self, place: int) -> int:
        """What the control batch at this place says: ABORT or COMMIT, in the key of its only record."""
        return int.from_bytes(os.pread(self.file, 2, place + HEADER_BYTES + 7), "big")

    @property
    def stable(self) -> int:
        """The first offset that an open transaction may still take back; `end` when there is none."""
        return min((first for _, first in self.open.values()), default=self.end)

    def mark(self, producer: int, epoch: int, marker: int, now: int) -> None:
        """End a producer's transaction here."""
        batch = control_batch(producer, epoch, marker, now, self.end)
        os.pwrite(self.file, batch, self.size)
        self._note(batch_header(batch, 0), self.end, marker)

    def _note(self, batch: RecordBatch, base: int, marker: int | None = None) -> None:
        if marker is not None:
            opened = self.open.pop(batch.producer_id, None)
            if opened is not None and marker == ABORT:
                self.aborted.append((batch.producer_id, opened[1], base))
        elif batch.attributes & TRANSACTIONAL:
            self.open.setdefault(batch.producer_id, (batch.producer_epoch, base))
        self.offsets.append(base)
        self.places.append(self.size)
        self.newest.append(batch.max_timestamp)
        if batch.producer_id >= 0 and batch.base_sequence >= 0:
            last = (batch.base_sequence + batch.last_delta) & 0x7FFFFFFF
            self.producers[batch.producer_id] = (batch.producer_epoch, last, base)
        self.end = base + batch.last_delta + 1
        self.size += batch.bytes

    def append(self, records: memoryview) -> tuple[int, int]:
        """Append batches as they came; returns (error code, offset of the first record)."""
        batches: list[tuple[int, RecordBatch]] = []
        at = 0
        while at < len(records):
            if at + HEADER_BYTES > len(records):
                return CORRUPT_MESSAGE, -1
            batch = batch_header(records, at)
            if batch.magic != 2:
                return UNSUPPORTED_FOR_MESSAGE_FORMAT, -1
            if batch.bytes < HEADER_BYTES or at + batch.bytes > len(records) or batch.last_delta < 0:
                return CORRUPT_MESSAGE, -1
            batches.append((at, batch))
            at += batch.bytes
        first = -1
        for at, batch in batches:
            known = self.producers.get(batch.producer_id) if batch.producer_id >= 0 else None
            if known is not None and batch.producer_epoch < known[0]:
                return INVALID_PRODUCER_EPOCH, -1
            if known is not None and known[0] == batch.producer_epoch:
                last = (batch.base_sequence + batch.last_delta) & 0x7FFFFFFF
                if last == known[1]:
                    first = known[2] if first < 0 else first
                    continue
                if batch.base_sequence != (known[1] + 1) & 0x7FFFFFFF:
                    return OUT_OF_ORDER_SEQUENCE, -1
            data = bytearray(records[at : at + batch.bytes])
            struct.pack_into(">q", data, 0, self.end)
            struct.pack_into(">i", data, 12, 0)
            place = self.size
            written = 0
            while written < len(data):
                written += os.pwrite(self.file, memoryview(data)[written:], place + written)
            first = self.end if first < 0 else first
            self._note(batch, self.end)
        return NONE, first

    def read(self, offset: int, limit: int, below: int) -> bytes:
        """Whole batches from the one that holds `offset` to the one before `below`, about `limit` bytes, at least one batch."""
        if offset >= below or not self.offsets:
            return b""
        index = max(0, bisect.bisect_right(self.offsets, offset) - 1)
        place = self.places[index]
        stop = bisect.bisect_right(self.places, place + max(limit, 1)) - 1
        until = self.places[stop] if stop > index and place + limit < self.size else self.size
        if stop <= index:
            until = self.places[index + 1] if index + 1 < len(self.places) else self.size
        if below < self.end:
            until = min(until, self.places[bisect.bisect_left(self.offsets, below)])
        return os.pread(self.file, until - place, place)

    def at_time(self, timestamp: int) -> tuple[int, int]:
        """(timestamp, offset) of the first batch with a record that is not older; (-1, -1) when there is none."""
        for newest, base in zip(self.newest, self.offsets, strict=True):
            if newest >= timestamp and base + 1 > self.start:
                return newest, base
        return -1, -1

    def forget(self, before: int) -> int:
        """Records before this offset are no longer there (-1: all that are there now); returns the new first offset."""
        self.start = max(self.start, self.end if before < 0 else before)
        self.start_path.write_text(str(self.start))
        return self.start

    def close(self) -> None:
        os.close(self.file)


@dataclass
class Broker:
    """Topics below `directory`, and the answers to requests about them."""

    directory: Path
    host: str
    port: int
    partitions: int
    topics: dict[str, list[TopicPartition]] = field(default_factory=dict)
    ids: dict[str, bytes] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)
    transactional: dict[str, tuple[int, int]] = field(default_factory=dict)
    in_transaction: dict[int, set[tuple[str, int]]] = field(default_factory=dict)
    waiting: set[asyncio.Event] = field(default_factory=set)
    next_producer: int = 0

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in sorted(path for path in self.directory.iterdir() if path.is_dir()):
            files = sorted(folder.glob("*.log"), key=lambda path: int(path.stem))
            self.topics[unquote(folder.name)] = [TopicPartition(path) for path in files]
            self.ids[unquote(folder.name)] = self._id(folder)
        self.next_producer = 1 + max(
            (producer for topic in self.topics.values() for partition in topic for producer in partition.producers), default=0
        )
        for partition in (partition for topic in self.topics.values() for partition in topic):
            for producer, (epoch, _) in list(partition.open.items()):
                partition.mark(producer, epoch, ABORT, int(time.time() * 1000))
        commits = self.directory / "committed.json"
        if commits.exists():
            self.committed = json.loads(commits.read_text())

    def close(self) -> None:
        for partition in (partition for topic in self.topics.values() for partition in topic):
            partition.close()

    def create(self, topic: str, partitions: int) -> int:
        if not topic or len(topic) > 200 or topic in (".", ".."):
            return INVALID_TOPIC
        if topic in self.topics:
            return TOPIC_ALREADY_EXISTS
        count = self.partitions if partitions == -1 else partitions
        if not 1 <= count <= 1000:
            return INVALID_PARTITIONS
        folder = self.directory / quote(topic, safe="").replace(".", "%2E")
        folder.mkdir(parents=True, exist_ok=True)
        self.topics[topic] = [TopicPartition(folder / f"{number}.log") for number in range(count)]
        self.ids[topic] = self._id(folder)
        return NONE

    @staticmethod
    def _id(folder: Path) -> bytes:
        """The id of the topic in this folder; made when it has none yet."""
        file = folder / "id"
        if not file.exists():
            file.write_bytes(uuid.uuid4().bytes)
        return file.read_bytes()

    def delete(self, topic: str) -> int:
        partitions = self.topics.pop(topic, None)
        if partitions is None:
            return UNKNOWN_TOPIC_OR_PARTITION
        del self.ids[topic]
        for partition in partitions:
            partition.close()
        shutil.rmtree(partitions[0].path.parent)
        return NONE

    def partition(self, topic: str, number: int) -> TopicPartition | None:
        partitions = self.topics.get(topic, [])
        return partitions[number] if 0 <= number < len(partitions) else None

    # Requests: each reads its body from `ask` and writes its answer to `out`.

    async def produce(self, version: int, ask: Reader, out: Writer) -> bool:
        """Returns whether an answer is wanted."""
        ask.text()
        acks = ask.int16()
        ask.int32()

        def partition(topic: str) -> tuple[int, int, int, int]:
            number, records = ask.int32(), ask.block()
            log = self.partition(topic, number)
            if log is None:
                return number, UNKNOWN_TOPIC_OR_PARTITION, -1, -1
            error, offset = log.append(records) if records is not None else (CORRUPT_MESSAGE, -1)
            return number, error, offset, log.start

        def topic() -> tuple[str, list[tuple[int, int, int, int]]]:
            name = ask.name()
            return name, ask.items(lambda: partition(name))

        def answer(item: tuple[int, int, int, int]) -> None:
            number, error, offset, start = item
            out.int32(number).int16(error).int64(offset).int64(-1)
            if version >= 5:
                out.int64(start)

        results = ask.items(topic)
        out.items(results, lambda item: out.text(item[0]).items(item[1], answer))
        out.int32(0)
        for event in self.waiting:
            event.set()
        return acks != 0

    async def fetch(self, version: int, ask: Reader, out: Writer) -> bool:
        ask.int32()
        wait, least, most = ask.int32(), ask.int32(), ask.int32()
        committed = ask.int8() == 1
        if version >= 7:
            ask.int32()
            ask.int32()

        def partition() -> tuple[int, int, int]:
            number = ask.int32()
            if version >= 9:
                ask.int32()
            offset = ask.int64()
            if version >= 5:
                ask.int64()
            return number, offset, ask.int32()

        wanted = ask.items(lambda: (ask.name(), ask.items(partition)))
        deadline = asyncio.get_running_loop().time() + wait / 1000
        while True:
            event = asyncio.Event()
            self.waiting.add(event)
            try:
                found = self._collect(wanted, most, committed)
                size = sum(len(data) for _, parts in found for _, _, _, data in parts)
                wrong = any(error for _, parts in found for _, error, _, _ in parts)
                left = deadline - asyncio.get_running_loop().time()
                if size >= max(least, 1) or wrong or left <= 0 or not wanted:
                    break
                try:
                    await asyncio.wait_for(event.wait(), left)
                except TimeoutError:
                    continue
            finally:
                self.waiting.discard(event)

        def answer(item: tuple[int, int, TopicPartition | None, bytes]) -> None:
            number, error, log, data = item
            end, stable, start = (log.end, log.stable, log.start) if log else (-1, -1, -1)
            out.int32(number).int16(error).int64(end).int64(stable)
            if version >= 5:
                out.int64(start)
            if committed and log is not None and data:
                (first,) = struct.unpack_from(">q", data)
                gone = [(producer, begun) for producer, begun, ended in log.aborted if ended >= first]
                out.items(gone, lambda item: out.int64(item[0]).int64(item[1]))
            else:
                out.int32(-1)
            out.block(data)

        out.int32(0)
        if version >= 7:
            out.int16(NONE).int32(0)
        out.items(found, lambda item: out.text(item[0]).items(item[1], answer))
        return True

    def _collect(
        self, wanted: list[tuple[str, list[tuple[int, int, int]]]], most: int, committed: bool
    ) -> list[tuple[str, list[tuple[int, int, TopicPartition | None, bytes]]]]:
        found: list[tuple[str, list[tuple[int, int, TopicPartition | None, bytes]]]] = []
        left = most
        for topic, partitions in wanted:
            parts: list[tuple[int, int, TopicPartition | None, bytes]] = []
            for number, offset, limit in partitions:
                log = self.partition(topic, number)
                if log is None:
                    parts.append((number, UNKNOWN_TOPIC_OR_PARTITION, None, b""))
                elif not log.start <= offset <= log.end:
                    parts.append((number, OFFSET_OUT_OF_RANGE, log, b""))
                else:
                    data = log.read(offset, min(limit, left), log.stable if committed else log.end) if left > 0 else b""
                    left -= len(data)
                    parts.append((number, NONE, log, data))
            found.append((topic, parts))
        return found

    async def list_offsets(self, version: int, ask: Reader, out: Writer) -> bool:
        ask.int32()
        committed = False
        if version >= 2:
            committed = ask.int8() == 1
            out.int32(0)

        def answer(topic: str, number: int, timestamp: int) -> None:
            log = self.partition(topic, number)
            if log is None:
                out.int32(number).int16(UNKNOWN_TOPIC_OR_PARTITION).int64(-1).int64(-1)
                return
            found = {-1: (-1, log.stable if committed else log.end), -2: (-1, log.start)}.get(timestamp) or log.at_time(timestamp)
            out.int32(number).int16(NONE).int64(found[0]).int64(found[1])

        wanted = ask.items(lambda: (ask.name(), ask.items(lambda: (ask.int32(), ask.int64()))))
        out.items(wanted, lambda item: out.text(item[0]).items(item[1], lambda part: answer(item[0], *part)))
        return True

    async def metadata(self, version: int, ask: Reader, out: Writer) -> bool:
        by_id = {identity: topic for topic, identity in self.ids.items()}

        def named() -> str:
            identity = ask.uuid() if version >= 10 else bytes(16)
            name = ask.text()
            ask.tags()
            return name if name is not None else by_id.get(identity, "")

        wanted = ask.some_items(named)
        names = sorted(self.topics) if wanted is None else wanted
        create = bool(ask.int8()) if version >= 4 else True
        if version >= 3:
            out.int32(0)

        def node(number: int) -> None:
            out.int32(number).text(self.host).int32(self.port).text(None).tags()

        out.items([NODE_ID], node)
        if version >= 2:
            out.text("shopsphere-sandbox")
        out.int32(NODE_ID)

        def answer(topic: str) -> None:
            error = NONE
            if topic not in self.topics:
                error = self.create(topic, -1) if create else UNKNOWN_TOPIC_OR_PARTITION
            out.int16(error).text(topic)
            if version >= 10:
                out.raw(self.ids.get(topic, bytes(16)))
            out.int8(0)
            out.items(range(len(self.topics.get(topic, []))), partition)
            if version >= 8:
                out.int32(NOT_ASKED)
            out.tags()

        def partition(number: int) -> None:
            out.int16(NONE).int32(number).int32(NODE_ID)
            if version >= 7:
                out.int32(-1)
            out.items([NODE_ID], out.int32).items([NODE_ID], out.int32)
            if version >= 5:
                out.items([], out.int32)
            out.tags()

        out.items(names, answer)
        if 8 <= version <= 10:
            out.int32(NOT_ASKED)
        out.tags()
        return True

    async def offset_commit(self, version: int, ask: Reader, out: Writer) -> bool:
        group = ask.name()
        ask.int32()
        ask.text()
        ask.int64()

        def partition(topic: str) -> int:
            number, offset = ask.int32(), ask.int64()
            ask.text()
            self.committed[json.dumps([group, topic, number])] = offset
            return number

        def topic() -> tuple[str, list[int]]:
            name = ask.name()
            return name, ask.items(lambda: partition(name))

        results = ask.items(topic)
        temporary = self.directory / "committed.json.new"
        temporary.write_text(json.dumps(self.committed))
        temporary.replace(self.directory / "committed.json")
        if version >= 3:
            out.int32(0)
        out.items(results, lambda item: out.text(item[0]).items(item[1], lambda number: out.int32(number).int16(NONE)))
        return True

    async def offset_fetch(self, version: int, ask: Reader, out: Writer) -> bool:
        group = ask.name()
        wanted = ask.items(lambda: (ask.name(), ask.items(ask.int32)))
        if version >= 3:
            out.int32(0)

        def answer(topic: str, number: int) -> None:
            offset = self.committed.get(json.dumps([group, topic, number]), -1)
            out.int32(number).int64(offset).text("").int16(NONE)

        out.items(wanted, lambda item: out.text(item[0]).items(item[1], lambda number: answer(item[0], number)))
        if version >= 2:
            out.int16(NONE)
        return True

    async def find_coordinator(self, version: int, ask: Reader, out: Writer) -> bool:
        if version >= 1:
            out.int32(0)
        out.int16(NONE)
        if version >= 1:
            out.text(None)
        out.int32(NODE_ID).text(self.host).int32(self.port)
        return True

    async def create_topics(self, version: int, ask: Reader, out: Writer) -> bool:
        def topic() -> tuple[str, int]:
            name, partitions = ask.name(), ask.int32()
            ask.int16()
            assigned = ask.items(lambda: (ask.int32(), ask.items(ask.int32)))
            ask.items(lambda: (ask.text(), ask.text()))
            return name, len(assigned) or partitions

        wanted = ask.items(topic)
        ask.int32()
        only_check = bool(ask.int8()) if version >= 1 else False
        if version >= 2:
            out.int32(0)

        def answer(item: tuple[str, int]) -> None:
            error = (TOPIC_ALREADY_EXISTS if item[0] in self.topics else NONE) if only_check else self.create(*item)
            out.text(item[0]).int16(error)
            if version >= 1:
                out.text(None)

        out.items(wanted, answer)
        return True

    async def delete_topics(self, version: int, ask: Reader, out: Writer) -> bool:
        wanted = ask.items(ask.name)
        if version >= 1:
            out.int32(0)
        out.items(wanted, lambda topic: out.text(topic).int16(self.delete(topic)))
        return True

    async def delete_records(self, version: int, ask: Reader, out: Writer) -> bool:
        wanted = ask.items(lambda: (ask.name(), ask.items(lambda: (ask.int32(), ask.int64()))))
        out.int32(0)

        def answer(topic: str, number: int, before: int) -> None:
            log = self.partition(topic, number)
            if log is None:
                out.int32(number).int64(-1).int16(UNKNOWN_TOPIC_OR_PARTITION)
            elif before > log.end:
                out.int32(number).int64(-1).int16(OFFSET_OUT_OF_RANGE)
            else:
                out.int32(number).int64(log.forget(before)).int16(NONE)

        out.items(wanted, lambda item: out.text(item[0]).items(item[1], lambda part: answer(item[0], *part)))
        return True

    async def init_producer_id(self, version: int, ask: Reader, out: Writer) -> bool:
        transactional = ask.text()
        producer, epoch = self.transactional.get(transactional, (0, -1)) if transactional else (0, -1)
        if epoch < 0:
            self.next_producer += 1
            producer = self.next_producer
        else:
            # A second producer of this name: the first one is fenced off, and what it left open is aborted.
            self._end(producer, epoch, ABORT)
        epoch += 1
        if transactional:
            self.transactional[transactional] = (producer, epoch)
        out.int32(0).int16(NONE).int64(producer).int16(epoch)
        return True

    def _end(self, producer: int, epoch: int, marker: int) -> None:
        for topic, number in sorted(self.in_transaction.pop(producer, set())):
            log = self.partition(topic, number)
            if log is not None:
                log.mark(producer, epoch, marker, int(time.time() * 1000))
        for event in self.waiting:
            event.set()

    def _fenced(self, transactional: str, producer: int, epoch: int) -> int:
        known = self.transactional.get(transactional)
        if known is None or known[0] != producer:
            return INVALID_TXN_STATE
        return NONE if known[1] == epoch else INVALID_PRODUCER_EPOCH

    async def add_partitions_to_txn(self, version: int, ask: Reader, out: Writer) -> bool:
        transactional, producer, epoch = ask.name(), ask.int64(), ask.int16()
        error = self._fenced(transactional, producer, epoch)

        def add(topic: str, number: int) -> int:
            if error == NONE and self.partition(topic, number) is None:
                return UNKNOWN_TOPIC_OR_PARTITION
            if error == NONE:
                self.in_transaction.setdefault(producer, set()).add((topic, number))
            return error

        wanted = ask.items(lambda: (ask.name(), ask.items(ask.int32)))
        out.int32(0)
        out.items(
            wanted,
            lambda item: out.text(item[0]).items(item[1], lambda number: out.int32(number).int16(add(item[0], number))),
        )
        return True

    async def end_txn(self, version: int, ask: Reader, out: Writer) -> bool:
        transactional, producer, epoch, commit = ask.name(), ask.int64(), ask.int16(), ask.int8()
        error = self._fenced(transactional, producer, epoch)
        if error == NONE:
            self._end(producer, epoch, COMMIT if commit else ABORT)
        out.int32(0).int16(error)
        return True

    async def api_versions(self, version: int, ask: Reader, out: Writer) -> bool:
        listed = sorted(SUPPORTED.items())
        if version <= 2:
            out.int16(NONE).items(listed, lambda item: out.int16(item[0]).int16(item[1][0]).int16(item[1][1]))
            if version >= 1:
                out.int32(0)
            return True
        out.int16(NONE).raw(bytes([len(listed) + 1]))
        for key, (lowest, highest) in listed:
            out.int16(key).int16(lowest).int16(highest).raw(b"\0")
        out.int32(0).raw(b"\0")
        return True

    async def answer(self, request: bytes) -> list[bytes] | None:
        """The answer to one request, as parts to send; None when none is wanted."""
        ask, out = Reader(request), Writer()
        key, version, correlation = ask.int16(), ask.int16(), ask.int32()
        ask.text()
        out.int32(correlation)
        lowest, highest = SUPPORTED.get(key, (0, -1))
        if not lowest <= version <= highest:
            if key != API_VERSIONS:
                raise ValueError(f"request {key} version {version} is not supported")
            out.int16(UNSUPPORTED_VERSION)
            out.items(sorted(SUPPORTED.items()), lambda item: out.int16(item[0]).int16(item[1][0]).int16(item[1][1]))
            return out.parts
        ask.compact = out.compact = version >= FLEXIBLE.get(key, version + 1)
        ask.tags()
        out.tags()
        handler = {
            PRODUCE: self.produce,
            FETCH: self.fetch,
            LIST_OFFSETS: self.list_offsets,
            METADATA: self.metadata,
            OFFSET_COMMIT: self.offset_commit,
            OFFSET_FETCH: self.offset_fetch,
            FIND_COORDINATOR: self.find_coordinator,
            API_VERSIONS: self.api_versions,
            CREATE_TOPICS: self.create_topics,
            DELETE_TOPICS: self.delete_topics,
            DELETE_RECORDS: self.delete_records,
            INIT_PRODUCER_ID: self.init_producer_id,
            ADD_PARTITIONS_TO_TXN: self.add_partitions_to_txn,
            END_TXN: self.end_txn,
        }[key]
        return out.parts if await handler(version, ask, out) else None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, in their order."""
        try:
            while True:
                (length,) = struct.unpack(">i", await reader.readexactly(4))
                if not 8 <= length <= MAX_REQUEST_BYTES:
                    raise ValueError(f"request of {length} bytes")
                parts = await self.answer(await reader.readexactly(length))
                if parts is not None:
                    writer.write(struct.pack(">i", sum(map(len, parts))) + b"".join(parts))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            print(f"connection closed: {error}", flush=True)
        finally:
            writer.close()


async def run(directory: Path, host: str, port: int, partitions: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    broker = Broker(directory, host, port, partitions)
    broker.open()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await asyncio.start_server(broker.serve, host, port, limit=1 << 22)
    try:
        await stopped.wait()
    finally:
        server.close()
        broker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Kafka-protocol broker")
    parser.add_argument("--directory", type=Path, required=True, help="where the topics are kept")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--partitions", type=int, default=4, help="partitions of a topic made on first use")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.directory, arguments.host, arguments.port, arguments.partitions))


if __name__ == "__main__":
    main()
