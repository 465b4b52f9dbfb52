"""Benchmark of serving against baselines, with an external load generator (wrk):

- the endpoints: scores with features and reasons, and stock of a product, on Ray Serve;
- the same model on plain uvicorn and Starlette, predicting from given features, and a look-up in a dict;
- the same model on `mlflow models serve`;
- the delay until a produced event is visible, while orders are scored concurrently.

Needs wrk (Debian: apt install wrk). Everything runs on one machine, so rely on ratios, not on absolute figures. Stacks are
measured in turn in several rounds: figures are medians over rounds, ratios are medians of each round's ratio.
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
WARM_UP_SECONDS = 3
ORDER = {
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
Stack = tuple[str, str, str]
"""Name, URL and wrk script."""
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


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stack under one load in one round."""

    stack: str
    connections: int
    round: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    failures: int


def app(home: Path, *arguments: str) -> str:
    """Run a command of the project and return its output."""
    process = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, "SHOPSPHERE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr[-2000:]}")
    return process.stdout


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], home: Path, ready: str, log: Path) -> Iterator[None]:
    """Run a server until the end of the block."""
    with log.open("wb") as output:
        environment = {
            **os.environ,
            "SHOPSPHERE_HOME": str(home),
            "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            # mlflow starts uvicorn from PATH
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_ready(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.3)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def is_ready(url: str) -> bool:
    """Return whether a URL answers with 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)
    return False


def wrk(stack: str, url: str, script: str, connections: int, round_: int, seconds: int) -> Measurement:
    """Send requests to a URL for some seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script + REPORT_LUA)
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", file.name, url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration, p50, p99, statuses, errors = map(int, output.split("RESULT ")[1].split())
    return Measurement(
        stack=stack,
        connections=connections,
        round=round_,
        requests_per_second=requests / (duration / 1e6),
        p50_ms=p50 / 1000,
        p99_ms=p99 / 1000,
        failures=statuses + errors,
    )


# --- baseline


