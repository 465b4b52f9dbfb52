"""Ingest, refine, train and serve on three nodes, with a node killed in each: the tables equal those of a single process."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cluster.nodes import Cluster
from cluster.services import NODE_HOME, Services, running_services
from support.waiting import wait_for

from app import sandbox
from lakehouse.parallel import JOB_CONFIG_VARIABLE
from ml.registry import Registry
from serve.http.keys import Keys

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ORDERS, SEED = 3000, 7
TRAIN = ("train", "--trials", "2", "--seconds", "600", "--workers", "2", "--rounds", "60", "--label-delay", "20")
SPREAD = {
    "SHOPSPHERE_RAY__INLINE_ROWS": "0",
    "SHOPSPHERE_RAY__ROWS_PER_TASK": "1500",
    "SHOPSPHERE_KAFKA__BATCH_MESSAGES": "4000",
    "SHOPSPHERE_SERVE_HOST": "0.0.0.0",
    "SHOPSPHERE_SERVE_REPLICAS": "2",
    "SHOPSPHERE_SERVE_REPLICA_CPUS": "1",
}


@dataclass
class ClusterWorld:
    """The cluster, its services, and the settings of its lakehouse and of the single process's lakehouse."""

    cluster: Cluster
    shop: Services
    spread: dict[str, str]
    plain: dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    directory: Path = tmp_path_factory.mktemp("cluster")
    with Cluster(directory, SPREAD) as cluster, running_services(directory, cluster.host, ORDERS, SEED) as shop:
        print(f"nodes are {cluster.kind}")
        spread = shop.environment("spread", MLFLOW_TRACKING_URI=shop.mlflow, **SPREAD)
        plain = shop.environment("plain", str(directory / "plain"))
        cluster.environment.update(spread)
        cluster.start(workers=2)
        yield ClusterWorld(cluster, shop, spread, plain)


def kill_node_during(world: ClusterWorld, job: subprocess.Popen[str], *doing: str) -> str:
    """Kill the first worker node that runs a process of one of these names, and start another node. Return a description.
    The job must be running until then."""
    begun = time.monotonic()
    while time.monotonic() < begun + 200:
        assert job.poll() is None, f"the job ended before a node could be killed: {job.communicate()[0][-3000:]}"
        for node in world.cluster.workers:
            hit = [process for name in doing for process in node.processes(f"ray::{name}")]
            if hit:
                told = f"{node.name} while it did {', '.join(' '.join(process.cmdline()).strip() for process in hit)}"
                world.cluster.kill(node)
                world.cluster.add()
                return told
    raise AssertionError(f"no worker node did any of {doing} within 200 s")


def wait_for_success(job: subprocess.Popen[str]) -> str:
    """Wait for a job to succeed and return its output."""
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said[-4000:]
    return said


def test_ingest_and_refine_lose_a_node_each(world: ClusterWorld) -> None:
    cluster, shop = world.cluster, world.shop
    first = cluster.submission("python", "-m", "app", "run")
    # the first of Ray Data's tasks are those that read the sources
    ingest = kill_node_during(world, first, "Map")
    wait_for_success(first)
    # the single process reads the sources at the same two times, because bronze contains updates between them
    shop.app(world.plain, "run")
    sandbox.step(shop.home, 200)
    second = cluster.submission("python", "-m", "app", "run", job="refine")
    wait_for(lambda: "silver.orders_unified ..." in output_so_far(cluster, second, "refine"), "refining", 200)
    refine = kill_node_during(world, second, "Map")
    wait_for_success(second)
    print("killed while ingesting:", ingest, "; while refining:", refine)
    shop.app(world.plain, "run")
    assert_equal_digests(world)


def assert_equal_digests(world: ClusterWorld) -> None:
    """Assert that the cluster's tables equal those of the single process."""
    here = {**world.spread, "SHOPSPHERE_HOME": str(world.shop.home / "look")}
    assert world.shop.digests(here) == world.shop.digests(world.plain)


