"""Apache Iceberg's REST catalog, started for a test: the reference server on SQLite with one warehouse."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from servers.programs import wait_until_ready
from support.waiting import free_port, skip_or_fail

BUILD = Path(__file__).resolve().parents[2] / "build"
JARS = BUILD / "iceberg-rest"


def require_built(path: Path) -> Path:
    """Return a path that `make test-servers` builds. Without it the test is skipped, or fails when CI is set."""
    if not path.exists():
        skip_or_fail(f"{path.name} is missing. Run `make test-servers`, which needs Java 17 and Maven.")
    return path


@contextmanager
def rest_catalog(folder: Path, warehouse: str, store: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start a REST catalog with its database and log in `folder`; yield its address.

    store    PyIceberg's S3 properties of the warehouse's store; None: a local folder
    """
    jars = require_built(JARS)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    properties = {
        "catalog-impl": "org.apache.iceberg.jdbc.JdbcCatalog",
        "uri": f"jdbc:sqlite:file:{folder / 'catalog.db'}",
        "jdbc.schema-version": "V1",
        "clients": "1",  # SQLite takes one writer at a time
        "warehouse": warehouse,
        "rest.port": str(port),
    }
    environment = dict(os.environ)
    if store is not None:
        properties |= {
            "io-impl": "org.apache.iceberg.aws.s3.S3FileIO",
            "s3.endpoint": store["s3.endpoint"],
            "s3.path-style-access": "true",
            "client.region": store["s3.region"],
        }
        environment |= {"AWS_ACCESS_KEY_ID": store["s3.access-key-id"], "AWS_SECRET_ACCESS_KEY": store["s3.secret-access-key"]}
    environment |= {f"CATALOG_{name.replace('-', '__').replace('.', '_').upper()}": value for name, value in properties.items()}
    command = ["java", "-Xmx512m", "-cp", f"{jars}/*", "org.apache.iceberg.rest.RESTCatalogServer"]
    address = f"http://127.0.0.1:{port}"
    with (folder / "catalog.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(lambda: _answers(address), "The REST catalog", server, folder / "catalog.log")
        yield address
    finally:
        server.terminate()
        server.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/v1/config", timeout=10).close()
        return True
    except OSError:
        return False
