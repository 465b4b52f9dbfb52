"""A private MLflow tracking server for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.waiting import free_port, wait_for


@dataclass(frozen=True)
class Server:
    """A server that runs in a session of its own, so that its workers stop with it."""

    process: subprocess.Popen[bytes]
    address: str

    def stop(self) -> None:
        """Stop the server."""
        for number in (15, 9):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
                return

    def answers(self, path: str) -> bool:
        """Return whether it answers, with any status. Raises AssertionError when its process has exited."""
        assert self.process.poll() is None, f"the server at {self.address} has exited"
        try:
            with urllib.request.urlopen(self.address + path, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@contextlib.contextmanager
def http_server(log: Path, address: str, path: str, *command: str) -> Iterator[Server]:
    """Start a server with a command; yield it once it answers at a path."""
    with log.open("wb") as output:
        # MLflow's job queue would start seven processes that the tests do not use
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = Server(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment), address)
    try:
        wait_for(lambda: server.answers(path), f"no server at {address}")
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def mlflow_server(directory: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    """Start MLflow's server with its database and files in a directory."""
    port, home = free_port(host), directory / "mlflow-server"
    home.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "artifacts")]
    command += ["--allowed-hosts", "*"]
    with http_server(directory / "mlflow.log", f"http://{host}:{port}", "/health", *command) as server:
        yield server
