"""Faults, and a lakehouse under them: what is struck, how it is healed, and what was seen."""

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
class Result:
    """One fault: what it struck, what the driver was at, how long it lasted, and when the next commit came after it."""

    number: int
    fault: str
    struck: str
    during: str
    lasted: float
    recovered_in: float


@dataclass
class Supervised:
    """A program that is started again whenever it ends, as systemd or Kubernetes would."""

    command: list[str]
    env: dict[str, str]
    log: Path
    starts: int = 0
    gave_up: list[str] = field(default_factory=list)
    """What it said last, each time that it ended without having been killed."""
    process: subprocess.Popen[bytes] | None = None
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start it, and keep it running."""
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 60.0) -> None:
        """End it for good: politely, then by force."""
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
                self.gave_up.append(f"exit code {self.process.returncode}: {tail(self.log, 4000)}")
            self._ending.wait(0.3)


@dataclass
class Shop:
    """A shop in the sandbox's PostgreSQL and MongoDB-wire server, and in Apache Kafka."""

    home: Path
    broker: Broker

    @property
    def running(self) -> Addresses | None:
        """Where it is, when all its servers run."""
        found, kafka = sandbox.running(self.home), self.broker.process
        alive = found is not None and kafka is not None and kafka.poll() is None
        return replace(found, kafka_bootstrap=self.broker.bootstrap) if alive else None

    @property
    def config(self) -> Path:
        """The settings file with its addresses."""
        return self.home / "shopsphere.toml"

    def start(self, orders: int, seed: int) -> None:
        """Start the servers, and fill them. Kafka runs already."""
        start_servers(self.home)
        addresses = self.running
        assert addresses is not None
        create_sources(addresses)
        history.fill(addresses, sandbox_directory(self.home), orders, seed, "USD", None)
        sandbox.write_settings(self.home, addresses, "USD")

    def go_on(self, orders: int) -> None:
        """Let its time go on by so many orders."""
        addresses = self.running
        assert addresses is not None, "a source server is away"
        history.simulate_more(addresses, sandbox_directory(self.home), orders, None)

    def start_again(self) -> None:
        """Start the servers that do not run. PostgreSQL refuses as long as its old processes are there."""

        def attempt() -> None:
            with contextlib.suppress(SandboxError):
                start_servers(self.home)
            assert sandbox.running(self.home)

        eventually(attempt, 60)


@dataclass
class World:
    """A shop in its servers, an object store, Ray nodes, and a driver that keeps the lakehouse up to date."""

    shop: Shop
    home: Path
    store: ObjectStore
    driver: Supervised
    nodes: Sequence[Supervised]
    chance: random.Random
    may_step: Callable[[], bool]
    """Whether the shop may go on: not before the first read of its servers has been committed, nor while one is away."""
    orders_a_step: int
    steps: int = 0

    def step(self) -> None:
        """Let the shop's time go on."""
        self.shop.go_on(self.orders_a_step)
        self.steps += 1

    def during(self) -> str:
        """The table that the driver is at."""
        begun = re.findall(r"^ {2}(\S+) \.\.\.$", tail(self.driver.log), re.MULTILINE)
        return begun[-1] if begun else "start"

    def commits(self) -> dict[str, str]:
        """Where the newest metadata of each table is."""
        query = "SELECT table_namespace || '.' || table_name, metadata_location FROM iceberg_tables"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.home / 'catalog.db'}?mode=ro", uri=True, timeout=5)) as catalog:
                return dict(catalog.execute(query).fetchall())
        except sqlite3.Error:  # its disk is full, or it is not there yet
            return {}


def is_up(node: Supervised) -> bool:
    """Whether a node's raylet runs."""
    with contextlib.suppress(psutil.Error):
        return any(process.name() == "raylet" for process in descendants(node))
    return False


def tail(file: Path, size: int = 8192) -> str:
    """The end of a file."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - size))
        return opened.read().decode(errors="replace")


# The faults: each strikes, and gives what it struck and how to heal it

Heal = Callable[[], None]
Strike = Callable[[World], tuple[str, Heal]]


def nothing() -> None:
    """Whoever supervises starts it again."""


def driver(world: World) -> tuple[str, Heal]:
    """SIGKILL of the driver."""
    process = world.driver.process
    assert process is not None
    process.kill()
    return "driver", nothing


def worker(world: World) -> tuple[str, Heal]:
    """SIGKILL of a Ray worker that works."""
    deadline, patience = time.monotonic() + 90, time.monotonic() + 2.0
    while not (busy := [(process, name) for process, name in workers_of(world) if "IDLE" not in name]):
        assert time.monotonic() < deadline, f"no Ray worker worked for 90 s: {tail(world.driver.log, 2000)}"
        if time.monotonic() > patience and world.may_step():
            world.step()
            patience = time.monotonic() + 10.0
        time.sleep(0.02)
    process, name = world.chance.choice(busy)
    with contextlib.suppress(psutil.Error):
        process.kill()
    return name, nothing


def raylet(world: World) -> tuple[str, Heal]:
    """SIGKILL of the raylet of a worker node, and with it of the node."""
    wait_for(lambda: any(map(is_up, world.nodes)))
    node = world.chance.choice([node for node in world.nodes if is_up(node)])
    for process in descendants(node):
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet":
                process.kill()
    return "raylet", nothing


def server(name: str) -> Strike:
    """SIGKILL of a source server of the sandbox; it is started again with its data."""

    def strike(world: World) -> tuple[str, Heal]:
        state = json.loads((sandbox_directory(world.shop.home) / "servers.json").read_text())
        os.kill(state["processes"][name]["pid"], signal.SIGKILL)
        return name, world.shop.start_again

    return strike


def broker(world: World) -> tuple[str, Heal]:
    """SIGKILL of Apache Kafka; it is started again with its data."""
    kafka = world.shop.broker
    kafka.kill()

    def heal() -> None:
        if kafka.process is not None and kafka.process.poll() is not None:
            kafka.start()

    return "Apache Kafka", heal


def store_refuses(world: World) -> tuple[str, Heal]:
    """The object store accepts no connection."""
    world.store.refuse()
    return "object store", world.store.heal


def store_cuts(world: World) -> tuple[str, Heal]:
    """The object store's answers break off."""
    world.store.cut()
    return "object store", world.store.heal


