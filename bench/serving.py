"""Serving beside what it can be compared with, in one run, with a load generator (wrk) outside:

- these endpoints: scores with features and reasons, stock of a product, over Ray Serve;
- the same model on bare uvicorn and Starlette, which only predicts from features that it is given, and a look-up in a dict;
- the same model by `mlflow models serve`;
- how long after it was produced an event is seen, while orders are scored beside it.

Needs wrk (Debian: apt install wrk). Everything runs on this machine, so trust the ratios. What is compared is measured in turn,
in several rounds: the figures are medians over rounds, the ratios medians of each round's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0
EVENTS, EVENTS_PER_SECOND = 1_000, 200
CONNECTIONS = (1, 8)
ORDER_LUA = """
local n, run = 0, tostring(os.time()) .. tostring({}):sub(8)
request = function()
  n = n + 1
  local body = string.gsub([==[BODY]==], "ORDER", run .. "-" .. n)
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
end
"""
POST_LUA = 'wrk.method = "POST"; wrk.headers["Content-Type"] = "application/json"; wrk.body = [==[BODY]==]'
STOCK_LUA = """
local n = 0
request = function()
  n = n % 100 + 1
  return wrk.format("GET", wrk.path .. string.format("P%04d", n))
end
"""
REPORT_LUA = """
done = function(summary, latency)
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Measured:
    """One stack under one load; of one round, or the median of several."""

    what: str
    connections: int
    round: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    failures: int


def app(home: Path, *arguments: str) -> str:
    """Run a command of the project."""
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, "SHOPSPHERE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], home: Path, ready: str, log: Path) -> Iterator[None]:
    """A server until the end of the block."""
    with log.open("wb") as output:
        environment = {
            **os.environ,
            "SHOPSPHERE_HOME": str(home),
            "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            # mlflow starts uvicorn by its name
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            until = time.monotonic() + START_SECONDS
            while not answers(ready):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.3)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Whether a URL gives 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)
    return False


def wrk(what: str, url: str, script: str, connections: int, round_: int, seconds: int) -> Measured:
    """Load a URL."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script + REPORT_LUA)
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", file.name, url]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration, p50, p99, statuses, broken = map(int, told.split("RESULT ")[1].split())
    return Measured(what, connections, round_, requests / (duration / 1e6), p50 / 1000, p99 / 1000, statuses + broken)


# --- what it is compared with


def bare(port: int) -> None:
    """uvicorn and Starlette: predict from features given; stock from a dict."""
    import numpy as np
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from ml.registry import Registry
    from pipelines.settings import load_settings

    model = Registry(home=load_settings().home).load().model
    stores = [level(store) for store in range(6)]
    stock = {f"P{number:04}": {"product_id": f"P{number:04}", "stores": stores} for number in range(5_000)}

    async def predict(request: Request) -> JSONResponse:
        columns = np.array([(await request.json())["features"]], dtype=np.float64)
        return JSONResponse({"score": float(model.score_matrix(columns)[0])})

    async def product(request: Request) -> JSONResponse:
        return JSONResponse(stock[request.path_params["product_id"]])

    model.score_matrix(np.zeros((1, len(model.features))))  # the first takes seconds
    routes = [Route("/predict", predict, methods=["POST"]), Route("/inventory/{product_id}", product)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning", access_log=False)


def level(store: int) -> dict[str, Any]:
    """A made-up level, of the size of a real one."""
    figures = {"on_hand": 12, "reserved": 1, "committed": None, "incoming": 0, "safety_stock": 2, "available_to_promise": 9}
    return {"store_id": f"ST-{store}", **figures, "low_stock": False, "last_event_at": "2026-01-31T12:00:00.000000Z"}


# --- an event's way


def seen_after(base: str, bootstrap: str, product: str, store: str) -> list[float]:
    """Milliseconds from before an event is produced until a look-up that waits for it has it, at a steady rate."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    found: list[float] = []

    def follow(began: float, at: str) -> None:
        with urllib.request.urlopen(f"{base}/v1/inventory/{product}?store_id={store}&min_offset={at}", timeout=10) as response:
            response.read()
        found.append((time.perf_counter() - began) * 1000)

    with ThreadPoolExecutor(32) as pool:
        start = time.perf_counter()
        for number in range(EVENTS):
            due = start + number / EVENTS_PER_SECOND
            while (left := due - time.perf_counter()) > 0:
                producer.poll(min(left, 0.002))
            began = time.perf_counter()
            event = {
                "event_id": f"bench{time.time_ns()}",
                "event_type": "stock_received",
                "timestamp": datetime.now(UTC).isoformat(),
                "metadata": {"store_id": store, "product_id": product, "quantity": 1},
            }

            def delivered(error: Any, one: Any, began: float = began) -> None:
                pool.submit(follow, began, f"{one.topic()}:{one.partition()}:{one.offset()}")

            producer.produce("events", json.dumps(event).encode(), key=f"{store}|{product}".encode(), on_delivery=delivered)
        producer.flush(30)
    return sorted(found)


