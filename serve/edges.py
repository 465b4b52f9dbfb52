"""What stands between the network and the answers: declared endpoints, keys, limits, back-pressure, access log, metrics."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import logging.handlers
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from polars.exceptions import PanicException
from prometheus_client import Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from serve.keys import Keys, Scope
from serve.problems import Problem, bad_body, bad_field, busy

logger = logging.getLogger("shopsphere.serve")
T = TypeVar("T")

COOKIE = "shopsphere_key"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"

if directory := os.environ.get(MULTIPROCESS):
    # declaring a metric opens its file, and a replica's node may be another than the one where serving was started
    Path(directory).mkdir(parents=True, exist_ok=True)

LATENCY = Histogram(
    "shopsphere_request_seconds",
    "Time from a request's arrival to the end of its answer",
    ("route", "status"),
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
STALENESS = Gauge("shopsphere_staleness_seconds", "How long ago the state was complete", multiprocess_mode="livemax")
LATER = Gauge("shopsphere_events_after_snapshot", "Events kept since the snapshot", multiprocess_mode="livemax")
REJECTED = Gauge("shopsphere_rejected_messages", "Messages after the snapshot that are no events", multiprocess_mode="livemax")
DECISIONS = Counter("shopsphere_decisions", "Scored orders", ("role", "version", "decision"))
UNKEPT = Counter("shopsphere_scores_not_kept", "Scores that could not be written to their topic")


@dataclass(frozen=True)
class Parameter:
    """A query parameter; `read` gives its value or raises ValueError saying what is expected."""

    name: str
    doc: str
    read: Callable[[str], Any] = str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    example: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """One thing that can be asked: its route, and all that the description at /openapi.json says of it.

    scope       what a key must open; None: everybody may ask
    body        type of the JSON body; limit: its greatest size in bytes
    statuses    that it can answer besides those of its scope and body
    keyed       a key is needed, whatever it opens
    browser     the key may come in the cookie that the page sets: only for what changes nothing
    problem     how a problem is shown
    """

    method: str
    path: str
    name: str
    doc: str
    handler: Callable[[Asked], Awaitable[Response]]
    answer: type
    scope: Scope | None = None
    parameters: tuple[Parameter, ...] = ()
    path_example: Mapping[str, str] = field(default_factory=dict)
    body: type | None = None
    limit: int = 0
    body_example: Any = None
    answer_example: Any = None
    media_type: str = "application/json"
    statuses: tuple[int, ...] = ()
    keyed: bool = False
    browser: bool = False
    problem: Callable[[Request, Problem], Response] = lambda request, problem: problem.response


@dataclass(frozen=True)
class Asked:
    """A request that has passed the edges."""

    request: Request
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any


def authorization(request: Request, browser: bool) -> str:
    """What a request shows to be let in: its Authorization header; of a browser, which cannot set it, the page's cookie."""
    shown = request.headers.get("authorization", "")
    return shown or (f"Bearer {request.cookies[COOKIE]}" if browser and COOKIE in request.cookies else "")


