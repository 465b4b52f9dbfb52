"""Fixtures that several packages' tests share, and the distribution of tests over processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import make_engine

from app import sandbox
from app.project import PROJECT
from app.sandbox.servers import Addresses, start_servers, stop_servers
from lakehouse.engine.engine import Engine
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a module fixture, or the filled lakehouse, in one process of `pytest -n 2 --dist loadgroup`; all
    others are spread."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
        if "filled" in fixtures:
            item.add_marker(pytest.mark.xdist_group("filled"))
        elif any(fixture.scope in ("class", "module") for found in fixtures.values() for fixture in found):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail when pytest-xdist ignores the groups, as some versions of pytest make it do: each process would set up everything."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist ignores xdist_group: use the versions in requirements-dev.lock.")


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Return an engine on an empty lake, with default settings, that runs everything in this process."""
    return make_engine(tmp_path)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """Yield the addresses of empty source servers. A test drops the tables, collections and topics that it creates."""
    home: Path = tmp_path_factory.mktemp("servers")
    addresses = start_servers(home)
    yield addresses
    stop_servers(home)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Yield the settings of a sandbox with 500 orders and a lakehouse that contains them."""
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
