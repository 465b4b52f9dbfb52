"""Ranges of offsets: how a plan is split into tasks, and the task that reads them.

A range is fixed when it is planned, so a task gives the same rows each time. Only committed transactions are read. The last
offsets of a range may be transaction markers, aborted messages or gaps left by compaction: a message past the end of the
range, or the end-of-partition event, then ends it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, TopicPartition

from lakehouse.errors import SourceError
from lakehouse.source import Position, Reached, Rows
from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import open_consumer
from pipelines.sources.kafka.errors import OFFSET_ERRORS, TRANSIENT_ERRORS, offsets_deleted, redact
from pipelines.sources.kafka.records import bronze_rows

BATCH_MESSAGES = 50_000
BATCH_BYTES = 64 << 20
NO_PROGRESS_SECONDS = 30.0
"""How long a read may make no progress before it fails."""


@dataclass(frozen=True)
class OffsetRange:
    """Offsets of a partition from `start` up to, not including, `end`."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of offsets. There are at most as many messages."""
        return self.end - self.start


def split_ranges(ranges: Sequence[OffsetRange], limit: int) -> list[tuple[OffsetRange, ...]]:
    """Group ranges so that each group has at most `limit` offsets. Longer ranges are cut; no group has a partition twice."""
    groups: list[tuple[OffsetRange, ...]] = []
    group: list[OffsetRange] = []
    room = limit
    for item in ranges:
        start = item.start
        while start < item.end:
            end = min(item.end, start + room)
            group.append(OffsetRange(item.topic, item.partition, start, end))
            room -= end - start
            start = end
            if room == 0:
                groups.append(tuple(group))
                group, room = [], limit
    if group:
        groups.append(tuple(group))
    return groups


@dataclass(frozen=True)
class OffsetRangesTask:
    """Reads ranges of offsets with one consumer.

    reached   the position of the whole plan, given by its last task: ranges that hold only transaction markers have no rows,
              but are read all the same
    prefixes  see `topic_prefixes`
    """

    settings: KafkaSettings = field(repr=False)
    ranges: tuple[OffsetRange, ...]
    reached: Position | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    no_progress_seconds: float = NO_PROGRESS_SECONDS

    def read(self) -> Iterator[Rows | Reached]:
        """Give exactly the messages of the ranges.

        Raises OffsetExpired when they were deleted, and SourceError when the brokers send nothing for too long.
        """
        if self.ranges:
            yield from self._messages()
        if self.reached is not None:
            yield Reached(EVENTS.name, self.reached)

    def _messages(self) -> Iterator[Rows]:
        unfinished = {(item.topic, item.partition): item.end for item in self.ranges}
        ended_early: dict[tuple[str, int], int] = {}
        with open_consumer(self.settings) as consumer:
            consumer.assign([TopicPartition(item.topic, item.partition, item.start) for item in self.ranges])
            batch: list[Any] = []
            size = 0
            last_progress = time.monotonic()
            while unfinished:
                messages: list[Any] = consumer.consume(BATCH_MESSAGES // 5, timeout=0.1)
                for message in messages:
                    if message.error() is not None:
                        self._handle_event(message, unfinished, ended_early)
                        continue
                    partition = (message.topic(), message.partition())
                    end = unfinished.get(partition)
                    if end is None:
                        continue
                    if message.offset() < end:
                        batch.append(message)
                        size += len(message)
                    if message.offset() >= end - 1:
                        del unfinished[partition]
                        consumer.incremental_unassign([TopicPartition(*partition)])
                    last_progress = time.monotonic()
                if len(batch) >= BATCH_MESSAGES or size >= BATCH_BYTES:
                    yield Rows(EVENTS.name, bronze_rows(batch, self.prefixes))
                    batch, size = [], 0
                    last_progress = time.monotonic()
                if unfinished and time.monotonic() - last_progress > self.no_progress_seconds:
                    raise self._no_progress(unfinished, ended_early)
            if batch:
                yield Rows(EVENTS.name, bronze_rows(batch, self.prefixes))

    def _handle_event(self, event: Any, unfinished: dict[tuple[str, int], int], ended_early: dict[tuple[str, int], int]) -> None:
        """Finish a range at the end of its partition, ignore transient errors, and raise all others."""
        error, topic, partition = event.error(), event.topic(), event.partition()
        if error.code() == KafkaError._PARTITION_EOF:
            end = unfinished.get((topic, partition))
            if end is not None and event.offset() >= end:
                del unfinished[(topic, partition)]
            else:
                ended_early[(topic, partition)] = event.offset()
        elif error.code() in OFFSET_ERRORS:
            lost = next((item for item in self.ranges if (item.topic, item.partition) == (topic, partition)), None)
            raise offsets_deleted(topic, partition, *((lost.start, lost.end) if lost else (event.offset(), None)))
        elif error.code() not in TRANSIENT_ERRORS:
            raise SourceError(
                f"Kafka topic '{topic}', partition {partition}: {redact(error.str(), self.settings)}. "
                "Correct the broker or kafka.properties, then run again."
            )

    def _no_progress(self, unfinished: Mapping[tuple[str, int], int], ended_early: Mapping[tuple[str, int], int]) -> SourceError:
        (topic, partition), end = next(iter(unfinished.items()))
        found = ended_early.get((topic, partition))
        seconds = f"{self.no_progress_seconds:.0f} s"
        reason = f"no message arrived within {seconds}" if found is None else f"it still ends at offset {found} after {seconds}"
        return SourceError(
            f"Kafka topic '{topic}', partition {partition}: expected offsets up to {end}, but {reason} "
            f"(brokers: {self.settings.bootstrap_servers}). Check that the brokers are running, then run again."
        )
