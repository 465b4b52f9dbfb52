"""Background processes: start times, signals, free ports, logs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from lakehouse.errors import SandboxError

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Started by this process. Polled to reap them: otherwise an ended server would stay a zombie while this process lives."""


@dataclass(frozen=True)
class Process:
    """One server process. `started` distinguishes it from a later process with the same id."""

    pid: int
    started: str
    port: int


def start_process(command: list[str], directory: Path, log: Path, port: int) -> tuple[Process, subprocess.Popen[bytes]]:
    """Start a server in the background, in a session of its own. Its output is appended to `log`."""
    with log.open("ab") as output:
        output.write(f"--- start on port {port}\n".encode())
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            start_new_session=True,
            env=server_environment(),
        )
    _children[child.pid] = child
    return Process(child.pid, _start_time(child.pid) or "", port), child


def is_alive(process: Process) -> bool:
    """Return whether the process runs: its id exists and has the same start time."""
    child = _children.get(process.pid)
    if child is not None:
        child.poll()
    return bool(process.started) and _start_time(process.pid) == process.started


def send_signal(process: Process, number: signal.Signals) -> None:
    """Send a signal, if the process runs."""
    if is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _start_time(pid: int) -> str | None:
    """Return when a process started, in a form that clock changes do not affect; None when it does not exist or has ended."""
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


def free_port(host: str, preferred: int) -> int:
    """Return the preferred port if it is free, otherwise another one. Raises SandboxError."""
    for port in (preferred, 0) if preferred else (0,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise SandboxError(f"{host} is not an address of this machine. Set one with --host.") from None
                continue
            return int(probe.getsockname()[1])
    raise SandboxError(f"No port on {host} is free. Stop other programs that listen there.")


def server_environment() -> dict[str, str]:
    """Return the environment without variables that would redirect a PostgreSQL client or server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else "no message"
