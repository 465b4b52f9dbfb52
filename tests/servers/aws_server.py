"""An S3-compatible store and a Glue catalog, started for a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from support.waiting import eventually, free_port

BUCKET = "lake"
START_SECONDS = 60.0


@contextmanager
def aws_server(key: str = "k", secret: str = "s") -> Iterator[dict[str, str]]:
    """Start a store with the bucket `lake`; yield PyIceberg's properties of it. Its address also serves a Glue catalog."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    properties = {"s3.endpoint": endpoint, "s3.access-key-id": key, "s3.secret-access-key": secret, "s3.region": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name=properties["s3.region"]
    )
    try:
        eventually(lambda: client.create_bucket(Bucket=BUCKET), START_SECONDS)
        yield properties
    finally:
        server.terminate()
        server.wait()