def answer(content: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


LINES = 1_000
"""Of the access log, kept back at most."""


class AccessLog:
    """One JSON line a request: the route's pattern, never the path or query, which may name a person.

    Lines are kept back and written together: a write for each would cost more than a look-up.
    """

    def __init__(self, file: Path | None) -> None:
        self._lines: list[str] = []
        self._file: logging.Handler | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = logging.handlers.RotatingFileHandler(file, maxBytes=64 << 20, backupCount=3)

    def write(self, **told: Any) -> None:
        """Note a request."""
        if self._file is not None:
            self._lines.append(msgspec.json.encode(told).decode())
            if len(self._lines) >= LINES:
                self.flush()

    def flush(self) -> None:
        """Write what is kept back."""
        if self._file is not None and self._lines:
            lines, self._lines = self._lines, []
            self._file.handle(logging.makeLogRecord({"msg": "\n".join(lines)}))


LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Edge:
    """An endpoint behind its edges, as an ASGI application."""

    def __init__(self, endpoint: Endpoint, keys: Keys, log: AccessLog) -> None:
        self.endpoint, self.keys, self.log = endpoint, keys, log
        self._decoder: msgspec.json.Decoder[Any] | None = None
        if endpoint.body is not None:
            self._decoder = msgspec.json.Decoder(endpoint.body)
        self._parameters = {one.name: one for one in endpoint.parameters}
        self._ok = LATENCY.labels(endpoint.path, "200")

    @property
    def route(self) -> Route:
        """For Starlette."""
        return Route(self.endpoint.path, self, methods=[self.endpoint.method], name=self.endpoint.name)

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        """Serve one request."""
        began = time.perf_counter()
        request, key = Request(connection, receive), ""
        try:
            key = self._allowed(request)
            asked = Asked(request, connection["path_params"], self._query(request), await self._body(request))
            response = await self.endpoint.handler(asked)
        except Problem as problem:
            response = self.endpoint.problem(request, problem)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            number = uuid.uuid4().hex[:12]
            logger.exception("%s %s failed (%s)", self.endpoint.method, self.endpoint.path, number)
            unknown = Problem(500, f"Something is wrong here; the log says more under {number}.")
            response = self.endpoint.problem(request, unknown)
        status = response.status_code
        try:
            await response(connection, receive, send)
        finally:
            seconds = time.perf_counter() - began
            (self._ok if status == 200 else LATENCY.labels(self.endpoint.path, str(status))).observe(seconds)
            self.log.write(
                at=round(time.time(), 3),
                method=self.endpoint.method,
                route=self.endpoint.path,
                status=status,
                ms=round(seconds * 1000, 2),
                key=key,
            )

    def _allowed(self, request: Request) -> str:
        if self.endpoint.scope is None and not self.endpoint.keyed:
            return ""
        if self.keys.keys:
            return self.keys.check(authorization(request, self.endpoint.browser), self.endpoint.scope)
        # replicas listen on ports of their own: without keys nobody from elsewhere may use those either
        if request.client is not None and not _is_loopback(request.client.host):
            raise Problem(403, "Without API keys only this machine is answered.")
        # a web page elsewhere can point a name of its own at this machine, and would then be let in by the browser
        host = request.headers.get("host", "")
        if host and (urlsplit(f"//{host}").hostname or "") not in LOCAL_NAMES:
            raise Problem(403, "Without API keys only http://localhost and http://127.0.0.1 are answered.")
        return ""

    def _query(self, request: Request) -> dict[str, Any]:
        read: dict[str, Any] = {}
        if not request.scope["query_string"]:
            return read
        for name, text in request.query_params.multi_items():
            parameter = self._parameters.get(name)
            if parameter is None:
                there = ", ".join(self._parameters) or "none"
                raise bad_field("query", f"has a parameter that is not known here; known are: {there}")
            if name in read:
                raise bad_field(name, "is there twice")
            try:
                read[name] = parameter.read(text)
            except ValueError as error:
                raise bad_field(name, str(error)) from None
        return read

    async def _body(self, request: Request) -> Any:
        if self._decoder is None:
            return None
        limit = self.endpoint.limit
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "The body must be application/json.")
        length = request.headers.get("content-length", "")
        body = bytearray()
        if length.isdigit() and int(length) > limit:
            raise Problem(413, f"The body is larger than {limit} bytes.")
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise Problem(413, f"The body is larger than {limit} bytes.")
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if "got `float`" in str(error):
                return _with_whole_numbers(body, self._decoder.type)
            raise bad_body(error) from None
        except RecursionError:
            raise bad_field("body", "is nested too deeply") from None


class Gate:
    """Runs work that takes long in a few threads; when too many wait, they are told to come again."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threads + queue
        self._inside = 0

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result. Raises Problem 429."""
        if self._inside >= self._room:
            raise busy(429, "Too many requests are waiting.")
        self._inside += 1
        try:
            work = functools.partial(unpanicked, function, *arguments)
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Wait for what runs."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _with_whole_numbers(body: bytes | bytearray, kind: Any) -> Any:
    """A body that writes whole numbers as 1.0, which JSON does not tell from 1. Raises Problem."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(one) for name, one in value.items()}
        if isinstance(value, list):
            return [whole(one) for one in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    try:
        return msgspec.convert(whole(msgspec.json.decode(body)), kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_body(error) from None
    except RecursionError:
        raise bad_field("body", "is nested too deeply") from None


def unpanicked(function: Callable[..., T], *arguments: Any) -> T:
    """A panic of polars is no Exception: it would end the process's event loop."""
    try:
        return function(*arguments)
    except PanicException as error:
        raise RuntimeError(f"polars panicked: {error}") from None


@functools.lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
