"""A run of many orders under 200 faults: no row is lost or duplicated, and recovery is automatic."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.faults import FAULTS, FaultInjector, SourceServers, Supervised, Target, format_result, format_results, is_up, run_app
from cluster.object_store import ObjectStore
from servers.kafka_broker import Broker
from support.waiting import eventually, free_port, skip_or_fail, wait_for

import pipelines
from app import sandbox
from lakehouse.iceberg.catalog import Lake
from pipelines.settings import load_settings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]

ORDERS = int(os.environ.get("FAULT_ORDERS", "200000"))
SHARE = float(os.environ.get("FAULT_SHARE", "1"))
SEED = int(os.environ.get("FAULT_SEED", "2026"))
DISK = "48m"
MARKETPLACE = "bronze.bronze_mongo__marketplace_orders"
MARKETPLACE_POSITIONS = f"SELECT document_id, _op, _source_position FROM {MARKETPLACE} ORDER BY ALL"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Yield a small file system that can be filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        skip_or_fail(f"A file system cannot be mounted ({mounted.stderr.strip()}): run as root.")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


@pytest.fixture
def shop(tmp_path) -> Iterator[SourceServers]:
    """Yield running source servers with generated data."""
    # messages have old or future timestamps: with default settings the broker would delete or refuse them
    with Broker(tmp_path / "kafka", {"log.retention.ms": "-1", "log.message.timestamp.after.max.ms": str(2**63 - 1)}) as broker:
        made = SourceServers(tmp_path / "shop", broker)
        try:
            made.start(ORDERS, SEED)
            yield made
        finally:
            sandbox.stop(made.home)


@pytest.fixture
def store(tmp_path) -> Iterator[ObjectStore]:
    """Yield an object store whose connections can be disturbed."""
    made = ObjectStore(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def ray_nodes(tmp_path) -> Iterator[tuple[str, list[Supervised]]]:
    """Yield the address of a Ray cluster and its two worker nodes."""
    folder = tempfile.mkdtemp(prefix="ray-")  # the paths of Ray's sockets must be short
    port, env = free_port(), {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    address = f"127.0.0.1:{port}"
    ray = str(Path(sys.executable).with_name("ray"))
    common = ["--num-cpus=1", "--object-store-memory=300000000", "--block", "--disable-usage-stats"]
    head = Supervised(
        [ray, "start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", *common],
        env,
        tmp_path / "head.log",
    )
    workers = [
        Supervised([ray, "start", f"--address={address}", *common], env, tmp_path / f"node-{number}.log") for number in range(2)
    ]
    head.start()
    try:
        eventually(lambda: socket.create_connection(("127.0.0.1", port)).close(), 60)
        for node in workers:
            node.start()
        wait_for(lambda: all(map(is_up, workers)), "Ray nodes are up", 90)
        yield address, workers
    finally:
        for node in [*workers, head]:
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)


def rows(env: dict[str, str], query: str) -> list[dict[str, str]]:
    """Return the rows of a query."""
    return json.loads(run_app("sql", "--json", query, env=env))


def test_faults_leave_the_tables_of_an_undisturbed_run(tmp_path, shop, small_disk, store, ray_nodes, capsys):
    address, workers = ray_nodes
    common = {**os.environ, "SHOPSPHERE_CONFIG": str(shop.config), "RAY_AUTH_MODE": "disabled"}
    common["SHOPSPHERE_RAY__REQUIRE_TOKEN"] = "false"
    undisturbed = {**common, "SHOPSPHERE_HOME": str(tmp_path / "undisturbed"), "SHOPSPHERE_POSTGRES__SLOT": "undisturbed"}
    catalog = {"type": "sql", "uri": f"sqlite:///{small_disk}/catalog.db", **store.properties()}
    faulted = {
        **common,
        "SHOPSPHERE_HOME": str(small_disk),
        "SHOPSPHERE_POSTGRES__SLOT": "faulted",
        "SHOPSPHERE_CATALOG__PROPERTIES": json.dumps(catalog),
        "SHOPSPHERE_RAY__ADDRESS": address,
        "SHOPSPHERE_RAY__INLINE_ROWS": "200",
        "SHOPSPHERE_RAY__ROWS_PER_TASK": "50000",
    }

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    began = time.monotonic()
    run_app("run", env=undisturbed)
    say(f"\nthe undisturbed run of {ORDERS:,} orders took {time.monotonic() - began:.0f} s")
    driver = Supervised([sys.executable, "-m", "app", "run", "--every", "0.5s"], faulted, tmp_path / "driver.log")
    settings = load_settings(home=small_disk, catalog=load_settings().catalog.model_copy(update={"properties": catalog}))
    from_sources = {name for source in pipelines.enabled_sources(settings) for name in source.tables}
    read_once: set[str] = set()

    def may_step() -> bool:
        """Return whether all sources have been read once. The undisturbed run has read them in that state."""
        waiting = from_sources - read_once
        if waiting and shop.running:
            lake = Lake(settings)
            read_once.update(name for name in waiting if lake.load(pipelines.TABLES[name], create=False).snapshot is not None)
            return False
        return shop.running is not None

    world = Target(shop, small_disk, store, driver, workers, random.Random(SEED), may_step, 60)
    driver.start()
    eventually(lambda: world.commits()["bronze.bronze_kafka__events"], 120)
    injector = FaultInjector(world)
    faults = [name for name, (_, times) in FAULTS.items() for _ in range(round(times * SHARE))]
    began = time.monotonic()
    try:
        injector.run(faults, lambda result: say(format_result(result)))
        say(
            f"{len(injector.results)} faults in {time.monotonic() - began:.0f} s, {world.steps} steps of the sandbox meanwhile; "
            f"the driver was started {driver.starts} times"
        )
        say(format_results(injector.results))
    finally:
        driver.stop()
    run_app("run", env=faulted)
    run_app("run", env=undisturbed)
    digests = [json.loads(run_app("digest", "--json", env=env).splitlines()[-1]) for env in (faulted, undisturbed)]
    # a change stream returns an updated document as of the read, so the two lakehouses may see different versions
    positions = [
        digest.pop(MARKETPLACE) and rows(env, MARKETPLACE_POSITIONS)
        for digest, env in zip(digests, (faulted, undisturbed), strict=True)
    ]
    assert [name for name in digests[1] if digests[0].get(name) != digests[1][name]] == []
    assert digests[0] == digests[1]
    assert positions[0] == positions[1]
    say(f"{len(digests[0])} tables: the same digests")
    exits = [output.splitlines()[-1] for output in driver.own_exits]
    say(f"the driver exited by itself and was restarted {len(exits)} times: {exits}")
    assert not [output for output in driver.own_exits if "please report" in output], "a fault was reported as a bug"
