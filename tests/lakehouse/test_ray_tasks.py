"""Errors of Ray tasks reach the driver with their own type: transient errors, project errors, programming errors."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import cloudpickle
import pyarrow as pa
import pytest

from lakehouse.errors import TransientError, UnknownColumn
from lakehouse.parallel import Block, Blocks, TaskPool
from lakehouse.settings import RaySettings
from lakehouse.transient_errors import as_transient_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[TaskPool]:
    made = TaskPool(RaySettings(cpus=2))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    yield made
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    made.close()


def test_a_worker_survives_the_deletion_of_its_working_directory(pool: TaskPool) -> None:
    def lose(*_: object) -> str:
        gone = tempfile.mkdtemp()
        os.chdir(gone)
        os.rmdir(gone)
        return gone

    def look(*_: object) -> str:
        return os.getcwd()

    places, _ = pool.map(lose, range(8), Blocks(), parallel=True)
    found, _ = pool.map(look, range(8), Blocks(), parallel=True)
    assert len(found) == 8
    assert not set(found) & set(places)


def unreachable_store() -> None:
    raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def caused_by_a_transient_error() -> None:
    raise ValueError("no rows") from ConnectionResetError("reset by peer")


def new_column() -> None:
    raise UnknownColumn("silver.stores", "colour", "text", pa.string())


def programming_error() -> None:
    raise KeyError("column")


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (unreachable_store, TransientError),
        (disk_full, TransientError),
        (caused_by_a_transient_error, TransientError),
        (new_column, UnknownColumn),
        (programming_error, KeyError),
    ],
)
def test_an_error_of_a_task_keeps_its_type(pool: TaskPool, fail: Callable[[], None], expected: type[Exception]) -> None:
    def work(*_: object) -> list[Block]:
        fail()
        return []

    for run in (pool.map, pool.transform):
        with pytest.raises(expected) as met:
            run(work, [1, 2], Blocks(), parallel=True)
        assert isinstance(met.value, TransientError) or as_transient_error(met.value) is None
        assert expected is KeyError or "\n" not in str(met.value), "one line for people, without Ray's stack"