def serve_baseline(port: int) -> None:
    """Serve on plain uvicorn and Starlette: predictions from given features, stock from a dict."""
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

    model.score_matrix(np.zeros((1, len(model.features))))  # the first prediction takes seconds
    routes = [Route("/predict", predict, methods=["POST"]), Route("/inventory/{product_id}", product)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning", access_log=False)


def level(store: int) -> dict[str, Any]:
    """Return a synthetic level of realistic size."""
    figures = {"on_hand": 12, "reserved": 1, "committed": None, "incoming": 0, "safety_stock": 2, "available_to_promise": 9}
    return {"store_id": f"ST-{store}", **figures, "low_stock": False, "last_event_at": "2026-01-31T12:00:00.000000Z"}


# --- delay of events


def event_delays(address: str, bootstrap: str, product: str, store: str) -> list[float]:
    """Return the milliseconds from before an event is produced until a look-up with its offset returns, at a steady rate."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    delays: list[float] = []

    def wait_for(started: float, offset: str) -> None:
        url = f"{address}/v1/inventory/{product}?store_id={store}&min_offset={offset}"
        with urllib.request.urlopen(url, timeout=10) as response:
            response.read()
        delays.append((time.perf_counter() - started) * 1000)

    with ThreadPoolExecutor(32) as pool:
        start = time.perf_counter()
        for number in range(EVENTS):
            due = start + number / EVENTS_PER_SECOND
            while (left := due - time.perf_counter()) > 0:
                producer.poll(min(left, 0.002))
            started = time.perf_counter()
            event = {
                "event_id": f"bench{time.time_ns()}",
                "event_type": "stock_received",
                "timestamp": datetime.now(UTC).isoformat(),
                "metadata": {"store_id": store, "product_id": product, "quantity": 1},
            }

            def delivered(error: Any, message: Any, started: float = started) -> None:
                pool.submit(wait_for, started, f"{message.topic()}:{message.partition()}:{message.offset()}")

            producer.produce("events", json.dumps(event).encode(), key=f"{store}|{product}".encode(), on_delivery=delivered)
        producer.flush(30)
    return sorted(delays)


def score_until_stopped(address: str, body: str, stop: threading.Event, statuses: list[int]) -> None:
    """Score orders one after the other and collect the statuses."""
    number = 0
    while not stop.is_set():
        number += 1
        data = body.replace("ORDER", f"beside{time.time_ns()}-{number}").encode()
        request = urllib.request.Request(f"{address}/v1/fraud/score", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                statuses.append(response.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)


class Comparison:
    """Measures stacks in several rounds and collects the results."""

    def __init__(self, seconds: int, rounds: int) -> None:
        self.seconds, self.rounds = seconds, rounds
        self.results: list[Measurement] = []

    def measure(self, *stacks: Stack) -> None:
        """Measure stacks one right after the other, so that each sees the same load of the machine."""
        for stack in stacks:
            wrk(*stack, 1, 0, WARM_UP_SECONDS)
        for connections, number in itertools.product(CONNECTIONS, range(self.rounds)):
            for stack in stacks:
                result = wrk(*stack, connections, number, self.seconds)
                self.results.append(result)
                if not result.requests_per_second:
                    raise SystemExit(f"{stack[0]}: no request was answered in {self.seconds} s; is the machine too busy?")
                print(result, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def measure(home: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """Measure everything on a lakehouse with a champion."""
    from pipelines.settings import load_settings

    os.environ["SHOPSPHERE_HOME"] = str(home)
    settings = load_settings()
    from ml.registry import Registry

    features = list(Registry(home=settings.home).load().model.features)
    values = [float(number % 7) for number in range(len(features))]
    logs = home / "bench"
    logs.mkdir(exist_ok=True)
    comparison = Comparison(seconds, rounds)
    measure_mlflow(comparison, home, {"dataframe_split": {"columns": features, "data": [values]}})
    bare_port, port = free_port(), free_port()
    baseline, address = f"http://127.0.0.1:{bare_port}", f"http://127.0.0.1:{port}"
    serve = [sys.executable, "-m", "app", "serve", "--port", str(port)]
    with (
        running([sys.executable, __file__, "--bare", str(bare_port)], home, f"{baseline}/inventory/P0001", logs / "bare.log"),
        running(serve, home, f"{address}/-/readyz", logs / "serve.log"),
    ):
        with urllib.request.urlopen(f"{address}/v1/inventory/P0001", timeout=10) as response:
            store = json.load(response)["stores"][0]["store_id"]
        comparison.measure(
            ("bare: predict", f"{baseline}/predict", POST_LUA.replace("BODY", json.dumps({"features": values}))),
            ("score with features and reasons", f"{address}/v1/fraud/score", ORDER_LUA.replace("BODY", json.dumps(ORDER))),
        )
        comparison.measure(
            ("bare: stock", f"{baseline}/inventory/", STOCK_LUA),
            ("stock of a product in all its stores", f"{address}/v1/inventory/", STOCK_LUA),
            ("stock of a product", f"{address}/v1/inventory/P0001?store_id={store}", ""),
        )
        delays, scored = delays_while_scoring(address, settings.kafka.bootstrap_servers, store)
    return {
        "stacks": medians(comparison.results),
        "event_seen_ms": {
            "events": len(delays),
            "p50": delays[len(delays) // 2],
            "p99": delays[int(len(delays) * 0.99)],
            "max": delays[-1],
        },
        "scored_beside": scored,
        "ratios": ratios(comparison.results),
    }


def measure_mlflow(comparison: Comparison, home: Path, body: Any) -> None:
    """Measure `mlflow models serve`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/fraud@champion", "--env-manager", "local"]
    with running([*command, "-p", str(port), "-h", "127.0.0.1"], home, f"{address}/ping", home / "bench" / "mlflow.log"):
        comparison.measure(("mlflow models serve", f"{address}/invocations", POST_LUA.replace("BODY", json.dumps(body))))


def delays_while_scoring(address: str, bootstrap: str, store: str) -> tuple[list[float], int]:
    """Return the delays of events in milliseconds, and the number of orders scored meanwhile."""
    stop = threading.Event()
    statuses: list[int] = []
    scorer = threading.Thread(target=score_until_stopped, args=(address, json.dumps(ORDER), stop, statuses))
    scorer.start()
    delays = event_delays(address, bootstrap, "P0001", store)
    stop.set()
    scorer.join()
    return delays, len(statuses)


def medians(results: list[Measurement]) -> list[dict[str, Any]]:
    """Return each stack under each load: medians over the rounds, and the failures of all rounds."""
    found = []
    for stack, connections in dict.fromkeys((one.stack, one.connections) for one in results):
        rounds = [one for one in results if (one.stack, one.connections) == (stack, connections)]
        middle = {name: median(getattr(one, name) for one in rounds) for name in ("requests_per_second", "p50_ms", "p99_ms")}
        row = {"what": stack, "connections": connections, "rounds": len(rounds), **middle}
        found.append({**row, "failures": sum(one.failures for one in rounds)})
    return found


def ratios(results: list[Measurement]) -> dict[str, dict[str, float]]:
    """Return the ratios with targets, by number of connections."""

    def ratio(stack: str, baseline: str, count: int, figure: str = "requests_per_second") -> dict[str, float]:
        numerators, denominators = (
            [getattr(one, figure) for one in results if (one.stack, one.connections) == (name, count)]
            for name in (stack, baseline)
        )
        each = [one / another for one, another in zip(numerators, denominators, strict=True)]
        return {"median": median(each), "lowest": min(each), "highest": max(each)}

    score, plain, stock = "score with features and reasons", "bare: predict", "stock of a product in all its stores"
    found = {}
    for count in CONNECTIONS:
        found[f"score / bare predict, p50, {count} connections (target: at most 3)"] = ratio(score, plain, count, "p50_ms")
        found[f"score / bare predict, req/s, {count} connections (target: at least 0.33)"] = ratio(score, plain, count)
        found[f"score / mlflow models serve, req/s, {count} connections (target: at least 5)"] = ratio(
            score, "mlflow models serve", count
        )
        found[f"stock / bare stock, req/s, {count} connections (target: at least 0.5)"] = ratio(stock, "bare: stock", count)
    return found


def prepare(home: Path, orders: int) -> None:
    """Start a sandbox, fill its lakehouse and train a champion."""
    app(home, "sandbox", "start", "--orders", str(orders))
    app(home, "run")
    # only speed is measured: any model of realistic size will do
    app(home, "train", "--trials", "0", "--rounds", "300", "--label-delay", "10")
    app(home, "models", "promote", "1", "--force")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--seconds", type=int, default=2, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds in which the stacks are measured in turn")
    parser.add_argument("--home", type=Path, help="a SHOPSPHERE_HOME with a running sandbox, a lakehouse and a champion")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_baseline(options.bare)
        return
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed. Install it (Debian: apt install wrk).")
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
