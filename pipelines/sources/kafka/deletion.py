"""Deletes messages from Kafka topics, for erasure."""

from __future__ import annotations

from datetime import datetime

from confluent_kafka import TopicPartition

from lakehouse.source import Position
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import REQUEST_TIMEOUT_SECONDS, open_admin_client, open_consumer
from pipelines.sources.kafka.positions import position_key


def delete_records_before(settings: KafkaSettings, topic: str, before: datetime, position: Position) -> int:
    """Delete the messages of a topic that were sent before a time, and return how many of them are left.

    Of a topic that is read into bronze, only messages that `position` has passed are deleted: the others are not read yet.
    A topic that does not exist has none. Raises SourceError.
    """
    with open_consumer(settings) as consumer:
        topics = consumer.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).topics
        if topic not in topics:
            return 0
        milliseconds = int(before.timestamp() * 1000)
        partitions = [TopicPartition(topic, partition, milliseconds) for partition in sorted(topics[topic].partitions)]
        first_kept = consumer.offsets_for_times(partitions, timeout=REQUEST_TIMEOUT_SECONDS)
        watermarks = [consumer.get_watermark_offsets(item, timeout=REQUEST_TIMEOUT_SECONDS) for item in partitions]
    left, deletions = 0, []
    for kept, (low, high) in zip(first_kept, watermarks, strict=True):
        end = kept.offset if kept.offset >= 0 else high
        deletable = min(int(position.get(position_key(topic, kept.partition), 0)), end) if topic in settings.topics else end
        left += max(0, end - max(deletable, low))
        if deletable > low:
            deletions.append(TopicPartition(topic, kept.partition, deletable))
    with open_admin_client(settings) as client:
        futures = client.delete_records(deletions, request_timeout=REQUEST_TIMEOUT_SECONDS).values() if deletions else ()
        for future in futures:
            future.result(2 * REQUEST_TIMEOUT_SECONDS)
    return left
