"""The requests about records: Produce, Fetch, ListOffsets, DeleteRecords."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

from app.kafka_broker.partition_log import PartitionLog
from app.kafka_broker.protocol import (
    CORRUPT_MESSAGE,
    NONE,
    OFFSET_OUT_OF_RANGE,
    UNKNOWN_TOPIC_OR_PARTITION,
    RequestReader,
    ResponseWriter,
)
from app.kafka_broker.topics import Topics

LATEST, EARLIEST = -1, -2
"""In place of a timestamp in ListOffsets."""


class NewRecords:
    """Wakes the Fetch requests that wait for records."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()

    def notify(self) -> None:
        for event in self._waiting:
            event.set()

    def subscribe(self) -> asyncio.Event:
        event = asyncio.Event()
        self._waiting.add(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._waiting.discard(event)


@dataclass(frozen=True)
class FetchedPartition:
    """The part of a Fetch response about one partition. log: None for an unknown partition."""

    number: int
    error: int
    log: PartitionLog | None
    records: bytes = b""


FetchedTopics = list[tuple[str, list[FetchedPartition]]]


class RecordRequests:
    """Answers the requests about records."""

    def __init__(self, topics: Topics, new_records: NewRecords) -> None:
        self._topics, self._new_records = topics, new_records

    async def produce(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Append records. Return False when the producer wants no response (acks=0)."""
        request.nullable_text()
        acks = request.int16()
        request.int32()

        def partition(topic: str) -> tuple[int, int, int, int]:
            number, records = request.int32(), request.nullable_bytes()
            log = self._topics.partition(topic, number)
            if log is None:
                return number, UNKNOWN_TOPIC_OR_PARTITION, -1, -1
            error, offset = log.append(records) if records is not None else (CORRUPT_MESSAGE, -1)
            return number, error, offset, log.start

        def topic() -> tuple[str, list[tuple[int, int, int, int]]]:
            name = request.text()
            return name, request.items(lambda: partition(name))

        def write(result: tuple[int, int, int, int]) -> None:
            number, error, offset, start = result
            response.int32(number).int16(error).int64(offset).int64(-1)
            if version >= 5:
                response.int64(start)

        results = request.items(topic)
        response.items(results, lambda item: response.text(item[0]).items(item[1], write))
        response.int32(0)
        self._new_records.notify()
        return acks != 0

    async def fetch(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return records. Waits until there are enough, at most as long as the request allows."""
        request.int32()
        max_wait, min_bytes, max_bytes = request.int32(), request.int32(), request.int32()
        committed = request.int8() == 1
        if version >= 7:
            request.int32()
            request.int32()

        def partition() -> tuple[int, int, int]:
            number = request.int32()
            if version >= 9:
                request.int32()
            offset = request.int64()
            if version >= 5:
                request.int64()
            return number, offset, request.int32()

        requested = request.items(lambda: (request.text(), request.items(partition)))
        found = await self._wait_for_records(requested, max_wait / 1000, max(min_bytes, 1), max_bytes, committed)
        response.int32(0)
        if version >= 7:
            response.int16(NONE).int32(0)

        def write(part: FetchedPartition) -> None:
            log = part.log
            end, stable, start = (log.end, log.stable, log.start) if log else (-1, -1, -1)
            response.int32(part.number).int16(part.error).int64(end).int64(stable)
            if version >= 5:
                response.int64(start)
            if committed and log is not None and part.records:
                aborted = _aborted_transactions(log, part.records)
                response.items(aborted, lambda item: response.int64(item[0]).int64(item[1]))
            else:
                response.int32(-1)
            response.bytes_(part.records)

        response.items(found, lambda item: response.text(item[0]).items(item[1], write))
        return True

    async def _wait_for_records(
        self,
        requested: list[tuple[str, list[tuple[int, int, int]]]],
        max_wait: float,
        min_bytes: int,
        max_bytes: int,
        committed: bool,
    ) -> FetchedTopics:
        """Return as soon as `min_bytes` are there, a partition has an error, or `max_wait` seconds have passed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait
        while True:
            event = self._new_records.subscribe()
            try:
                found = self._read(requested, max_bytes, committed)
                size = sum(len(part.records) for _, parts in found for part in parts)
                failed = any(part.error for _, parts in found for part in parts)
                left = deadline - loop.time()
                if size >= min_bytes or failed or left <= 0 or not requested:
                    return found
                try:
                    await asyncio.wait_for(event.wait(), left)
                except TimeoutError:
                    continue
            finally:
                self._new_records.unsubscribe(event)

    def _read(self, requested: list[tuple[str, list[tuple[int, int, int]]]], max_bytes: int, committed: bool) -> FetchedTopics:
        found: FetchedTopics = []
        left = max_bytes
        for topic, partitions in requested:
            parts: list[FetchedPartition] = []
            for number, offset, limit in partitions:
                log = self._topics.partition(topic, number)
                if log is None:
                    parts.append(FetchedPartition(number, UNKNOWN_TOPIC_OR_PARTITION, None))
                elif not log.start <= offset <= log.end:
                    parts.append(FetchedPartition(number, OFFSET_OUT_OF_RANGE, log))
                else:
                    below = log.stable if committed else log.end
                    records = log.read(offset, min(limit, left), below) if left > 0 else b""
                    left -= len(records)
                    parts.append(FetchedPartition(number, NONE, log, records))
            found.append((topic, parts))
        return found

    async def list_offsets(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return the first offset, the last one, or the one at a timestamp."""
        request.int32()
        committed = False
        if version >= 2:
            committed = request.int8() == 1
            response.int32(0)

        def write(topic: str, number: int, timestamp: int) -> None:
            log = self._topics.partition(topic, number)
            if log is None:
                response.int32(number).int16(UNKNOWN_TOPIC_OR_PARTITION).int64(-1).int64(-1)
                return
            ends = {LATEST: (-1, log.stable if committed else log.end), EARLIEST: (-1, log.start)}
            found = ends.get(timestamp) or log.at_time(timestamp)
            response.int32(number).int16(NONE).int64(found[0]).int64(found[1])

        requested = request.items(lambda: (request.text(), request.items(lambda: (request.int32(), request.int64()))))
        response.items(requested, lambda item: response.text(item[0]).items(item[1], lambda part: write(item[0], *part)))
        return True

    async def delete_records(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Delete the records before an offset."""
        requested = request.items(lambda: (request.text(), request.items(lambda: (request.int32(), request.int64()))))
        response.int32(0)

        def write(topic: str, number: int, before: int) -> None:
            log = self._topics.partition(topic, number)
            if log is None:
                response.int32(number).int64(-1).int16(UNKNOWN_TOPIC_OR_PARTITION)
            elif before > log.end:
                response.int32(number).int64(-1).int16(OFFSET_OUT_OF_RANGE)
            else:
                response.int32(number).int64(log.delete_before(before)).int16(NONE)

        response.items(requested, lambda item: response.text(item[0]).items(item[1], lambda part: write(item[0], *part)))
        return True


def _aborted_transactions(log: PartitionLog, records: bytes) -> list[tuple[int, int]]:
    """Return (producer, first offset) of the aborted transactions that may have records among these."""
    (first,) = struct.unpack_from(">q", records)
    return [(producer, start) for producer, start, marker in log.aborted if marker >= first]
