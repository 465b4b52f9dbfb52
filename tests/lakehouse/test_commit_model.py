"""The commit protocol as a state machine: several writers of all kinds, interrupted between any two steps, on the SQLite catalog.

`make test-commits` runs 10,000 schedules, COMMIT_SCHEDULES another number.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support import other_engine
from support.commit_world import LATER, SALES, SALES_RECEIVED, TABLES, TOTALS, CommitWorld, State, WorldDirectory, state_of
from support.commit_writers import Fault, Writer, pauses_in_the_product

from lakehouse.engine.engine import Engine
from lakehouse.iceberg.table_handle import TableHandle

SCHEDULES = int(os.environ.get("COMMIT_SCHEDULES", "3"))
STEPS = 10
MAX_WRITERS = 3
BY_NAME = {table.name: table for table in TABLES}
KEYS = {SALES_RECEIVED.name: ("_source_position", "id"), SALES.name: ("id", "shop", "amount"), TOTALS.name: ("shop", "amount")}

IDS = st.integers(0, 3)
EVENTS = st.lists(
    st.tuples(IDS, st.sampled_from(["north", "south"]), st.integers(-1, 9), st.sampled_from("uuud")), min_size=1, max_size=3
)
OTHER_ENGINE = st.tuples(st.sampled_from(sorted(other_engine.ACTIONS)), st.sampled_from(sorted(BY_NAME)))
ACTIONS = st.one_of(
    st.just(("run",)),
    st.tuples(st.just("erase"), IDS),
    st.just(("run",)),
    st.tuples(st.just("erase"), IDS),
    st.sampled_from([("maintain",), ("publish",)]),
    OTHER_ENGINE,
)
COMMITS = st.tuples(st.sampled_from(["commit", "committed"]), st.sampled_from(sorted(BY_NAME))).map(" ".join)
OTHER_POINTS = st.sampled_from([*(f"load {name}" for name in BY_NAME), "swap", "read", "referenced_files", "delete_file", "end"])
PLACES = st.one_of(*[st.tuples(COMMITS, st.integers(1, 4))] * 2, st.tuples(OTHER_POINTS, st.integers(1, 6)))
"""A point of a writer, and how often it comes there before it is paused. The order of commits is what matters most."""
FIRST_PLACES = st.one_of(*[st.tuples(COMMITS, st.just(1))] * 2, PLACES)
FAULTS = st.sampled_from([None, None, *Fault])


class CommitProtocol(RuleBasedStateMachine):
    """Schedules of writers and readers."""

    directory: WorldDirectory

    def __init__(self) -> None:
        super().__init__()
        self.world: CommitWorld = self.directory.reset()
        self.writers: list[Writer] = []
        self.readers: list[tuple[TableHandle, State, int]] = []

    # writers

    def start_writer(self, action: tuple[Any, ...]) -> Writer:
        kind, *arguments = action
        if kind in other_engine.ACTIONS:
            perform = partial(other_engine.ACTIONS[kind], table=BY_NAME[arguments[0]])
        else:
            perform = partial(getattr(self.world, kind), **({"number": arguments[0]} if arguments else {}))
        self.writers.append(Writer(kind, self.world.engine(), perform))
        return self.writers[-1]

    def end(self, writer: Writer) -> None:
        """Forget a writer that has ended, for a reason that may end it."""
        if writer.done and writer in self.writers:
            self.writers.remove(writer)
            if not (self.world.accepts(writer) or other_engine.accepts(writer.kind, writer.error)):
                raise AssertionError(f"{writer.kind} ended with an error") from writer.error

    def cross(self, first, paused, events, second, stopped, fault: Fault | None) -> None:
        """Start a writer beside another one that is paused, and end both; the second one with a fault, if any."""
        slow, fast = self.start_writer(first), self.start_writer(second)
        slow.advance_to(*paused)
        self.world.log.events += events
        fast.advance_to(*stopped)
        fast.advance(fault)
        slow.finish()
        self.world.check_tables()
        fast.finish()
        self.end(slow)
        self.end(fast)

    @rule(first=ACTIONS, paused=PLACES, events=EVENTS, second=ACTIONS, stopped=FIRST_PLACES, fault=FAULTS)
    def cross_any(self, **writers) -> None:
        self.cross(**writers)

    @rule(number=IDS, paused=PLACES, events=EVENTS, stopped=FIRST_PLACES, fault=FAULTS)
    def cross_erasure_and_run(self, number: int, **writers) -> None:
        self.cross(("erase", number), second=("run",), **writers)

    @rule(paused=FIRST_PLACES, events=EVENTS, number=IDS, stopped=PLACES, fault=FAULTS)
    def cross_run_and_erasure(self, number: int, **writers) -> None:
        self.cross(("run",), second=("erase", number), **writers)

    @rule(paused=FIRST_PLACES, events=EVENTS, stopped=FIRST_PLACES, fault=FAULTS)
    def cross_runs(self, **writers) -> None:
        self.cross(("run",), second=("run",), **writers)

    @precondition(lambda self: len(self.writers) < MAX_WRITERS)
    @rule(events=EVENTS, action=ACTIONS, place=PLACES)
    def start(self, events, action, place) -> None:
        self.world.log.events += events
        writer = self.start_writer(action)
        writer.advance_to(*place)
        self.end(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), place=PLACES)
    def advance(self, data: st.DataObject, place) -> None:
        writer = data.draw(st.sampled_from(self.writers), "writer")
        writer.advance_to(*place)
        self.end(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), fault=st.sampled_from(Fault))
    def inject(self, data: st.DataObject, fault: Fault) -> None:
        """Kill a writer where it is, or lose the answer to its next commit."""
        writer = data.draw(st.sampled_from(self.writers), "writer")
        if fault is not Fault.KILL:
            writer.advance_to("committed")
        writer.advance(fault)
        self.end(writer)

    # readers

    @rule(table=st.sampled_from(sorted(BY_NAME)))
    def open_reader(self, table: str) -> None:
        handle = self.world.lake.load(BY_NAME[table])
        self.readers.append((handle, state_of(handle, KEYS[table]), self.world.purges))

    @precondition(lambda self: self.readers)
    @rule()
    def read(self) -> None:
        handle, before, purges = self.readers.pop(0)
        try:
            assert state_of(handle, KEYS[handle.table.name]) == before
        except FileNotFoundError:
            assert self.world.purges > purges, "a snapshot's files are gone, although only an erasure deletes them at once"

    # everything at rest

    @rule()
    def settle(self) -> None:
        self.finish_all()
        self.world.settle()

    def finish_all(self) -> None:
        for writer in list(self.writers):
            writer.finish()
            self.end(writer)

    @precondition(lambda self: not self.writers)
    @rule()
    def maintain_much_later(self) -> None:
        """Remove all orphans: those that killed writers left are old by now."""
        self.readers.clear()
        self.world.alone(partial(self.world.maintain, later=LATER))
        self.world.check_files()

    @invariant()
    def tables_are_consistent(self) -> None:
        self.world.check_tables()

    def teardown(self) -> None:
        try:
            self.finish_all()
            # gold accepts the rows after these events
            self.world.log.events += [(number, "north", 1, "u") for number in range(4)]
            self.world.settle()
            self.maintain_much_later()
            self.world.check_tables()
            self.world.check_erased_files()
        finally:
            for writer in self.writers:
                writer.advance(Fault.KILL)
            self.world.close()


@pytest.fixture(scope="module")
def directory() -> Iterator[WorldDirectory]:
    directory = WorldDirectory()
    with pauses_in_the_product():
        yield directory
    directory.remove()


@pytest.mark.timeout(60 + 10 * SCHEDULES)
@pytest.mark.slow
def test_any_schedule_of_writers_loses_and_doubles_nothing(directory: WorldDirectory) -> None:
    machine = type("Machine", (CommitProtocol,), {"directory": directory})
    options = settings(
        max_examples=SCHEDULES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=SCHEDULES < 10,  # the same schedules in every fast run
    )
    run_state_machine_as_test(machine, settings=options)


WRITERS: dict[str, Callable[[CommitWorld], Callable[[Engine], object]]] = {
    "run": lambda world: world.run,
    "maintain": lambda world: world.maintain,
    "erase": lambda world: partial(world.erase, number=1),
    "publish": lambda world: world.publish,
}
MOVED = (0, "south", 5, "u")
"""The event between the two writers: a sale that moves to another shop."""


def mutating_points(directory: WorldDirectory, kind: str) -> list[int]:
    """Return the numbers of the points of a writer that come right before or after it changes something."""
    world = directory.reset()
    world.log.events.append(MOVED)
    writer = Writer(kind, world.engine(), WRITERS[kind](world))
    numbers, before = [], ""
    for number in itertools.count(1):
        writer.advance()
        if writer.done:
            world.close()
            return numbers
        if writer.point.startswith(("commit", "swap", "referenced_files", "delete_file")) and writer.point != before:
            numbers.append(number)
        before = writer.point


def check_crossing(directory: WorldDirectory, first: str, paused: int, second: str, stopped: int, fault: Fault | None) -> None:
    """Pause one writer at a point, let another come to one of its own, end the first and then the second."""
    world = directory.reset()
    slow = Writer(first, world.engine(), WRITERS[first](world))
    fast = Writer(second, world.engine(), WRITERS[second](world))
    try:
        slow.advance_by(paused)
        world.log.events.append(MOVED)
        fast.advance_by(stopped)
        fast.advance(fault)
        slow.finish()
        world.check_tables()
        fast.finish()
        for writer in (slow, fast):
            if not world.accepts(writer):
                raise AssertionError(f"{writer.kind} ended with an error") from writer.error
        world.settle()
        world.alone(partial(world.maintain, later=LATER))
        world.check_tables()
        world.check_files()
        world.check_erased_files()
    except AssertionError as error:
        error.add_note(f"{first} paused at its point {paused}, {second} stopped at its point {stopped}, fault: {fault}")
        raise
    finally:
        slow.advance(Fault.KILL)
        fast.advance(Fault.KILL)
        world.close()


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * SCHEDULES)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("erase", "run"),
        ("run", "erase"),
        ("erase", "erase"),
        ("run", "run"),
        ("maintain", "run"),
        ("run", "maintain"),
        ("erase", "maintain"),
    ],
)
def test_two_writers_that_cross_at_any_two_points(directory: WorldDirectory, first: str, second: str) -> None:
    """With a large COMMIT_SCHEDULES all pairs of points, otherwise a sample."""
    crossings = list(
        itertools.product(mutating_points(directory, first), mutating_points(directory, second), (None, Fault.KILL, Fault.LOSE))
    )
    for paused, stopped, fault in Random(0).sample(crossings, min(SCHEDULES, len(crossings))):
        check_crossing(directory, first, paused, second, stopped, fault)
