"""The genuine servers, each started once per session in a directory of its own, when the first test needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers.kafka_broker import Broker


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Apache Kafka. A test makes topics of its own, and leaves the broker running."""
    with Broker(tmp_path_factory.mktemp("kafka") / "broker") as broker:
        yield broker
