"""Where work runs: in this process when there is little of it, else on Ray Data.

The same functions run in both places; only the cost differs. Ray is started when it is first needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lakehouse.errors import SettingsError
from lakehouse.settings import RaySettings

Item = TypeVar("Item")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of the driver of a submitted job."""


@dataclass(frozen=True)
class Block:
    """A part of a task's output that another task will read: an Arrow table under a kind and a bucket."""

    kind: str
    bucket: int
    table: pa.Table


@dataclass
class Blocks:
    """The pieces of many tasks, in memory or in Ray's object store; picklable into tasks."""

    local: list[Block] = field(default_factory=list)
    refs: list[Any] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def of(self, kind: str, bucket: int | None = None) -> Iterator[pa.Table]:
        """The tables of a kind; with `bucket`, those of that bucket and those for every bucket (-1)."""
        for piece in self.local:
            if piece.kind == kind and (bucket is None or piece.bucket in (bucket, -1)):
                yield piece.table
        if self.refs:
            import ray

            for block in ray.get(self.refs):
                kinds, buckets, data = block.column("kind"), block.column("bucket"), block.column("data")
                for row in range(block.num_rows):
                    if kinds[row].as_py() == kind and (bucket is None or buckets[row].as_py() in (bucket, -1)):
                        yield pa.ipc.open_stream(data[row].as_buffer()).read_all()


def _serialised(pieces: Sequence[Block]) -> pa.Table:
    rows = []
    for piece in pieces:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, piece.table.schema) as stream:
            stream.write_table(piece.table)
        rows.append(sink.getvalue())
    return pa.table(
        {
            "kind": pa.array([piece.kind for piece in pieces], pa.string()),
            "bucket": pa.array([piece.bucket for piece in pieces], pa.int32()),
            "data": pa.array([row.to_pybytes() for row in rows], pa.large_binary()),
        }
    )


