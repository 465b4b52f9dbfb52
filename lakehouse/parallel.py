"""A pool that runs tasks in this process when there is little work, else on Ray Data.

The same functions run in both places; only the cost differs. Ray is started when it is first needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lakehouse.errors import SettingsError, ShopSphereError, TransientError
from lakehouse.local_access import UMASK
from lakehouse.private_directory import private_directory
from lakehouse.settings import RaySettings
from lakehouse.transient_errors import NOTHING_LOST, as_transient_error, causes_of

Item = TypeVar("Item")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the environment of the driver of a submitted job."""
EVERY_BUCKET = -1
START_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Block:
    """A part of a task's output that other tasks read: an Arrow table with a kind and a bucket."""

    kind: str
    bucket: int
    table: pa.Table


@dataclass
class Blocks:
    """The output of many tasks, in memory or in Ray's object store. Can be passed to tasks."""

    local: list[Block] = field(default_factory=list)
    refs: list[Any] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def of(self, kind: str, bucket: int | None = None) -> Iterator[pa.Table]:
        """Yield the tables of a kind; with `bucket`, those of that bucket and those for every bucket."""
        for block in self.local:
            if block.kind == kind and (bucket is None or block.bucket in (bucket, EVERY_BUCKET)):
                yield block.table
        if self.refs:
            import ray

            for output in ray.get(self.refs):
                kinds, buckets, data = output.column("kind"), output.column("bucket"), output.column("data")
                for row in range(output.num_rows):
                    if kinds[row].as_py() == kind and (bucket is None or buckets[row].as_py() in (bucket, EVERY_BUCKET)):
                        yield pa.ipc.open_stream(data[row].as_buffer()).read_all()


def _serialize(blocks: Sequence[Block]) -> pa.Table:
    """Return a table of one row per block, as tasks on Ray return it."""
    rows = []
    for block in blocks:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, block.table.schema) as stream:
            stream.write_table(block.table)
        rows.append(sink.getvalue())
    return pa.table(
        {
            "kind": pa.array([block.kind for block in blocks], pa.string()),
            "bucket": pa.array([block.bucket for block in blocks], pa.int32()),
            "data": pa.array([row.to_pybytes() for row in rows], pa.large_binary()),
        }
    )


