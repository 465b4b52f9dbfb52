"""Kafka to bronze: exact offset ranges, decided in the plan, read in parallel.

The position holds, per 'topic:partition', the next offset to read. A plan asks every partition for its low and high
offset, so that a task is a fixed set of ranges and gives the same rows each time. Only committed transactions are
read; where a range ends in transaction markers, aborted messages or compacted gaps, the reader's own position or
the end-of-partition event ends it.

The position also holds each topic's id, if the broker gives one (since Kafka 2.8): a topic that was deleted and created
anew has another, even where its offsets go on past ours. Generations (see `generations`) are counted by topic. Read
again, a topic with the id that it had gives the same rows at the same positions; any other begins the next generation,
because its offsets may be those of other messages. What Kafka forgot by age stays: there is no marker.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import pyarrow as pa
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Plan, Position, Reached, Rows, is_resnapshot
from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import EVENTS, MILLISECONDS, row_schema
from pipelines.settings import KafkaSettings
from pipelines.sources.epochs import prefix

SCHEMA = row_schema(EVENTS)
BATCH_MESSAGES = 50_000
BATCH_BYTES = 64 << 20
IDS, GENERATIONS = "ids", "generations"
"""Of a position: by topic its id, and its generation where that is not the first. No 'topic:partition' is so named."""
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a question."""
SILENCE_SECONDS = 30.0
"""How long reading may make no progress."""
NO_IDS = frozenset({KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION, KafkaError.TOPIC_AUTHORIZATION_FAILED})
"""Errors of a broker that may be read, but does not tell a topic's id."""
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

Client = TypeVar("Client")


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
        known = positions.get(EVENTS.name) or {}
        offsets, ids = self._offsets({} if is_resnapshot(known) else known)
        position = _anew(known, ids) if is_resnapshot(known) else _with_ids(known, ids)
        # of a topic that was read before, a partition that is not known was added since, and begins at 0
        read = {name.rpartition(":")[0] for name in position if ":" in name}
        ranges = []
        for topic, partition, low, high in offsets:
            start = int(position.get(f"{topic}:{partition}", 0 if topic in read else low))
            _check(topic, partition, start, low, high)
            position[f"{topic}:{partition}"] = high
            if high > start:
                ranges.append(Range(topic, partition, start, high))
        # a partition seen empty is remembered, so that messages that come and go unread are missed
        if not ranges and not is_resnapshot(known) and (not known or position == known):
            return Plan()
        # of a topic that is empty by now, what is to be remembered is that it was read
        groups = _tasks(ranges, self.settings.batch_messages) or [()]
        last = len(groups) - 1
        prefixes = {topic: prefix(number) for topic, number in position.get(GENERATIONS, {}).items()}
        return Plan(
            tasks=tuple(
                RangesTask(self.settings, group, position if number == last else None, prefixes)
                for number, group in enumerate(groups)
            ),
            schemas={EVENTS.name: SCHEMA},
            positions={EVENTS.name: position},
            rows=sum(item.count for item in ranges),
        )

    def acknowledge(self, plan: Plan) -> None:
        """Nothing to say: Kafka forgets by age and size alone."""

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Messages between the position and the end of the topics; apart from them those that no reader may see yet."""
        position = positions.get(EVENTS.name)
        written = self._written()
        offsets, _ = self._offsets(position or {})
        behind = sum(
            high - min(int((position or {}).get(f"{topic}:{partition}", low)), high) for topic, partition, low, high in offsets
        )
        # asked for before the others, so that what was sent meanwhile does not look held back
        held = sum(max(0, written.get((topic, partition), high) - high) for topic, partition, _, high in offsets)
        text = f"{behind} message{'' if behind == 1 else 's'}"
        return {EVENTS.name: text + (f", {held} held back by an open transaction" if held else "")}

    def _written(self) -> dict[tuple[str, int], int]:
        """By topic and partition the offset after the last message, committed or not."""
        properties = {**self.settings.properties, "isolation.level": "read_uncommitted"}
        with open_consumer(self.settings.model_copy(update={"properties": properties})) as consumer:
            topics = consumer.list_topics(timeout=ANSWER_SECONDS).topics
            return {
                (topic, partition): consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_SECONDS)[1]
                for topic in self.settings.topics
                if topic in topics
                for partition in topics[topic].partitions
            }

    def _offsets(self, position: Mapping[str, Any]) -> tuple[list[tuple[str, int, int, int]], dict[str, str]]:
        """(topic, partition, first offset, offset after the last committed message) of every configured partition; and
        the topics' ids, asked first, so that a topic created anew meanwhile is noticed by the next plan."""
        with open_consumer(self.settings) as consumer:
            existing = consumer.list_topics(timeout=ANSWER_SECONDS).topics
            for topic in self.settings.topics:
                if topic not in existing:
                    read_before = any(name.rpartition(":")[0] == topic for name in position)
                    raise (OffsetExpired if read_before else SourceError)(
                        f"Kafka topic '{topic}' does not exist{' any more' if read_before else ''}. Create it, or correct "
                        f"kafka.topics (SHOPSPHERE_KAFKA__TOPICS). Topics there are: {_some(existing)}."
                    )
                if (error := existing[topic].error) is not None:
                    raise SourceError(f"Kafka topic '{topic}': {error.str()}. Run again.")
            ids = topic_ids(self.settings)
            check_ids(position.get(IDS, {}), ids)
            found = []
            for topic in self.settings.topics:
                for partition in sorted(existing[topic].partitions):
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_SECONDS)
                    found.append((topic, partition, low, high))
                gone = {int(name.rpartition(":")[2]) for name in position if name.rpartition(":")[0] == topic} - existing[
                    topic
                ].partitions.keys()
                if gone:
                    raise OffsetExpired(
                        f"Kafka topic '{topic}' has lost partition {min(gone)}: it was created anew. "
                        f"Read it from the beginning: python -m app rebuild {EVENTS.name}"
                    )
        return found, ids


