"""Values of MongoDB Extended JSON v2 (canonical): types, numbers, times, texts, and plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MIN_MILLISECONDS = -62_135_596_800_000  # the years 1 to 9999, the range of a datetime
_MAX_MILLISECONDS = 253_402_300_799_999
_TO_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), check_circular=False).encode
_NUMBER_TYPES = ("$numberInt", "$numberLong", "$numberDouble", "$numberDecimal")
_TYPE_NAMES = {
    "$numberInt": "int", "$numberLong": "long", "$numberDouble": "double", "$numberDecimal": "decimal", "$date": "date",
    "$oid": "objectId", "$binary": "binary", "$timestamp": "timestamp", "$regularExpression": "regex", "$undefined": "undefined",
    "$minKey": "minKey", "$maxKey": "maxKey", "$code": "code", "$symbol": "symbol", "$dbPointer": "dbPointer",
}  # fmt: skip


class DocumentUnreadable(ValueError):
    """A document that cannot be read as an order. The message has the field and the type found, never the value."""


def wrapper_of(value: dict[str, Any]) -> str | None:
    """Return the key of an object that wraps a typed value ('$numberInt'), else None."""
    first = next(iter(value), "")
    return first if first in _TYPE_NAMES else None


def type_name(value: Any) -> str:
    """Return the BSON type of a value for error messages."""
    if isinstance(value, dict):
        return _TYPE_NAMES.get(wrapper_of(value) or "", "an object")
    if isinstance(value, list):
        return "an array"
    if value is None:
        return "null or absent"
    return {bool: "boolean", str: "text", int: "int", Decimal: "double"}.get(type(value), "unknown")


def number_text(value: Any) -> str | None:
    """Return the digits of a number (of a double: the shortest that parse to the same value), else None."""
    if isinstance(value, dict):
        if len(value) == 1:
            ((kind, digits),) = value.items()
            if kind in _NUMBER_TYPES and isinstance(digits, str):
                return digits
        return None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return str(value)
    return None


def text_value(value: Any, field: str, *, joined_by: str = "") -> str | None:
    """Return a text, trimmed; an empty text is null, a number becomes its digits. Raises DocumentUnreadable.

    joined_by: separator by which an object or array of texts is joined; without it, these are unreadable.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    digits = number_text(value)
    if digits is not None:
        return digits.removesuffix(".0")
    if joined_by and isinstance(value, (dict, list)) and not (isinstance(value, dict) and wrapper_of(value)):
        parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
        texts = [part.strip() if isinstance(part, str) else number_text(part) for part in parts if part is not None]
        if all(text is not None for text in texts):
            return joined_by.join(text for text in texts if text) or None
    raise DocumentUnreadable(f"{field} is {type_name(value)}, expected text")


def instant(value: Any, field: str) -> int | None:
    """Return microseconds since 1970 in UTC; a text without an offset is in UTC. Raises DocumentUnreadable."""
    if value is None:
        return None
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "$date":
            milliseconds = _milliseconds(inner, field)
            if milliseconds is not None:
                return milliseconds * 1000
            value = inner
        elif kind == "$timestamp" and isinstance(inner, dict) and isinstance(inner.get("t"), int):
            return int(inner["t"]) * 1_000_000
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
            return (moment - _EPOCH) // _MICROSECOND
        except (ValueError, OverflowError):
            raise DocumentUnreadable(f"{field} is text, expected a date or its ISO 8601 spelling") from None
    raise DocumentUnreadable(f"{field} is {type_name(value)}, expected a date")


def _milliseconds(value: Any, field: str) -> int | None:
    """Return the milliseconds of a `$date`, or None when it has another form. Raises DocumentUnreadable."""
    digits = value if isinstance(value, str) else None if isinstance(value, bool) else number_text(value)
    if digits is None or not digits.lstrip("-").isdigit():
        return None
    milliseconds = int(digits)
    if not _MIN_MILLISECONDS <= milliseconds <= _MAX_MILLISECONDS:
        raise DocumentUnreadable(f"{field} is a date outside the years 1 to 9999")
    return milliseconds


def plain_json(value: Any) -> str | None:
    """Return canonical plain JSON: sorted keys, compact, numbers and dates without their Extended JSON wrapper."""
    if value is None:
        return None
    return _TO_JSON(_unwrapped(value))


def _unwrapped(value: Any) -> Any:
    """Return a value without Extended JSON wrappers."""
    if isinstance(value, list):
        return [_unwrapped(part) for part in value]
    if isinstance(value, Decimal):
        return str(value)
    if not isinstance(value, dict):
        return value
    kind = wrapper_of(value)
    if kind is None or len(value) != 1:
        return {key: _unwrapped(part) for key, part in value.items()}
    inner = value[kind]
    if kind in ("$numberInt", "$numberLong") and isinstance(inner, str) and inner.lstrip("-").isdigit():
        return int(inner)
    return inner if isinstance(inner, str) else _unwrapped(inner)