def output_of(said: str) -> dict[str, Any]:
    """Return the JSON object that a job printed."""
    found: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    return found


def test_training_loses_a_node(world: ClusterWorld) -> None:
    cluster, shop = world.cluster, world.shop
    job = cluster.submission("python", "-m", "app", *TRAIN, "--json")
    print("killed:", kill_node_during(world, job, "RayTrainWorker", "_RayTrainWorker"))
    trained = output_of(wait_for_success(job))
    plain = json.loads(shop.app(world.plain, *TRAIN, "--json").stdout.splitlines()[-1])
    for one in (trained, plain):
        for timing in ("seconds", "cpu_seconds", "mlflow"):
            one.pop(timing)
    # the text of the latency check has a duration
    trained["checks"], plain["checks"] = ([(c["name"], c["passed"]) for c in one["checks"]] for one in (trained, plain))
    assert trained == plain
    ours = Registry(shop.mlflow).version(1).tags
    assert ours["model_digest"] == Registry(home=Path(world.plain["SHOPSPHERE_HOME"])).version(1).tags["model_digest"]


@dataclass
class RepeatedRequest:
    """Sends the same request repeatedly until the end of the block."""

    address: str
    key: str
    good: list[float] = field(default_factory=list)
    bad: list[tuple[float, str]] = field(default_factory=list)

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def __enter__(self) -> RepeatedRequest:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(0.1):
            try:
                self.ask("/v1/inventory/P0001")
                self.good.append(time.monotonic())
            except OSError as error:
                self.bad.append((time.monotonic(), repr(error)))


def test_serving_loses_a_node(world: ClusterWorld) -> None:
    cluster, shop = world.cluster, world.shop
    file = cluster.head.path(NODE_HOME) / "serve_keys.json"
    key = Keys().add(file, "test", ("inventory", "score", "customers"))
    job = cluster.submission("python", "-m", "app", "serve", job="serving")
    asking = RepeatedRequest(f"http://{cluster.head.address}:8000", key)
    wait_for(lambda: "Serving on" in output_so_far(cluster, job, "serving"), "serving", 200)
    stock = asking.ask("/v1/inventory/P0001")["stores"]
    query = "SELECT store_id, on_hand FROM gold.inventory_health WHERE product_id = 'P0001' ORDER BY store_id"
    known = json.loads(shop.app(world.plain, "sql", query, "--json").stdout.splitlines()[-1])
    assert [(one["store_id"], one["on_hand"]) for one in stock] == [(one["store_id"], one["on_hand"]) for one in known]
    with asking:
        print("killed:", kill_node_during(world, job, "ServeReplica"))
        killed = time.monotonic()
        replicas = [node.name for node in cluster.nodes if node.alive for _ in node.processes("ray::ServeReplica")]
        wait_for(lambda: sum(at > killed for at in asking.good) >= 50, "answers after the kill", 120)
    print(f"{len(asking.good)} answers, {len(asking.bad)} failures {asking.bad[:5]}; replicas on {replicas}")
    assert asking.ask("/v1/inventory/P0001")["stores"] == stock
    cluster.stop_job("serving")
    wait_for_success(job)
    assert_equal_digests(world)


def output_so_far(cluster: Cluster, job: subprocess.Popen[str], name: str) -> str:
    """Return the output of a running job so far."""
    assert job.poll() is None, job.communicate()[0][-3000:]
    try:
        return str(cluster.ask(f"/api/jobs/{name}/logs")["logs"])
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return ""  # it is being submitted


