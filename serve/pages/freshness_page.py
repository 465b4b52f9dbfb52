"""The freshness page: the online state, the state of every table, expectations and runs."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from starlette.responses import Response

from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project
from lakehouse.run_history import PastRun, past_runs
from lakehouse.status import TableStatus, statuses
from serve.api.inventory import Inventory
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest
from serve.http.problems import Problem
from serve.pages.renderer import Renderer

MAX_RUNS = 10
STATUS_SECONDS = 10.0
"""How long the state of the tables is cached: determining it queries every source."""


class FreshnessPage:
    """The page about freshness."""

    def __init__(
        self, *, lake: Lake, project: Project, inventory: Inventory, pool: BoundedThreadPool, renderer: Renderer
    ) -> None:
        """pool: one of its own, since a source that does not answer must not block look-ups."""
        self.lake, self.project = lake, project
        self.inventory, self.pool, self.renderer = inventory, pool, renderer
        self._cached: tuple[float, tuple[datetime, list[TableStatus], list[PastRun]]] | None = None

    async def freshness(self, request: ApiRequest) -> Response:
        """Show how far behind the online state and the tables are."""
        checked_at, tables, runs = await self.pool.run(self._status)
        basis, not_ready = None, None
        try:
            basis = self.inventory.basis(await self.inventory.follower(request))
        except Problem as problem:
            not_ready = problem.detail
        return self.renderer.page(
            request,
            "freshness.html",
            "freshness",
            checked_at=checked_at,
            tables=tables,
            runs=runs,
            basis=basis,
            not_ready=not_ready,
        )

    def _status(self) -> tuple[datetime, list[TableStatus], list[PastRun]]:
        """Return when the state was determined, the tables, and the newest runs."""
        cached = self._cached
        if cached is None or time.monotonic() - cached[0] > STATUS_SECONDS:
            status = (datetime.now(UTC), statuses(self.lake, self.project), past_runs(self.lake, MAX_RUNS))
            self._cached = cached = (time.monotonic(), status)
        return cached[1]
