"""The Kafka topic of served scores, which contains the orders that were scored: ingested, then emptied by an erasure."""

from __future__ import annotations

import contextlib

from lakehouse.engine.engine import Engine
from lakehouse.errors import SourceError
from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project
from pipelines.bronze.tables import EVENTS
from pipelines.privacy.suppression import Erasure
from pipelines.settings import settings_of
from pipelines.sources.kafka.deletion import delete_records_before
from pipelines.sources.kafka.source import KafkaSource


def ingest_scores(engine: Engine, project: Project, topic: str) -> None:
    """Read the scores served so far, so that they can be deleted from their topic.

    An unreachable broker is no error here: `delete_scores` reports it at the end of the erasure.
    """
    kafka = settings_of(engine.lake).kafka
    if topic in kafka.topics:
        with contextlib.suppress(SourceError):
            engine.ingest(KafkaSource(kafka), project.tables)


def delete_scores(lake: Lake, topic: str, erasure: Erasure) -> str:
    """Delete on the broker the scores served before an erasure; bronze keeps them without the person.

    Returns the reason why some of them may remain, or ''.
    """
    if not topic:
        return ""
    position = lake.load(EVENTS).positions.get(KafkaSource.name) or {}
    try:
        unread = delete_records_before(settings_of(lake).kafka, topic, erasure.requested_at, position)
    except SourceError as error:
        return f"topic {topic} could not be emptied: {error}"
    if not unread:
        return ""
    return f"topic {topic} still has {unread:,} older scores that the lakehouse has not read. Read them with `python -m app run`."
