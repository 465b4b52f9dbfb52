"""A snapshot of the lakehouse followed by its topics: one thread reads them, one asks how fresh that is."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import polars as pl
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition
from polars.exceptions import PanicException

from lakehouse.errors import OffsetExpired, SourceError
from pipelines.bronze.tables import EVENTS
from pipelines.privacy.anonymise import Anonymiser
from pipelines.settings import BusinessSettings, KafkaSettings
from pipelines.sources.kafka.clients import open_consumer, topic_ids
from pipelines.sources.kafka.errors import TRANSIENT_ERRORS
from pipelines.sources.kafka.positions import check_topic_ids
from pipelines.sources.kafka.records import bronze_rows
from serve.state.lake_snapshot import Base, StateError
from serve.state.stock import Pair, StockState

logger = logging.getLogger("shopsphere.serve")

POLL_SECONDS = 0.02
"""How long messages are gathered before they are applied together."""
BATCH = 10_000
ANSWER_SECONDS = 2.0
LOOK_SECONDS = 10.0
"""Pause between two looks for new partitions, and for topics that were created anew."""
GONE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)

Changed = Callable[["TopicFollower", set[Pair]], None]


class TopicFollower:
    """The state that follows from one snapshot, kept up to date until `stop`.

    offsets    by 'topic:partition' the first offset that `stock` does not contain yet
    fresh_at   unix time until which nothing is missing
    error      why it cannot go on
    anonymiser what is done with messages of people who were erased; None: nobody was
    """

    def __init__(
        self,
        base: Base,
        kafka: KafkaSettings,
        context: BusinessSettings,
        probe_seconds: float,
        changed: Changed,
        anonymiser: Anonymiser | None = None,
    ) -> None:
        self.anonymiser = anonymiser
        self.base, self.stock = base, StockState(base, context)
        self.offsets = {name: at for name, at in base.offsets.items() if name.rpartition(":")[0] in kafka.topics}
        self.fresh_at = _unix(base.at)
        self.caught_up = threading.Event()
        self.error: StateError | None = None
        self._kafka, self._probe_seconds, self._changed = kafka, probe_seconds, changed
        self._stopping = threading.Event()
        self._asked: tuple[float, dict[str, int]] | None = None
        self._new: tuple[str, ...] = ()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to follow the topics; without Kafka the snapshot is all there is."""
        if not (self._kafka.enabled and self._kafka.bootstrap_servers):
            self.caught_up.set()
            return
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True) for run, name in ((self._follow, "topics"), (self._ask, "ends"))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def has(self, offsets: Mapping[str, int]) -> bool:
        """Whether everything before these offsets is in the state."""
        return all(self.offsets.get(name, 0) >= offset for name, offset in offsets.items())

    def _follow(self) -> None:
        try:
            with open_consumer(self._kafka) as consumer:
                self._read(consumer)
        except StateError as error:
            self.error = error
        except (Exception, PanicException) as error:  # a panic of polars is no Exception
            self.error = StateError(f"The topics cannot be followed: {' '.join(str(error).split())}")
            logger.exception("following the topics ended")
        finally:
            self._stopping.set()

    def _read(self, consumer: Consumer) -> None:
        consumer.assign([_at(name, offset) for name, offset in self.offsets.items()])
        while not self._stopping.is_set():
            if new := self._new:
                # partitions that the snapshot does not know are read from their beginning
                consumer.incremental_assign([_at(name, OFFSET_BEGINNING) for name in new])
                self.offsets.update(dict.fromkeys(new, 0))
                self._new = ()
            messages = consumer.consume(BATCH, timeout=POLL_SECONDS)
            reached: dict[str, int] = {}
            good = []
            for message in messages:
                error, name, offset = message.error(), f"{message.topic()}:{message.partition()}", message.offset() or 0
                if error is None:
                    good.append(message)
                    reached[name] = offset + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    # beyond the last message there may be transaction markers
                    reached[name] = max(reached.get(name, 0), offset)
                elif error.code() in GONE:
                    raise StateError(
                        f"Kafka topic '{message.topic()}', partition {message.partition()}: offset {self.offsets.get(name, 0)} "
                        "comes next and is not there any more. Bring the tables up to date: python -m app run."
                    )
                elif error.code() not in TRANSIENT_ERRORS and error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise StateError(f"Kafka topic '{message.topic()}', partition {message.partition()}: {error.str()}")
            if good:
                bronze = pl.from_arrow(bronze_rows(good, self.base.prefixes))
                assert isinstance(bronze, pl.DataFrame)
                if self.anonymiser is not None:
                    bronze = self.anonymiser(EVENTS, bronze).rows
                pairs = self.stock.apply(bronze)
                self._advance(reached)
                self._changed(self, pairs)
            else:
                self._advance(reached)

    def _advance(self, reached: Mapping[str, int]) -> None:
        """What is in the state is said after it is there."""
        for name, offset in reached.items():
            if offset > self.offsets.get(name, 0):
                self.offsets[name] = offset
        asked = self._asked
        if asked is not None and self.has(asked[1]):
            self.fresh_at = max(self.fresh_at, asked[0])
            self._asked = None
            self.caught_up.set()

    def _ask(self) -> None:
        """Ask where the topics end; when the reader has come so far, the state was complete at the time of asking.

        On a connection of its own: behind the reader's, each answer would wait for a fetch to end.
        """
        with open_consumer(self._kafka) as consumer:
            looked = -LOOK_SECONDS
            while not self._stopping.wait(self._probe_seconds):
                if self._asked is not None or self._new:
                    continue
                with contextlib.suppress(KafkaException, SourceError):
                    begun = time.time()
                    if time.monotonic() - looked > LOOK_SECONDS:
                        known = consumer.list_topics(timeout=ANSWER_SECONDS).topics
                        topics = [topic for topic in self._kafka.topics if topic in known]
                        found = [f"{topic}:{number}" for topic in topics for number in known[topic].partitions]
                        if not self._is_same(topics):
                            return
                        self._new = tuple(name for name in found if name not in self.offsets)
                        looked = time.monotonic()
                        if self._new:
                            continue
                    ends = {
                        name: consumer.get_watermark_offsets(_at(name, 0), timeout=ANSWER_SECONDS)[1]
                        for name in list(self.offsets)
                    }
                    self._asked = (begun, ends)

    def _is_same(self, topics: Sequence[str]) -> bool:
        """Whether the topics are those of the snapshot; the reader would go on with the messages of others at its offsets.
        Raises SourceError when the broker does not answer."""
        known = {topic: identity for topic, identity in self.base.ids.items() if topic in topics}
        if not known:
            return True
        try:
            check_topic_ids(known, topic_ids(self._kafka))
        except OffsetExpired as error:
            self.error = StateError(str(error))
            self._stopping.set()
            return False
        return True


def _at(name: str, offset: int) -> TopicPartition:
    topic, _, partition = name.rpartition(":")
    return TopicPartition(topic, int(partition), offset)


def _unix(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0
