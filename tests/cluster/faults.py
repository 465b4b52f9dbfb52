"""Injects faults into a running lakehouse, repairs them, and records the recovery."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from cluster.object_store import ObjectStore
from servers.kafka_broker import Broker
from support.waiting import eventually, wait_for

from app import sandbox
from app.sandbox import history
from app.sandbox.schema import create_sources
from app.sandbox.servers import Addresses, sandbox_directory, start_servers
from lakehouse.errors import SandboxError

ROOT = Path(__file__).resolve().parents[2]
RECOVERY_SECONDS = 240.0
IDLE_SECONDS = 1.5


@dataclass(frozen=True)
class FaultResult:
    """One fault: its target, the driver's current table, its duration, and the seconds from the repair to the next commit."""

    number: int
    fault: str
    faulted: str
    current_table: str
    lasted: float
    recovered_in: float


@dataclass
class Supervised:
    """A program that is restarted whenever it ends, as by systemd or Kubernetes."""

    command: list[str]
    env: dict[str, str]
    log: Path
    starts: int = 0
    own_exits: list[str] = field(default_factory=list)
    """Its last output, each time it ended without having been killed."""
    process: subprocess.Popen[bytes] | None = None
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start it and keep it running."""
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 60.0) -> None:
        """Stop it permanently: SIGTERM, then SIGKILL."""
        self._ending.set()
        process = self.process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread is not None:
            self._thread.join()

    def _keep(self) -> None:
        while not self._ending.is_set():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, cwd=ROOT, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            self.starts += 1
            if self.process.wait() != -signal.SIGKILL and not self._ending.is_set():
                self.own_exits.append(f"exit code {self.process.returncode}: {tail(self.log, 4000)}")
            self._ending.wait(0.3)


@dataclass
class SourceServers:
    """Generated data in the sandbox's PostgreSQL and MongoDB-compatible server and in Apache Kafka."""

    home: Path
    broker: Broker

    @property
    def running(self) -> Addresses | None:
        """The addresses, if all servers run."""
        found, kafka = sandbox.running(self.home), self.broker.process
        alive = found is not None and kafka is not None and kafka.poll() is None
        return replace(found, kafka_bootstrap=self.broker.bootstrap) if alive else None

    @property
    def config(self) -> Path:
        """The settings file with the addresses."""
        return self.home / "shopsphere.toml"

    def start(self, orders: int, seed: int) -> None:
        """Start the servers and load the data. Kafka already runs."""
        start_servers(self.home)
        addresses = self.running
        assert addresses is not None
        create_sources(addresses)
        history.fill(addresses, sandbox_directory(self.home), orders, seed, "USD", None)
        sandbox.write_settings(self.home, addresses, "USD")

    def simulate(self, orders: int) -> None:
        """Simulate more orders."""
        addresses = self.running
        assert addresses is not None, "a source server does not run"
        history.simulate_more(addresses, sandbox_directory(self.home), orders, None)

    def restart(self) -> None:
        """Start the servers that do not run. PostgreSQL refuses as long as its old processes exist."""

        def attempt() -> None:
            with contextlib.suppress(SandboxError):
                start_servers(self.home)
            assert sandbox.running(self.home)

        eventually(attempt, 60)


@dataclass
class Target:
    """Source servers, an object store, Ray nodes, and a driver that keeps the lakehouse up to date."""

    shop: SourceServers
    home: Path
    store: ObjectStore
    driver: Supervised
    nodes: Sequence[Supervised]
    random: random.Random
    may_step: Callable[[], bool]
    """Whether more orders may be simulated: after the first read of the sources, and while all servers run."""
    orders_per_step: int
    steps: int = 0

    def step(self) -> None:
        """Simulate more orders."""
        self.shop.simulate(self.orders_per_step)
        self.steps += 1

    def current_table(self) -> str:
        """Return the table that the driver is refreshing."""
        begun = re.findall(r"^ {2}(\S+) \.\.\.$", tail(self.driver.log), re.MULTILINE)
        return begun[-1] if begun else "start"

    def commits(self) -> dict[str, str]:
        """Return the location of the newest metadata of each table."""
        query = "SELECT table_namespace || '.' || table_name, metadata_location FROM iceberg_tables"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.home / 'catalog.db'}?mode=ro", uri=True, timeout=5)) as catalog:
                return dict(catalog.execute(query).fetchall())
        except sqlite3.Error:  # its disk is full, or it does not exist yet
            return {}


