"""The topic of scores, which `monitor` evaluates and through which replicas learn of each other's orders.

A score is an event of type `order_scored`, so the lakehouse ingests it like any other when the topic is among
`kafka.topics`. It names no account or device outside `metadata`: features count an account's events, and must not count scores.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from lakehouse.errors import ShopSphereError
from ml.evaluation.served_scores import ORDER_SCORED
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import open_consumer
from serve.http.metrics import LOST_SCORES
from serve.state.topic_follower import OFFSET_ERRORS

logger = logging.getLogger("shopsphere.serve")

PARTITIONS = 3
GATHER_SECONDS = 0.005
"""How long scores are collected before they are written together."""
DELIVERY_TIMEOUT_MS = 600_000
"""How long a score waits for an unavailable broker."""
BROKER_TIMEOUT_SECONDS = 10
MAX_BATCH = 1_000


@dataclass(frozen=True, kw_only=True)
class Score:
    """A scored order.

    entity      the order in the form of the features (ORDER_COLUMNS)
    features    the model's input; NaN (null in the topic): unknown
    answer      the answer: a struct, or its JSON values when read from the topic
    challenger  the challenger's version, score and decision
    digest      of the request; '' if unknown
    """

    order_id: str
    scored_at: datetime
    entity: Mapping[str, Any]
    features: Mapping[str, Any]
    answer: Any
    challenger: Mapping[str, Any] | None
    digest: str = ""


class _Origin(msgspec.Struct):
    """The writer of a message, decoded without the rest: most messages are the replica's own."""

    replica: str


class _Envelope(msgspec.Struct):
    event_type: str
    metadata: _Origin


ENVELOPE = msgspec.json.Decoder(_Envelope)


class ScoreTopic:
    """Writes scores to the topic, and passes those of other replicas to `on_score`."""

    def __init__(self, kafka: KafkaSettings, topic: str, on_score: Callable[[Score], None]) -> None:
        self.topic = topic if kafka.enabled and kafka.bootstrap_servers else ""
        self.replica = uuid.uuid4().hex
        self.caught_up = threading.Event()
        self._kafka, self._on_score = kafka, on_score
        self._stopping = threading.Event()
        self._reader = threading.Thread(target=self._read, name="scores", daemon=True)
        self._writer = threading.Thread(target=self._write, name="score-writer", daemon=True)
        self._queue: queue.SimpleQueue[Score | threading.Event | None] = queue.SimpleQueue()
        self._producer: Producer | None = None

    def start(self, since: datetime) -> None:
        """Start to write, and to read scores from `since` on."""
        if not self.topic:
            self.caught_up.set()
            return
        self._producer = Producer(
            {
                **self._kafka.properties,
                "bootstrap.servers": self._kafka.bootstrap_servers,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.timeout.ms": DELIVERY_TIMEOUT_MS,
                "compression.type": "zstd",
                "logger": logger,
            }
        )
        self._since = since
        self._reader.start()
        self._writer.start()

    def stop(self) -> None:
        """Write the queued scores and stop."""
        self._stopping.set()
        if self._producer is not None:
            self._reader.join(timeout=10)
            self._queue.put(None)
            self._writer.join(timeout=10)
            if lost := self._producer.flush(10):
                LOST_SCORES.inc(lost)
                logger.error("%d scores could not be written to topic '%s'", lost, self.topic)

    def write(self, score: Score) -> None:
        """Queue a score to be written to the broker."""
        if self._producer is not None:
            self._queue.put(score)

    def flush(self, seconds: float) -> int:
        """Wait until the queued scores are on the broker. Return the number of those that are not."""
        if self._producer is None:
            return 0
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait(seconds)
        return int(self._producer.flush(seconds))

    def _write(self) -> None:
        """Produce queued scores in their own thread, several at once, so that requests do not wait for the broker."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._produce(item)
            except Exception:
                LOST_SCORES.inc()
                logger.exception("A score could not be written to topic '%s'", self.topic)
            if self._queue.empty() and not self._stopping.is_set():
                time.sleep(GATHER_SECONDS)

    def _produce(self, score: Score) -> None:
        assert self._producer is not None
        event = {
            "event_id": f"score:{score.order_id}:{uuid.uuid4().hex[:16]}",
            "event_type": ORDER_SCORED,
            "timestamp": score.scored_at,
            "metadata": {
                "order_ref": score.order_id,
                "replica": self.replica,
                "request_digest": score.digest,
                "order": score.entity,
                "features": score.features,
                "answer": score.answer,
                "challenger": score.challenger,
            },
        }
        try:
            self._producer.produce(
                self.topic, msgspec.json.encode(event), key=score.order_id.encode(), on_delivery=self._on_delivery
            )
        except BufferError:
            LOST_SCORES.inc()
        self._producer.poll(0)

    def _on_delivery(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            LOST_SCORES.inc()
            logger.error("A score could not be written to topic '%s': %s", self.topic, error.str())

    def _read(self) -> None:
        while not self._stopping.is_set():
            try:
                with open_consumer(self._kafka) as consumer:
                    self._consume(consumer)
            except Exception as error:
                logger.error("Topic '%s' cannot be read: %s", self.topic, " ".join(str(error).split()))
            self._stopping.wait(1.0)

    def _consume(self, consumer: Consumer) -> None:
        partitions = self._partitions(consumer)
        started = time.time()
        offsets, ends = self._start_offsets(consumer, partitions)
        consumer.assign([TopicPartition(self.topic, number, offset) for number, offset in offsets.items()])
        while not self._stopping.is_set():
            if not self.caught_up.is_set() and all(offsets[number] >= end for number, end in ends.items()):
                self.caught_up.set()
            if self._producer is not None:
                self._producer.poll(0)
            for message in consumer.consume(MAX_BATCH, timeout=0.05):
                error, number, offset = message.error(), message.partition() or 0, message.offset() or 0
                if error is None:
                    offsets[number] = offset + 1
                    self._receive(message.value())
                elif error.code() == KafkaError._PARTITION_EOF:
                    offsets[number] = max(offsets[number], offset)
                elif error.code() in OFFSET_ERRORS:
                    raise KafkaException(error)
            # where to resume after an interruption: a score that is received twice counts once
            self._since = datetime.fromtimestamp(started, UTC) if self.caught_up.is_set() else self._since

    def _start_offsets(self, consumer: Consumer, partitions: list[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Return by partition the offset of the first message from `_since` on, and the end offset."""
        milliseconds = int(self._since.timestamp() * 1000)
        times = [TopicPartition(self.topic, number, milliseconds) for number in partitions]
        starts = consumer.offsets_for_times(times, timeout=BROKER_TIMEOUT_SECONDS)
        ends = {}
        for number in partitions:
            partition = TopicPartition(self.topic, number)
            ends[number] = consumer.get_watermark_offsets(partition, timeout=BROKER_TIMEOUT_SECONDS)[1]
        return {one.partition: one.offset if one.offset >= 0 else ends[one.partition] for one in starts}, ends

    def _partitions(self, consumer: Consumer) -> list[int]:
        """Return the topic's partitions; create the topic when it does not exist."""
        metadata = consumer.list_topics(timeout=BROKER_TIMEOUT_SECONDS)
        topics = metadata.topics
        if self.topic not in topics:
            self._create_topic(len(metadata.brokers))
            deadline = time.monotonic() + BROKER_TIMEOUT_SECONDS
            while self.topic not in (topics := consumer.list_topics(timeout=BROKER_TIMEOUT_SECONDS).topics):
                if time.monotonic() >= deadline:
                    break
                self._stopping.wait(0.1)
        return sorted(topics[self.topic].partitions)

    def _create_topic(self, brokers: int) -> None:
        admin = AdminClient({**self._kafka.properties, "bootstrap.servers": self._kafka.bootstrap_servers})
        # brokers before 2.4 do not support -1, their default replication factor
        for replication in (-1, min(3, brokers)):
            try:
                admin.create_topics([NewTopic(self.topic, PARTITIONS, replication)])[self.topic].result(BROKER_TIMEOUT_SECONDS)
                return
            except KafkaException as error:
                code = error.args[0].code()
                if code == KafkaError.TOPIC_ALREADY_EXISTS:  # another replica was faster
                    return
                if code != KafkaError._UNSUPPORTED_FEATURE or replication > 0:
                    raise

    def _receive(self, value: bytes | None) -> None:
        try:
            envelope = ENVELOPE.decode(value or b"")
            if envelope.event_type != ORDER_SCORED or envelope.metadata.replica == self.replica:
                return
            event = msgspec.json.decode(value or b"")
            metadata = event["metadata"]
            score = Score(
                order_id=metadata["order_ref"],
                scored_at=datetime.fromisoformat(event["timestamp"]),
                entity=metadata["order"],
                features=metadata["features"],
                answer=metadata["answer"],
                challenger=metadata["challenger"],
                digest=metadata.get("request_digest", ""),
            )
            self._on_score(score)
        except (msgspec.DecodeError, ShopSphereError, KeyError, TypeError, ValueError) as error:
            logger.error("Topic '%s' contains a message that is not a score (%s)", self.topic, type(error).__name__)
