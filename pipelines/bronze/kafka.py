"""Kafka to bronze: exact offset ranges, decided in the plan, read in parallel.

The position holds, per 'topic:partition', the next offset to read. A plan asks every partition for its low and high
offset, so that a task is a fixed set of ranges and gives the same rows each time. Only committed transactions are
read; where a range ends in transaction markers, aborted messages or compacted gaps, the reader's own position or
the end-of-partition event ends it.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, TopicPartition

from lakehouse.errors import OffsetGone, SourceError
from lakehouse.settings import KafkaSettings
from lakehouse.source import AGAIN, Plan, Position, Reached, Rows
from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import EVENTS, row_schema

SCHEMA = row_schema(EVENTS)
BATCH_MESSAGES = 50_000
BATCH_BYTES = 64 << 20
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a question."""
SILENCE_SECONDS = 30.0
"""How long reading may make no progress."""
UNREACHABLE = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._TIMED_OUT})
PASSING = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
    }
)
"""Errors that the client gets over by itself, or that end as silence."""


@dataclass(frozen=True)
class Range:
    """Offsets of a partition: from `start`, up to and without `end`."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many offsets; messages are as many or fewer."""
        return self.end - self.start


@dataclass
class KafkaSource:
    """The Kafka topics of events as a source of bronze rows."""

    settings: KafkaSettings = field(repr=False)
    name: str = "kafka"
    tables: tuple[str, ...] = (EVENTS.name,)

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        known = positions.get(EVENTS.name)
        position = dict(known) if known and known != AGAIN else {}
        ranges = []
        for topic, partition, low, high in self._offsets(position):
            start = int(position.get(f"{topic}:{partition}", low))
            _check(topic, partition, start, low, high)
            position[f"{topic}:{partition}"] = high
            if high > start:
                ranges.append(Range(topic, partition, start, high))
        if not ranges:
            return Plan()
        groups = _tasks(ranges, self.settings.batch_messages)
        last = len(groups) - 1
        return Plan(
            tasks=tuple(
                RangesTask(self.settings, group, position if number == last else None) for number, group in enumerate(groups)
            ),
            schemas={EVENTS.name: SCHEMA},
            positions={EVENTS.name: position},
            rows=sum(item.count for item in ranges),
        )

    def acknowledge(self, plan: Plan) -> None:
        """Nothing to say: Kafka forgets by age and size alone."""

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Messages between the position and the end of the topics."""
        position = positions.get(EVENTS.name)
        behind = sum(
            high - min(int((position or {}).get(f"{topic}:{partition}", low)), high)
            for topic, partition, low, high in self._offsets(position or {})
        )
        return {EVENTS.name: f"{behind} message{'' if behind == 1 else 's'}"}

    def _offsets(self, position: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
        """(topic, partition, first offset, offset after the last committed message) of every configured partition."""
        with _consumer(self.settings) as consumer:
            existing = consumer.list_topics(timeout=ANSWER_SECONDS).topics
            found = []
            for topic in self.settings.topics:
                if topic not in existing:
                    read_before = any(name.rpartition(":")[0] == topic for name in position)
                    raise (OffsetGone if read_before else SourceError)(
                        f"Kafka topic '{topic}' does not exist{' any more' if read_before else ''}. Create it, or correct "
                        f"kafka.topics (SHOPSPHERE_KAFKA__TOPICS). Topics there are: {_some(existing)}."
                    )
                if (error := existing[topic].error) is not None:
                    raise SourceError(f"Kafka topic '{topic}': {error.str()}. Run again.")
                for partition in sorted(existing[topic].partitions):
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_SECONDS)
                    found.append((topic, partition, low, high))
                gone = {int(name.rpartition(":")[2]) for name in position if name.rpartition(":")[0] == topic} - existing[
                    topic
                ].partitions.keys()
                if gone:
                    raise OffsetGone(
                        f"Kafka topic '{topic}' has lost partition {min(gone)}: it was created anew. "
                        f"Read it from the beginning: python -m app rebuild {EVENTS.name}"
                    )
        return found


@dataclass(frozen=True)
class RangesTask:
    """Some ranges of offsets, read by one consumer.

    reached  the whole plan's position, said by its last task: ranges of nothing but transaction markers give no row,
             and are done all the same
    """

    settings: KafkaSettings = field(repr=False)
    ranges: tuple[Range, ...]
    reached: Position | None = None
    silence_seconds: float = SILENCE_SECONDS

    def read(self) -> Iterator[Rows | Reached]:
        """Give exactly the messages of the ranges. Raises OffsetGone, and SourceError when the broker goes silent."""
        ends = {(item.topic, item.partition): item.end for item in self.ranges}
        with _consumer(self.settings) as consumer:
            consumer.assign([TopicPartition(item.topic, item.partition, item.start) for item in self.ranges])
            waiting: list[Any] = []
            short: dict[tuple[str, int], int] = {}
            size = 0
            progress = time.monotonic()
            while ends:
                messages: list[Any] = consumer.consume(BATCH_MESSAGES // 5, timeout=0.1)
                for message in messages:
                    where = (message.topic(), message.partition())
                    end = ends.get(where)
                    error = message.error()
                    if error is not None:
                        if error.code() != KafkaError._PARTITION_EOF:
                            self._met(error, message)
                        elif end is not None and message.offset() >= end:
                            del ends[where]
                        else:
                            short[where] = message.offset()
                        continue
                    if end is None:
                        continue
                    offset = message.offset()
                    if offset < end:
                        waiting.append(message)
                        size += len(message)
                    if offset >= end - 1:
                        del ends[where]
                        consumer.incremental_unassign([TopicPartition(*where)])
                    progress = time.monotonic()
                if len(waiting) >= BATCH_MESSAGES or size >= BATCH_BYTES:
                    yield Rows(EVENTS.name, _rows(waiting))
                    waiting, size = [], 0
                    progress = time.monotonic()
                if ends and time.monotonic() - progress > self.silence_seconds:
                    raise self._silent(ends, short)
            if waiting:
                yield Rows(EVENTS.name, _rows(waiting))
        if self.reached is not None:
            yield Reached(EVENTS.name, self.reached)

    def _met(self, error: KafkaError, message: Any) -> None:
        """Raise what an error event means for the range it happened in; passing troubles pass."""
        topic, partition = message.topic(), message.partition()
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            lost = next((item for item in self.ranges if (item.topic, item.partition) == (topic, partition)), None)
            raise _gone(topic, partition, *((lost.start, lost.end) if lost else (message.offset(), None)))
        if error.code() not in PASSING:
            raise SourceError(
                f"Kafka topic '{topic}', partition {partition}: {_clean(error.str(), self.settings)}. "
                "Correct the broker or kafka.properties, and run again."
            )

    def _silent(self, ends: Mapping[tuple[str, int], int], short: Mapping[tuple[str, int], int]) -> SourceError:
        (topic, partition), end = next(iter(ends.items()))
        found = short.get((topic, partition))
        but = f"the partition ends at offset {found}" if found is not None else "nothing came"
        return SourceError(
            f"Kafka topic '{topic}', partition {partition}: offsets up to {end} are to be read, but for "
            f"{self.silence_seconds:.0f} s {but} from {self.settings.bootstrap_servers}. See that the brokers run, and run again."
        )


def _check(topic: str, partition: int, start: int, low: int, high: int) -> None:
    """Raises OffsetGone when what comes next is not there any more."""
    if start < low:
        raise _gone(topic, partition, start, low)
    if start > high:
        raise OffsetGone(
            f"Kafka topic '{topic}', partition {partition}: offset {start} comes next, but the topic ends at {high}: it was "
            f"truncated or created anew, offsets {high} to {start - 1} are not what was read. "
            f"Read it from the beginning: python -m app rebuild {EVENTS.name}"
        )


def _gone(topic: str, partition: int, start: int, end: int | None) -> OffsetGone:
    last = f" to {end - 1}" if end is not None else ""
    return OffsetGone(
        f"Kafka topic '{topic}', partition {partition}: offsets {start}{last} were deleted before they were read. "
        f"Read what is left: python -m app rebuild {EVENTS.name}; and keep messages longer (retention.ms) or run more often."
    )


def _tasks(ranges: Sequence[Range], limit: int) -> list[tuple[Range, ...]]:
    """Ranges in groups of at most `limit` offsets; a longer range is cut. A partition is in a group only once."""
    groups: list[tuple[Range, ...]] = []
    group: list[Range] = []
    room = limit
    for item in ranges:
        start = item.start
        while start < item.end:
            end = min(item.end, start + room)
            group.append(Range(item.topic, item.partition, start, end))
            room -= end - start
            start = end
            if room == 0:
                groups.append(tuple(group))
                group, room = [], limit
    if group:
        groups.append(tuple(group))
    return groups


def _rows(messages: Sequence[Any]) -> pa.Table:
    """Messages as bronze rows."""
    count = len(messages)
    stamps = [message.timestamp() for message in messages]
    microseconds = [None if kind == TIMESTAMP_NOT_AVAILABLE else stamp * 1000 for kind, stamp in stamps]
    timestamp = pa.array(microseconds, pa.int64()).cast(TIMESTAMP)
    topics = [message.topic() for message in messages]
    partitions = [message.partition() for message in messages]
    offsets = [message.offset() for message in messages]
    where = zip(topics, partitions, offsets, strict=True)
    positions = [f"{topic}/{partition:05d}/{offset:019d}" for topic, partition, offset in where]
    columns = {
        "topic": pa.array(topics, pa.string()),
        "partition": pa.array(partitions, pa.int32()),
        "offset": pa.array(offsets, pa.int64()),
        "key": pa.array([message.key() for message in messages], pa.binary()),
        "value": pa.array([message.value() for message in messages], pa.binary()),
        "headers": pa.array([_headers(message.headers()) for message in messages], pa.string()),
        "timestamp": timestamp,
        "_op": pa.repeat(pa.scalar("c"), count),
        "_source_position": pa.array(positions, pa.string()),
        "_source_time": timestamp,
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _headers(headers: Any) -> str | None:
    if not headers:
        return None
    return json.dumps([[name, None if value is None else base64.b64encode(value).decode()] for name, value in headers])


# -- the broker ------------------------------------------------------------------------------------------------------


@contextmanager
def _consumer(settings: KafkaSettings) -> Iterator[Consumer]:
    """A consumer outside any group; librdkafka's errors as SourceError: one line, no secret, with a way out."""
    if not settings.bootstrap_servers:
        raise SourceError(
            "Kafka: kafka.bootstrap_servers is not set. Set it (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS), or switch the source off "
            "(SHOPSPHERE_KAFKA__ENABLED=false)."
        )
    troubles: list[KafkaError] = []
    try:
        consumer = Consumer(
            {
                # 760,000 messages a second instead of 150,000
                "fetch.queue.backoff.ms": 0,
                "queued.min.messages": 200_000,
                "queued.max.messages.kbytes": 65_536,
                "check.crcs": False,
                "fetch.wait.max.ms": 50,
                "isolation.level": "read_committed",
                "log_level": 0,
                **settings.properties,
                "bootstrap.servers": settings.bootstrap_servers,
                "group.id": settings.properties.get("group.id", "shopsphere"),
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "error_cb": troubles.append,
                "logger": _quiet(),
            }
        )
    except (KafkaException, ValueError, TypeError) as error:
        raise SourceError(
            f"Kafka: {_clean(_reason(error), settings)}. Correct kafka.properties (SHOPSPHERE_KAFKA__PROPERTIES)."
        ) from None
    try:
        yield consumer
    except KafkaException as error:
        consumer.poll(0)
        first = error.args[0]
        cause = troubles[-1] if troubles and isinstance(first, KafkaError) and first.code() in UNREACHABLE else first
        raise SourceError(
            f"Kafka: {settings.bootstrap_servers} does not answer as it should: {_clean(_reason(cause), settings)}. "
            "See that the brokers run and that kafka.bootstrap_servers (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS) is right."
        ) from None
    finally:
        consumer.close()


def _quiet() -> logging.Logger:
    """What librdkafka logs is told by the errors raised; it would spoil the output."""
    logger = logging.getLogger("shopsphere.kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return logger


def _reason(error: object) -> str:
    if isinstance(error, KafkaException) and error.args:
        error = error.args[0]
    return error.str() if isinstance(error, KafkaError) else str(error)


def _clean(text: str, settings: KafkaSettings) -> str:
    """One line without the values of secret properties."""
    for name, value in settings.properties.items():
        if value and any(word in name for word in ("password", "secret", "key", "token", "jaas", "config", "pem")):
            text = text.replace(value, "***")
    return " ".join(text.split()).rstrip(".")


def _some(names: Mapping[str, Any]) -> str:
    shown = sorted(name for name in names if not name.startswith("__"))
    return (", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "")) or "none"
