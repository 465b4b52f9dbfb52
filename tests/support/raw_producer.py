"""A producer of messages that confluent_kafka's own refuses: header names that are not UTF-8. Calls librdkafka directly."""

from __future__ import annotations

import ctypes
from pathlib import Path

import confluent_kafka

_PRODUCER = 0
_CONF_OK = 0
# the kinds of arguments of rd_kafka_producev
_END, _TOPIC, _VALUE, _HEADERS = 0, 1, 4, 10


def produce_with_header(bootstrap_servers: str, topic: str, value: bytes, name: bytes) -> None:
    """Send a message with one header whose name consists of any bytes, and wait until the broker has it."""
    (file,) = Path(f"{confluent_kafka.__path__[0]}.libs").glob("librdkafka-*.so*")
    library = ctypes.CDLL(str(file))
    for function in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(library, function).restype = ctypes.c_void_p
    reason = ctypes.create_string_buffer(512)
    configuration = ctypes.c_void_p(library.rd_kafka_conf_new())
    servers = library.rd_kafka_conf_set(configuration, b"bootstrap.servers", bootstrap_servers.encode(), reason, 512)
    assert servers == _CONF_OK, reason.value
    producer = ctypes.c_void_p(library.rd_kafka_new(_PRODUCER, configuration, reason, 512))
    assert producer.value, reason.value
    headers = ctypes.c_void_p(library.rd_kafka_headers_new(ctypes.c_size_t(1)))
    assert not library.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"v", ctypes.c_ssize_t(1))
    kind, size = ctypes.c_int, ctypes.c_size_t(len(value))
    parts = (kind(_TOPIC), topic.encode(), kind(_VALUE), value, size, kind(_HEADERS), headers, kind(_END))
    failed = library.rd_kafka_producev(producer, *parts)
    assert not failed
    assert not library.rd_kafka_flush(producer, 10_000)
    library.rd_kafka_destroy(producer)
