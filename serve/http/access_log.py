"""The access log: one JSON line per request, which is also counted in the latency metric."""

from __future__ import annotations

import functools
import logging
import logging.handlers
from pathlib import Path
from typing import NamedTuple

import msgspec
from prometheus_client import Histogram

from serve.http.metrics import LATENCY

MAX_BUFFERED = 250
"""Requests that are buffered before they are written."""
MAX_FILE_BYTES = 64 << 20
BACKUP_FILES = 3


class AccessRecord(NamedTuple):
    """A finished request. at: unix time; key: name of the API key, empty without one; client: address, '' if unknown."""

    at: float
    method: str
    route: str
    status: int
    seconds: float
    key: str
    client: str = ""


class AccessLog:
    """Writes the route's pattern, never the path or query, which may contain personal data.

    Requests are buffered, then written and counted together: doing so for each request would cost as much as a look-up.
    """

    def __init__(self, file: Path) -> None:
        self._buffer: list[AccessRecord] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.handlers.RotatingFileHandler(file, maxBytes=MAX_FILE_BYTES, backupCount=BACKUP_FILES)

    def write(self, record: AccessRecord) -> None:
        """Add a request; flush when the buffer is full."""
        self._buffer.append(record)
        if len(self._buffer) >= MAX_BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write and count the buffered requests."""
        if not self._buffer:
            return
        records, self._buffer = self._buffer, []
        for record in records:
            _latency(record.route, record.status).observe(record.seconds)
        self._file.handle(logging.makeLogRecord({"msg": b"\n".join(map(_json_line, records)).decode()}))


@functools.lru_cache(maxsize=1024)
def _latency(route: str, status: int) -> Histogram:
    return LATENCY.labels(route, str(status))


def _json_line(record: AccessRecord) -> bytes:
    return msgspec.json.encode(
        {
            "at": round(record.at, 3),
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "ms": round(record.seconds * 1000, 2),
            "key": record.key,
            "client": record.client,
        }
    )
