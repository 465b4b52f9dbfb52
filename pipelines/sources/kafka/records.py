"""Kafka messages as bronze rows, byte for byte."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any

import pyarrow as pa
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import EVENTS, MILLISECONDS, row_schema

SCHEMA = row_schema(EVENTS)
UNREADABLE_HEADERS = "[[null, null]]"
_read_headers = methodcaller("headers")
"""Called like this, and not as a method, the result is checked in every case: the interpreter omits the check in a loop."""


def bronze_rows(messages: Sequence[Any], prefixes: Mapping[str, str]) -> pa.Table:
    """Return the messages as bronze rows. `prefixes`: see `topic_prefixes`."""
    count = len(messages)
    # producers send arbitrary timestamps, including microseconds instead of milliseconds
    earliest, latest = MILLISECONDS
    microseconds = [
        milliseconds * 1000 if kind != TIMESTAMP_NOT_AVAILABLE and earliest <= milliseconds <= latest else None
        for kind, milliseconds in (message.timestamp() for message in messages)
    ]
    timestamp = pa.array(microseconds, pa.int64()).cast(TIMESTAMP)
    topics = [message.topic() for message in messages]
    partitions = [message.partition() for message in messages]
    offsets = [message.offset() for message in messages]
    positions = [
        f"{prefixes.get(topic, '')}{topic}/{partition:05d}/{offset:019d}"
        for topic, partition, offset in zip(topics, partitions, offsets, strict=True)
    ]
    columns = {
        "topic": pa.array(topics, pa.string()),
        "partition": pa.array(partitions, pa.int32()),
        "offset": pa.array(offsets, pa.int64()),
        "key": pa.array([message.key() for message in messages], pa.binary()),
        "value": pa.array([message.value() for message in messages], pa.binary()),
        "headers": pa.array([_headers(message) for message in messages], pa.string()),
        "timestamp": timestamp,
        "_op": pa.repeat(pa.scalar("c"), count),
        "_source_position": pa.array(positions, pa.string()),
        "_source_time": timestamp,
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _headers(message: Any) -> str | None:
    """Return headers as a JSON list of [name, base64 of the value]; null without headers.

    The client cannot read headers with a name that is not UTF-8: then they are [[null, null]].
    """
    try:
        headers = _read_headers(message)
    except SystemError:
        # the client returned a list with a hole in it, which crashes the process when it is touched
        return UNREADABLE_HEADERS
    if not headers:
        return None
    return json.dumps([[name, None if value is None else base64.b64encode(value).decode()] for name, value in headers])
