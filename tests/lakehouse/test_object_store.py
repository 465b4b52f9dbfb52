"""A warehouse in an object store has the same digests as one on the local disk."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from support.erasure_world import context_of, find_customer, personal_texts

import pipelines
from app import sandbox
from app.project import PROJECT
from lakehouse.byte_search import SearchTerms, search_bytes
from lakehouse.digest import digest
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import maintain
from pipelines.privacy.erase import erase_person
from pipelines.privacy.person import SubjectQuery
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def s3() -> Iterator[str]:
    """Yield the endpoint of an S3-compatible store with a bucket `lake`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1")
    try:
        for attempt in range(100):
            try:
                client.create_bucket(Bucket="lake")
                break
            except Exception:
                if attempt == 99:
                    raise
                time.sleep(0.2)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def test_tables_in_an_object_store_have_the_same_digests(s3, tmp_path, monkeypatch):
    home: Path = tmp_path / "shop"
    monkeypatch.setenv("SHOPSPHERE_HOME", str(home))
    sandbox.start(home, orders=300, seed=21)
    try:
        local = load_settings(postgres=load_settings().postgres.model_copy(update={"slot": "local"}))
        properties = {
            "type": "sql",
            "uri": f"sqlite:///{tmp_path / 's3.db'}",
            "warehouse": "s3://lake/warehouse",
            "s3.endpoint": s3,
            "s3.access-key-id": "k",
            "s3.secret-access-key": "s",
            "s3.region": "us-east-1",
        }
        remote = load_settings(home=tmp_path / "remote", catalog=local.catalog.model_copy(update={"properties": properties}))
        found = []
        for stage in range(2):
            if stage:
                sandbox.step(home, 40)
            for settings in (local, remote):
                with open_engine(settings) as engine:
                    assert not run_once(engine, PROJECT, lambda name, report: None).errors
        for settings in (local, remote):
            with open_engine(settings) as engine:
                for table in pipelines.TABLES.values():
                    maintain(engine.lake, table, after_all_retentions())
                found.append({name: digest(engine.lake.load(table)) for name, table in pipelines.TABLES.items()})
        assert found[0] == found[1]
        assert_erased_from_store(remote)
    finally:
        sandbox.stop(home)


def after_all_retentions():
    """Return a time at which every snapshot but the current one, and every unreferenced file, is beyond its retention."""
    from datetime import UTC, datetime, timedelta

    return datetime.now(UTC) + timedelta(days=30)


def assert_erased_from_store(settings: Settings) -> None:
    """Erase a person and assert that no object in the store contains their values."""
    person = find_customer(Lake(settings))
    with open_engine(settings) as engine:
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
    assert receipt.clean
    assert receipt.values
    assert sum(one.files_deleted for one in receipt.forgotten)
    client = boto3.client(
        "s3", endpoint_url=settings.catalog.properties["s3.endpoint"], aws_access_key_id="k", aws_secret_access_key="s",
        region_name="us-east-1",
    )  # fmt: skip
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="lake")
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    assert keys
    for key in keys:
        content = client.get_object(Bucket="lake", Key=key)["Body"].read()
        assert not search_bytes(key, content, SearchTerms(tuple(personal_texts(person)))).matches
