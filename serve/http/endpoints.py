"""Declarations of endpoints: route, handler, authentication, limits, and the description in /openapi.json."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serve.http.keys import KeyScope
from serve.http.problems import API_HEADERS, Problem


@dataclass(frozen=True)
class Parameter:
    """A query parameter. `read` converts its text or raises ValueError with a message such as 'expected ...'."""

    name: str
    doc: str
    read: Callable[[str], Any] = str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    example: str | None = None


@dataclass(frozen=True)
class ApiRequest:
    """An authenticated request with validated query and body. http: Starlette's request."""

    http: Request
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A route and everything that is declared about it.

    scope        scope that the API key must have; None: the endpoint is public
    body         type of the JSON body; body_limit: its maximum size in bytes
    statuses     error statuses besides those implied by scope and body
    any_key      an API key is required, with any scope
    cookie_auth  the key may come in the cookie of the pages: only for requests that change nothing
    problem      renders a problem as a response
    """

    method: str
    path: str
    name: str
    doc: str
    handler: Callable[[ApiRequest], Awaitable[Response]]
    answer: type
    scope: KeyScope | None = None
    parameters: tuple[Parameter, ...] = ()
    path_example: Mapping[str, str] = field(default_factory=dict)
    body: type | None = None
    body_limit: int = 0
    body_example: Any = None
    answer_example: Any = None
    media_type: str = "application/json"
    statuses: tuple[int, ...] = ()
    any_key: bool = False
    cookie_auth: bool = False
    problem: Callable[[Request, Problem], Response] = lambda request, problem: problem.response


def json_response(content: Any, status: int = 200) -> Response:
    """Return `content` as JSON."""
    return Response(msgspec.json.encode(content), status, API_HEADERS, "application/json")
