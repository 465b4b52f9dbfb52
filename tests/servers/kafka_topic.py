"""A separate topic on a real broker, with operations for tests, and a reader of it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType
from servers.kafka_broker import Broker
from support.bronze_reading import Reader
from support.waiting import wait_for

from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.clients import open_consumer
from pipelines.sources.kafka.source import KafkaSource

DAY_MS = 86_400_000


class Topic:
    """A separate topic and a reader of it."""

    def __init__(self, broker: Broker, partitions: int = 1, **config: str) -> None:
        self.broker, self.name = broker, f"t{time.time_ns():x}"
        self.admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
        self.create(partitions, **config)
        self.settings = KafkaSettings(bootstrap_servers=broker.bootstrap, topics=(self.name,), batch_messages=400)  # type: ignore[call-arg]
        self.reader = Reader(KafkaSource(self.settings))

    def create(self, partitions: int, **config: str) -> None:
        names = {name.replace("_", "."): value for name, value in config.items()}

        def is_created() -> bool:
            with suppress(KafkaException):
                self.admin.create_topics([NewTopic(self.name, partitions, 1, config=names)])[self.name].result(10)
            found = self.admin.list_topics(timeout=10).topics.get(self.name)
            return found is not None and len(found.partitions) == partitions

        wait_for(is_created, f"topic {self.name} was not created")

    def delete(self) -> None:
        self.admin.delete_topics([self.name])[self.name].result(10)
        wait_for(lambda: self.name not in self.admin.list_topics(timeout=10).topics, f"topic {self.name} was not deleted")

    def configure(self, **config: str) -> None:
        entries = [
            ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
            for name, value in config.items()
        ]
        (done,) = self.admin.incremental_alter_configs(
            [ConfigResource(ResourceType.TOPIC, self.name, incremental_configs=entries)]
        ).values()
        done.result(10)

    def producer(self, **options: Any) -> Producer:
        return Producer({"bootstrap.servers": self.broker.bootstrap, "linger.ms": 5, "log_level": 0, **options})

    def transactional(self, **options: Any) -> Producer:
        producer = self.producer(**{"transactional.id": f"{self.name}-{time.time_ns():x}", **options})
        producer.init_transactions(30)
        return producer

    def send(self, producer: Producer, *values: str, **options: Any) -> None:
        for value in values:
            producer.produce(self.name, value.encode(), **({"partition": 0} | options))
        assert producer.flush(30) == 0

    def watermarks(self, partition: int = 0) -> tuple[int, int]:
        with open_consumer(self.settings) as consumer:
            low, high = consumer.get_watermark_offsets(TopicPartition(self.name, partition), timeout=10)
        return low, high

    def values(self) -> list[str]:
        rows = sorted(self.reader.rows.get(EVENTS.name, []), key=lambda row: row["_source_position"])
        return [row["value"].decode() for row in rows]

    def position(self, partition: int = 0) -> int:
        return int(self.reader.positions[EVENTS.name][f"{self.name}:{partition}"])

    def expire_messages(self) -> None:
        """Have retention delete all messages."""
        _, high = self.watermarks()
        self.configure(retention_ms="1")
        wait_for(lambda: self.watermarks()[0] == high, "retention deleted nothing")
        self.configure(retention_ms=str(DAY_MS))
