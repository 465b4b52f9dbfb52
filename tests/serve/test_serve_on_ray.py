"""`python -m app serve` on Ray Serve under load: killed replicas, a new champion and a suspended broker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer
from support.scoring_desk import order_body, train_model
from support.waiting import wait_for

from app.sandbox.servers import sandbox_directory
from ml.registry import Registry
from pipelines.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Served:
    """A running server with two replicas."""

    settings: Settings
    port: int
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: Any = None, timeout: float = 10.0) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def replicas(self) -> list[psutil.Process]:
        """The replicas of this server; others may run on this machine."""
        return self.children("ServeReplica")

    def children(self, name: str) -> list[psutil.Process]:
        """Return the processes of this server with `name` in their command line."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if _matches(one, name)]


def _matches(process: psutil.Process, name: str) -> bool:
    try:
        return name in "".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


@dataclass
class Load:
    """Sends requests from several threads until the end of the block, and records answers and failures."""

    served: Served
    threads: int = 4
    answers: list[tuple[float, int, Any]] = field(default_factory=list)
    failures: list[tuple[float, Any]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self.stopping = threading.Event()
        self.running = [threading.Thread(target=self._send_requests, args=(number,)) for number in range(self.threads)]
        for thread in self.running:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for thread in self.running:
            thread.join()

    def _send_requests(self, number: int) -> None:
        while not self.stopping.is_set():
            started = time.time()
            try:
                path, body = ("/v1/fraud/score", order_body()) if number % 2 else ("/v1/inventory/P0001", None)
                status, answer = self.served.ask(path, body)
            except OSError as error:
                status, answer = 0, repr(error)
            if status == 200:
                self.answers.append((started, number, answer))
            else:
                self.failures.append((started, (status, answer)))


@pytest.fixture(scope="module")
def served(filled: Settings) -> Iterator[Served]:
    registry = Registry(home=filled.home)
    registry.promote(registry.record(train_model(filled, 11)).number)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "SHOPSPHERE_HOME": str(filled.home),
        "SHOPSPHERE_RAY__ADDRESS": "",
        "SHOPSPHERE_SERVE_MODEL_SECONDS": "1",
        "SHOPSPHERE_SERVE_REFRESH_SECONDS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    log = (filled.home / "serve.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", str(port), "--replicas", "2"],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
    )
    served = Served(filled, port, process)
    try:
        deadline = time.monotonic() + 120
        while b"Serving on" not in (filled.home / "serve.log").read_bytes():
            assert process.poll() is None, (filled.home / "serve.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


def test_api_answers_bypass_ray_serves_wrapper(served: Served) -> None:
    """The wrapper adds an id to each answer: a change in a release of Ray is noticed by nothing else."""
    for path, wrapped in {"/v1/inventory/P0001": False, "/-/readyz": True}.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}{path}", timeout=10) as response:
            assert ("x-request-id" in response.headers) is wrapped, path


def test_haproxy_uses_free_ports_and_logs_no_requests(served: Served) -> None:
    (proxy,) = served.children("bin/haproxy")
    ports = {one.laddr.port for one in proxy.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    assert served.port in ports
    assert not ports & {8404, 9101}
    command = proxy.cmdline()
    config = Path(command[command.index("-f") + 1]).read_text()
    assert {line.split()[1] for line in config.splitlines() if line.split()[:1] == ["log"]} == {"/dev/null", "global"}


def test_closed_streams_are_released(served: Served) -> None:
    def sockets() -> int:
        return sum(len(one.net_connections("tcp")) for one in served.replicas)

    before = sockets()
    streams = [urllib.request.urlopen(f"http://127.0.0.1:{served.port}/v1/inventory/stream", timeout=10) for _ in range(20)]
    for stream in streams:
        assert stream.readline().startswith(b":")
    assert sockets() >= before + 15
    for stream in streams:
        stream.close()
    wait_for(lambda: sockets() <= before + 4)


def test_killed_replica_loses_at_most_requests_in_flight(served: Served) -> None:
    wait_for(lambda: len(served.replicas) == 2)
    with Load(served) as load:
        time.sleep(3)
        killed = served.replicas[0]
        killed.send_signal(signal.SIGKILL)
        at = time.time()
        wait_for(lambda: killed.pid not in {one.pid for one in served.replicas})
        wait_for(lambda: len(served.replicas) == 2)
        time.sleep(8)
    print(f"answers {len(load.answers)}, failures {len(load.failures)}: {load.failures[:5]}")
    assert len(load.answers) > 100
    # only requests started before the kill may fail
    late = [one for one in load.failures if one[0] > at + 0.5]
    assert not late
    assert len(load.failures) <= load.threads
    status, answer = served.ask("/v1/inventory/P0001")
    assert status == 200
    assert answer["staleness_ms"] < 5_000


def test_new_champion_causes_no_failures(served: Served) -> None:
    registry = Registry(home=served.settings.home)
    number = registry.record(train_model(served.settings, 12)).number
    with Load(served) as load:
        time.sleep(2)
        registry.promote(number)
        promoted = time.time()
        time.sleep(10)
        until = time.time()
    scores = [(started, answer["model"]["version"]) for started, thread, answer in load.answers if thread % 2]
    late = {version for started, version in scores if promoted + 8 < started < until}
    print(f"answers {len(load.answers)}, failures {len(load.failures)}")
    assert not load.failures
    assert late == {number}


def test_suspended_broker_causes_no_failures_and_is_caught_up_with(served: Served) -> None:
    state = json.loads((sandbox_directory(served.settings.home) / "servers.json").read_text())
    broker = psutil.Process(state["processes"]["kafka"]["pid"])
    _, before = served.ask("/v1/inventory/P0001")
    broker.suspend()
    try:
        with Load(served) as load:
            time.sleep(30)
        status, answer = served.ask("/v1/inventory/P0001")
        assert status == 200
        assert answer["staleness_ms"] > 28_000
    finally:
        broker.resume()
    assert not load.failures, load.failures[:3]
    store = before["stores"][0]
    event = {
        "event_id": f"after{time.time_ns()}",
        "event_type": "stock_received",
        "timestamp": datetime.now(UTC).isoformat(),
        "metadata": {"store_id": store["store_id"], "product_id": "P0001", "quantity": 7},
    }
    offsets: list[str] = []
    producer = Producer({"bootstrap.servers": served.settings.kafka.bootstrap_servers})

    def delivered(error: Any, one: Any) -> None:
        offsets.append(f"{one.topic()}:{one.partition()}:{one.offset()}")

    producer.produce("events", json.dumps(event).encode(), on_delivery=delivered)
    producer.flush(30)
    wait_for(
        lambda: served.ask(f"/v1/inventory/P0001?min_offset={offsets[0]}&store_id={store['store_id']}")[0] == 200, seconds=30
    )
    _, after = served.ask(f"/v1/inventory/P0001?min_offset={offsets[0]}&store_id={store['store_id']}")
    assert after["stores"][0]["on_hand"] == store["on_hand"] + 7
    wait_for(lambda: served.ask("/v1/inventory/P0001")[1]["staleness_ms"] < 2_000, seconds=30)


def test_sigterm_drains_requests_in_flight(served: Served) -> None:
    assert served.process.poll() is None
    with Load(served, threads=2) as load:
        time.sleep(2)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
    assert load.answers
    # then routes are removed (404), and finally the port is closed
    removed = min(started for started, (status, _) in load.failures if status == 404)
    failed = [failure for started, failure in load.failures if started < removed]
    assert not failed, failed[:5]
    with pytest.raises(OSError):
        served.ask("/-/healthz", timeout=2)
