"""Follows Kafka topics from the offsets of a lakehouse snapshot. One thread consumes messages; another measures staleness
against the broker's end offsets."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import polars as pl
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from polars.exceptions import PanicException

from lakehouse.errors import OffsetExpired, SourceError
from pipelines.bronze.tables import EVENTS
from pipelines.privacy.anonymise import Anonymiser
from pipelines.settings import BusinessSettings, KafkaSettings
from pipelines.sources.kafka.clients import open_consumer, topic_ids
from pipelines.sources.kafka.errors import TRANSIENT_ERRORS
from pipelines.sources.kafka.positions import check_topic_ids
from pipelines.sources.kafka.records import bronze_rows
from serve.state.lake_snapshot import LakeSnapshot, StateError
from serve.state.stock import Pair, StockState

logger = logging.getLogger("shopsphere.serve")

POLL_SECONDS = 0.02
"""How long messages are collected before they are applied together."""
MAX_BATCH = 10_000
BROKER_TIMEOUT_SECONDS = 2.0
METADATA_SECONDS = 10.0
"""Interval between checks for new partitions and re-created topics."""
OFFSET_ERRORS = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)

OnChange = Callable[["TopicFollower", set[Pair]], None]


@dataclass
class _Poll:
    """The outcome of one poll: valid messages, and the next offset by 'topic:partition'."""

    messages: list[Message] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)


class TopicFollower:
    """The state of one lakehouse snapshot, kept up to date with the topics until `stop`.

    offsets     first offset not yet in `stock`, by 'topic:partition'
    fresh_at    unix time up to which the state is complete
    error       why the follower has stopped
    anonymiser  applied to messages of erased people; None: no one was erased
    on_change   called after messages were applied, with the stores and products whose figures changed
    """

    def __init__(
        self,
        *,
        snapshot: LakeSnapshot,
        kafka: KafkaSettings,
        context: BusinessSettings,
        probe_seconds: float,
        on_change: OnChange,
        anonymiser: Anonymiser | None = None,
    ) -> None:
        self.anonymiser = anonymiser
        self.snapshot, self.stock = snapshot, StockState(snapshot, context)
        self.offsets = {name: offset for name, offset in snapshot.offsets.items() if name.rpartition(":")[0] in kafka.topics}
        self.fresh_at = _unix_time(snapshot.committed_at)
        self.caught_up = threading.Event()
        self.error: StateError | None = None
        self._kafka, self._probe_seconds, self._on_change = kafka, probe_seconds, on_change
        self._stopping = threading.Event()
        self._probe: tuple[float, dict[str, int]] | None = None
        self._new_partitions: tuple[str, ...] = ()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start to follow the topics. Without Kafka, the snapshot is the whole state."""
        if not (self._kafka.enabled and self._kafka.bootstrap_servers):
            self.caught_up.set()
            return
        self._threads = [
            threading.Thread(target=self._consume, name="topics", daemon=True),
            threading.Thread(target=self._probe_ends, name="ends", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop both threads."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def has(self, offsets: Mapping[str, int]) -> bool:
        """Return whether the state contains everything before these offsets."""
        return all(self.offsets.get(name, 0) >= offset for name, offset in offsets.items())

    def _consume(self) -> None:
        try:
            with open_consumer(self._kafka) as consumer:
                consumer.assign([_partition(name, offset) for name, offset in self.offsets.items()])
                while not self._stopping.is_set():
                    self._assign_new_partitions(consumer)
                    self._apply(self._poll(consumer))
        except StateError as error:
            self.error = error
        except (Exception, PanicException) as error:  # a polars panic is not an Exception
            self.error = StateError(f"The topics cannot be followed: {' '.join(str(error).split())}")
            logger.exception("Following the topics failed")
        finally:
            self._stopping.set()

    def _assign_new_partitions(self, consumer: Consumer) -> None:
        """Read partitions that the snapshot does not cover from their beginning."""
        if new := self._new_partitions:
            consumer.incremental_assign([_partition(name, OFFSET_BEGINNING) for name in new])
            self.offsets.update(dict.fromkeys(new, 0))
            self._new_partitions = ()

    def _poll(self, consumer: Consumer) -> _Poll:
        poll = _Poll()
        for message in consumer.consume(MAX_BATCH, timeout=POLL_SECONDS):
            error, name, offset = message.error(), f"{message.topic()}:{message.partition()}", message.offset() or 0
            if error is None:
                poll.messages.append(message)
                poll.offsets[name] = offset + 1
            elif error.code() == KafkaError._PARTITION_EOF:
                # transaction markers may follow the last message
                poll.offsets[name] = max(poll.offsets.get(name, 0), offset)
            elif error.code() in OFFSET_ERRORS:
                raise StateError(
                    f"Kafka topic '{message.topic()}', partition {message.partition()}: the next offset "
                    f"{self.offsets.get(name, 0)} no longer exists. Bring the tables up to date: python -m app run."
                )
            elif error.code() not in TRANSIENT_ERRORS and error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise StateError(f"Kafka topic '{message.topic()}', partition {message.partition()}: {error.str()}")
        return poll

    def _apply(self, poll: _Poll) -> None:
        if not poll.messages:
            self._advance(poll.offsets)
            return
        rows = pl.from_arrow(bronze_rows(poll.messages, self.snapshot.position_prefixes))
        assert isinstance(rows, pl.DataFrame)
        if self.anonymiser is not None:
            rows = self.anonymiser(EVENTS, rows).rows
        pairs = self.stock.apply(rows)
        self._advance(poll.offsets)
        self._on_change(self, pairs)

    def _advance(self, offsets: Mapping[str, int]) -> None:
        """Publish offsets after the state contains the messages before them."""
        for name, offset in offsets.items():
            if offset > self.offsets.get(name, 0):
                self.offsets[name] = offset
        probe = self._probe
        if probe is not None and self.has(probe[1]):
            self.fresh_at = max(self.fresh_at, probe[0])
            self._probe = None
            self.caught_up.set()

    def _probe_ends(self) -> None:
        """Query the end offsets of the topics. Once the consumer reaches them, the state is complete as of the query.

        Uses its own connection: on the consumer's, each response would wait for a fetch to end.
        """
        with open_consumer(self._kafka) as consumer:
            checked = -METADATA_SECONDS
            while not self._stopping.wait(self._probe_seconds):
                if self._probe is not None or self._new_partitions:
                    continue
                with contextlib.suppress(KafkaException, SourceError):
                    started = time.time()
                    if time.monotonic() - checked > METADATA_SECONDS:
                        if not self._check_topics(consumer):
                            return
                        checked = time.monotonic()
                        if self._new_partitions:
                            continue
                    ends = {
                        name: consumer.get_watermark_offsets(_partition(name, 0), timeout=BROKER_TIMEOUT_SECONDS)[1]
                        for name in list(self.offsets)
                    }
                    self._probe = (started, ends)

    def _check_topics(self, consumer: Consumer) -> bool:
        """Find new partitions; return False when a topic was re-created. Raises KafkaException, SourceError."""
        existing = consumer.list_topics(timeout=BROKER_TIMEOUT_SECONDS).topics
        topics = [topic for topic in self._kafka.topics if topic in existing]
        partitions = [f"{topic}:{number}" for topic in topics for number in existing[topic].partitions]
        if not self._has_same_topics(topics):
            return False
        self._new_partitions = tuple(name for name in partitions if name not in self.offsets)
        return True

    def _has_same_topics(self, topics: Sequence[str]) -> bool:
        """Return whether the topics are those of the snapshot; a re-created topic's messages must not be read from the old
        offsets. Raises SourceError when the broker does not answer."""
        ids = {topic: topic_id for topic, topic_id in self.snapshot.topic_ids.items() if topic in topics}
        if not ids:
            return True
        try:
            check_topic_ids(ids, topic_ids(self._kafka))
        except OffsetExpired as error:
            self.error = StateError(str(error))
            self._stopping.set()
            return False
        return True


def _partition(name: str, offset: int) -> TopicPartition:
    topic, _, number = name.rpartition(":")
    return TopicPartition(topic, int(number), offset)


def _unix_time(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0