def score_on(base: str, body: str, stop: threading.Event, statuses: list[int]) -> None:
    """Score orders one after the other."""
    number = 0
    while not stop.is_set():
        number += 1
        data = body.replace("ORDER", f"beside{time.time_ns()}-{number}").encode()
        request = urllib.request.Request(f"{base}/v1/fraud/score", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                statuses.append(response.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)


def measure(home: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """All of it, on a lakehouse with a champion."""
    from pipelines.settings import load_settings

    os.environ["SHOPSPHERE_HOME"] = str(home)
    settings = load_settings()
    from ml.registry import Registry

    model = Registry(home=settings.home).load().model
    values = [float(number % 7) for number in range(len(model.features))]
    plain = POST_LUA.replace("BODY", json.dumps({"features": values}))
    split = {"dataframe_split": {"columns": list(model.features), "data": [values]}}
    order = {
        "order_id": "ORDER",
        "currency": "USD",
        "total_amount": "249.90",
        "items": [{"product_id": "P0001", "quantity": 1, "unit_price": "249.90"}],
        "user_id": 42,
        "payment_method": "card",
        "card_fingerprint": "c-77",
        "ip_address": "203.0.113.7",
        "device_id": "d-9",
        "shipping_address": "Jalan Ahmad Yani 87",
    }
    results: list[Measured] = []

    def loaded(*stacks: tuple[str, str, str]) -> None:
        """One right after the other: what is compared must be measured under the same load of the machine."""
        for stack in stacks:
            wrk(*stack, 1, 0, 3)  # warms up
        for connections, number in itertools.product(CONNECTIONS, range(rounds)):
            for stack in stacks:
                results.append(wrk(*stack, connections, number, seconds))
                if not results[-1].requests_per_second:
                    raise SystemExit(f"{stack[0]}: no request was answered in {seconds} s; is the machine too busy?")
                print(results[-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)

    logs = home / "bench"
    logs.mkdir(exist_ok=True)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/fraud@champion", "--env-manager", "local"]
    with running([*command, "-p", str(port), "-h", "127.0.0.1"], home, f"{base}/ping", logs / "mlflow.log"):
        loaded(("mlflow models serve", f"{base}/invocations", POST_LUA.replace("BODY", json.dumps(split))))
    bare_port, port = free_port(), free_port()
    beside, base = f"http://127.0.0.1:{bare_port}", f"http://127.0.0.1:{port}"
    served = [sys.executable, "-m", "app", "serve", "--port", str(port)]
    with (
        running([sys.executable, __file__, "--bare", str(bare_port)], home, f"{beside}/inventory/P0001", logs / "bare.log"),
        running(served, home, f"{base}/-/readyz", logs / "serve.log"),
    ):
        with urllib.request.urlopen(f"{base}/v1/inventory/P0001", timeout=10) as response:
            store = json.load(response)["stores"][0]["store_id"]
        scoring = ORDER_LUA.replace("BODY", json.dumps(order))
        loaded(
            ("bare: predict", f"{beside}/predict", plain),
            ("score with features and reasons", f"{base}/v1/fraud/score", scoring),
        )
        loaded(
            ("bare: stock", f"{beside}/inventory/", STOCK_LUA),
            ("stock of a product in all its stores", f"{base}/v1/inventory/", STOCK_LUA),
            ("stock of a product", f"{base}/v1/inventory/P0001?store_id={store}", ""),
        )
        stop = threading.Event()
        statuses: list[int] = []
        scorer = threading.Thread(target=score_on, args=(base, json.dumps(order), stop, statuses))
        scorer.start()
        seen = seen_after(base, settings.kafka.bootstrap_servers, "P0001", store)
        stop.set()
        scorer.join()
    return {
        "stacks": medians(results),
        "event_seen_ms": {"events": len(seen), "p50": seen[len(seen) // 2], "p99": seen[int(len(seen) * 0.99)], "max": seen[-1]},
        "scored_beside": len(statuses),
        "ratios": ratios(results),
    }


def medians(results: list[Measured]) -> list[dict[str, Any]]:
    """Each stack under each load, over the rounds; failures are those of all rounds."""
    found = []
    for what, connections in dict.fromkeys((one.what, one.connections) for one in results):
        rounds = [one for one in results if (one.what, one.connections) == (what, connections)]
        middle = {name: median(getattr(one, name) for one in rounds) for name in ("requests_per_second", "p50_ms", "p99_ms")}
        told = {"what": what, "connections": connections, "rounds": len(rounds), **middle}
        found.append({**told, "failures": sum(one.failures for one in rounds)})
    return found


def ratios(results: list[Measured]) -> dict[str, dict[str, float]]:
    """The promises, by the number of connections."""

    def of(what: str, other: str, count: int, figure: str = "requests_per_second") -> dict[str, float]:
        above, below = (
            [getattr(one, figure) for one in results if (one.what, one.connections) == (stack, count)] for stack in (what, other)
        )
        each = [one / another for one, another in zip(above, below, strict=True)]
        return {"median": median(each), "lowest": min(each), "highest": max(each)}

    score, plain, stock = "score with features and reasons", "bare: predict", "stock of a product in all its stores"
    told = {}
    for count in CONNECTIONS:
        told[f"score / bare predict, p50, {count} connections (promised at most 3)"] = of(score, plain, count, "p50_ms")
        told[f"score / bare predict, req/s, {count} connections (promised at least 0.33)"] = of(score, plain, count)
        told[f"score / mlflow models serve, req/s, {count} connections (promised at least 5)"] = of(
            score, "mlflow models serve", count
        )
        told[f"stock / bare stock, req/s, {count} connections (promised at least 0.5)"] = of(stock, "bare: stock", count)
    return told


def prepare(home: Path, orders: int) -> None:
    """A shop, its lakehouse, and a champion."""
    app(home, "sandbox", "start", "--orders", str(orders))
    app(home, "run")
    # the figures are of speed: any model of the real size will do
    app(home, "train", "--trials", "0", "--rounds", "300", "--label-delay", "10")
    app(home, "models", "promote", "1", "--force")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--seconds", type=int, default=2, help="of each load")
    parser.add_argument("--rounds", type=int, default=5, help="in which what is compared is measured in turn")
    parser.add_argument("--home", type=Path, help="a SHOPSPHERE_HOME with a running sandbox, a lakehouse and a champion")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare)
        return
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not there. Install it (Debian: apt install wrk).")
    if options.home:
        print(json.dumps(measure(options.home.absolute(), options.seconds, options.rounds), indent=2))
        return
    with tempfile.TemporaryDirectory(prefix="bench-serve") as directory:
        home = Path(directory)
        try:
            prepare(home, options.orders)
            print(json.dumps(measure(home, options.seconds, options.rounds), indent=2))
        finally:
            app(home, "sandbox", "stop")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
