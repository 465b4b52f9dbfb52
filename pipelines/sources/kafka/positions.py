"""Positions of the Kafka source: next offset by 'topic:partition', topic ids, and topic epochs.

    {"events:0": 120, "events:1": 98, "ids": {"events": "Rz9..."}, "generations": {"events": 1}}

A topic that was deleted and re-created has a new id (brokers since Kafka 2.8 return one), even where its offsets have already
passed ours. Epochs (see `pipelines.sources.epochs`) are counted by topic. When a topic is re-read under the id that it had,
the same rows come at the same positions. Under any other id the next epoch begins, because the same offsets may be other
messages. Messages that Kafka deleted by retention stay in bronze: there is no marker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakehouse.errors import OffsetExpired
from lakehouse.source import Position
from pipelines.sources.epochs import epoch_prefix
from pipelines.sources.kafka.errors import REBUILD, offsets_deleted

TOPIC_IDS, TOPIC_EPOCHS = "ids", "generations"
"""Keys of a position. Neither can be a 'topic:partition'."""


def position_key(topic: str, partition: int) -> str:
    """Return the key under which a position stores the next offset of a partition."""
    return f"{topic}:{partition}"


def topics_read(position: Position) -> set[str]:
    """Return the topics of which the position has a partition."""
    return {key.rpartition(":")[0] for key in position if ":" in key}


def partitions_read(position: Position, topic: str) -> set[int]:
    """Return the partitions of a topic that the position has."""
    return {int(key.rpartition(":")[2]) for key in position if key.rpartition(":")[0] == topic}


def topic_prefixes(position: Position) -> dict[str, str]:
    """Return what row positions begin with, by topic, for topics that are past their first epoch."""
    return {topic: epoch_prefix(epoch) for topic, epoch in position.get(TOPIC_EPOCHS, {}).items()}


def with_topic_ids(position: Position, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the position with the ids that the broker returned; other ids stay as they were."""
    merged = {**position.get(TOPIC_IDS, {}), **ids}
    return {**position, TOPIC_IDS: merged} if merged else {name: value for name, value in position.items() if name != TOPIC_IDS}


def restarted_position(position: Position, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the position from which all topics of `position` are re-read, without offsets.

    The epoch of a topic goes up unless the broker confirms that it is the same topic.
    """
    known_ids, epochs = position.get(TOPIC_IDS, {}), dict(position.get(TOPIC_EPOCHS, {}))
    for topic in topics_read(position):
        if topic not in ids or known_ids.get(topic) != ids[topic]:
            epochs[topic] = epochs.get(topic, 0) + 1
    return with_topic_ids({TOPIC_IDS: known_ids} | ({TOPIC_EPOCHS: epochs} if epochs else {}), ids)


def check_topic_ids(known_ids: Mapping[str, str], ids: Mapping[str, str]) -> None:
    """Raise OffsetExpired when a topic is not the one that was read."""
    for topic, topic_id in ids.items():
        if known_ids.get(topic, topic_id) != topic_id:
            raise OffsetExpired(
                f"Kafka topic '{topic}' was deleted and re-created: its id was {known_ids[topic]} and is now {topic_id}. "
                f"Read it from the beginning: {REBUILD}"
            )


def check_next_offset(topic: str, partition: int, next_offset: int, low: int, high: int) -> None:
    """Raise OffsetExpired when the next offset to read is outside the partition's offsets, `low` up to `high`."""
    if next_offset < low:
        raise offsets_deleted(topic, partition, next_offset, low)
    if next_offset > high:
        raise OffsetExpired(
            f"Kafka topic '{topic}', partition {partition}: the next offset to read is {next_offset}, but the partition ends at "
            f"{high}. The topic was truncated or re-created; offsets {high} to {next_offset - 1} are no longer the messages that "
            f"were read. Read it from the beginning: {REBUILD}"
        )