class TaskPool:
    """Runs functions over items, on Ray Data or in this process."""

    def __init__(self, settings: RaySettings, on_disk: str = "") -> None:
        """`on_disk`: directory on this machine's disk that tasks read or write, '' for none; other machines cannot reach it."""
        self.settings = settings
        self.on_disk = on_disk
        self.started = False
        self._failed_start: tuple[float, ShopSphereError] | None = None

    def start(self) -> None:
        """Connect to Ray, or start it, once. Raises SettingsError when the cluster is unreachable, TransientError when Ray does
        not start here. For START_AGAIN_SECONDS after a failure it is raised again at once: each attempt may take a minute, and
        every step of a run may need Ray."""
        if self.started:
            return
        if self._failed_start is not None and time.monotonic() < self._failed_start[0] + START_AGAIN_SECONDS:
            raise self._failed_start[1]
        try:
            self._start()
        except ShopSphereError as error:
            self._failed_start = time.monotonic(), error
            raise

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        # Ray's default of 15 starves a job's workers for minutes on a machine with any other load
        os.environ.setdefault("RAY_worker_niceness", "0")
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        address = self.settings.address or os.environ.get("RAY_ADDRESS") or None
        if not address and "ray" not in sys.modules:
            # the default of Ray, which prints a notice on every start unless it is set. Ray reads it when it is imported: set
            # later, the processes that it starts would require a token that this one does not send
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        if address and self.settings.require_token and os.environ.get("RAY_AUTH_MODE") != "token":
            # a cluster that authenticates would not accept this process either
            raise SettingsError(
                f"The Ray cluster at {address} does not authenticate: whoever reaches its ports can run code on it. Set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on its nodes and here, or SHOPSPHERE_RAY__REQUIRE_TOKEN=false if no "
                "other user reaches its network."
            )
        import ray

        try:
            with _keep_signal_handler(signal.SIGTERM):
                self._init(address)
        except Exception as error:  # of many types, some of them only a timeout
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
            if not address:
                raise TransientError(f"Ray cannot be started on this machine: {reason}. Run again: {NOTHING_LOST}.") from error
            raise SettingsError(
                f"Ray at {address} cannot be used: {reason}. "
                "Correct SHOPSPHERE_RAY__ADDRESS, or leave it empty to start Ray here."
            ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.enable_operator_progress_bars = False
        # otherwise Ray wraps errors in its own exception, without their type and cause
        context.raise_original_map_exception = True
        for name in ("ray", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # errors are raised to the caller: Ray's own stack traces add nothing
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        self.started = True

    def _init(self, address: str | None) -> None:
        import ray

        if ray.is_initialized():
            return
        if address is None:
            ray.init(
                # never a cluster that another program has started on this machine
                address="local",
                # Ray's default, /tmp/ray, is shared by all users, and each of its directories is open to all of them
                _temp_dir=str(private_directory() / "ray"),
                num_cpus=self.settings.cpus or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
            return
        # a submitted job has its code on the nodes; any other driver has to send it
        code = None if JOB_CONFIG_VARIABLE in os.environ else {"working_dir": str(ROOT)}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=code)

    def check(self) -> None:
        """Raise SettingsError if tasks on several machines would use the disk of this one. Ray must be started."""
        if self.on_disk and not self.settings.shared_disk and (count := count_machines()) > 1:
            raise SettingsError(
                f"Ray has {count} machines, but {self.on_disk} is on the disk of this one. Use storage that all machines reach "
                "(catalog.properties: warehouse s3://...), or set SHOPSPHERE_RAY__SHARED_DISK=true if all mount this path."
            )

    def map(
        self, function: Callable[[Item, Blocks], Result], items: Sequence[Item], blocks: Blocks, *, parallel: bool
    ) -> tuple[list[Result], float]:
        """Call `function` for each item, with all `blocks`. Return the results in the order of the items, and the CPU seconds
        used on Ray."""
        if not parallel or not items:
            return [function(item, blocks) for item in items], 0.0
        self.start()
        self.check()
        import cloudpickle
        import ray

        payload = cloudpickle.dumps(function)

        def run(row: dict[str, Any]) -> dict[str, Any]:
            started = time.process_time()
            # object references must be in the closure, where Ray finds them: inside pickled bytes they would never resolve
            with task_environment():
                result = cloudpickle.loads(payload)(pickle.loads(row["item"]), blocks)
            return {"number": row["number"], "result": pickle.dumps(result), "cpu": time.process_time() - started}

        dataset = ray.data.from_items(
            [{"number": number, "item": cloudpickle.dumps(item)} for number, item in enumerate(items)],
            override_num_blocks=len(items),
        ).map(run)
        rows = sorted(_raise_project_errors(dataset.take_all), key=lambda row: int(row["number"]))
        return [pickle.loads(row["result"]) for row in rows], sum(float(row["cpu"]) for row in rows)

    def extract(self, function: Callable[[Item], list[Block]], items: Sequence[Item], *, parallel: bool) -> Blocks:
        """Call `function` for each item. The blocks that it returns stay on the node that created them."""
        return self.transform(lambda item, _: function(item), items, Blocks(), parallel=parallel)

    def transform(
        self, function: Callable[[Item, Blocks], list[Block]], items: Sequence[Item], blocks: Blocks, *, parallel: bool
    ) -> Blocks:
        """Call `function` for each item, with all `blocks`. The blocks that it returns stay on the node that created them."""
        if not parallel or not items:
            return Blocks(local=[block for item in items for block in function(item, blocks)])
        self.start()
        self.check()
        import cloudpickle
        import ray

        payload = cloudpickle.dumps(function)

        def run(batch: pa.Table) -> pa.Table:
            started = time.process_time()
            # object references must be in the closure, as in `map`
            with task_environment():
                work = cloudpickle.loads(payload)
                output = [block for item in batch.column("item").to_pylist() for block in work(pickle.loads(item), blocks)]
            cpu = Block("cpu", -1, pa.table({"seconds": [time.process_time() - started]}))
            return _serialize([*output, cpu])

        dataset = ray.data.from_items(
            [{"item": cloudpickle.dumps(item)} for item in items], override_num_blocks=len(items)
        ).map_batches(run, batch_size=1, batch_format="pyarrow")
        refs = _raise_project_errors(lambda: dataset.materialize().to_arrow_refs())
        result = Blocks(refs=refs)
        result.cpu_seconds = sum(float(table["seconds"][0].as_py()) for table in result.of("cpu"))
        return result

    def close(self) -> None:
        """Stop Ray if this pool started it."""
        if self.started:
            import ray

            ray.shutdown()
            self.started = False


def count_machines() -> int:
    """Return the number of machines that Ray runs on, by their addresses. Ray must be started."""
    import ray

    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _keep_signal_handler(number: signal.Signals) -> Iterator[None]:
    """Restore this process's signal handler afterwards: Ray replaces it by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(number, before)


@contextlib.contextmanager
def task_environment() -> Iterator[None]:
    """Prepare a worker for a task: a working directory that exists, files that only this user can read, and transient errors
    raised as such, because an error loses its cause on the way to the driver."""
    os.umask(UMASK)
    try:
        os.getcwd()
    except FileNotFoundError:
        # Ray deletes the code of a dead job, but its workers go on to serve the next one
        os.chdir(ROOT if ROOT.exists() else "/")
    try:
        yield
    except ShopSphereError:
        raise
    except Exception as error:
        if found := as_transient_error(error):
            raise found from error
        raise


def _raise_project_errors(action: Callable[[], Any]) -> Any:
    """Call a Ray Data action; raise a ShopSphereError of a task as itself."""
    try:
        return action()
    except Exception as error:
        found = None
        for cause in causes_of(error):
            # the innermost one: Ray's copy of a ShopSphereError is one too, but its text is the task's whole stack trace
            found = cause if isinstance(cause, ShopSphereError) else found
        if found is None:
            raise
        found.args = (str(found).split("\n", 1)[0], *found.args[1:])  # Ray appends advice of its own
        raise found from None
