"""The application on Ray Serve's fast path: HAProxy in front of replicas that answer HTTP themselves."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lakehouse.errors import SettingsError, ShopSphereError
from lakehouse.project import Project
from pipelines.settings import Settings, business_settings, load_settings
from serve.application import MULTIPROCESS, Application
from serve.http.edges import DIRECT
from serve.http.keys import Keys
from serve.settings import ServeSettings, load_serve_settings

logger = logging.getLogger("shopsphere.serve")

FAST_PATH: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # by default each request's path and query, which may name a person, are sent to whatever listens on UDP 514
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/dev/null",
}
"""Must be in the environment before Ray starts. A factor of ten in requests per second; see docs/concepts/serving.md."""

OWN_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
"""Of HAProxy, beside the one that it serves on; by default the same for all that serve on a machine."""

BUSY_REQUESTS = 1_000


def check(serving: ServeSettings) -> None:
    """What must hold before anything listens. Raises SettingsError, ShopSphereError."""
    if not serving.loopback and not Keys.read(serving.keys).keys:
        raise _no_keys(serving)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ShopSphereError(
                f"{serving.host}:{serving.port} cannot be listened on ({error.strerror}). Choose another: --port, --host."
            ) from None


def node_environment() -> dict[str, str]:
    """What must be in the environment before Ray starts on a node that serves for itself: FAST_PATH, and free ports, so
    that others can serve on the same machine."""
    with contextlib.ExitStack() as probes:
        ports = []
        for _ in OWN_PORTS:
            probe = probes.enter_context(socket.socket())
            probe.bind(("", 0))
            ports.append(str(probe.getsockname()[1]))
    return {**FAST_PATH, **dict(zip(OWN_PORTS, ports, strict=True))}


def _no_keys(serving: ServeSettings) -> SettingsError:
    return SettingsError(
        f"Serving on {serving.host} needs API keys, and {serving.keys} has none. "
        "Make one: python -m app api-key NAME --scope inventory; or serve on 127.0.0.1."
    )


def environment(home: Path) -> dict[str, str]:
    """Variables of a replica's process beside those of its node, where all others are set: Ray shows these to whoever may
    look at the cluster, so no secret may be among them."""
    return {
        **FAST_PATH,
        "SHOPSPHERE_HOME": str(home),
        MULTIPROCESS: str(home / "serve" / "metrics"),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
        # frames of a row or two: threads for them cost more than they give
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
    }


class Direct:
    """Middleware in a replica's HTTP server, outside of Ray Serve's wrapper: that costs many times what a look-up does.

    What it does for a request (log line, metrics, an id, tasks that await a disconnect), the edges do. Ray Serve still
    starts the server, asks after its health, and drains it: what is under way is answered before the process ends.
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
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(DIRECT):
            await self.wrapped(scope, receive, send)
            return
        try:
            await self.application(scope, receive, send)
        except Exception:  # while the answer was sent: uvicorn's log is switched off in a replica
            logger.exception("an answer was cut off")
            raise


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its own application in a replica's HTTP server."""
    return [Middleware(Direct)]


class Replica:
    """One process with all of the state. Ray Serve makes it, asks after its health, and ends it."""

    def __init__(self, settings: Settings, serving: ServeSettings, keys: Keys, project: Project) -> None:
        """What was read where serving was started: this node may have neither the settings' nor the keys' file."""
        if directory := os.environ.get(MULTIPROCESS):
            _forget_dead(Path(directory))
        self.application = Application(settings, serving, business_settings(settings), keys, project=project)

    def __serve_build_asgi_app__(self) -> Any:
        return self.application.asgi()

    def check_health(self) -> None:
        """Called by Ray Serve; an error has it replaced."""
        self.application.check_health()


def build(project: Project, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the Ray Serve application. Settings come from the environment; `arguments` win over them."""
    from ray import serve as rayserve

    serving, settings = load_serve_settings(**dict(arguments or {})), load_settings()
    keys = Keys.read(serving.keys)
    if not serving.loopback and not keys.keys:
        raise _no_keys(serving)
    home = Path(settings.home).absolute()
    (home / "serve" / "metrics").mkdir(parents=True, exist_ok=True)
    deployment: Any = rayserve.deployment(
        rayserve.ingress()(Replica),
        name="shopsphere",
        num_replicas=serving.replicas,
        max_ongoing_requests=BUSY_REQUESTS,
        graceful_shutdown_timeout_s=serving.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": serving.replica_cpus, "runtime_env": {"env_vars": environment(home)}},
    )
    return deployment.bind(settings, serving, keys, project)


def _forget_dead(directory: Path) -> None:
    """Gauges of processes that are no more would be told for ever."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("gauge_live*_*.db"):
        number = file.stem.rpartition("_")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            file.unlink(missing_ok=True)


def clear_metrics(home: Path) -> None:
    """Metrics of an earlier serving."""
    shutil.rmtree(home / "serve" / "metrics", ignore_errors=True)
