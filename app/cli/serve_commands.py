"""The commands of serving: serve, api-key."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output
from lakehouse.errors import ShopSphereError
from lakehouse.settings import RaySettings
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from serve.http.keys import Keys

START_SECONDS = 120.0
TLS_WARNING = (
    "warning: {host} is reachable from other machines, and serve does not encrypt. Keys and personal data must not cross a "
    "network in clear: put a reverse proxy with TLS in front (docs/how-to/serve-over-tls.md)."
)
MAX_DAYS = 36_500
SCOPE_HELP = "Scope of the key: score, inventory or customers (personal data); repeat the option for several"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback requires API keys")] = "",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: from the settings")] = 0,
    replicas: Annotated[int, typer.Option(help="Number of serving processes; 0: from the settings")] = 0,
    json: Json = False,
) -> None:
    """Serve inventory, customers and fraud scores over HTTP until SIGTERM or Ctrl-C."""
    from lakehouse.private_directory import private_directory
    from serve.deployment import check, clear_metrics
    from serve.node import reserved_node
    from serve.settings import load_serve_settings

    given = {"host": host or None, "port": port or None, "replicas": replicas or None}
    arguments = {name: value for name, value in given.items() if value is not None}
    serving, settings, output = load_serve_settings(**arguments), load_settings(), Output(json)
    if not serving.loopback:
        print(TLS_WARNING.format(host=serving.host), file=sys.stderr)
    directory = private_directory()  # stops what a killed instance has left on the port
    check(serving)
    clear_metrics(Path(settings.home).absolute())
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    address = f"http://{serving.host}:{serving.port}"
    try:
        with (
            reserved_node(directory) as environment,
            _environment(environment),
            _deployed(settings.ray, serving.host, serving.port, arguments),
        ):
            # starting Ray replaces the signal handlers
            for number in previous:
                signal.signal(number, on_signal)
            _wait_until_ready(address, stop)
            if not stop.is_set():
                line = f"Serving on {address}; API description: {address}/openapi.json"
                output.json({"address": address}) if json else output.say(line)
            stop.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, for the length of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _deployed(ray: RaySettings, host: str, port: int, arguments: Mapping[str, object]) -> Iterator[None]:
    """Run the Serve application for the length of the block, then let it answer its open requests and shut Ray down."""
    from app.serving import build
    from lakehouse.parallel import TaskPool

    pool = TaskPool(ray)
    pool.start()
    from ray import serve as rayserve

    try:
        rayserve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, "request_timeout_s": None})
        rayserve.run(build(arguments), name="shopsphere", route_prefix="/", blocking=False)
        yield
        # deleting the application first lets open requests finish
        rayserve.delete("shopsphere")
    finally:
        rayserve.shutdown()  # type: ignore[no-untyped-call]
        pool.close()


def _wait_until_ready(address: str, stop: threading.Event) -> None:
    """Wait until /-/readyz succeeds or `stop` is set. Raises ShopSphereError after START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    answer = ""
    while not stop.is_set():
        try:
            with urllib.request.urlopen(f"{address}/-/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
        except OSError as error:
            answer = str(error)
        if time.monotonic() > deadline:
            raise ShopSphereError(f"Serving on {address} is not ready after {START_SECONDS:.0f} s: {answer[:300]}")
        stop.wait(0.2)


def api_key(
    name: Annotated[str, typer.Argument(help="Name of the key's owner; replaces an existing key of that name")] = "",
    scope: Annotated[list[str] | None, typer.Option(help=SCOPE_HELP)] = None,
    days: Annotated[float | None, typer.Option(help="Days until the key expires; by default it does not")] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the key of that name")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the keys")] = False,
    json: Json = False,
) -> None:
    """Create, list or revoke API keys. A new key is shown once; only its hash is stored. Serving follows within a second."""
    from serve.http.keys import SCOPES, Keys
    from serve.settings import load_serve_settings

    output, file = Output(json), load_serve_settings().keys
    keys = Keys.read(file)
    if show:
        _print_keys(output, keys)
        return
    if not name:
        raise ShopSphereError("Name the owner of the key: python -m app api-key NAME --scope SCOPE. --list shows all keys.")
    if revoke:
        if not keys.revoke(file, name):
            raise ShopSphereError(f"{file} has no key named '{name}'. List the keys: python -m app api-key --list.")
        output.json({"name": name, "revoked": True}) if json else output.say(f"The key of '{name}' is revoked.")
        return
    if unknown := [one for one in scope or () if one not in SCOPES]:
        raise ShopSphereError(f"Scope '{unknown[0]}' does not exist. Scopes: {', '.join(SCOPES)}.")
    if not scope:
        raise ShopSphereError(f"Name a scope of the key: --scope {' or --scope '.join(SCOPES)}.")
    if days is not None and not 0 < days <= MAX_DAYS:
        raise ShopSphereError(f"--days is {days:g}. Give a number above 0, and at most {MAX_DAYS}.")
    key = keys.add(file, name, tuple(one for one in SCOPES if one in scope), days)
    output.json({"name": name, "key": key, "file": str(file)}) if json else output.say(key)


def _print_keys(output: Output, keys: Keys) -> None:
    now = time.time()
    rows = [(key.name, " ".join(key.scopes), key.created, key.expires, key.is_valid(now)) for key in keys.keys]
    columns = ("name", "scopes", "created", "expires", "valid")
    if output.as_json:
        output.json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        output.table(columns, rows)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("serve")(serve)
    app.command("api-key")(api_key)
