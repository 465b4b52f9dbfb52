"""Kills `erase` before or after any of its writes. The next `erase` finishes: nothing remains and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.erasure_world import World, context_of, files_containing, find_customer, personal_texts, shop

from app.project import PROJECT
from lakehouse.digest import digest
from pipelines.gold.sales_daily import SALES_DAILY
from pipelines.privacy.erase import erase_person
from pipelines.privacy.person import SubjectQuery
from pipelines.privacy.suppression import erasures
from pipelines.rebuild import rebuild_tables
from pipelines.runner import run_once

pytestmark = pytest.mark.slow
MOMENTS = 12

# counts the writes that other processes can see (commits, deleted files, receipts) and kills the process at one of them
CHILD = """
import os, signal, sys
import pipelines.privacy.receipt, lakehouse.iceberg.table_handle, lakehouse.iceberg.rewrite
from app.cli.main import main
wanted, after, count = int(sys.argv[1]), sys.argv[2] == "after", 0
def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == wanted and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if count == wanted and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
lakehouse.iceberg.table_handle.TableHandle.commit = counted(lakehouse.iceberg.table_handle.TableHandle.commit)
lakehouse.iceberg.rewrite.delete_file = counted(lakehouse.iceberg.rewrite.delete_file)
pipelines.privacy.receipt.replace_private_file = counted(pipelines.privacy.receipt.replace_private_file)
code = main(["erase", "--email", sys.argv[3]])
print("writes", count, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with shop(tmp_path_factory.mktemp("erasure-kill") / "home", orders=200, seed=11) as world:
        yield world


def erase_in_subprocess(home: Path, email: str, at: int, when: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHOPSPHERE_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(at), when, email], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.timeout(3600)
def test_an_erasure_killed_at_any_write_is_finished_by_the_next_one(world: World) -> None:
    person = find_customer(world.lake)
    asked, texts = SubjectQuery(email=person["email"]), personal_texts(person)
    sales = digest(world.lake.load(SALES_DAILY))
    whole = erase_in_subprocess(world.home, person["email_raw"], 0, "after")
    assert whole.returncode == 0, whole.stderr
    writes = int(whole.stderr.rsplit("writes ", 1)[1])
    draw = random.Random(3)
    moments = [
        (1, "before"),
        (1, "after"),
        (2, "after"),
        (writes, "after"),
        *((draw.randint(3, writes), draw.choice(("before", "after"))) for _ in range(MOMENTS)),
    ]
    for at, when in moments:
        world.restore()
        killed = erase_in_subprocess(world.home, person["email_raw"], at, when)
        assert killed.returncode == -signal.SIGKILL, (at, when, killed.stderr)
        with world.engine() as engine:
            # `run` starts with this; if the erasure was not committed, it is requested again
            receipts = erase_person(context_of(engine), None)
            if not erasures(engine.lake):
                receipts = erase_person(context_of(engine), asked)
        assert all(receipt.clean for receipt in receipts), (at, when)
        assert all(one.finished for one in erasures(world.lake))
        assert files_containing(world.home, texts) == [], (at, when)
        assert digest(world.lake.load(SALES_DAILY)) == sales
        assert not list((world.home / "erasures").glob("*.order.json"))
    with world.engine() as engine:
        before = {name: digest(world.lake.load(table)) for name, table in PROJECT.tables.items() if world.lake.exists(table)}
        assert not run_once(engine, PROJECT, lambda name, report: None).errors
        rebuild_tables(engine, PROJECT, [name for name in before if not name.startswith("bronze.")])
    assert {name: digest(world.lake.load(PROJECT.tables[name])) for name in before} == before
