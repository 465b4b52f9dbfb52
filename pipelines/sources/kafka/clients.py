"""Kafka clients: consumers outside any group, admin clients, and the ids of topics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from lakehouse.errors import SourceError
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka.errors import TOPIC_ID_UNAVAILABLE_ERRORS, error_text, kafka_errors, redact

REQUEST_TIMEOUT_SECONDS = 10.0

Client = TypeVar("Client")


@contextmanager
def open_consumer(settings: KafkaSettings) -> Iterator[Consumer]:
    """Open a consumer that belongs to no group. Raises SourceError as `kafka_errors` does."""
    with kafka_errors(settings) as background_errors:
        consumer = create_client(
            Consumer,
            {
                # 760,000 messages a second instead of 150,000
                "fetch.queue.backoff.ms": 0,
                "queued.min.messages": 200_000,
                "queued.max.messages.kbytes": 65_536,
                "check.crcs": False,
                "fetch.wait.max.ms": 50,
                "isolation.level": "read_committed",
                **client_properties(settings, background_errors),
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
            consumer.poll(0)  # delivers pending background errors
            raise
        finally:
            consumer.close()


@contextmanager
def open_admin_client(settings: KafkaSettings) -> Iterator[AdminClient]:
    """Open an admin client. Raises SourceError as `kafka_errors` does."""
    with kafka_errors(settings) as background_errors:
        yield create_client(AdminClient, client_properties(settings, background_errors), settings)


def topic_ids(settings: KafkaSettings) -> dict[str, str]:
    """Return the id of each configured topic. Topics for which the broker returns no id are left out."""
    ids = {}
    with open_admin_client(settings) as client:
        described = client.describe_topics(TopicCollection(list(settings.topics)), request_timeout=REQUEST_TIMEOUT_SECONDS)
        for topic, future in described.items():
            try:
                topic_id = future.result(2 * REQUEST_TIMEOUT_SECONDS).topic_id
            except KafkaException as error:
                if error.args[0].code() not in TOPIC_ID_UNAVAILABLE_ERRORS:
                    raise
                continue
            if topic_id.get_most_significant_bits() or topic_id.get_least_significant_bits():
                ids[topic] = str(topic_id)
    return ids


def client_properties(settings: KafkaSettings, background_errors: list[KafkaError]) -> dict[str, Any]:
    """Return the properties of every client. librdkafka appends errors of its threads to `background_errors`."""
    return {
        "log_level": 0,
        **settings.properties,
        "bootstrap.servers": settings.bootstrap_servers,
        "error_cb": background_errors.append,
        "logger": _silent_logger(),
    }


def create_client(client: Callable[[dict[str, Any]], Client], properties: dict[str, Any], settings: KafkaSettings) -> Client:
    """Create a client. Raises SourceError when a property is unknown or has an invalid value."""
    try:
        return client(properties)
    except (KafkaException, ValueError, TypeError) as error:
        raise SourceError(
            f"Kafka: {redact(error_text(error), settings)}. Correct kafka.properties (SHOPSPHERE_KAFKA__PROPERTIES)."
        ) from None


def _silent_logger() -> logging.Logger:
    """Return a logger that discards records: errors that matter are raised, and log lines would mix with the CLI's output."""
    logger = logging.getLogger("shopsphere.kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return logger