@dataclass(frozen=True)
class RangesTask:
    """Some ranges of offsets, read by one consumer.

    reached  the whole plan's position, said by its last task: ranges of nothing but transaction markers give no row,
             and are done all the same
    prefixes the prefix of the generation, of topics that are not in their first
    """

    settings: KafkaSettings = field(repr=False)
    ranges: tuple[Range, ...]
    reached: Position | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    silence_seconds: float = SILENCE_SECONDS

    def read(self) -> Iterator[Rows | Reached]:
        """Give exactly the messages of the ranges. Raises OffsetExpired, and SourceError when the broker goes silent."""
        if self.ranges:
            yield from self._messages()
        if self.reached is not None:
            yield Reached(EVENTS.name, self.reached)

    def _messages(self) -> Iterator[Rows]:
        ends = {(item.topic, item.partition): item.end for item in self.ranges}
        with open_consumer(self.settings) as consumer:
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
                    yield Rows(EVENTS.name, bronze_rows(waiting, self.prefixes))
                    waiting, size = [], 0
                    progress = time.monotonic()
                if ends and time.monotonic() - progress > self.silence_seconds:
                    raise self._silent(ends, short)
            if waiting:
                yield Rows(EVENTS.name, bronze_rows(waiting, self.prefixes))

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


def delete_sent(settings: KafkaSettings, topic: str, before: datetime, position: Position) -> int:
    """Have the broker delete the messages of a topic that were sent before a moment. Raises SourceError.

    Of a topic that is read into bronze only what the position is past: gives how many are left, since they were not read yet.
    A topic that is not there has none."""
    with open_consumer(settings) as consumer:
        found = consumer.list_topics(timeout=ANSWER_SECONDS).topics
        if topic not in found:
            return 0
        moment = int(before.timestamp() * 1000)
        asked = [TopicPartition(topic, partition, moment) for partition in sorted(found[topic].partitions)]
        firsts = consumer.offsets_for_times(asked, timeout=ANSWER_SECONDS)
        ends = [consumer.get_watermark_offsets(one, timeout=ANSWER_SECONDS) for one in asked]
    left, done = 0, []
    for first, (low, high) in zip(firsts, ends, strict=True):
        sent = first.offset if first.offset >= 0 else high
        read = min(int(position.get(f"{topic}:{first.partition}", 0)), sent) if topic in settings.topics else sent
        left += max(0, sent - max(read, low))
        if read > low:
            done.append(TopicPartition(topic, first.partition, read))
    with _errors(settings) as troubles:
        client = _made(AdminClient, _properties(settings, troubles), settings)
        for answer in client.delete_records(done, request_timeout=ANSWER_SECONDS).values() if done else ():
            answer.result(2 * ANSWER_SECONDS)
    return left


def check_ids(known: Mapping[str, str], ids: Mapping[str, str]) -> None:
    """Raises OffsetExpired when a topic is not the one that was read."""
    for topic, identity in ids.items():
        if known.get(topic, identity) != identity:
            raise OffsetExpired(
                f"Kafka topic '{topic}' was deleted and created anew: its id was {known[topic]} and is {identity}. "
                f"Read it from the beginning: python -m app rebuild {EVENTS.name}"
            )


def _anew(known: Position, ids: Mapping[str, str]) -> dict[str, Any]:
    """The position before all offsets, when the topics that `known` speaks of are read again."""
    before, numbers = known.get(IDS, {}), dict(known.get(GENERATIONS, {}))
    read = {name.rpartition(":")[0] for name in known if ":" in name}
    for topic in read:
        if topic not in ids or before.get(topic) != ids[topic]:
            numbers[topic] = numbers.get(topic, 0) + 1
    return _with_ids({IDS: before} | ({GENERATIONS: numbers} if numbers else {}), ids)


def _with_ids(position: Position, ids: Mapping[str, str]) -> dict[str, Any]:
    """A position with the ids that the broker tells; those that it does not tell stay as they were."""
    kept = {**position.get(IDS, {}), **ids}
    return {**position, IDS: kept} if kept else {name: value for name, value in position.items() if name != IDS}


