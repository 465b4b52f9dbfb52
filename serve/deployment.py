"""The application on Ray Serve's fast path: HAProxy in front of replicas that answer HTTP themselves."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lakehouse.errors import SettingsError
from lakehouse.local_access import close_to_other_users
from lakehouse.project import Project
from pipelines.settings import Settings, business_settings, load_settings
from serve.application import Application
from serve.http.keys import Keys
from serve.http.metrics import MULTIPROCESS_VARIABLE
from serve.http.router import API_PREFIX
from serve.node import FAST_PATH, check_address
from serve.settings import ServeSettings, load_serve_settings

logger = logging.getLogger("shopsphere.serve")

MAX_ONGOING_REQUESTS = 1_000


def check(serving: ServeSettings) -> None:
    """Check the API keys and that the address is free before serving starts. Raises SettingsError, ShopSphereError."""
    if not Keys.read(serving.keys, named=serving.keys_named).keys and not serving.loopback:
        raise _no_keys(serving)
    check_address(serving.host, serving.port)


def _no_keys(serving: ServeSettings) -> SettingsError:
    return SettingsError(
        f"Serving on {serving.host} requires API keys, and {serving.keys} has none. "
        "Create one with: python -m app api-key NAME --scope inventory. Or serve on 127.0.0.1."
    )


def environment(home: Path) -> dict[str, str]:
    """Return the variables of a replica's process that differ from its node's.

    Ray shows them to everyone who can view the cluster, so they must not contain secrets.
    """
    return {
        **FAST_PATH,
        "SHOPSPHERE_HOME": str(home),
        MULTIPROCESS_VARIABLE: str(home / "serve" / "metrics"),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
        # for frames of a row or two, threads cost more than they gain
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
    }


class BypassRayServe:
    """Middleware in a replica's HTTP server that passes API requests around Ray Serve's wrapper, which costs many times as
    much as a look-up.

    What the wrapper does for a request (access log, metrics, disconnects), EndpointApp does. Ray Serve still starts the
    server, health-checks it and drains it: requests in flight are answered before the process ends.
    """

    def __init__(self, wrapped: ASGIApp) -> None:
        self.wrapped = wrapped

    @functools.cached_property
    def application(self) -> ASGIApp:
        """The application of this process's replica."""
        from ray import serve as rayserve

        replica: Any = rayserve.get_replica_context().servable_object
        return replica.app  # type: ignore[no-any-return]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith(API_PREFIX):
            await self.wrapped(scope, receive, send)
            return
        try:
            await self.application(scope, receive, send)
        except Exception:  # while the response was being sent; uvicorn's own log is disabled in a replica
            logger.exception("Sending a response failed")
            raise


def middlewares() -> list[Middleware]:
    """Return the middleware that Ray Serve adds to a replica's HTTP server."""
    return [Middleware(BypassRayServe)]


class Replica:
    """A process with the whole state, which Ray Serve starts, health-checks and stops."""

    def __init__(self, settings: Settings, serving: ServeSettings, keys: Keys, project: Project) -> None:
        """settings, keys: as read on the node that started serving; this node may have neither file."""
        close_to_other_users(Path(settings.home))
        if directory := os.environ.get(MULTIPROCESS_VARIABLE):
            _remove_metrics_of_dead_processes(Path(directory))
        self.application = Application(settings, serving, business_settings(settings), keys, project=project)

    def __serve_build_asgi_app__(self) -> Any:
        return self.application.asgi()

    def check_health(self) -> None:
        """Raise when the replica must be replaced; called by Ray Serve."""
        self.application.check_health()


def build(project: Project, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the Ray Serve application. Settings come from the environment; `arguments` override them."""
    from ray import serve as rayserve

    serving, settings = load_serve_settings(**dict(arguments or {})), load_settings()
    keys = Keys.read(serving.keys, named=serving.keys_named)
    if not serving.loopback and not keys.keys:
        raise _no_keys(serving)
    home = Path(settings.home).absolute()
    (home / "serve" / "metrics").mkdir(parents=True, exist_ok=True)
    deployment: Any = rayserve.deployment(
        rayserve.ingress()(Replica),
        name="shopsphere",
        num_replicas=serving.replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=serving.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": serving.replica_cpus, "runtime_env": {"env_vars": environment(home)}},
    )
    return deployment.bind(settings, serving, keys, project)


def _remove_metrics_of_dead_processes(directory: Path) -> None:
    """Remove gauges of processes that no longer run, which would otherwise be reported forever."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("gauge_live*_*.db"):
        number = file.stem.rpartition("_")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            file.unlink(missing_ok=True)


def clear_metrics(home: Path) -> None:
    """Remove the metrics of an earlier start."""
    shutil.rmtree(home / "serve" / "metrics", ignore_errors=True)
