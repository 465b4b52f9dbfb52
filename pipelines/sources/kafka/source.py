"""Kafka to bronze: exact offset ranges, decided by the plan, read in parallel.

A plan asks every partition for its first and last offset. The position has the next offset to read of each partition, and the
ids of the topics (see `positions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from confluent_kafka import Consumer, TopicPartition

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Plan, Position, is_resnapshot
from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import REQUEST_TIMEOUT_SECONDS, open_consumer, topic_ids
from pipelines.sources.kafka.errors import REBUILD
from pipelines.sources.kafka.positions import (
    TOPIC_IDS,
    check_next_offset,
    check_topic_ids,
    partitions_read,
    position_key,
    restarted_position,
    topic_prefixes,
    topics_read,
    with_topic_ids,
)
from pipelines.sources.kafka.ranges import OffsetRange, OffsetRangesTask, split_ranges
from pipelines.sources.kafka.records import SCHEMA

MAX_TOPICS_LISTED = 10


class PartitionOffsets(NamedTuple):
    """Offsets of a partition: the first one, and the one after the last message that can be read."""

    topic: str
    partition: int
    low: int
    high: int


@dataclass
class KafkaSource:
    """Kafka topics as a source of bronze rows."""

    settings: KafkaSettings = field(repr=False)
    name: str = "kafka"
    tables: tuple[str, ...] = (EVENTS.name,)

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        known = positions.get(EVENTS.name) or {}
        resnapshot = is_resnapshot(known)
        partitions, ids = self._partitions({} if resnapshot else known)
        position = restarted_position(known, ids) if resnapshot else with_topic_ids(known, ids)
        # a partition that appears in a topic that was read before was added since, so it is read from offset 0
        topics = topics_read(position)
        ranges = []
        for topic, partition, low, high in partitions:
            key = position_key(topic, partition)
            start = int(position.get(key, 0 if topic in topics else low))
            check_next_offset(topic, partition, start, low, high)
            position[key] = high
            if high > start:
                ranges.append(OffsetRange(topic, partition, start, high))
        # an empty partition is stored in the position too: messages that come and are deleted before a run are then noticed
        if not ranges and not resnapshot and (not known or position == known):
            return Plan()
        # without ranges, one task without messages stores the position
        groups = split_ranges(ranges, self.settings.batch_messages) or [()]
        prefixes = topic_prefixes(position)
        *others, last = groups
        return Plan(
            tasks=(
                *(OffsetRangesTask(self.settings, group, None, prefixes) for group in others),
                OffsetRangesTask(self.settings, last, position, prefixes),
            ),
            schemas={EVENTS.name: SCHEMA},
            positions={EVENTS.name: position},
            rows=sum(item.count for item in ranges),
        )

    def acknowledge(self, plan: Plan) -> None:
        """Do nothing: Kafka deletes messages by age and size alone."""

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Return the number of unread messages, and of those that no reader can see yet."""
        position = positions.get(EVENTS.name) or {}
        # asked first, so that messages sent meanwhile do not count as held back
        written = self._end_offsets_uncommitted()
        partitions, _ = self._partitions(position)
        behind = sum(
            high - min(int(position.get(position_key(topic, partition), low)), high) for topic, partition, low, high in partitions
        )
        held_back = sum(max(0, written.get((topic, partition), high) - high) for topic, partition, _, high in partitions)
        text = f"{behind} message{'' if behind == 1 else 's'}"
        return {EVENTS.name: text + (f", {held_back} held back by an open transaction" if held_back else "")}

    def _end_offsets_uncommitted(self) -> dict[tuple[str, int], int]:
        """Return, by topic and partition, the offset after the last message, committed or not."""
        properties = {**self.settings.properties, "isolation.level": "read_uncommitted"}
        with open_consumer(self.settings.model_copy(update={"properties": properties})) as consumer:
            topics = consumer.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).topics
            return {
                (topic, partition): _watermarks(consumer, topic, partition)[1]
                for topic in self.settings.topics
                if topic in topics
                for partition in topics[topic].partitions
            }

    def _partitions(self, position: Position) -> tuple[list[PartitionOffsets], dict[str, str]]:
        """Return the offsets of every partition of the configured topics, up to the last committed message, and topic ids.

        Ids are asked first, so that a topic that is re-created meanwhile is noticed by the next plan. Raises OffsetExpired when
        a topic that was read is missing, has another id or has lost a partition.
        """
        with open_consumer(self.settings) as consumer:
            existing = consumer.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).topics
            for topic in self.settings.topics:
                _check_exists(topic, existing, position)
            ids = topic_ids(self.settings)
            check_topic_ids(position.get(TOPIC_IDS, {}), ids)
            found = []
            for topic in self.settings.topics:
                partitions = existing[topic].partitions
                found += [PartitionOffsets(topic, number, *_watermarks(consumer, topic, number)) for number in sorted(partitions)]
                if lost := partitions_read(position, topic) - partitions.keys():
                    raise OffsetExpired(
                        f"Kafka topic '{topic}' has lost partition {min(lost)}: the topic was re-created. "
                        f"Read it from the beginning: {REBUILD}"
                    )
        return found, ids


def _watermarks(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Return the first offset of a partition and the one after its last message."""
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=REQUEST_TIMEOUT_SECONDS)
    return low, high


def _check_exists(topic: str, existing: Mapping[str, Any], position: Position) -> None:
    """Raise SourceError when a topic does not exist (OffsetExpired when it was read before) or the broker reports an error."""
    if topic not in existing:
        read_before = topic in topics_read(position)
        names = sorted(name for name in existing if not name.startswith("__"))
        listed = ", ".join(names[:MAX_TOPICS_LISTED]) + (" ..." if len(names) > MAX_TOPICS_LISTED else "")
        raise (OffsetExpired if read_before else SourceError)(
            f"Kafka topic '{topic}' {'no longer exists' if read_before else 'does not exist'}. Create it, or correct "
            f"kafka.topics (SHOPSPHERE_KAFKA__TOPICS). Existing topics: {listed or 'none'}."
        )
    if (error := existing[topic].error) is not None:
        raise SourceError(f"Kafka topic '{topic}': {error.str()}. Run again.")