def is_up(node: Supervised) -> bool:
    """Return whether a node's raylet runs."""
    with contextlib.suppress(psutil.Error):
        return any(process.name() == "raylet" for process in descendants(node))
    return False


def tail(file: Path, size: int = 8192) -> str:
    """Return the end of a file."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - size))
        return opened.read().decode(errors="replace")


# The faults. Each function injects one and returns its target and the repair

Repair = Callable[[], None]
Inject = Callable[[Target], tuple[str, Repair]]


def nothing() -> None:
    """The supervisor restarts it."""


def driver(world: Target) -> tuple[str, Repair]:
    """Kill the driver."""
    process = world.driver.process
    assert process is not None
    process.kill()
    return "driver", nothing


def worker(world: Target) -> tuple[str, Repair]:
    """Kill a busy Ray worker."""
    deadline, patience = time.monotonic() + 90, time.monotonic() + 2.0
    while not (busy := [(process, name) for process, name in workers_of(world) if "IDLE" not in name]):
        assert time.monotonic() < deadline, f"no Ray worker worked for 90 s: {tail(world.driver.log, 2000)}"
        if time.monotonic() > patience and world.may_step():
            world.step()
            patience = time.monotonic() + 10.0
        time.sleep(0.02)
    process, name = world.random.choice(busy)
    with contextlib.suppress(psutil.Error):
        process.kill()
    return name, nothing


def raylet(world: Target) -> tuple[str, Repair]:
    """Kill the raylet of a worker node, which ends the node."""
    wait_for(lambda: any(map(is_up, world.nodes)))
    node = world.random.choice([node for node in world.nodes if is_up(node)])
    for process in descendants(node):
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet":
                process.kill()
    return "raylet", nothing


def server(name: str) -> Inject:
    """Kill a source server of the sandbox; it is restarted with its data."""

    def strike(world: Target) -> tuple[str, Repair]:
        state = json.loads((sandbox_directory(world.shop.home) / "servers.json").read_text())
        os.kill(state["processes"][name]["pid"], signal.SIGKILL)
        return name, world.shop.restart

    return strike


def broker(world: Target) -> tuple[str, Repair]:
    """Kill Apache Kafka; it is restarted with its data."""
    kafka = world.shop.broker
    kafka.kill()

    def repair() -> None:
        if kafka.process is not None and kafka.process.poll() is not None:
            kafka.start()

    return "Apache Kafka", repair


def store_refuses(world: Target) -> tuple[str, Repair]:
    """Refuse connections to the object store."""
    world.store.refuse()
    return "object store", world.store.repair


def store_cuts(world: Target) -> tuple[str, Repair]:
    """Reset the object store's connections within a response."""
    world.store.cut()
    return "object store", world.store.repair


def store_slow(world: Target) -> tuple[str, Repair]:
    """Delay the object store's responses."""
    world.store.slow()
    return "object store", world.store.repair


def disk_full(world: Target) -> tuple[str, Repair]:
    """Fill the disk of the driver's home, which contains the catalog."""
    ballast = world.home / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return "catalog's disk", lambda: ballast.unlink(missing_ok=True)


FAULTS: dict[str, tuple[Inject, int]] = {
    "driver killed": (driver, 40),
    "worker killed": (worker, 40),
    "raylet killed": (raylet, 24),
    "broker killed": (broker, 20),
    "PostgreSQL killed": (server("postgres"), 20),
    "MongoDB-compatible server killed": (server("mongo"), 12),
    "object store refuses": (store_refuses, 14),
    "object store cuts answers": (store_cuts, 8),
    "object store slow": (store_slow, 8),
    "disk full": (disk_full, 14),
}
"""Each fault and how often it is injected."""


