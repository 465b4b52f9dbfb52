"""The sandbox's servers: PostgreSQL, a MongoDB-compatible server and a Kafka-compatible broker, from Python packages.

They run in the background on free ports of loopback, or of another address, and outlive the process that started them.
Their data, logs and state are in `<home>/sandbox/`; `servers.json` has process ids, ports and the password. A process is
identified by its id AND its start time, so a process that reuses the id is never signalled. After a stop or a reboot the
servers start with their data, on the same ports where they are still free.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pymongo
import pymongo.errors

from app.sandbox.postgres_server import DATABASE, ROLE, postgres_command, postgres_ready, prepare_data
from app.sandbox.processes import Process, free_port, is_alive, last_line, send_signal, start_process
from lakehouse.errors import SandboxError

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
KILL_SECONDS = 5.0
ATTEMPTS = 3
STOP_COMMAND = "python -m app sandbox stop"
NAMES = ("postgres", "mongo", "kafka")
LABELS = {"postgres": "PostgreSQL", "mongo": "MongoDB-compatible server", "kafka": "Kafka broker"}
BROKER = Path(__file__).resolve().parents[1] / "kafka_broker"

ShowProgress = Callable[[str, int, int], None]
"""show(label, done, total)."""


@dataclass(frozen=True)
class Addresses:
    """The addresses of the three servers."""

    postgres_dsn: str
    mongo_uri: str
    kafka_bootstrap: str


@dataclass(frozen=True)
class SandboxState:
    """The content of `servers.json`. Host and ports are kept after a stop."""

    password: str
    ports: dict[str, int]
    processes: dict[str, Process]
    host: str = LOOPBACK

    def addresses(self) -> Addresses:
        """Return the addresses of the servers."""
        return Addresses(
            f"postgresql://{ROLE}:{self.password}@{self.host}:{self.ports['postgres']}/{DATABASE}",
            f"mongodb://{self.host}:{self.ports['mongo']}",
            f"{self.host}:{self.ports['kafka']}",
        )

    def is_running(self, name: str) -> bool:
        """Return whether a server runs."""
        return name in self.processes and is_alive(self.processes[name])


def sandbox_directory(home: Path) -> Path:
    """Return `<home>/sandbox`, absolute."""
    return home.expanduser().absolute() / "sandbox"


def start_servers(home: Path, on_start: Callable[[str], None] | None = None, host: str = LOOPBACK) -> Addresses:
    """Start the three servers and wait until each answers. Servers that already run are left alone.

    on_start: called with the name of each server. host: the address of this machine to listen on; beyond loopback, only
    PostgreSQL requires a password. On an error or interruption the servers started here are stopped. Raises SandboxError.
    """
    directory = sandbox_directory(home)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        state = replace(_read(directory) or SandboxState(secrets.token_urlsafe(18), {}, {}), host=host)
        processes = {name: process for name, process in state.processes.items() if is_alive(process)}
        started: list[str] = []
        try:
            for name in NAMES:
                if name in processes:
                    continue
                if on_start:
                    on_start(LABELS[name])
                started.append(name)
                state = _start(directory, name, replace(state, processes=processes))
                processes = dict(state.processes)
        except BaseException:
            written = _read(directory) or state
            _stop(directory, written, [name for name in started if name in written.processes])
            raise
        return state.addresses()


def stop_servers(home: Path) -> list[str]:
    """Stop the servers and return the names of those that ran. Their data is kept. Raises SandboxError."""
    directory = sandbox_directory(home)
    if not directory.exists():
        return []
    with _locked(directory):
        state = _read(directory)
        return _stop(directory, state, list(NAMES)) if state else []


def running(home: Path) -> Addresses | None:
    """Return the addresses if all three servers run, otherwise None."""
    state = _read(sandbox_directory(home))
    return state.addresses() if state and all(map(state.is_running, NAMES)) else None


def any_running(home: Path) -> list[str]:
    """Return the names of the servers that run."""
    state = _read(sandbox_directory(home))
    return [LABELS[name] for name in NAMES if state and state.is_running(name)]


# Starting and stopping one server


def _start(directory: Path, name: str, state: SandboxState) -> SandboxState:
    command, ready = {
        "postgres": (postgres_command, postgres_ready),
        "mongo": (_mongo_command, _mongo_ready),
        "kafka": (_kafka_command, _kafka_ready),
    }[name]
    if name == "postgres":
        prepare_data(directory, state.password, network=state.host != LOOPBACK)
    log = directory / f"{name}.log"
    for attempt in range(1, ATTEMPTS + 1):
        port = free_port(state.host, state.ports.get(name, 0))
        process, child = start_process(command(directory, state.host, port), directory, log, port)
        state = replace(state, ports=state.ports | {name: port}, processes=state.processes | {name: process})
        _write(directory, state)
        if _wait_until_ready(child, partial(ready, state.host, port, state.password)):
            return state
        if attempt == ATTEMPTS or child.poll() is None:
            break
        # the port may have been taken in the meantime
        state = replace(state, ports={key: value for key, value in state.ports.items() if key != name})
    raise SandboxError(f"{LABELS[name]} did not start: {last_line(log)}. The whole log is in {log}.")


def _wait_until_ready(child: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return False
        if ready():
            return True
        time.sleep(0.05)
    return False


def _stop(directory: Path, state: SandboxState, names: list[str]) -> list[str]:
    stopped: list[str] = []
    failed: list[str] = []
    alive = {name: state.processes[name] for name in names if state.is_running(name)}
    for name, process in alive.items():
        # SIGINT is PostgreSQL's fast shutdown: it ends sessions instead of waiting for them
        send_signal(process, signal.SIGINT if name == "postgres" else signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for name, process in alive.items():
        _wait_until_ended(process, deadline)
        if is_alive(process):
            send_signal(process, signal.SIGQUIT if name == "postgres" else signal.SIGKILL)
            _wait_until_ended(process, time.monotonic() + KILL_SECONDS)
        (failed if is_alive(process) else stopped).append(name)
    left = {name: process for name, process in state.processes.items() if is_alive(process)}
    _write(directory, replace(state, processes=left))
    if failed:
        raise SandboxError(
            f"{LABELS[failed[0]]} (process {state.processes[failed[0]].pid}) does not stop. "
            f"End it by hand, then run `{STOP_COMMAND}` again."
        )
    return [LABELS[name] for name in stopped]


def _wait_until_ended(process: Process, deadline: float) -> None:
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)


# MongoDB and Kafka


def _mongo_command(directory: Path, host: str, port: int) -> list[str]:
    (directory / "mongo").mkdir(exist_ok=True)
    return [
        *(sys.executable, str(Path(__file__).with_name("mongo_server.py")), "--host", host, "--port", str(port)),
        *("--data-dir", str(directory / "mongo")),
        *("--log-file", os.devnull, "--pid-file", str(directory / "mongo.pid")),
    ]


def _mongo_ready(host: str, port: int, _password: str) -> bool:
    try:
        with pymongo.MongoClient(host, port, serverSelectionTimeoutMS=500, connect=True) as client:  # type: ignore[var-annotated]
            client.admin.command("ping")
            return True
    except pymongo.errors.PyMongoError:
        return False


def _kafka_command(directory: Path, host: str, port: int) -> list[str]:
    arguments = ["--directory", str(directory / "kafka"), "--host", host, "--port", str(port)]
    return [sys.executable, "-I", "-S", str(BROKER), *arguments]


def _kafka_ready(host: str, port: int, _password: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


# The state file


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SandboxError(
                f"Another process is starting or stopping the sandbox in {directory}. Wait until it is done."
            ) from None
        yield


def _read(directory: Path) -> SandboxState | None:
    file = directory / "servers.json"
    try:
        content = json.loads(file.read_text())
        processes = {name: Process(**process) for name, process in content["processes"].items()}
        return SandboxState(content["password"], content["ports"], processes, content.get("host", LOOPBACK))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"{file} cannot be read ({error}). End the servers by hand and remove {directory}.") from None


def _write(directory: Path, state: SandboxState) -> None:
    temporary = directory / "servers.json.new"
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(state), indent=1))
    temporary.replace(directory / "servers.json")
