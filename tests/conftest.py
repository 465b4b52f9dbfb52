"""What several tests share: the sandbox's servers, started once per session in a home of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app import sandbox
from app.project import PROJECT
from app.sandbox.servers import Addresses, start_servers, stop_servers
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """Real servers, empty: no table, collection or topic is made yet, and a test cleans up what it makes."""
    home: Path = tmp_path_factory.mktemp("servers")
    addresses = start_servers(home)
    yield addresses
    stop_servers(home)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The settings of a sandbox with a small shop and a lakehouse filled from it."""
    home: Path = tmp_path_factory.mktemp("filled")
    sandbox.start(home, orders=500, seed=5)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHOPSPHERE_HOME", str(home))
            settings = load_settings()
        with open_engine(settings) as engine:
            assert not run_once(engine, PROJECT, lambda name, report: None).errors
        yield settings
    finally:
        sandbox.stop(home)