class TaskPool:
    """Runs functions over items, on Ray Data or in this process."""

    def __init__(self, settings: RaySettings, on_disk: str = "") -> None:
        """on_disk: what of this machine's disk the functions read or write, '' for nothing: other machines have not got it."""
        self.settings = settings
        self.on_disk = on_disk
        self.started = False

    def start(self) -> None:
        """Join or start Ray, once. Raises SettingsError when the cluster cannot be reached."""
        if self.started:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        # Ray's default of 15 starves the workers of a job for minutes on a machine that does anything else
        os.environ.setdefault("RAY_worker_niceness", "0")
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        address = self.settings.address or os.environ.get("RAY_ADDRESS") or None
        if not address:
            # what Ray does by itself, but then it says so on every start
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        try:
            with _own_handler(signal.SIGTERM):
                self._init(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"Ray at {address or 'this machine'} cannot be used: {str(error).splitlines()[0][:200]}. "
                "Correct SHOPSPHERE_RAY__ADDRESS, or leave it empty to start Ray here."
            ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.enable_operator_progress_bars = False
        # wrapped in Ray's own exception, an error comes without what it is and what caused it
        context.raise_original_map_exception = True
        for name in ("ray", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # an error is raised to us: pages of Ray's own stack beside it tell nothing
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        self.started = True

    def _init(self, address: str | None) -> None:
        import ray

        if ray.is_initialized():
            return
        if address is None:
            ray.init(
                num_cpus=self.settings.cpus or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
            return
        # a job brings its code along; from elsewhere it has to be sent to nodes that may not have it
        code = None if IN_A_JOB in os.environ else {"working_dir": str(ROOT)}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=code)

    def check(self) -> None:
        """Ray is started. Raises SettingsError when work would read or write the disks of several machines."""
        if self.on_disk and not self.settings.shared_disk and (count := machines()) > 1:
            raise SettingsError(
                f"Ray has {count} machines, but {self.on_disk} is on the disk of this one. Put it where all of them reach it "
                "(catalog.properties: warehouse s3://...), or set SHOPSPHERE_RAY__SHARED_DISK=true if all mount it at that path."
            )

    def map(
        self, function: Callable[[Item, Blocks], Result], items: Sequence[Item], pieces: Blocks, *, parallel: bool
    ) -> tuple[list[Result], float]:
        """Run `function` over `items`, each with all `pieces`; gives the results in the items' order, and the CPU
        seconds used elsewhere."""
        if not parallel or not items:
            return [function(item, pieces) for item in items], 0.0
        self.start()
        self.check()
        import cloudpickle
        import ray

        payload = cloudpickle.dumps(function)

        def run(row: dict[str, Any]) -> dict[str, Any]:
            started = time.process_time()
            # object references travel in the closure, where Ray sees them: hidden in pickled bytes they would never resolve
            with in_task():
                result = cloudpickle.loads(payload)(pickle.loads(row["item"]), pieces)
            return {"number": row["number"], "result": pickle.dumps(result), "cpu": time.process_time() - started}

        dataset = ray.data.from_items(
            [{"number": number, "item": cloudpickle.dumps(item)} for number, item in enumerate(items)],
            override_num_blocks=len(items),
        ).map(run)
        rows = sorted(_unwrapped(dataset.take_all), key=lambda row: int(row["number"]))
        return [pickle.loads(row["result"]) for row in rows], sum(float(row["cpu"]) for row in rows)

    def extract(self, function: Callable[[Item], list[Block]], items: Sequence[Item], *, parallel: bool) -> Blocks:
        """Run `function` over `items`; what it gives stays where it was made."""
        return self.transform(lambda item, _: function(item), items, Blocks(), parallel=parallel)

    def transform(
        self, function: Callable[[Item, Blocks], list[Block]], items: Sequence[Item], pieces: Blocks, *, parallel: bool
    ) -> Blocks:
        """Run `function` over `items`, each with all `pieces`; what it gives stays where it was made."""
        if not parallel or not items:
            return Blocks(local=[piece for item in items for piece in function(item, pieces)])
        self.start()
        self.check()
        import cloudpickle
        import ray

        payload = cloudpickle.dumps(function)

        def run(batch: pa.Table) -> pa.Table:
            started = time.process_time()
            # object references travel in the closure, as in `map`
            with in_task():
                work = cloudpickle.loads(payload)
                made = [piece for item in batch.column("item").to_pylist() for piece in work(pickle.loads(item), pieces)]
            cpu = Block("cpu", -1, pa.table({"seconds": [time.process_time() - started]}))
            return _serialised([*made, cpu])

        dataset = ray.data.from_items(
            [{"item": cloudpickle.dumps(item)} for item in items], override_num_blocks=len(items)
        ).map_batches(run, batch_size=1, batch_format="pyarrow")
        refs = _unwrapped(lambda: dataset.materialize().to_arrow_refs())
        result = Blocks(refs=refs)
        result.cpu_seconds = sum(float(table["seconds"][0].as_py()) for table in result.of("cpu"))
        return result

    def close(self) -> None:
        """Stop Ray if this pool started it."""
        if self.started:
            import ray

            ray.shutdown()
            self.started = False


def machines() -> int:
    """On how many machines Ray runs, by their addresses; Ray is started."""
    import ray

    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """Keep this process's handler of a signal: Ray puts its own in the place of it."""
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
def in_task() -> Iterator[None]:
    """Around what a task does: it has a working directory, and an outage is raised as what it is, since an error loses what
    caused it on its way to the driver."""
    try:
        os.getcwd()
    except FileNotFoundError:
        # Ray deletes the code of a job that died under a worker that goes on to work for the next one
        os.chdir(ROOT if ROOT.exists() else "/")
    from lakehouse.errors import ShopSphereError
    from lakehouse.transient_errors import as_transient_error

    try:
        yield
    except ShopSphereError:
        raise
    except Exception as error:
        if found := as_transient_error(error):
            raise found from error
        raise


def _unwrapped(action: Callable[[], Any]) -> Any:
    """Run a Ray Data action; an error of ours raised in a task comes out as itself."""
    from lakehouse.errors import ShopSphereError
    from lakehouse.transient_errors import causes_of

    try:
        return action()
    except Exception as error:
        ours = None
        for cause in causes_of(error):
            # the innermost: what Ray makes of an error of ours is one too, but its text is the task's whole stack
            ours = cause if isinstance(cause, ShopSphereError) else ours
        if ours is None:
            raise
        ours.args = (str(ours).split("\n", 1)[0], *ours.args[1:])  # Ray has put its own advice below
        raise ours from None
