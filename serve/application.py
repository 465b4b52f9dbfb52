"""All endpoints as one Starlette application, with the state that they answer from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
from serve.api.fraud import SETTLE, Fraud
from serve.api.inventory import Inventory
from serve.api.openapi import describe
from serve.http.edges import LATER, MULTIPROCESS, REJECTED, STALENESS, AccessLog, ApiRequest, Edge, Endpoint, Gate, Routes, answer
from serve.http.keys import Keys
from serve.http.problems import Problem, busy
from serve.pages.pages import Page
from serve.settings import ServeSettings
from serve.state.lake_snapshot import StateError
from serve.state.models import ModelWatch
from serve.state.online_state import OnlineState
from serve.state.score_topic import ScoreLog
from serve.state.table_cache import TableCache
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")

VERSION = "1"
TICK_SECONDS = 0.5


class Application:
    """What a replica is made of."""

    def __init__(
        self,
        settings: Settings,
        serving: ServeSettings,
        context: BusinessSettings,
        keys: Keys | None = None,
        *,
        project: Project,
    ) -> None:
        """keys: None: those of the settings' file. project: its tables are shown on the freshness page."""
        self.project = project
        self._keys = keys
        self.settings, self.serving = settings, serving
        self.state = OnlineState(settings, serving, context, self._on_line)
        self.lookups = Gate("lookup", serving.lookup_threads, serving.lookup_queue)
        self.asking = Gate("sources", 1, serving.lookup_queue)
        self._began = 0.0
        self.log = AccessLog(Path(settings.home) / "logs" / f"access-{os.getpid()}.jsonl")
        self.inventory = Inventory(self.state, self.lookups)
        self.snapshots = TableCache(Lake(settings))
        self.scoring = Gate("scoring", 1, serving.scoring_queue)
        self.watch = ModelWatch(Registry(home=Path(settings.home)), serving.model_seconds)
        self.fraud = Fraud(serving, context, self.snapshots, self.inventory, self.watch, self.scoring)
        self.scores = ScoreLog(settings.kafka, serving.scores_topic, self.fraud.heard)
        self.fraud.log = self.scores
        self.customers = Customers(self.snapshots, self.lookups, settings.default_region, settings.base_currency)

    def _on_line(self, line: TopicFollower) -> None:
        """A newer snapshot is about to answer."""
        self.fraud.refresh(line)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Everything that can be asked."""
        return (*self.fraud.endpoints, *self.inventory.endpoints, *self.customers.endpoints, *self._own)

    @property
    def _own(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint("GET", "/-/healthz", "healthz", "Whether the process lives.", self._healthz, str, media_type="text/plain"),
            Endpoint(
                "GET",
                "/-/readyz",
                "readyz",
                "Whether it has something to answer with.",
                self._readyz,
                str,
                media_type="text/plain",
                statuses=(503,),
            ),
            Endpoint("GET", "/-/metrics", "metrics", "Prometheus metrics.", self._metrics, str, media_type="text/plain"),
            Endpoint("GET", "/openapi.json", "openapi", "This description.", self._openapi, dict),
        )

    async def _healthz(self, asked: ApiRequest) -> Response:
        return PlainTextResponse("alive\n")

    async def _readyz(self, asked: ApiRequest) -> Response:
        if missing := self.missing:
            raise busy(503, missing, 2)
        return PlainTextResponse("ready\n")

    async def _metrics(self, asked: ApiRequest) -> Response:
        self.log.flush()
        registry = REGISTRY
        if MULTIPROCESS in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def _openapi(self, asked: ApiRequest) -> Response:
        return answer(describe(self.endpoints, VERSION))

    async def _tick(self) -> None:
        """What is done every half second: gauges, and the lines of the access log."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.log.flush()
            if self.state.ready.is_set():
                line = self.state.line
                STALENESS.set(self.state.freshness(line).staleness_ms / 1000)
                LATER.set(line.stock.later.height)
                REJECTED.set(line.stock.rejected)

    def _hear(self) -> None:
        """Scores whose answer may be asked for again, or whose order the lakehouse may not have."""
        since = datetime.now(UTC) - timedelta(seconds=self.serving.same_answer_seconds)
        has = self.snapshots.of(ORDERS_UNIFIED).at
        self.scores.start(min(since, has - SETTLE) if has is not None else since)

    async def _refresh(self) -> None:
        """Orders and labels that the lakehouse has learned of."""
        while True:
            await asyncio.sleep(self.serving.refresh_seconds)
            try:
                if self.state.ready.is_set():
                    await asyncio.to_thread(self.fraud.refresh)
            except Exception:
                logger.exception("reading the orders failed; those known before go on serving")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The state is followed while the application runs."""
        self._began = time.monotonic()
        self.state.start()
        self.watch.start()
        await asyncio.to_thread(self._hear)
        # Ray Serve sends requests as soon as this is over
        await self._until_ready()
        beside = [asyncio.create_task(self._tick()), asyncio.create_task(self._refresh())]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
            await asyncio.to_thread(self.close)

    @property
    def missing(self) -> str | None:
        """What it waits for before it should be asked."""
        if not self.state.ready.is_set():
            return self.state.error or "The state is being read."
        if not self.watch.looked.is_set():
            return "The models are being loaded."
        if not self.scores.caught_up.is_set() and time.monotonic() - self._began < self.serving.start_seconds:
            return "The scores of other replicas are being read."
        return None

    async def _until_ready(self) -> None:
        """Wait, not for ever: what cannot become ready says so at /-/readyz and in each answer."""
        while self.missing is not None and time.monotonic() - self._began < self.serving.start_seconds * 2:
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Raises when the thread that follows the snapshots is gone: only a new process helps then."""
        if not self.state.alive:
            raise StateError(self.state.error or "The state is not followed any more.")

    def close(self) -> None:
        """End what runs beside the requests, and write what is kept back."""
        self.lookups.close()
        self.asking.close()
        self.scoring.close()
        self.scores.stop()
        self.watch.stop()
        self.state.stop()
        self.log.flush()

    def asgi(self) -> Starlette:
        """The application. Raises SettingsError."""
        keys = Keys.read(self.serving.keys) if self._keys is None else self._keys
        page = Page(
            Lake(self.settings), self.project, self.customers, self.inventory, self.fraud, self.lookups, self.asking, keys
        )

        async def unknown(request: Request, error: Exception) -> Response:
            problem = _unknown(error)
            return page.problem(request, problem) if "text/html" in request.headers.get("accept", "") else problem.response

        return Routes(
            [Edge(one, keys, self.log) for one in (*self.endpoints, *page.endpoints)],
            lifespan=self.lifespan,
            exception_handlers={HTTPException: unknown},
        )


def _unknown(error: Exception) -> Problem:
    assert isinstance(error, HTTPException)
    detail = {404: "There is nothing at this path; /openapi.json lists what there is.", 405: "This path has other methods."}
    return Problem(error.status_code, detail.get(error.status_code, "This cannot be done."), headers=error.headers)