def _check(topic: str, partition: int, start: int, low: int, high: int) -> None:
    """Raises OffsetExpired when what comes next is not there any more."""
    if start < low:
        raise _gone(topic, partition, start, low)
    if start > high:
        raise OffsetExpired(
            f"Kafka topic '{topic}', partition {partition}: offset {start} comes next, but the topic ends at {high}: it was "
            f"truncated or created anew, offsets {high} to {start - 1} are not what was read. "
            f"Read it from the beginning: python -m app rebuild {EVENTS.name}"
        )


def _gone(topic: str, partition: int, start: int, end: int | None) -> OffsetExpired:
    last = f" to {end - 1}" if end is not None else ""
    return OffsetExpired(
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


def bronze_rows(messages: Sequence[Any], prefixes: Mapping[str, str]) -> pa.Table:
    """Messages as bronze rows."""
    count = len(messages)
    stamps = [message.timestamp() for message in messages]
    # producers may send anything, microseconds for milliseconds too
    first, last = MILLISECONDS
    microseconds = [
        stamp * 1000 if kind != TIMESTAMP_NOT_AVAILABLE and first <= stamp <= last else None for kind, stamp in stamps
    ]
    timestamp = pa.array(microseconds, pa.int64()).cast(TIMESTAMP)
    topics = [message.topic() for message in messages]
    partitions = [message.partition() for message in messages]
    offsets = [message.offset() for message in messages]
    where = zip(topics, partitions, offsets, strict=True)
    positions = [f"{prefixes.get(topic, '')}{topic}/{partition:05d}/{offset:019d}" for topic, partition, offset in where]
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


def _properties(settings: KafkaSettings, troubles: list[KafkaError]) -> dict[str, Any]:
    """What every client is made with. troubles: takes the errors that librdkafka tells of by the way."""
    return {
        "log_level": 0,
        **settings.properties,
        "bootstrap.servers": settings.bootstrap_servers,
        "error_cb": troubles.append,
        "logger": _quiet(),
    }


def topic_ids(settings: KafkaSettings) -> dict[str, str]:
    """The id of every configured topic, as far as the broker tells."""
    found = {}
    with _errors(settings) as troubles:
        client = _made(AdminClient, _properties(settings, troubles), settings)
        described = client.describe_topics(TopicCollection(list(settings.topics)), request_timeout=ANSWER_SECONDS)
        for topic, answer in described.items():
            try:
                identity = answer.result(2 * ANSWER_SECONDS).topic_id
            except KafkaException as error:
                if error.args[0].code() not in NO_IDS:
                    raise
                continue
            if identity.get_most_significant_bits() or identity.get_least_significant_bits():
                found[topic] = str(identity)
    return found


@contextmanager
def open_consumer(settings: KafkaSettings) -> Iterator[Consumer]:
    """A consumer outside any group, with errors as in `_errors`."""
    with _errors(settings) as troubles:
        consumer = _made(
            Consumer,
            {
                # 760,000 messages a second instead of 150,000
                "fetch.queue.backoff.ms": 0,
                "queued.min.messages": 200_000,
                "queued.max.messages.kbytes": 65_536,
                "check.crcs": False,
                "fetch.wait.max.ms": 50,
                "isolation.level": "read_committed",
                **_properties(settings, troubles),
                "group.id": settings.properties.get("group.id", "shopsphere"),
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
            },
            settings,
        )
        try:
            yield consumer
        except KafkaException:
            consumer.poll(0)
            raise
        finally:
            consumer.close()


@contextmanager
def _errors(settings: KafkaSettings) -> Iterator[list[KafkaError]]:
    """librdkafka's errors as SourceError: one line, no secret, with a way out. Gives the list that `_properties` takes."""
    if not settings.bootstrap_servers:
        raise SourceError(
            "Kafka: kafka.bootstrap_servers is not set. Set it (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS), or switch the source off "
            "(SHOPSPHERE_KAFKA__ENABLED=false)."
        )
    troubles: list[KafkaError] = []
    try:
        yield troubles
    except KafkaException as error:
        first = error.args[0]
        cause = troubles[-1] if troubles and isinstance(first, KafkaError) and first.code() in UNREACHABLE else first
        raise SourceError(
            f"Kafka: {settings.bootstrap_servers} does not answer as it should: {_clean(_reason(cause), settings)}. "
            "See that the brokers run and that kafka.bootstrap_servers (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS) is right."
        ) from None


def _made(kind: Callable[[dict[str, Any]], Client], options: dict[str, Any], settings: KafkaSettings) -> Client:
    """A client. Raises SourceError when its options are wrong."""
    try:
        return kind(options)
    except (KafkaException, ValueError, TypeError) as error:
        raise SourceError(
            f"Kafka: {_clean(_reason(error), settings)}. Correct kafka.properties (SHOPSPHERE_KAFKA__PROPERTIES)."
        ) from None


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
