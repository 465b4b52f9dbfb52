"""Instances of `python -m app serve` side by side on one machine: none answers for another, and no other local user or
unauthenticated client can read, redirect, stop or slow one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support.waiting import free_port, skip_or_fail, wait_for

from pipelines.settings import Settings
from serve.http.keys import Keys

pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
LOOK_UP = "/v1/inventory/P0001"


@dataclass
class Instance:
    """A server with its own home, port and API key."""

    home: Path
    lake: Settings
    port: int = field(default_factory=free_port)
    key: str = ""
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.home.mkdir()
        self.key = Keys().add(self.home / "serve_keys.json", "till", ("inventory",))

    def start(self) -> None:
        """Start the server, and do not wait for it."""
        properties = {
            "type": "sql",
            "uri": f"sqlite:///{self.lake.home}/catalog.db",
            "warehouse": f"file://{self.lake.home}/warehouse",
        }
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "SHOPSPHERE_HOME": str(self.home),
            "SHOPSPHERE_CONFIG": str(self.lake.home / "shopsphere.toml"),
            "SHOPSPHERE_CATALOG__PROPERTIES": json.dumps(properties),
            "SHOPSPHERE_SERVE_SCORES_TOPIC": "",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve", "--port", str(self.port)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> Path:
        return self.home / "serve.log"

    def ask(self, key: str, path: str = LOOK_UP) -> int:
        """Return the status of the answer to a request with a key; 0 when there was none."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def children(self, name: str) -> list[psutil.Process]:
        """Return the processes of this server with `name` in their command line."""
        assert self.process is not None
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if name in "".join(child.cmdline()):
                        found.append(child)
        return found

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.ask(self.key) == 200, f"{self.home.name} does not answer", 120)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def instances(filled: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Instance, Instance]]:
    homes = tmp_path_factory.mktemp("instances")
    first, second = Instance(homes / "first", filled), Instance(homes / "second", filled)
    try:
        for instance in (first, second):
            instance.start()
        for instance in (first, second):
            instance.wait_until_ready()
        yield first, second
    finally:
        for instance in (first, second):
            instance.stop()


@dataclass
class Watch:
    """Asks each instance with each key until the end of the block, and records the statuses."""

    instances: tuple[Instance, Instance]
    own: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(asked,)) for asked in self.instances]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, asked: Instance) -> None:
        while not self._stopping.wait(0.02):
            for key_of in self.instances:
                (self.own if key_of is asked else self.foreign).append(asked.ask(key_of.key))


def test_instances_that_are_killed_and_restarted_never_answer_for_each_other(instances: tuple[Instance, Instance]) -> None:
    """An answer of the other instance would accept its own key and refuse the right one."""
    chance = random.Random(7)
    with Watch(instances) as watch:
        for number in range(4):
            victim = instances[number % 2]
            if number < 2:
                (replica,) = wait_for(lambda victim=victim: victim.children("ServeReplica"))
                replica.kill()
            else:
                assert victim.process is not None
                victim.process.kill()
                victim.process.wait()
                victim.start()
            time.sleep(chance.uniform(0, 2))
            for instance in instances:
                instance.wait_until_ready()
    assert watch.own.count(200) > 100
    assert 401 not in watch.own
    assert watch.foreign.count(401) > 100
    assert 200 not in watch.foreign


def test_a_second_instance_on_the_same_port_is_refused(instances: tuple[Instance, Instance], tmp_path: Path) -> None:
    first, _ = instances
    third = Instance(tmp_path / "third", first.lake, port=first.port)
    third.start()
    assert third.process is not None
    assert third.process.wait(120) == 1
    assert f"Cannot listen on 127.0.0.1:{first.port}" in third.log.read_text()


LOCAL_ATTACK = """
import os, socket, sys
home, private, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    print(name)
for directory, _, files in [*os.walk(home), *os.walk(private)]:
    for file in files:
        attempt("read " + os.path.join(directory, file), lambda: open(os.path.join(directory, file), "rb").read(1))
attempt("list the home", lambda: os.listdir(home))
attempt("list the private directory", lambda: os.listdir(private))
for path in sys.argv[4:]:
    attempt("read " + path, lambda: open(path, "rb").read(1))
    attempt("connect to " + path, lambda: socket.socket(socket.AF_UNIX).connect(path))
attempt("stop the server", lambda: os.kill(process, 15))
"""


def test_another_local_user_can_neither_read_nor_redirect_nor_stop_an_instance(instances: tuple[Instance, Instance]) -> None:
    if os.geteuid() != 0:
        skip_or_fail("Only root can run a program as another user.")
    first, _ = instances
    assert first.process is not None
    (proxy,) = first.children("bin/haproxy")
    command = proxy.cmdline()
    config = Path(command[command.index("-f") + 1])
    sockets = [line.split()[2] for line in config.read_text().splitlines() if line.split()[:2] == ["stats", "socket"]]
    assert sockets
    assert Path(sockets[0]).is_socket()
    private = config.parents[1]
    files = [str(path) for path in (*private.rglob("*"), *first.home.rglob("*")) if path.is_file() or path.is_socket()]
    assert any("access-" in file for file in files)
    for directory in first.home.parents:  # pytest's own directories would hide a home that is open to all
        if directory.stat().st_uid == os.geteuid() and directory != Path("/") and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o005)
    done = subprocess.run(
        [
            "/usr/bin/env",
            "python3",
            "-I",
            "-S",
            "-c",
            LOCAL_ATTACK,
            str(first.home),
            str(private),
            str(first.process.pid),
            *files,
        ],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == []
    with socket.socket(socket.AF_UNIX) as admin:  # the same attempts succeed for this user
        admin.connect(sockets[0])


def test_slow_clients_without_a_key_take_no_connections_from_others(instances: tuple[Instance, Instance]) -> None:
    first, _ = instances
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_000), hard))
    slow: list[socket.socket] = []

    def median() -> float:
        times = []
        for _ in range(100):
            started = time.perf_counter()
            assert first.ask(first.key) == 200
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    try:
        alone = median()
        for _ in range(4_200):
            client = socket.create_connection(("127.0.0.1", first.port), timeout=10)
            client.sendall(b"GET /v1/inventory/P0001 HTTP/1.1\r\nHost: localhost\r\n")
            slow.append(client)
        beside = median()
        assert beside < 2 * alone + 0.002, f"{beside * 1000:.2f} ms beside slow clients, {alone * 1000:.2f} ms alone"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # one byte now and then does not keep a connection
            time.sleep(2)
            for client in slow[:50]:
                with contextlib.suppress(OSError):
                    client.sendall(b"X")
        closed = 0
        for client in slow:
            client.settimeout(0.01)
            with contextlib.suppress(TimeoutError, OSError):
                while data := client.recv(4096):
                    assert b" 408 " in data or b"\r\n" in data
                closed += 1
        assert closed >= len(slow) - 5
    finally:
        for client in slow:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
