"""The commands about serving: serve, api-key."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from app.cli.output import Output
from lakehouse.errors import ShopSphereError
from lakehouse.settings import RaySettings
from pipelines.settings import load_settings

START_SECONDS = 120.0
SCOPE_HELP = "What it opens: score, inventory, customers (personal data); several times for several"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback API keys are required")] = "",
    port: Annotated[int, typer.Option(help="Port to listen on")] = 0,
    replicas: Annotated[int, typer.Option(help="Processes that answer")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text")] = False,
) -> None:
    """Answer over HTTP until SIGTERM or Ctrl-C: stock, customers, fraud scores."""
    from serve.deployment import check, clear_metrics, node_environment
    from serve.settings import load_serve_settings

    given = {"host": host or None, "port": port or None, "replicas": replicas or None}
    arguments = {name: value for name, value in given.items() if value is not None}
    serving, settings, output = load_serve_settings(**arguments), load_settings(), Output(json)
    check(serving)
    for name, value in node_environment().items():
        os.environ.setdefault(name, value)
    clear_metrics(Path(settings.home).absolute())
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    address = f"http://{serving.host}:{serving.port}"
    try:
        with _served(settings.ray, serving.host, serving.port, arguments):
            # Ray has put its own in the place of ours
            for number in previous:
                signal.signal(number, on_signal)
            _wait_ready(address, stop)
            if not stop.is_set():
                said = f"Serving on {address}; description: {address}/openapi.json"
                output.json({"address": address}) if json else output.say(said)
            stop.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _served(ray: RaySettings, host: str, port: int, arguments: Mapping[str, object]) -> Iterator[None]:
    from app.serving import build
    from lakehouse.parallel import TaskPool

    pool = TaskPool(ray)
    pool.start()
    from ray import serve as rayserve

    try:
        rayserve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, "request_timeout_s": None})
        rayserve.run(build(arguments), name="shopsphere", route_prefix="/", blocking=False)
        yield
        # what is under way is answered before anything is taken down
        rayserve.delete("shopsphere")
    finally:
        rayserve.shutdown()  # type: ignore[no-untyped-call]
        pool.close()


def _wait_ready(address: str, stop: threading.Event) -> None:
    until = time.monotonic() + START_SECONDS
    told = ""
    while not stop.is_set():
        try:
            with urllib.request.urlopen(f"{address}/-/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
        except OSError as error:
            told = str(error)
        if time.monotonic() > until:
            raise ShopSphereError(f"Nothing answers at {address} after {START_SECONDS:.0f} s: {told[:300]}")
        stop.wait(0.2)


def api_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; a key of that name is replaced")],
    scope: Annotated[list[str], typer.Option(help=SCOPE_HELP)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text")] = False,
) -> None:
    """Make an API key. It is shown once; only its hash is stored. Serving reads keys when it starts."""
    from serve.http.keys import SCOPES, Keys
    from serve.settings import load_serve_settings

    if unknown := [one for one in scope if one not in SCOPES]:
        raise ShopSphereError(f"There is no scope '{unknown[0]}'. Scopes: {', '.join(SCOPES)}.")
    file = load_serve_settings().keys
    text = Keys.read(file).add(file, name, tuple(one for one in SCOPES if one in scope))
    output = Output(json)
    output.json({"name": name, "key": text, "file": str(file)}) if json else output.say(text)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("serve")(serve)
    app.command("api-key")(api_key)
