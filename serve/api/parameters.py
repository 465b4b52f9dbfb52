"""Query parameters that several endpoints share, and the conversion of their values."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from serve.http.endpoints import Parameter

MAX_ID_LENGTH = 200
ID_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}


def read_id(text: str) -> str:
    """Return an id of 1 to MAX_ID_LENGTH characters. Raises ValueError."""
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        raise ValueError(f"expected 1 to {MAX_ID_LENGTH} characters")
    return text


def read_moment(text: str) -> datetime:
    """Return an ISO 8601 date and time in UTC, the default time zone. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("expected an ISO 8601 date and time, such as 2026-01-31T12:00:00Z") from None
    return moment


def read_limit(maximum: int, text: str) -> int:
    """Return an integer from 1 to `maximum`. Raises ValueError."""
    if not (is_number(text) and 1 <= int(text) <= maximum):
        raise ValueError(f"expected an integer from 1 to {maximum}")
    return int(text)


def is_number(text: str) -> bool:
    """Return whether the text consists of 1 to 18 ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def limit_parameter(maximum: int, doc: str) -> Parameter:
    """Return the parameter `limit` from 1 to `maximum`, 100 by default. doc: the noun that is limited."""
    return Parameter(
        "limit",
        f"{doc}: 1 to {maximum}, default 100.",
        lambda text: read_limit(maximum, text),
        {"type": "integer", "minimum": 1, "maximum": maximum, "default": 100},
    )
