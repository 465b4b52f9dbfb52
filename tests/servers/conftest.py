"""Real servers, each started once per session in a separate directory when the first test needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers.kafka_broker import Broker
from servers.mongo_servers import FerretDB, MongoJava


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Start Apache Kafka. A test creates its own topics and leaves the broker running."""
    with Broker(tmp_path_factory.mktemp("kafka") / "broker") as broker:
        yield broker


@pytest.fixture(scope="session")
def ferretdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FerretDB]:
    """Start FerretDB. A test creates its own database."""
    with FerretDB(tmp_path_factory.mktemp("ferretdb")) as server:
        yield server


@pytest.fixture(scope="session")
def mongo_java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoJava]:
    """Start mongo-java-server. A test creates its own database."""
    with MongoJava(tmp_path_factory.mktemp("mongo-java")) as server:
        yield server
