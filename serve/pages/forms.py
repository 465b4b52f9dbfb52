"""Parsing of HTML forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request

from serve.http.problems import Problem, bad_field

MAX_FORM_BYTES = 4_096
MAX_FIELDS = 10


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form. Raises Problem 400, 413, 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/x-www-form-urlencoded":
        raise Problem(415, "The body must be application/x-www-form-urlencoded.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise Problem(413, f"The form is larger than {MAX_FORM_BYTES} bytes.")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS))
    except ValueError:
        raise bad_field("body", "is not a valid form in UTF-8") from None


def optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader that treats an empty field as absent."""
    return lambda text: read(text) if text.strip() else None
