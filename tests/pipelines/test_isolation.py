"""One fault does not stop the rest: unforeseen exceptions at random points of random sources and steps."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import pytest
from polars.exceptions import PanicException

from app import sandbox
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.errors import UnforeseenError
from lakehouse.step import upstream_names
from pipelines.runner import RunResult, open_engine, run_once
from pipelines.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(str(ROOT / package) for package in ("lakehouse", "pipelines"))
ORDERS_PER_RUN = 6
SECRET = "north@example.org"
EXCEPTIONS: tuple[type[BaseException], ...] = (KeyError, OverflowError, SystemError, RuntimeError, PanicException)


class FaultPoint:
    """Counts the calls of the product's own functions in one source or step, and raises an exception at one of them."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        """at: the call to fail at, counted from 1; 0: only count."""
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            self.calls += 1
            if self.calls == self.at:
                raise self.kind(SECRET)

    def around(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function under this profiler."""
        sys.setprofile(self)
        try:
            return function(*arguments)
        finally:
            sys.setprofile(None)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine, dict[str, int]]]:
    """Yield the home of a sandbox, an engine whose tables are up to date, and the calls of each source and step in a run."""
    home = tmp_path_factory.mktemp("isolation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(home))
        sandbox.start(home, orders=120, seed=5)
        try:
            with open_engine(load_settings()) as engine:
                assert not run(engine).errors
                sandbox.step(home, ORDERS_PER_RUN)
                points = {unit: FaultPoint(0, KeyError) for unit in units()}
                assert not run(engine, points).errors
                yield home, engine, {unit: point.calls for unit, point in points.items()}
        finally:
            sandbox.stop(home)


def units() -> list[str]:
    """Return what fails on its own: the sources by name, the steps by their tables."""
    return [*(source.name for source in PROJECT.sources(load_settings())), *(step.target.name for step in PROJECT.ordered_steps)]


def run(engine: Engine, points: Mapping[str, FaultPoint] = MappingProxyType({})) -> RunResult:
    """Run once, with fault points around some sources and steps."""
    ingest, refresh = engine.ingest, engine.refresh

    def around(unit: str) -> Callable[..., Any]:
        return points[unit].around if unit in points else call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ingest", lambda source, *more: around(source.name)(ingest, source, *more))
        patch.setattr(engine, "refresh", lambda step: around(step.target.name)(refresh, step))
        return run_once(engine, PROJECT, lambda name, result: None)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def tables_behind(unit: str) -> set[str]:
    """Return the tables that a failure of a source or step leaves behind: its own and those downstream."""
    sources = {source.name: set(source.tables) for source in PROJECT.sources(load_settings())}
    behind = sources.get(unit, {unit})
    for step in PROJECT.ordered_steps:
        if behind & {*upstream_names(step)}:
            behind.add(step.target.name)
    return behind


@pytest.mark.parametrize(("seed", "rounds"), [(1, 2), pytest.param(2, 8, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_fault_at_a_random_point_of_a_random_source_or_step_stops_nothing_else(shop, seed, rounds) -> None:
    home, engine, calls = shop
    chance = random.Random(seed)
    faults = 0
    for number in range(rounds):
        sandbox.step(home, ORDERS_PER_RUN)
        unit = chance.choice(units()) if number else "kafka"
        point = FaultPoint(chance.randint(1, calls[unit] * 3 // 4), chance.choice(EXCEPTIONS))
        failed = run(engine, {unit: point})
        for error in failed.errors:
            assert isinstance(error, UnforeseenError)
            assert (error.table, error.kind) == (unit, point.kind.__name__)
            assert SECRET not in str(error)
            faults += 1
        healed = run(engine)
        assert not healed.errors
        changed = {result.table for result in healed.results if result.status != "unchanged"}
        assert changed <= tables_behind(unit), "the others were up to date"
    assert faults
    assert {result.status for result in run(engine).results} == {"unchanged"}
    before = digests(engine)
    for step in PROJECT.ordered_steps:
        engine.refresh(step, rebuild=True)
    assert digests(engine) == before


def digests(engine: Engine) -> dict[str, str]:
    return {step.target.name: digest(engine.lake.load(step.target)) for step in PROJECT.ordered_steps}
