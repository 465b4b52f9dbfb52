"""A Ray cluster of several nodes on one machine, for tests and fault injection.

Each node resembles a separate machine: its own processes (a PID namespace: all end when the first one is killed), its own
address (a network namespace on a bridge), and its own disks (a mount namespace with an empty /tmp, /dev/shm and working copy
of this project, of which only the virtual environment exists). The tests' servers listen on the bridge's address, which every
node reaches. Needs root and Linux; otherwise the nodes are raylets on loopback that share the machine's disk. `Cluster.kind`
is the kind in use.

    with Cluster(tmp_path, environment) as cluster:     # environment of every process on every node, including secrets
        head, first, second = cluster.start(workers=2)
        done = cluster.submit("python", "-m", "app", "run")
        cluster.kill(first)                             # SIGKILL to all its processes
        third = cluster.add()
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from support.waiting import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0
OBJECT_STORE_BYTES = 200_000_000
GCS_PORT, DASHBOARD_PORT = 6379, 8265

QUICK: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    # detect a lost node within seconds instead of half a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}

OWN_MACHINE = """
hostname "$NODE_NAME"
mount -t tmpfs tmpfs /mnt
mkdir /mnt/venv && mount --bind "$NODE_VENV" /mnt/venv
for place in /tmp /dev/shm "$NODE_ROOT"; do
    mkdir -p "$place" && mount -t tmpfs -o mode=1777 tmpfs "$place"
done
if [ ! -e "$NODE_PREFIX/bin" ]; then
    mkdir -p "$NODE_PREFIX" && mount --bind /mnt/venv "$NODE_PREFIX"
fi
printf '127.0.0.1 localhost\\n%s %s\\n' "$NODE_ADDRESS" "$NODE_NAME" > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
mkdir -p "$HOME"
cd /tmp
"""
"""Script that runs inside a node's namespaces before Ray starts there."""


class ClusterError(Exception):
    """The cluster cannot be started, or a command on a node failed."""


@dataclass(eq=False)
class Node:
    """A node: its first process, its address, and its network namespace, if it has one."""

    name: str
    address: str
    namespace: str
    process: subprocess.Popen[bytes]
    log: Path
    head: bool = False

    @property
    def alive(self) -> bool:
        """Whether the node runs."""
        return self.process.poll() is None

    def processes(self, named: str = "") -> list[psutil.Process]:
        """Return the node's processes as seen from outside. named: only those with this in their command line, which Ray's
        workers set to their task: 'ray::MapBatches(run)', 'ray::ServeReplica:...', 'ray::IDLE'."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if named in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def path(self, inside: str) -> Path:
        """Return the path of a file on the node's disk as seen from outside, while the node runs."""
        if not self.namespace:
            return Path(inside)
        first = psutil.Process(self.process.pid).children()[0]
        return Path(f"/proc/{first.pid}/root{inside}")


@functools.cache
def namespaces_allowed() -> bool:
    """Return whether this machine allows creating network, mount and PID namespaces."""
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname", "bash"))):
        return False
    name = f"ss{secrets.token_hex(3)}"
    trial = [
        *("ip", "link", "add", name, "type", "bridge"),
        *("&&", "ip", "netns", "add", name, "&&", "ip", "netns", "exec", name),
        *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "mount", "-t", "tmpfs", "tmpfs", "/mnt"),
    ]
    try:
        return subprocess.run(["bash", "-c", " ".join(trial)], capture_output=True, check=False).returncode == 0
    finally:
        _quietly("ip", "netns", "del", name)
        _quietly("ip", "link", "del", name)


