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
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec
from polars.exceptions import PanicException
from prometheus_client import Counter, Gauge, Histogram
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from serve.http.keys import Keys, Scope
from serve.http.problems import Problem, bad_body, bad_field, busy

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
    handler: Callable[[ApiRequest], Awaitable[Response]]
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
class ApiRequest:
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


LINES = 250
"""Of the access log, kept back at most."""


class Answer(NamedTuple):
    """A request that was answered. at: unix time; seconds: how long it took; key: the name of the key that it showed."""

    at: float
    method: str
    route: str
    status: int
    seconds: float
    key: str


class AccessLog:
    """One JSON line a request: the route's pattern, never the path or query, which may name a person.

    Requests are kept back, then written and counted in the metrics together: for each by itself that would cost as much
    as a look-up.
    """

    def __init__(self, file: Path) -> None:
        self._answered: list[Answer] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.handlers.RotatingFileHandler(file, maxBytes=64 << 20, backupCount=3)

    def write(self, answered: Answer) -> None:
        """Note a request."""
        self._answered.append(answered)
        if len(self._answered) >= LINES:
            self.flush()

    def flush(self) -> None:
        """Write and count what is kept back."""
        if not self._answered:
            return
        answered, self._answered = self._answered, []
        for one in answered:
            _latency(one.route, one.status).observe(one.seconds)
        self._file.handle(logging.makeLogRecord({"msg": b"\n".join(map(_line, answered)).decode()}))


@functools.lru_cache(maxsize=1024)
def _latency(route: str, status: int) -> Histogram:
    return LATENCY.labels(route, str(status))


def _line(one: Answer) -> bytes:
    told = {"at": round(one.at, 3), "method": one.method, "route": one.route, "status": one.status}
    return msgspec.json.encode({**told, "ms": round(one.seconds * 1000, 2), "key": one.key})


DIRECT = "/v1/"
"""Where what programs ask for is: the paths on which every microsecond counts."""


class Routes(Starlette):
    """Starlette, but a request to an endpoint below /v1/ is found by a look into a dictionary.

    Starlette tries one pattern after the other, behind layers of its own: half of what such a request costs. Whatever is
    not found here (another method, HEAD, another path) is Starlette's.
    """

    def __init__(self, edges: Iterable[Edge], **options: Any) -> None:
        every = tuple(edges)
        super().__init__(routes=[one.route for one in every], **options)
        self._whole: dict[tuple[str, str], Edge] = {}
        self._start: dict[tuple[str, str], tuple[Edge, str]] = {}
        for edge in every:
            method, path = edge.endpoint.method, edge.endpoint.path
            start, _, last = path.rpartition("/")
            if path.startswith(DIRECT) and "{" not in path:
                self._whole[method, path] = edge
            elif path.startswith(DIRECT) and "{" not in start:
                self._start[method, start] = edge, last.strip("{}")

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serve one request."""
        edge = self._direct(scope) if scope["type"] == "http" else None
        await (super().__call__ if edge is None else edge)(scope, receive, send)

    def _direct(self, scope: Connection) -> Edge | None:
        method, path = scope["method"], scope["path"]
        edge, parameters = self._whole.get((method, path)), {}
        if edge is None:
            start, _, last = path.rpartition("/")
            edge, name = self._start.get((method, start), (None, ""))
            parameters = {name: last}
            if not last:
                return None
        if edge is not None:
            scope["path_params"] = parameters
        return edge


LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Edge:
    """An endpoint behind its edges, as an ASGI application."""

    def __init__(self, endpoint: Endpoint, keys: Keys, log: AccessLog) -> None:
        self.endpoint, self.keys, self.log = endpoint, keys, log
        self._decoder: msgspec.json.Decoder[Any] | None = None
        if endpoint.body is not None:
            self._decoder = msgspec.json.Decoder(endpoint.body)
        self._parameters = {one.name: one for one in endpoint.parameters}

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
            asked = ApiRequest(request, connection["path_params"], self._query(request), await self._body(request))
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
            self.log.write(Answer(time.time(), self.endpoint.method, self.endpoint.path, status, seconds, key))

    def _allowed(self, request: Request) -> str:
        if self.endpoint.scope is None and not self.endpoint.keyed:
            return ""
        if self.keys.keys:
            return self.keys.check(authorization(request, self.endpoint.browser), self.endpoint.scope)
        # replicas listen on ports of their own: without keys nobody from elsewhere may use those either
        client = request.scope.get("client")
        if client is not None and not _is_loopback(client[0]):
            raise Problem(403, "Without API keys only this machine is answered.")
        # a web page elsewhere can point a name of its own at this machine, and would then be let in by the browser
        if not _is_local_name(request.headers.get("host", "")):
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
def _is_local_name(host: str) -> bool:
    try:
        return not host or (urlsplit(f"//{host}").hostname or "") in LOCAL_NAMES
    except ValueError:  # a bracket too many
        return False


@functools.lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
