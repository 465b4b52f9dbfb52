"""Runs `python -m app serve` for the demo and sends it requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from lakehouse.errors import ShopSphereError

ROOT = Path(__file__).resolve().parents[2]
PORTS = range(18_000, 19_000)
"""Below the ephemeral ports, which Ray's own servers take while it starts."""
READY_SECONDS = 120.0
STOP_SECONDS = 60.0
"""Longer than a request may take."""
CHILD_STOP_SECONDS = 15.0
"""How long the processes that serving started may outlive it."""
REQUEST_SECONDS = 15.0


class DemoError(ShopSphereError):
    """Serving did not start or did not answer."""


@contextlib.contextmanager
def serving(home: Path) -> Iterator[str]:
    """Run `python -m app serve` on a free loopback port for the length of the block. Yield its address once it is ready.

    However the block ends, including by SIGTERM, serving is terminated and killed if it does not exit. Raises DemoError.
    """
    port = _free_port()
    log = home / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SHOPSPHERE_HOME": str(home.absolute())}
    address = f"http://127.0.0.1:{port}"
    with _exit_on_sigterm(), log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--host", "127.0.0.1", "--port", str(port), "--replicas", "1"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only the demo, which then stops serving
        )
        try:
            _wait_until_ready(process, address, log)
            yield address
        finally:
            _stop(process)


def _free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DemoError(f"No port of 127.0.0.1 from {PORTS[0]} to {PORTS[-1]} is free. Stop a program that listens there.")


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline, last = time.monotonic() + READY_SECONDS, "no answer yet"
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            errors = [line for line in lines if line.startswith("error:")] or lines
            raise DemoError(f"Serving ended with exit code {code} before it was ready: {errors[-1][:300]} (log: {log})")
        try:
            send(f"{address}/-/readyz", seconds=5)
            return
        except DemoError as error:
            last = str(error)
        time.sleep(0.3)
    raise DemoError(f"Serving was not ready after {READY_SECONDS:.0f} s: {last[:300]} See {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate serving and wait for its open requests; after STOP_SECONDS kill it and its children."""
    if process.poll() is not None:
        return
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Ray's processes end a little later than the process that started them
    for child in psutil.wait_procs(children, CHILD_STOP_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM within the block, so that serving is stopped as it is on Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def send(url: str, body: Mapping[str, Any] | None = None, seconds: float = REQUEST_SECONDS) -> dict[str, Any]:
    """GET a URL, or POST a JSON body to it, and return the response's JSON. Raises DemoError with any other response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        raise DemoError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DemoError(f"{url} does not answer: {error}") from None
    try:
        return dict(json.loads(content))
    except ValueError:
        # the health checks answer with a word, not with JSON
        return {"text": content.decode(errors="replace")}