def test_a_job_that_is_stopped_leaves_the_tables_whole(world: ClusterWorld) -> None:
    cluster, shop = world.cluster, world.shop
    sandbox.step(shop.home, 200)
    stopped = cluster.submission("python", "-m", "app", "run", job="stopped")
    wait_until_working(world, stopped)
    cluster.stop_job("stopped")
    wait_for(lambda: cluster.ask("/api/jobs/stopped")["status"] == "STOPPED", "the job is stopped", 60)
    stopped.communicate(timeout=60)
    # its submitter is interrupted and the job continues; without the variable it must send the code itself
    left = cluster.submission(
        "env", "-u", JOB_CONFIG_VARIABLE, "SHOPSPHERE_RAY__ADDRESS=auto", "python", "-m", "app", "run", job="left"
    )
    wait_until_working(world, left)
    left.send_signal(signal.SIGINT)
    left.communicate(timeout=60)
    wait_for(lambda: cluster.ask("/api/jobs/left")["status"] == "SUCCEEDED", "the job that was left alone is done", 200)
    shop.app(world.plain, "run")
    assert_equal_digests(world)


def wait_until_working(world: ClusterWorld, job: subprocess.Popen[str]) -> None:
    """Wait until tasks of a job run on a worker node."""
    until = time.monotonic() + 200
    while not any(node.processes("ray::Map") for node in world.cluster.workers):
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_errors_are_printed_and_a_token_is_required(world: ClusterWorld) -> None:
    cluster = world.cluster
    done = cluster.submit("python", "-m", "app", "rebuild", "gold.nothing", job="wrong")
    assert "error: There is no table 'gold.nothing'" in done.stdout
    assert done.returncode == 1
    assert cluster.ask("/api/jobs/wrong")["driver_exit_code"] == 1
    # tables on the disk of the head, which the workers cannot reach
    local = ("SHOPSPHERE_CATALOG__PROPERTIES={}", "SHOPSPHERE_POSTGRES__SLOT=local")
    done = cluster.submit("env", *local, "python", "-m", "app", "run", job="local")
    assert "machines, but /tmp/shopsphere/warehouse is on the disk of this one" in done.stdout
    assert done.returncode == 1
    for path in ("/api/jobs/", "/api/version"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(cluster.dashboard + path, timeout=10)


LISTED = ("jobs", "tasks", "actors", "workers", "runtime_envs", "nodes", "objects")
INSPECTED_PATHS = (
    *("/api/jobs/", "/nodes?view=details", "/api/serve/applications/", "/api/actors/", "/logical/actors"),
    *(f"/api/v0/{what}?limit=10000&detail=1" for what in LISTED),
)


def test_no_secret_is_shown(world: ClusterWorld) -> None:
    """Runs last: no log, no answer of Ray's dashboard and no MLflow run contains a secret."""
    cluster, shop = world.cluster, world.shop
    secrets = {**shop.secrets, "token": cluster.token}
    shown: dict[str, str] = {}
    for path in INSPECTED_PATHS:
        with contextlib.suppress(urllib.error.HTTPError):
            shown[path] = json.dumps(cluster.ask(path, timeout=60))
    assert len(shown) >= 8, shown.keys()
    assert "python -m app run" in shown["/api/jobs/"]
    for node in cluster.nodes:
        if node.alive:
            logs = node.path("/tmp/ray" if cluster.kind == "namespaces" else str(cluster.temporary)).glob("session_2*/logs/**/*")
            files = [file for file in logs if file.is_file()]
            assert files
            shown |= {str(file): file.read_text(errors="replace") for file in files}
    shown |= {str(file): file.read_text(errors="replace") for file in cluster.directory.glob("*.log") if file.name != "s3.log"}
    assert not leaks(secrets, shown)
    client = mlflow.MlflowClient(shop.mlflow)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    versions = client.search_model_versions("")
    assert runs
    assert versions
    assert not leaks(secrets, {"MLflow": repr([run.to_dictionary() for run in runs]) + repr([dict(one) for one in versions])})


def leaks(secrets: dict[str, str], shown: dict[str, str]) -> list[tuple[str, str]]:
    """Return (secret, place) of every secret that is shown."""
    return [(what, where) for where, text in shown.items() for what, secret in secrets.items() if secret in text]
