"""`python -m app serve` on Ray Serve: replicas killed, models swapped and a broker that stands still, all under load."""

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
from support.scoring_desk import made, trained
from support.waiting import wait_for

from app.sandbox.servers import sandbox_directory
from ml.registry import Registry
from pipelines.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Served:
    """A serving with two replicas."""

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
        """The replicas of this serving; others may run on this machine."""
        return self.family("ServeReplica")

    def family(self, named: str) -> list[psutil.Process]:
        """Processes of this serving with this in their command line."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if _is(one, named)]


def _is(process: psutil.Process, named: str) -> bool:
    try:
        return named in "".join(process.cmdline())
    except psutil.Error:  # it is no more
        return False


@dataclass
class Load:
    """Requests from several threads until the end of the block: how many, and which failed."""

    served: Served
    threads: int = 4
    answers: list[tuple[float, int, Any]] = field(default_factory=list)
    failures: list[tuple[float, Any]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self.stopping = threading.Event()
        self.running = [threading.Thread(target=self._shoot, args=(number,)) for number in range(self.threads)]
        for thread in self.running:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for thread in self.running:
            thread.join()

    def _shoot(self, number: int) -> None:
        while not self.stopping.is_set():
            began = time.time()
            try:
                path, body = ("/v1/fraud/score", made()) if number % 2 else ("/v1/inventory/P0001", None)
                status, told = self.served.ask(path, body)
            except OSError as error:
                status, told = 0, repr(error)
            if status == 200:
                self.answers.append((began, number, told))
            else:
                self.failures.append((began, (status, told)))


@pytest.fixture(scope="module")
def served(filled: Settings) -> Iterator[Served]:
    registry = Registry(home=filled.home)
    registry.promote(registry.record(trained(filled, 11)).number)
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
        until = time.monotonic() + 120
        while b"Serving on" not in (filled.home / "serve.log").read_bytes():
            assert process.poll() is None, (filled.home / "serve.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


def test_answers_do_not_pass_ray_serves_wrapper(served: Served) -> None:
    """Which adds an id to each: nothing else tells that a release of Ray has changed its way."""
    for path, wrapped in {"/v1/inventory/P0001": False, "/-/readyz": True}.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}{path}", timeout=10) as response:
            assert ("x-request-id" in response.headers) is wrapped, path


def test_others_can_serve_on_the_machine_and_nobody_is_told_of_requests(served: Served) -> None:
    (proxy,) = served.family("bin/haproxy")
    ports = {one.laddr.port for one in proxy.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    assert served.port in ports
    assert not ports & {8404, 9101}
    command = proxy.cmdline()
    config = Path(command[command.index("-f") + 1]).read_text()
    assert {line.split()[1] for line in config.splitlines() if line.split()[:1] == ["log"]} == {"/dev/null", "global"}


def test_a_reader_who_leaves_the_stream_is_forgotten(served: Served) -> None:
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


def test_a_killed_replica_costs_the_requests_in_flight_at_most(served: Served) -> None:
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
    # what was begun before the kill is lost at most; nothing that came after it
    late = [one for one in load.failures if one[0] > at + 0.5]
    assert not late
    assert len(load.failures) <= load.threads
    (status, told) = served.ask("/v1/inventory/P0001")
    assert status == 200
    assert told["staleness_ms"] < 5_000


def test_a_new_champion_fails_no_request(served: Served) -> None:
    registry = Registry(home=served.settings.home)
    number = registry.record(trained(served.settings, 12)).number
    with Load(served) as load:
        time.sleep(2)
        registry.promote(number)
        promoted = time.time()
        time.sleep(10)
        until = time.time()
    scores = [(began, told["model"]["version"]) for began, thread, told in load.answers if thread % 2]
    late = {version for began, version in scores if promoted + 8 < began < until}
    print(f"answers {len(load.answers)}, failures {len(load.failures)}")
    assert not load.failures
    assert late == {number}


def test_a_broker_that_stands_still_is_answered_through_and_caught_up_with(served: Served) -> None:
    state = json.loads((sandbox_directory(served.settings.home) / "servers.json").read_text())
    broker = psutil.Process(state["processes"]["kafka"]["pid"])
    _, before = served.ask("/v1/inventory/P0001")
    broker.suspend()
    try:
        with Load(served) as load:
            time.sleep(30)
        status, told = served.ask("/v1/inventory/P0001")
        assert status == 200
        assert told["staleness_ms"] > 28_000
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
    at: list[str] = []
    producer = Producer({"bootstrap.servers": served.settings.kafka.bootstrap_servers})

    def delivered(error: Any, one: Any) -> None:
        at.append(f"{one.topic()}:{one.partition()}:{one.offset()}")

    producer.produce("events", json.dumps(event).encode(), on_delivery=delivered)
    producer.flush(30)
    wait_for(lambda: served.ask(f"/v1/inventory/P0001?min_offset={at[0]}&store_id={store['store_id']}")[0] == 200, seconds=30)
    _, after = served.ask(f"/v1/inventory/P0001?min_offset={at[0]}&store_id={store['store_id']}")
    assert after["stores"][0]["on_hand"] == store["on_hand"] + 7
    wait_for(lambda: served.ask("/v1/inventory/P0001")[1]["staleness_ms"] < 2_000, seconds=30)


def test_it_ends_when_what_is_under_way_is_answered(served: Served) -> None:
    assert served.process.poll() is None
    with Load(served, threads=2) as load:
        time.sleep(2)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
    assert load.answers
    # then nothing is there (404), and at last nobody listens
    gone = min(began for began, (status, _) in load.failures if status == 404)
    cut = [told for began, told in load.failures if began < gone]
    assert not cut, cut[:5]
    with pytest.raises(OSError):
        served.ask("/-/healthz", timeout=2)
