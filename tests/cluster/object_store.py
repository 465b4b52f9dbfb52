"""An S3-compatible store behind a proxy that can refuse, cut or slow its connections (Toxiproxy, built with Go)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from support.waiting import eventually, free_port, skip_or_fail

TOXIPROXY = "github.com/Shopify/toxiproxy/v2/cmd/server@v2.12.0"
BUILD = Path(__file__).resolve().parents[2] / "build"
ACCESS_KEY, SECRET_KEY, BUCKET = "fault-tests", "fault-tests-secret", "lake"


def toxiproxy() -> Path:
    """Return Toxiproxy's server, built on first use."""
    program = BUILD / "toxiproxy" / "server"
    if not program.exists():
        if shutil.which("go") is None:
            skip_or_fail("Building Toxiproxy needs Go: install it (https://go.dev/dl).")
        subprocess.run(["go", "install", TOXIPROXY], env={**os.environ, "GOBIN": str(program.parent)}, check=True)
    return program


@dataclass
class ObjectStore:
    """A bucket of an S3-compatible store, reached through a proxy at `endpoint`."""

    folder: Path
    host: str = "127.0.0.1"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    endpoint: str = ""
    control: str = ""
    _proxy: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start the store and the proxy, and create the bucket."""
        program = toxiproxy()
        behind, proxied, control = free_port(self.host), free_port(self.host), free_port()
        self._run([sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(behind)], "store")
        self._run([str(program), "-host", "127.0.0.1", "-port", str(control)], "proxy")
        self.control, self.endpoint = f"http://127.0.0.1:{control}", f"http://{self.host}:{proxied}"
        self._proxy = {"name": "store", "listen": f"{self.host}:{proxied}", "upstream": f"{self.host}:{behind}"}
        eventually(lambda: self._ask("/proxies", self._proxy))
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        eventually(lambda: client.create_bucket(Bucket=BUCKET))

    def refuse(self) -> None:
        """Close all connections and refuse new ones."""
        self._ask("/proxies/store", {"enabled": False})

    def slow(self) -> None:
        """Delay every response by 700 ms and limit it to 2 MB/s."""
        self._ask("/proxies/store/toxics", {"type": "latency", "attributes": {"latency": 700}})
        self._ask("/proxies/store/toxics", {"type": "bandwidth", "attributes": {"rate": 2000}})

    def cut(self) -> None:
        """Reset connections after a few kB of the response."""
        self._ask("/proxies/store/toxics", {"type": "limit_data", "attributes": {"bytes": 20_000}})

    def repair(self) -> None:
        """Re-create the proxy. Toxiproxy's own reset waits for slow connections, sometimes forever."""
        self._ask("/proxies/store", {}, "DELETE")
        eventually(lambda: self._ask("/proxies", self._proxy))

    def stop(self) -> None:
        """Stop the store and the proxy."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()

    def properties(self) -> dict[str, str]:
        """Return PyIceberg's properties of the store."""
        return {
            "warehouse": f"s3://{BUCKET}/warehouse",
            "s3.endpoint": self.endpoint,
            "s3.access-key-id": ACCESS_KEY,
            "s3.secret-access-key": SECRET_KEY,
            "s3.region": "us-east-1",
        }

    def _run(self, command: list[str], name: str) -> None:
        env = {**os.environ, "LOG_LEVEL": "warn"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))

    def _ask(self, path: str, body: dict[str, Any], method: str = "POST") -> None:
        request = urllib.request.Request(
            self.control + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
        )
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            said = error.read().decode()
            if "toxic already exists" not in said:  # injected twice at once
                raise AssertionError(f"Toxiproxy refused {path}: {said}") from None
