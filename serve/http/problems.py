"""Errors for clients: RFC 9457 problem documents that name the invalid field and reveal no internals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response

_MSGSPEC_MESSAGE = re.compile(r"^(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")
_UNKNOWN = re.compile(r"unknown field `(?P<field>[^`]+)`")


API_HEADERS: Mapping[str, str] = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""Answers contain personal data: no cache may keep them, and no browser may take them for something else."""
MAX_REFLECTED = 200
"""Characters of a request's own text in the answer to it."""


class Wrong(msgspec.Struct, frozen=True):
    """An invalid field of the input."""

    field: str
    """A query parameter, or the path of a field in the body, such as items[0].quantity."""
    detail: str


class Problem(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self, status: int, detail: str, *, errors: tuple[Wrong, ...] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.headers = status, detail, errors, dict(headers or {})

    @property
    def response(self) -> Response:
        """The problem document."""
        body: dict[str, object] = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        body["detail"] = self.detail
        if self.errors:
            body["errors"] = self.errors
        return Response(msgspec.json.encode(body), self.status, {**API_HEADERS, **self.headers}, "application/problem+json")


def bad_field(field: str, detail: str, status: int = 400) -> Problem:
    """Return a problem about one field of the input. detail: continues the field's name, as in 'is missing'."""
    field, detail = _clipped(field), _clipped(detail)
    return Problem(status, f"{field}: {detail}", errors=(Wrong(field, detail),))


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_REFLECTED else f"{text[:MAX_REFLECTED]}..."


def bad_body(error: msgspec.DecodeError | UnicodeDecodeError) -> Problem:
    """Return a problem about a body that msgspec cannot decode, with the path of the invalid field."""
    if not isinstance(error, msgspec.ValidationError):
        return bad_field("body", "is not valid JSON")
    parsed = _MSGSPEC_MESSAGE.match(str(error))
    assert parsed is not None
    path, message = (parsed["path"] or "").removeprefix("."), parsed["message"]
    if named := _MISSING.search(message) or _UNKNOWN.search(message):
        path = f"{path}.{named['field']}" if path else named["field"]
        return bad_field(path, "is missing" if "missing" in message else "is not a known field")
    return bad_field(path or "body", message[:1].lower() + message[1:])


def retry_later(status: int, detail: str, seconds: int = 1) -> Problem:
    """Return a problem with a Retry-After header."""
    return Problem(status, detail, headers={"Retry-After": str(seconds)})
