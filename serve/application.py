"""The HTTP application of a replica: all endpoints and pages, and the online state behind them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, multiprocess
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project
from ml.registry import Registry
from pipelines.settings import BusinessSettings, Settings
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from serve.api.customers import Customers
from serve.api.fraud import Fraud
from serve.api.inventory import Inventory
from serve.api.openapi import describe
from serve.http.access_log import AccessLog
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest, Endpoint
from serve.http.keys import Keys
from serve.http.metrics import EVENTS_AFTER_SNAPSHOT, MULTIPROCESS_VARIABLE, REJECTED_MESSAGES, STALENESS
from serve.http.problems import API_HEADERS, Problem, retry_later
from serve.http.router import EndpointApp, Router
from serve.pages.site import Site
from serve.settings import ServeSettings
from serve.state.lake_snapshot import StateError
from serve.state.models import ModelWatcher
from serve.state.online_state import OnlineState
from serve.state.score_topic import ScoreTopic
from serve.state.scoring_state import LAKE_DELAY
from serve.state.table_cache import TableCache
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")

VERSION = "1"
TICK_SECONDS = 0.5
METRICS_SECONDS = 1.0
"""How long the rendered metrics are sent again: rendering takes milliseconds, and anybody with a key may ask."""
READY_POLL_SECONDS = 0.05
HTTP_ERRORS = {
    404: "This path does not exist. /openapi.json lists all paths.",
    405: "This path does not support this method.",
}


class Application:
    """A replica: its state, its background tasks and its endpoints."""

    def __init__(
        self,
        settings: Settings,
        serving: ServeSettings,
        context: BusinessSettings,
        keys: Keys | None = None,
        *,
        project: Project,
    ) -> None:
        """keys: None: read them from the file in the settings. project: its tables are listed on the freshness page."""
        self.project = project
        self._keys = Keys.read(serving.keys, named=serving.keys_named) if keys is None else keys
        self._keys.share_ended_sessions(Path(settings.home) / "serve" / "ended_sessions")
        self.settings, self.serving = settings, serving
        self.state = OnlineState(settings, serving, context, self._prepare_follower)
        self.lookup_pool = BoundedThreadPool("lookup", serving.lookup_threads, serving.lookup_queue)
        self.status_pool = BoundedThreadPool("sources", 1, serving.lookup_queue)
        self._started = 0.0
        self._metrics_text, self._metrics_until = b"", 0.0
        self.log = AccessLog(Path(settings.home) / "logs" / f"access-{os.getpid()}.jsonl")
        self.inventory = Inventory(self.state, self.lookup_pool)
        self.tables = TableCache(Lake(settings))
        self.scoring_pool = BoundedThreadPool("scoring", 1, serving.scoring_queue)
        self.models = ModelWatcher(Registry(home=Path(settings.home)), serving.model_seconds)
        self.fraud = Fraud(
            serving=serving,
            context=context,
            tables=self.tables,
            state=self.state,
            models=self.models,
            pool=self.scoring_pool,
        )
        self.scores = ScoreTopic(settings.kafka, serving.scores_topic, self.fraud.add_score)
        self.fraud.topic = self.scores
        self.customers = Customers(self.tables, self.lookup_pool, settings.default_region, settings.base_currency)

    def _prepare_follower(self, follower: TopicFollower) -> None:
        """Rebuild the scoring state before a follower of a newer snapshot starts to answer."""
        self.fraud.refresh(follower)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints in /openapi.json."""
        return (*self.fraud.endpoints, *self.inventory.endpoints, *self.customers.endpoints, *self._own_endpoints)

    @property
    def _own_endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                method="GET",
                path="/-/healthz",
                name="healthz",
                doc="Liveness: the process runs.",
                handler=self._healthz,
                answer=str,
                media_type="text/plain",
            ),
            Endpoint(
                method="GET",
                path="/-/readyz",
                name="readyz",
                doc="Readiness: the state is loaded.",
                handler=self._readyz,
                answer=str,
                media_type="text/plain",
                statuses=(503,),
            ),
            Endpoint(
                method="GET",
                path="/-/metrics",
                name="metrics",
                doc="Prometheus metrics, at most a second old. With API keys, any key is required.",
                handler=self._metrics,
                answer=str,
                media_type="text/plain",
                any_key=True,
            ),
            Endpoint(
                method="GET",
                path="/openapi.json",
                name="openapi",
                doc="This OpenAPI document.",
                handler=self._openapi,
                answer=dict,
            ),
        )

    async def _healthz(self, request: ApiRequest) -> Response:
        return PlainTextResponse("alive\n")

    async def _readyz(self, request: ApiRequest) -> Response:
        if reason := self.not_ready_reason:
            raise retry_later(503, reason, 2)
        return PlainTextResponse("ready\n")

    async def _metrics(self, request: ApiRequest) -> Response:
        self.log.flush()
        if time.monotonic() >= self._metrics_until:
            self._metrics_until = time.monotonic() + METRICS_SECONDS
            self._metrics_text = await asyncio.to_thread(_render_metrics)
        return Response(self._metrics_text, 200, API_HEADERS, CONTENT_TYPE_LATEST)

    async def _openapi(self, request: ApiRequest) -> Response:
        return Response(self._description, 200, API_HEADERS, "application/json")

    @functools.cached_property
    def _description(self) -> bytes:
        return msgspec.json.encode(describe(self.endpoints, VERSION))

    async def _tick(self) -> None:
        """Every half second: update gauges and flush the access log."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.log.flush()
            self._keys.refresh()
            if self.state.ready.is_set():
                follower = self.state.follower
                STALENESS.set(self.state.freshness(follower).staleness_ms / 1000)
                EVENTS_AFTER_SNAPSHOT.set(follower.stock.later.height)
                REJECTED_MESSAGES.set(follower.stock.rejected)

    def _start_reading_scores(self) -> None:
        """Read scores that may have to be repeated, or whose order the lakehouse may not have yet."""
        since = datetime.now(UTC) - timedelta(seconds=self.serving.same_answer_seconds)
        committed = self.tables.get(ORDERS_UNIFIED).committed_at
        self.scores.start(min(since, committed - LAKE_DELAY) if committed is not None else since)

    async def _refresh(self) -> None:
        """Take over new orders and labels from the lakehouse."""
        while True:
            await asyncio.sleep(self.serving.refresh_seconds)
            try:
                if self.state.ready.is_set():
                    await asyncio.to_thread(self.fraud.refresh)
            except Exception:
                logger.exception("Reading orders from the lakehouse failed; scoring continues with the previous ones")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Maintain the state while the application runs."""
        self._started = time.monotonic()
        self.state.start()
        self.models.start()
        await asyncio.to_thread(self._start_reading_scores)
        # Ray Serve sends requests as soon as this returns
        await self._wait_until_ready()
        tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._refresh())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(self.close)

    @property
    def not_ready_reason(self) -> str | None:
        """Why the replica should not receive requests yet; None: it is ready."""
        if not self.state.ready.is_set():
            return self.state.error or "The online state is being loaded."
        if not self.models.first_check_done.is_set():
            return "The models are being loaded."
        if not self.scores.caught_up.is_set() and time.monotonic() - self._started < self.serving.start_seconds:
            return "The scores of other replicas are being read."
        return None

    async def _wait_until_ready(self) -> None:
        """Wait a limited time; a replica that cannot become ready reports the reason at /-/readyz and in each answer."""
        while self.not_ready_reason is not None and time.monotonic() - self._started < self.serving.start_seconds * 2:
            await asyncio.sleep(READY_POLL_SECONDS)

    def check_health(self) -> None:
        """Raise StateError when the thread that reads snapshots has died, which only a new process can fix."""
        if not self.state.alive:
            raise StateError(self.state.error or "The thread that reads snapshots of the lakehouse has died.")

    def close(self) -> None:
        """Stop all threads and flush what is buffered."""
        self.lookup_pool.close()
        self.status_pool.close()
        self.scoring_pool.close()
        self.scores.stop()
        self.models.stop()
        self.state.stop()
        self.log.flush()

    def asgi(self) -> Starlette:
        """Return the ASGI application. Raises SettingsError."""
        keys = self._keys
        site = Site(
            lake=Lake(self.settings),
            project=self.project,
            customers=self.customers,
            inventory=self.inventory,
            fraud=self.fraud,
            lookup_pool=self.lookup_pool,
            status_pool=self.status_pool,
            keys=keys,
        )

        async def http_error(request: Request, error: Exception) -> Response:
            problem = _http_problem(error)
            return site.problem(request, problem) if "text/html" in request.headers.get("accept", "") else problem.response

        return Router(
            [EndpointApp(endpoint, keys, self.log) for endpoint in (*self.endpoints, *site.endpoints)],
            lifespan=self.lifespan,
            exception_handlers={HTTPException: http_error},
        )


def _render_metrics() -> bytes:
    """Return the metrics of all replicas that share this node's directory, else of this process."""
    registry = REGISTRY
    if MULTIPROCESS_VARIABLE in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _http_problem(error: Exception) -> Problem:
    assert isinstance(error, HTTPException)
    detail = HTTP_ERRORS.get(error.status_code, "The request failed.")
    return Problem(error.status_code, detail, headers=error.headers)
