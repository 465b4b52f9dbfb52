"""Credentials of the catalog and the store never appear in output, errors, logs or table metadata."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.aws_server import BUCKET, aws_server
from servers.rest_catalog import rest_catalog
from support.waiting import free_port

from app.cli.main import main
from lakehouse.iceberg.catalog import Lake
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.settings import load_settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(200)]
SECRETS = {"s3": "s3-Secret-4711", "oauth": "oauth-Secret-4712", "user": "user-Secret-4713"}
COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["sql", "SELECT count(*) FROM gold.dim_stores"],
    ["digest", "gold.dim_stores"],
    ["maintain"],
    ["run"],
)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the address of a REST catalog on an S3-compatible store, and the store's properties."""
    with (
        aws_server(secret=SECRETS["s3"]) as store,
        rest_catalog(tmp_path_factory.mktemp("rest"), f"s3://{BUCKET}/w", store) as address,
    ):
        yield address, store


def catalog_properties(address: str, store: dict[str, str]) -> dict[str, str]:
    return {
        "type": "rest",
        "uri": address.replace("http://", f"http://someone:{SECRETS['user']}@"),
        "credential": f"shop:{SECRETS['oauth']}",
        **store,
    }


def output_of(capfd, caplog, monkeypatch, home: Path, properties: dict[str, str], *, debug: bool) -> str:
    """Return everything that the commands write with these properties."""
    monkeypatch.setenv("SHOPSPHERE_HOME", str(home))
    monkeypatch.setenv("SHOPSPHERE_CATALOG__PROPERTIES", json.dumps(properties))
    for source in ("POSTGRES", "MONGO", "KAFKA"):
        monkeypatch.setenv(f"SHOPSPHERE_{source}__ENABLED", "false")
    written = [repr(load_settings())]
    for command in COMMANDS:
        try:
            main([*(["--debug"] if debug else []), *command])
        except Exception:
            written.append(traceback.format_exc())
    out, err = capfd.readouterr()
    return "\n".join([*written, out, err, caplog.text])


@pytest.mark.parametrize(("broken", "debug"), [("nothing", False), ("catalog", False), ("catalog", True), ("store", True)])
@pytest.mark.filterwarnings("ignore")
def test_no_secret_is_written(services, tmp_path, capfd, caplog, monkeypatch, broken, debug):
    address, store = services
    unreachable = f"http://127.0.0.1:{free_port()}"
    properties = catalog_properties(unreachable if broken == "catalog" else address, store)
    if broken == "store":
        properties["s3.endpoint"] = unreachable
    caplog.set_level(logging.INFO)
    text = output_of(capfd, caplog, monkeypatch, tmp_path, properties, debug=debug)
    if broken == "nothing":
        assert "gold.dim_stores" in text
    found = [name for name, secret in SECRETS.items() if secret in text]
    assert not found, [line for line in text.splitlines() if any(secret in line for secret in SECRETS.values())][:5]
    if broken == "nothing":
        metadata = Lake(load_settings()).load(DIM_STORES).iceberg_table.metadata.model_dump_json()
        assert not [name for name, secret in SECRETS.items() if secret in metadata]
