"""Errors as callers see them: RFC 9457 problem documents that name the field and hold nothing of the inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")
_UNKNOWN = re.compile(r"unknown field `(?P<field>[^`]+)`")


class Wrong(msgspec.Struct, frozen=True):
    """One thing that is wrong with the input."""

    field: str
    """Where: a parameter, or the way to a field of the body, such as items[0].quantity."""
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
        """The answer."""
        body: dict[str, object] = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        body["detail"] = self.detail
        if self.errors:
            body["errors"] = self.errors
        return Response(msgspec.json.encode(body), self.status, self.headers, "application/problem+json")


def bad_field(field: str, detail: str) -> Problem:
    """One field of the input is wrong."""
    return Problem(400, f"{field}: {detail}", errors=(Wrong(field, detail),))


def bad_body(error: msgspec.DecodeError | UnicodeDecodeError) -> Problem:
    """The body cannot be read: what msgspec says, and where."""
    if not isinstance(error, msgspec.ValidationError):
        return bad_field("body", "is not JSON")
    found = _PLACE.match(str(error))
    assert found is not None
    path = (found["path"] or "").removeprefix(".")
    if named := _MISSING.search(found["what"]) or _UNKNOWN.search(found["what"]):
        path = f"{path}.{named['field']}" if path else named["field"]
        return bad_field(path, "is missing" if "missing" in found["what"] else "is not a field that is known here")
    return bad_field(path or "body", found["what"][:1].lower() + found["what"][1:])


def busy(status: int, detail: str, seconds: int = 1) -> Problem:
    """Come again later."""
    return Problem(status, detail, headers={"Retry-After": str(seconds)})
