"""Routing: each endpoint is an ASGI application that authenticates, validates, answers and logs a request."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve.http.access_log import AccessLog, AccessRecord
from serve.http.authentication import authenticate, client_address
from serve.http.cross_site import refuse_cross_site
from serve.http.endpoints import ApiRequest, Endpoint
from serve.http.keys import Keys
from serve.http.problems import Problem
from serve.http.request_parsing import read_body, read_query

logger = logging.getLogger("shopsphere.serve")

API_PREFIX = "/v1/"
"""Paths of the API, on which every microsecond counts."""
CLIENT_CLOSED_REQUEST = 499


class EndpointApp:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, keys: Keys, log: AccessLog) -> None:
        self.endpoint, self.keys, self.log = endpoint, keys, log
        self._decoder: msgspec.json.Decoder[Any] | None = None
        if endpoint.body is not None:
            self._decoder = msgspec.json.Decoder(endpoint.body)
        self._parameters = {parameter.name: parameter for parameter in endpoint.parameters}

    @property
    def route(self) -> Route:
        """The endpoint as a Starlette route."""
        return Route(self.endpoint.path, self, methods=[self.endpoint.method], name=self.endpoint.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and log it."""
        started = time.perf_counter()
        request, key = Request(scope, receive), ""
        try:
            if self.endpoint.method != "GET":
                refuse_cross_site(request)
            key = authenticate(request, self.endpoint, self.keys)
            query = read_query(request, self._parameters)
            body = await read_body(request, self._decoder, self.endpoint.body_limit) if self._decoder is not None else None
            response = await self.endpoint.handler(ApiRequest(request, scope["path_params"], query, body))
        except Problem as problem:
            response = self.endpoint.problem(request, problem)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            logger.exception("%s %s failed (error %s)", self.endpoint.method, self.endpoint.path, error_id)
            failure = Problem(500, f"Internal server error. The server's log has the details under {error_id}.")
            response = self.endpoint.problem(request, failure)
        status = response.status_code
        try:
            await response(scope, receive, send)
        finally:
            seconds = time.perf_counter() - started
            method, path = self.endpoint.method, self.endpoint.path
            self.log.write(AccessRecord(time.time(), method, path, status, seconds, key, client_address(request)))


class Router(Starlette):
    """Starlette with a dictionary look-up for endpoints below API_PREFIX.

    Starlette tries one pattern after the other, behind its middleware: half of the cost of a request to the API. A request
    without an entry in the dictionaries (another method, HEAD, another path) is left to Starlette.
    """

    def __init__(self, endpoints: Iterable[EndpointApp], **options: Any) -> None:
        apps = tuple(endpoints)
        super().__init__(routes=[app.route for app in apps], **options)
        self._by_path: dict[tuple[str, str], EndpointApp] = {}
        self._by_parent: dict[tuple[str, str], tuple[EndpointApp, str]] = {}
        for app in apps:
            method, path = app.endpoint.method, app.endpoint.path
            parent, _, last = path.rpartition("/")
            if path.startswith(API_PREFIX) and "{" not in path:
                self._by_path[method, path] = app
            elif path.startswith(API_PREFIX) and "{" not in parent:
                self._by_parent[method, parent] = app, last.strip("{}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        app = self._look_up(scope) if scope["type"] == "http" else None
        await (super().__call__ if app is None else app)(scope, receive, send)

    def _look_up(self, scope: Scope) -> EndpointApp | None:
        """Return the endpoint of an API request and set its path parameters; None: leave it to Starlette."""
        method, path = scope["method"], scope["path"]
        app, parameters = self._by_path.get((method, path)), {}
        if app is None:
            parent, _, last = path.rpartition("/")
            app, name = self._by_parent.get((method, parent), (None, ""))
            parameters = {name: last}
            if not last:
                return None
        if app is not None:
            scope["path_params"] = parameters
        return app
