"""What several tests share: the sandbox's servers, started once per session in a home of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.sandbox.servers import Addresses, start_servers, stop_servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """Real servers, empty: no table, collection or topic is made yet, and a test cleans up what it makes."""
    home: Path = tmp_path_factory.mktemp("servers")
    addresses = start_servers(home)
    yield addresses
    stop_servers(home)
