"""Errors of Kafka as SourceError: one line, without secrets, with a way to fix them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from confluent_kafka import KafkaError, KafkaException

from lakehouse.errors import OffsetExpired, SourceError
from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings

UNREACHABLE_ERRORS = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._TIMED_OUT})
TRANSIENT_ERRORS = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
    }
)
"""Errors from which the client recovers by itself. If it does not, reading makes no progress and times out."""
OFFSET_ERRORS = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
TOPIC_ID_UNAVAILABLE_ERRORS = frozenset(
    {KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION, KafkaError.TOPIC_AUTHORIZATION_FAILED}
)
"""Errors of a broker that can be read from but does not return topic ids."""
SECRET_PROPERTY_WORDS = ("password", "secret", "key", "token", "jaas", "config", "pem")
REBUILD = f"python -m app rebuild {EVENTS.name}"


@contextmanager
def kafka_errors(settings: KafkaSettings) -> Iterator[list[KafkaError]]:
    """Raise SourceError for errors of librdkafka, and when kafka.bootstrap_servers is not set.

    Yields the list to which `client_properties` has librdkafka append its background errors: when the brokers cannot be
    reached, the cause is among those.
    """
    if not settings.bootstrap_servers:
        raise SourceError(
            "Kafka: kafka.bootstrap_servers is not set. Set it (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS), or disable the source "
            "(SHOPSPHERE_KAFKA__ENABLED=false)."
        )
    background_errors: list[KafkaError] = []
    try:
        yield background_errors
    except KafkaException as error:
        cause = error.args[0]
        if background_errors and isinstance(cause, KafkaError) and cause.code() in UNREACHABLE_ERRORS:
            cause = background_errors[-1]
        raise SourceError(
            f"Kafka: request to {settings.bootstrap_servers} failed: {redact(error_text(cause), settings)}. "
            "Check that the brokers are running and that kafka.bootstrap_servers (SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS) is right."
        ) from None


def offsets_deleted(topic: str, partition: int, start: int, end: int | None) -> OffsetExpired:
    """Return the error for offsets from `start` up to, not including, `end` that were deleted before they were read."""
    last = f" to {end - 1}" if end is not None else ""
    return OffsetExpired(
        f"Kafka topic '{topic}', partition {partition}: offsets {start}{last} were deleted before they were read. "
        f"Read the remaining messages: {REBUILD}. To prevent this, increase retention.ms or run more often."
    )


def error_text(error: object) -> str:
    """Return the message of an error, also of one that is wrapped in a KafkaException."""
    if isinstance(error, KafkaException) and error.args:
        error = error.args[0]
    return error.str() if isinstance(error, KafkaError) else str(error)


def redact(text: str, settings: KafkaSettings) -> str:
    """Return the text on one line, without the values of secret properties."""
    for name, value in settings.properties.items():
        if value and any(word in name for word in SECRET_PROPERTY_WORDS):
            text = text.replace(value, "***")
    return " ".join(text.split()).rstrip(".")