def store_slow(world: World) -> tuple[str, Heal]:
    """The object store answers late."""
    world.store.slow()
    return "object store", world.store.heal


def disk_full(world: World) -> tuple[str, Heal]:
    """The disk of the driver's home, where the catalog is, is full."""
    ballast = world.home / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return "catalog's disk", lambda: ballast.unlink(missing_ok=True)


FAULTS: dict[str, tuple[Strike, int]] = {
    "driver killed": (driver, 40),
    "worker killed": (worker, 40),
    "raylet killed": (raylet, 24),
    "broker killed": (broker, 20),
    "PostgreSQL killed": (server("postgres"), 20),
    "MongoDB-wire server killed": (server("mongo"), 12),
    "object store refuses": (store_refuses, 14),
    "object store cuts answers": (store_cuts, 8),
    "object store slow": (store_slow, 8),
    "disk full": (disk_full, 14),
}
"""Each fault, and how often it strikes."""


def workers_of(world: World) -> Iterator[tuple[psutil.Process, str]]:
    """Ray's worker processes on the world's nodes."""
    for node in world.nodes:
        for process in descendants(node):
            with contextlib.suppress(psutil.Error, IndexError):
                name = process.cmdline()[0]
                if name.startswith("ray::") and "Agent" not in name:
                    yield process, name


def descendants(node: Supervised) -> list[psutil.Process]:
    """All processes that a node has."""
    if node.process is None:
        return []
    with contextlib.suppress(psutil.Error):
        return psutil.Process(node.process.pid).children(recursive=True)
    return []


# Striking again and again


@dataclass
class Storm:
    """Strikes two to four faults at a time, heals them, and waits until the lakehouse goes on by itself."""

    world: World
    results: list[Result] = field(default_factory=list)

    def rage(self, faults: list[str], report: Callable[[Result], None]) -> None:
        """Strike all of them, in an order of chance."""
        chance = self.world.chance
        waiting = chance.sample(faults, len(faults))
        while waiting:
            together = [waiting.pop() for _ in range(min(len(waiting), chance.choice((2, 3, 3, 4))))]
            time.sleep(chance.uniform(0.0, 1.2))
            self._strike(together, report)

    def _strike(self, together: list[str], report: Callable[[Result], None]) -> None:
        began, struck, heals = time.monotonic(), [], []
        # a worker is struck while it works, so before anything else is
        for name in sorted(together, key=lambda name: name != "worker killed"):
            during = self.world.during()
            what, heal = FAULTS[name][0](self.world)
            struck.append((name, what, during))
            heals.append(heal)
            time.sleep(self.world.chance.uniform(0.0, 0.3))
        time.sleep(self.world.chance.uniform(0.2, 1.5))
        for heal in heals:
            heal()
        healed = time.monotonic()
        self._recovered()
        now = time.monotonic()
        for name, what, during in struck:
            self.results.append(Result(len(self.results) + 1, name, what, during, healed - began, now - healed))
            report(self.results[-1])

    def _recovered(self) -> None:
        """Wait for a commit that was begun after the fault; let the sources go on when there is nothing to do."""
        before, deadline, quiet = self.world.commits(), time.monotonic() + RECOVERY_SECONDS, time.monotonic() + IDLE_SECONDS
        while self.world.commits() == before:
            if time.monotonic() > deadline:
                raise AssertionError(f"no commit for {RECOVERY_SECONDS} s: {tail(self.world.driver.log, 3000)}")
            if time.monotonic() > quiet and self.world.may_step():
                self.world.step()
                quiet = time.monotonic() + 20 * IDLE_SECONDS
            time.sleep(0.05)


def table(results: Sequence[Result]) -> str:
    """One line a kind of fault, for people."""
    lines = [f"{'fault':28}{'struck':>7}{'lasted s':>10}{'next commit after s: median':>29}{'worst':>8}"]
    for name in FAULTS:
        of = [result for result in results if result.fault == name]
        if of:
            waits = [result.recovered_in for result in of]
            lasted = statistics.median(result.lasted for result in of)
            lines.append(f"{name:28}{len(of):>7}{lasted:>10.1f}{statistics.median(waits):>29.1f}{max(waits):>8.1f}")
    return "\n".join(lines)


def line(result: Result) -> str:
    """One fault, for people."""
    return (
        f"{result.number:>4}  {result.fault:28}{result.struck[:34]:36}{result.during:36}"
        f"{result.lasted:>5.1f} s{result.recovered_in:>7.1f} s"
    )


def python(*arguments: str, env: dict[str, str]) -> str:
    """Run `python -m app ...`; gives its output."""
    done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout
