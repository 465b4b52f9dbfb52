"""The topic of scores: kept for `monitor`, and how replicas know of each other's orders.

A score is an event of type `order_scored`, so the lakehouse takes it in like any other when the topic is among
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
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from lakehouse.errors import ShopSphereError
from ml.evaluation.served_scores import ORDER_SCORED
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import open_consumer
from serve.http.edges import UNKEPT

logger = logging.getLogger("shopsphere.serve")

PARTITIONS = 3
GATHER_SECONDS = 0.005
"""How long scores are gathered before they are written together."""
KEPT_MS = 600_000
"""How long a score waits for a broker that is away."""


@dataclass(frozen=True)
class Score:
    """A scored order.

    entity    the order as features take it
    features  what the model saw; NaN (null in the topic): unknown
    answer    what was answered, a struct; of a score that was heard of what JSON makes of it
    shadow    the challenger's version and score
    """

    order_id: str
    scored_at: datetime
    entity: Mapping[str, Any]
    features: Mapping[str, Any]
    answer: Any
    shadow: Mapping[str, Any] | None


class _From(msgspec.Struct):
    """Who wrote a message, read without the rest of it: most are one's own."""

    replica: str


class _Sent(msgspec.Struct):
    event_type: str
    metadata: _From


SENT = msgspec.json.Decoder(_Sent)


class ScoreLog:
    """Writes scores, and hears of those that others wrote."""

    def __init__(self, kafka: KafkaSettings, topic: str, heard: Callable[[Score], None]) -> None:
        self.topic = topic if kafka.enabled and kafka.bootstrap_servers else ""
        self.replica = uuid.uuid4().hex
        self.caught_up = threading.Event()
        self._kafka, self._heard = kafka, heard
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self._writer = threading.Thread(target=self._write, name="score-writer", daemon=True)
        self._waiting: queue.SimpleQueue[Score | threading.Event | None] = queue.SimpleQueue()
        self._producer: Producer | None = None

    def start(self, since: datetime) -> None:
        """Begin to hear, of scores from `since` on too."""
        if not self.topic:
            self.caught_up.set()
            return
        self._producer = Producer(
            {
                **self._kafka.properties,
                "bootstrap.servers": self._kafka.bootstrap_servers,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.timeout.ms": KEPT_MS,
                "compression.type": "zstd",
                "logger": logger,
            }
        )
        self._since = since
        self._thread.start()
        self._writer.start()

    def stop(self) -> None:
        """Write what waits, and end."""
        self._stopping.set()
        if self._producer is not None:
            self._thread.join(timeout=10)
            self._waiting.put(None)
            self._writer.join(timeout=10)
            if left := self._producer.flush(10):
                UNKEPT.inc(left)
                logger.error("%d scores could not be written to topic '%s'", left, self.topic)

    def write(self, score: Score) -> None:
        """Keep a score: at once in memory, on the broker when it answers."""
        if self._producer is not None:
            self._waiting.put(score)

    def flush(self, seconds: float) -> int:
        """Wait until what was written so far is on the broker. Gives how many scores are not."""
        if self._producer is None:
            return 0
        reached = threading.Event()
        self._waiting.put(reached)
        reached.wait(seconds)
        return int(self._producer.flush(seconds))

    def _write(self) -> None:
        """A thread of its own, which takes several at once: a request does not wait for the broker's threads."""
        while (one := self._waiting.get()) is not None:
            if isinstance(one, threading.Event):
                one.set()
                continue
            try:
                self._produce(one)
            except Exception:
                UNKEPT.inc()
                logger.exception("a score could not be written to topic '%s'", self.topic)
            if self._waiting.empty() and not self._stopping.is_set():
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
                "order": score.entity,
                "features": score.features,
                "answer": score.answer,
                "challenger": score.shadow,
            },
        }
        try:
            self._producer.produce(
                self.topic, msgspec.json.encode(event), key=score.order_id.encode(), on_delivery=self._delivered
            )
        except BufferError:
            UNKEPT.inc()
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            UNKEPT.inc()
            logger.error("a score could not be written to topic '%s': %s", self.topic, error.str())

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with open_consumer(self._kafka) as consumer:
                    self._listen(consumer)
            except Exception as error:
                logger.error("topic '%s' cannot be read: %s", self.topic, " ".join(str(error).split()))
            self._stopping.wait(1.0)

    def _listen(self, consumer: Any) -> None:
        partitions = self._partitions(consumer)
        milliseconds = int(self._since.timestamp() * 1000)
        asked = [TopicPartition(self.topic, number, milliseconds) for number in partitions]
        begun = time.time()
        starts = consumer.offsets_for_times(asked, timeout=10)
        ends = {}
        for number in partitions:
            ends[number] = consumer.get_watermark_offsets(TopicPartition(self.topic, number), timeout=10)[1]
        places = {one.partition: one.offset if one.offset >= 0 else ends[one.partition] for one in starts}
        consumer.assign([TopicPartition(self.topic, number, offset) for number, offset in places.items()])
        while not self._stopping.is_set():
            if not self.caught_up.is_set() and all(places[number] >= end for number, end in ends.items()):
                self.caught_up.set()
            if self._producer is not None:
                self._producer.poll(0)
            for message in consumer.consume(1_000, timeout=0.05):
                error = message.error()
                if error is None:
                    places[message.partition()] = message.offset() + 1
                    self._take(message.value())
                elif error.code() == KafkaError._PARTITION_EOF:
                    places[message.partition()] = max(places[message.partition()], message.offset())
                elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                    raise KafkaException(error)
            # where to go on after an interruption: a score that is heard of twice counts once
            self._since = datetime.fromtimestamp(begun, UTC) if self.caught_up.is_set() else self._since

    def _partitions(self, consumer: Any) -> list[int]:
        """The topic's partitions; it is made when it is not there."""
        found = consumer.list_topics(timeout=10)
        topics = found.topics
        if self.topic not in topics:
            admin = AdminClient({**self._kafka.properties, "bootstrap.servers": self._kafka.bootstrap_servers})
            # brokers before 2.4 have no replication of their own choice
            for copies in (-1, min(3, len(found.brokers))):
                try:
                    admin.create_topics([NewTopic(self.topic, PARTITIONS, copies)])[self.topic].result(10)
                    break
                except KafkaException as error:
                    code = error.args[0].code()
                    if code == KafkaError.TOPIC_ALREADY_EXISTS:  # another replica was first
                        break
                    if code != KafkaError._UNSUPPORTED_FEATURE or copies > 0:
                        raise
            until = time.monotonic() + 10
            while self.topic not in (topics := consumer.list_topics(timeout=10).topics) and time.monotonic() < until:
                self._stopping.wait(0.1)
        return sorted(topics[self.topic].partitions)

    def _take(self, value: bytes | None) -> None:
        try:
            sent = SENT.decode(value or b"")
            if sent.event_type != ORDER_SCORED or sent.metadata.replica == self.replica:
                return
            event = msgspec.json.decode(value or b"")
            told = event["metadata"]
            score = Score(
                told["order_ref"],
                datetime.fromisoformat(event["timestamp"]),
                told["order"],
                told["features"],
                told["answer"],
                told["challenger"],
            )
            self._heard(score)
        except (msgspec.DecodeError, ShopSphereError, KeyError, TypeError, ValueError) as error:
            logger.error("topic '%s' holds a message that is no score (%s)", self.topic, type(error).__name__)