class Cluster:
    """A Ray cluster with a node for each `add`. environment: of every process on nodes that start from now on."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, namespaces: bool | None = None, store: int = OBJECT_STORE_BYTES
    ) -> None:
        self.directory = directory
        self.store = store
        self.nodes: list[Node] = []
        self._submitters: list[subprocess.Popen[str]] = []
        self.token = secrets.token_hex(24)
        self.environment = dict(environment)
        self._made = 0
        self.temporary = Path(tempfile.mkdtemp(prefix="ss", dir="/tmp"))
        self._code = f"ss{secrets.token_hex(3)}"
        self.kind = "namespaces" if (namespaces_allowed() if namespaces is None else namespaces) else "loopback"
        if self.kind == "namespaces":
            self.network = _free_network()
            self.host = f"{self.network}.1"
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "addr", "add", f"{self.host}/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            self.gcs_port, self.dashboard_port = GCS_PORT, DASHBOARD_PORT
        else:
            self.host = "127.0.0.1"
            self.gcs_port, self.dashboard_port = free_port(), free_port()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def _bridge(self) -> str:
        return f"{self._code}br"

    # --- nodes

    @property
    def head(self) -> Node:
        """The node with the control store, the dashboard and the drivers of jobs."""
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        """The other running nodes."""
        return [node for node in self.nodes[1:] if node.alive]

    @property
    def dashboard(self) -> str:
        """The address for `ray job submit`."""
        return f"http://{self.head.address}:{self.dashboard_port}"

    def start(self, workers: int = 2, *, cpus: int = 1, head_cpus: int = 0) -> list[Node]:
        """Start the head and the workers, and wait until all have joined."""
        head = self._start_node(head_cpus)
        wait_for(self._listens, f"the control store of the head (see {head.log})", START_SECONDS)
        for _ in range(workers):
            if self.kind == "loopback":
                # nodes that share a directory take each other's file names when they start at the same moment
                wait_for(self._answers, f"the dashboard of the head (see {head.log})", START_SECONDS)
                self._wait_until_known()
            self._start_node(cpus)
        wait_for(self._answers, f"the dashboard of the head (see {head.log})", START_SECONDS)
        self._wait_until_known()
        return list(self.nodes)

    def add(self, cpus: int = 1) -> Node:
        """Start another worker and wait until it has joined."""
        node = self._start_node(cpus)
        self._wait_until_known()
        return node

    def kill(self, node: Node) -> None:
        """Kill all processes of the node; its disks are lost."""
        if self.kind == "namespaces":
            node.process.kill()  # the kernel takes the whole PID namespace with it
        else:
            family = [psutil.Process(node.process.pid), *node.processes()]
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
        node.process.wait(30)

    def cut(self, node: Node) -> None:
        """Disconnect the node from the network; it keeps running."""
        _run("ip", "link", "set", self._link(node), "down")

    def mend(self, node: Node) -> None:
        """Reconnect the node to the network."""
        _run("ip", "link", "set", self._link(node), "up")

    def stop(self) -> None:
        """Stop every node and submitter, and remove their networks and directories."""
        for submitter in self._submitters:
            if submitter.poll() is None:
                submitter.kill()
                submitter.communicate()
        for node in reversed(self.nodes):
            if node.alive:
                self.kill(node)
        if self.kind == "namespaces":
            for node in self.nodes:
                _quietly("ip", "link", "del", self._link(node))
                _quietly("ip", "netns", "del", node.namespace)
            _quietly("ip", "link", "del", self._bridge)
        shutil.rmtree(self.temporary, ignore_errors=True)

    # --- jobs

    def client_environment(self, **more: str) -> dict[str, str]:
        """The environment of commands outside the cluster: its token, but not the nodes' environment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SHOPSPHERE_", "MLFLOW_"))}
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0", **more}

    def submission(self, *command: str, job: str = "") -> subprocess.Popen[str]:
        """Start `ray job submit` of this project with a command."""
        ray = str(Path(sys.prefix) / "bin" / "ray")
        named = ["--submission-id", job] if job else []
        submitter = subprocess.Popen(
            [ray, "job", "submit", "--address", self.dashboard, *named, "--working-dir", ".", "--", *command],
            cwd=ROOT,
            env=self.client_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._submitters.append(submitter)
        return submitter

    def submit(self, *command: str, job: str = "", seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Submit a job and wait; return the submitter's exit code, and its output with the job's."""
        submitter = self.submission(*command, job=job)
        said, _ = submitter.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, submitter.returncode, said)

    def stop_job(self, job: str) -> None:
        """Stop a job, like `ray job stop`."""
        self.ask(f"/api/jobs/{job}/stop", method="POST")

    def ask(self, path: str, timeout: float = 10.0, method: str = "GET") -> Any:
        """Return the response of the dashboard's HTTP interface."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def states(self, what: str, **equal: str) -> list[dict[str, Any]]:
        """Return the cluster's list of 'nodes', 'tasks', 'actors', ..., filtered by fields."""
        filters = "".join(f"&filter_keys={key}&filter_predicates=%3D&filter_values={value}" for key, value in equal.items())
        answer = self.ask(f"/api/v0/{what}?limit=10000&detail=1{filters}")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def ids(self) -> dict[str, str]:
        """Return Ray's id of each running node, by the node's name."""
        return {one["labels"]["name"]: one["node_id"] for one in self.states("nodes", state="ALIVE")}

    # --- how

    def _listens(self) -> bool:
        if not self.head.alive:
            raise ClusterError(f"The head ended: {_tail(self.head.log)}")
        try:
            with socket.create_connection((self.head.address, self.gcs_port), timeout=1):
                return True
        except OSError:
            return False

    def _answers(self) -> bool:
        try:
            self.ask("/api/version")
            return True
        except OSError:
            return False

    def _wait_until_known(self) -> None:
        wanted = {node.name for node in self.nodes if node.alive}

        def known() -> bool:
            for node in self.nodes:
                if node.name in wanted and not node.alive:
                    raise ClusterError(f"Node {node.name} ended: {_tail(node.log)}")
            return wanted <= self.ids().keys()

        wait_for(known, "all nodes in the cluster's list", START_SECONDS)

    def _link(self, node: Node) -> str:
        return f"{self._code}{node.name.rpartition('-')[2]}"

    def _start_node(self, cpus: int) -> Node:
        number, self._made = self._made, self._made + 1
        name, head = f"{self._code}-{number}", number == 0
        own = self.kind == "namespaces"
        address = f"{self.network}.{10 + number}" if own else "127.0.0.1"
        if own:
            self._connect(name, f"{self._code}{number}", address)
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(name, address, head, cpus),
                env=self._node_environment(name, address),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        node = Node(name, address, name if own else "", process, log, head)
        self.nodes.append(node)
        return node

    def _connect(self, namespace: str, link: str, address: str) -> None:
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", link, "master", self._bridge, "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run("ip", "-n", namespace, "link", "set", interface, "up")
        _run("ip", "-n", namespace, "route", "add", "default", "via", self.host)

    def _command(self, name: str, address: str, head: bool, cpus: int) -> list[str]:
        options = ["--node-ip-address", address, "--num-cpus", str(cpus), "--object-store-memory", str(self.store), "--block"]
        options += ["--disable-usage-stats", "--labels", f"name={name}"]
        if head:
            options += ["--head", "--port", str(self.gcs_port)]
            options += ["--include-dashboard", "true", "--dashboard-host", address, "--dashboard-port", str(self.dashboard_port)]
        else:
            options += ["--address", f"{self.head.address}:{self.gcs_port}"]
        if self.kind == "loopback":
            options += ["--dashboard-agent-listen-port", str(free_port()), "--metrics-export-port", str(free_port())]
            options += ["--temp-dir", str(self.temporary)] if head else []
        start = shlex.join(["ray", "start", *options])
        if self.kind == "loopback":
            return ["bash", "-c", f"exec {start}"]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc"]
        # bash stays as the first process: it takes in those whose parent ended
        return ["ip", "netns", "exec", name, *apart, "bash", "-ec", f"{OWN_MACHINE}\n{start} & wait $!"]

    def _node_environment(self, name: str, address: str) -> dict[str, str]:
        prefix = Path(sys.prefix)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SHOPSPHERE_", "MLFLOW_", "AWS_"))}
        home = "/tmp/home" if self.kind == "namespaces" else str(self.temporary / "home")
        Path(home).mkdir(parents=True, exist_ok=True) if self.kind == "loopback" else None
        return {
            **kept,
            **QUICK,
            "RAY_AUTH_TOKEN": self.token,
            "HOME": home,
            "PATH": f"{prefix / 'bin'}:{kept.get('PATH', '')}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "NODE_NAME": name,
            "NODE_ADDRESS": address,
            "NODE_ROOT": str(ROOT),
            "NODE_PREFIX": str(prefix),
            "NODE_VENV": str(prefix.resolve()),
            **self.environment,
        }


def _free_network() -> str:
    """Return the first three numbers of an unused private network."""
    taken = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    for _ in range(100):
        network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250) + 1}"
        if f" {network}." not in taken:
            return network
    raise ClusterError("No free network between 10.200.1.0 and 10.249.250.0.")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{shlex.join(command)}: {done.stderr.strip()}")


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:].strip()


@contextlib.contextmanager
def started(directory: Path, environment: Mapping[str, str], workers: int = 2) -> Iterator[Cluster]:
    """Yield a cluster with its head and workers; stop it at the end."""
    with Cluster(directory, environment) as cluster:
        cluster.start(workers)
        yield cluster
