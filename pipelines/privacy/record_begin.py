"""When a record began, in microseconds since 1970: erased values are replaced in other people's older records only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl

UNKNOWN = 0
"""Used where a record has no time: it counts as older than every erasure."""


def begin_of_rows(rows: pl.DataFrame, column: str = "created_at") -> list[int]:
    """Return for each row the value of a timestamp column."""
    if column not in rows.columns:
        return [UNKNOWN] * rows.height
    return rows[column].dt.epoch("us").fill_null(UNKNOWN).to_list()


def begin_of_document(order_time: Any) -> int:
    """Return the time of a marketplace document: ISO 8601 text or an Extended JSON date."""
    inner = order_time.get("$date") if isinstance(order_time, dict) else order_time
    if isinstance(inner, dict):
        digits = inner.get("$numberLong")
        return int(digits) * 1000 if isinstance(digits, str) and digits.lstrip("-").isdigit() else UNKNOWN
    return _parse(inner) or UNKNOWN


def begin_of_event(timestamp: Any, source_time: datetime | None) -> int:
    """Return the time of an event; without a readable timestamp the time of its message."""
    parsed = _parse(timestamp)
    if parsed is not None:
        return parsed
    return microseconds(source_time) if source_time is not None else UNKNOWN


def microseconds(moment: datetime) -> int:
    """Return the microseconds since 1970."""
    return int(moment.timestamp() * 1_000_000)


def _parse(value: Any) -> int | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value.strip())
        return microseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        return None
