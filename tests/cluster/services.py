"""The services of a cluster, on an address that all nodes reach: sources, catalog, object store, MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import psycopg
from cluster.nodes import ROOT
from support.mlflow_server import http_server, mlflow_server
from support.waiting import free_port

from app import sandbox
from serve.node import FAST_PATH

NODE_HOME = "/tmp/shopsphere"
"""SHOPSPHERE_HOME on every node: a directory on its own disk."""


@dataclass(frozen=True)
class Services:
    """Running services.

    home     directory of the sandbox, which no node can reach
    secrets  by purpose; none may appear in logs or answers
    """

    home: Path
    addresses: sandbox.Addresses
    s3: str
    mlflow: str
    secrets: Mapping[str, str]

    def catalog(self, name: str) -> dict[str, str]:
        """Return the properties of a catalog in the sandbox's PostgreSQL, with a warehouse in the object store."""
        return {
            "type": "sql",
            "uri": self._database(name).replace("postgresql://", "postgresql+psycopg://"),
            "warehouse": f"s3://lake/{name}",
            "s3.endpoint": self.s3,
            "s3.access-key-id": self.secrets["s3 key id"],
            "s3.secret-access-key": self.secrets["s3 key"],
            "s3.region": "us-east-1",
        }

    def _database(self, name: str) -> str:
        return self.addresses.postgres_dsn.rpartition("/")[0] + f"/{name}"

    def environment(self, name: str, home: str = NODE_HOME, **settings: str) -> dict[str, str]:
        """Return the settings of a lakehouse with its own catalog and replication slot. Creates its database."""
        with psycopg.connect(self.addresses.postgres_dsn, autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                connection.execute(f'CREATE DATABASE "{name}"')
        return {
            **FAST_PATH,
            "SHOPSPHERE_HOME": home,
            "SHOPSPHERE_CATALOG__PROPERTIES": json.dumps(self.catalog(name)),
            "SHOPSPHERE_POSTGRES__DSN": self.addresses.postgres_dsn,
            "SHOPSPHERE_POSTGRES__SLOT": name,
            "SHOPSPHERE_MONGO__URI": self.addresses.mongo_uri,
            "SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS": self.addresses.kafka_bootstrap,
            **settings,
        }

    def app(self, environment: Mapping[str, str], *arguments: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `python -m app` on this machine with these settings, and assert that it succeeds."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SHOPSPHERE_", "MLFLOW_"))}
        done = subprocess.run(
            [sys.executable, "-m", "app", *arguments],
            cwd=ROOT,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    def digests(self, environment: Mapping[str, str], *tables: str) -> dict[str, str]:
        """Return the digests of the tables."""
        found: dict[str, str] = json.loads(self.app(environment, "digest", *tables, "--json").stdout.splitlines()[-1])
        return found


@contextlib.contextmanager
def running_services(directory: Path, host: str, orders: int = 1500, seed: int = 11) -> Iterator[Services]:
    """Yield services with generated data, which listen on `host`."""
    key_id, key = f"KEY{secrets.token_hex(8)}", secrets.token_hex(20)
    home = directory / "shop"
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(_object_store(directory, host, key_id, key))
        mlflow = stack.enter_context(mlflow_server(directory, host)).address
        addresses = sandbox.start(home, orders=orders, seed=seed, host=host)
        stack.callback(sandbox.stop, home)
        password = addresses.postgres_dsn.partition("://")[2].partition("@")[0].partition(":")[2]
        passwords = {"postgres password": password, "s3 key id": key_id, "s3 key": key}
        yield Services(home, addresses, s3, mlflow, passwords)


@contextlib.contextmanager
def _object_store(directory: Path, host: str, key_id: str, key: str) -> Iterator[str]:
    port = free_port(host)
    endpoint = f"http://{host}:{port}"
    command = (sys.executable, "-m", "moto.server", "-H", host, "-p", str(port))
    with http_server(directory / "s3.log", endpoint, "/moto-api/", *command):
        boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=key_id, aws_secret_access_key=key, region_name="us-east-1"
        ).create_bucket(Bucket="lake")
        yield endpoint