def workers_of(world: Target) -> Iterator[tuple[psutil.Process, str]]:
    """Yield Ray's worker processes on all nodes, with their names."""
    for node in world.nodes:
        for process in descendants(node):
            with contextlib.suppress(psutil.Error, IndexError):
                name = process.cmdline()[0]
                if name.startswith("ray::") and "Agent" not in name:
                    yield process, name


def descendants(node: Supervised) -> list[psutil.Process]:
    """Return all processes of a node."""
    if node.process is None:
        return []
    with contextlib.suppress(psutil.Error):
        return psutil.Process(node.process.pid).children(recursive=True)
    return []


# The injector


@dataclass
class FaultInjector:
    """Injects two to four faults at a time, repairs them, and waits until the lakehouse commits again."""

    world: Target
    results: list[FaultResult] = field(default_factory=list)

    def run(self, faults: list[str], report: Callable[[FaultResult], None]) -> None:
        """Inject all faults, in random order."""
        random = self.world.random
        waiting = random.sample(faults, len(faults))
        while waiting:
            batch = [waiting.pop() for _ in range(min(len(waiting), random.choice((2, 3, 3, 4))))]
            time.sleep(random.uniform(0.0, 1.2))
            self._inject(batch, report)

    def _inject(self, batch: list[str], report: Callable[[FaultResult], None]) -> None:
        began, faulted, repairs = time.monotonic(), [], []
        # a worker must be killed while it is busy, so before the other faults
        for name in sorted(batch, key=lambda name: name != "worker killed"):
            current_table = self.world.current_table()
            what, repair = FAULTS[name][0](self.world)
            faulted.append((name, what, current_table))
            repairs.append(repair)
            time.sleep(self.world.random.uniform(0.0, 0.3))
        time.sleep(self.world.random.uniform(0.2, 1.5))
        for repair in repairs:
            repair()
        repaired = time.monotonic()
        self._wait_for_commit()
        now = time.monotonic()
        for name, what, current_table in faulted:
            self.results.append(FaultResult(len(self.results) + 1, name, what, current_table, repaired - began, now - repaired))
            report(self.results[-1])

    def _wait_for_commit(self) -> None:
        """Wait for a commit; simulate more orders when there is nothing to do."""
        before, deadline, quiet = self.world.commits(), time.monotonic() + RECOVERY_SECONDS, time.monotonic() + IDLE_SECONDS
        while self.world.commits() == before:
            if time.monotonic() > deadline:
                raise AssertionError(f"no commit for {RECOVERY_SECONDS} s: {tail(self.world.driver.log, 3000)}")
            if time.monotonic() > quiet and self.world.may_step():
                self.world.step()
                quiet = time.monotonic() + 20 * IDLE_SECONDS
            time.sleep(0.05)


def format_results(results: Sequence[FaultResult]) -> str:
    """Return a table with one line per kind of fault."""
    lines = [f"{'fault':28}{'count':>7}{'lasted s':>10}{'next commit after s: median':>29}{'worst':>8}"]
    for name in FAULTS:
        own = [result for result in results if result.fault == name]
        if own:
            waits = [result.recovered_in for result in own]
            lasted = statistics.median(result.lasted for result in own)
            lines.append(f"{name:28}{len(own):>7}{lasted:>10.1f}{statistics.median(waits):>29.1f}{max(waits):>8.1f}")
    return "\n".join(lines)


def format_result(result: FaultResult) -> str:
    """Return a fault as a line of text."""
    return (
        f"{result.number:>4}  {result.fault:28}{result.faulted[:34]:36}{result.current_table:36}"
        f"{result.lasted:>5.1f} s{result.recovered_in:>7.1f} s"
    )


def run_app(*arguments: str, env: dict[str, str]) -> str:
    """Run `python -m app ...` and return its output."""
    done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout
