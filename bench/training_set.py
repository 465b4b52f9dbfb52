"""Cost of the training set of N orders, compared with a plain polars script that computes the same features in memory.

Prints the CPU seconds of both: of the script's whole process; of this build the steps with their Ray tasks and, separately,
all processes including Ray's own. Verifies that every feature of every order is equal. Prints the memory that a worker and the
driver use for the build, at N orders and at N / 4: it must depend on the block size, not on N. The complete training set is
then read into the driver's memory, where XGBoost needs it; its memory is printed separately.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lakehouse.engine.engine import Engine  # noqa: E402
from lakehouse.engine.frames import conform, stamp  # noqa: E402
from lakehouse.iceberg.catalog import Lake  # noqa: E402
from lakehouse.parallel import TaskPool  # noqa: E402
from lakehouse.settings import RaySettings  # noqa: E402
from lakehouse.table import DELETED, Table  # noqa: E402
from ml.features.declarations import LABEL_DELAY  # noqa: E402
from ml.features.groups import FEATURES  # noqa: E402
from ml.tables import category_amounts, fraud_ratios, order_features  # noqa: E402
from ml.tables.full_build import build  # noqa: E402
from ml.tables.order_entities import ORDER_ENTITIES  # noqa: E402
from ml.training.training_set import labelled_orders  # noqa: E402
from pipelines.settings import BusinessSettings, Settings  # noqa: E402
from pipelines.silver.events_clean import EVENTS_CLEAN  # noqa: E402
from pipelines.silver.quarantine import QUARANTINE  # noqa: E402

DAYS = 365
START = datetime(2025, 1, 1, tzinfo=UTC)
EVENTS_PER_ORDER = 3
BLOCK = 100_000


def generate_orders(count: int, seed: int = 7) -> pl.DataFrame:
    """Return orders like those of silver.order_entities: about ten per customer, one in a hundred reported as fraud."""
    random = np.random.default_rng(seed)
    # distinct times: the plain script does not order simultaneous orders
    moment = np.sort(random.choice(DAYS * 86_400_000, count, replace=False)) * 1000
    who = (random.beta(1, 3, count) * max(count // 6, 2)).astype(np.int64)
    other = random.random((5, count))

    def named(prefix: str, values: np.ndarray[Any, Any], share: float, draw: np.ndarray[Any, Any]) -> pl.Series:
        return pl.select(pl.when(pl.Series(draw < share)).then(prefix + pl.Series(values).cast(pl.String))).to_series()

    fraud = random.random(count) < 0.01
    placed = pl.Series(moment).cast(pl.Duration("us")) + START
    reported = placed + pl.Series(random.integers(10 * 86_400, 45 * 86_400, count) * 1_000_000).cast(pl.Duration("us"))
    days_old = pl.Series((who % 900).astype(np.int64) * 86_400_000_000).cast(pl.Duration("us"))
    return pl.DataFrame(
        {
            "order_id": pl.Series(np.arange(count)).cast(pl.String).str.zfill(9),
            "placed_at": placed,
            "amount": np.minimum(np.exp(random.normal(8.5, 1.0, count)), 1e7).astype(np.int64),
            "customer": named("user:", who, 0.95, other[0]),
            "card": named("card-", who * 2 + (other[1] < 0.2), 0.7, other[0]),
            "device": named("d-", np.where(other[2] < 0.02, who % 97, who * 3 + (other[3] * 2).astype(int)), 0.75, other[4]),
            "address": named("street ", np.where(other[3] < 0.05, who // 7, who), 0.8, other[2]),
            "ip": named("ip ", np.where(other[4] < 0.3, (other[4] * 1e6).astype(int) % 5000, who), 0.75, other[4]),
            "person": named("M-", who // 1.1, 1.1, other[0]).str.replace(r"\.0$", ""),
            "account": who,
            "account_created_at": START - days_old,
            "channel": pl.Series(["web", "pos", "marketplace"]).gather((other[1] * 3).astype(int)),
            "payment_method": pl.Series(["card", "wallet", "cash", "voucher"]).gather((other[2] * 4).astype(int)),
            "category": pl.Series([f"category {n}" for n in range(12)]).gather((other[3] * 12).astype(int)),
            "known_at": pl.select(pl.when(pl.Series(fraud)).then(reported)).to_series(),
        }
    )


def generate_events(orders: pl.DataFrame, seed: int = 8) -> pl.DataFrame:
    """Return events like those of silver.events_clean: sessions of the orders' accounts on their devices."""
    random = np.random.default_rng(seed)
    count = orders.height * EVENTS_PER_ORDER
    source = orders[random.integers(0, orders.height, count)]
    before = pl.Series(random.integers(1, 90 * 60_000_000, count)).cast(pl.Duration("us"))
    kind = np.searchsorted([0.02, 0.05, 0.06], random.random(count))
    return pl.DataFrame(
        {
            "event_id": pl.Series(np.arange(count)).cast(pl.String),
            "event_type": pl.Series(["login_failed", "payment_attempted", "account_changed", "view_product"]).gather(kind),
            "occurred_at": source["placed_at"] - before,
            "user_id": source["account"],
            "device_id": source["device"],
            "outcome": pl.Series(["", "declined", "", ""]).gather(kind),
            "topic": pl.repeat("events", count, eager=True),
        }
    ).sort("occurred_at")


def write(engine: Engine, table: Table, rows: pl.DataFrame) -> None:
    """Write rows as the first commit of a table, one file per block."""
    handle = engine.lake.load(table)
    missing = [pl.lit(None).alias(name) for name in table.schema.names if name not in rows.columns]
    files = []
    for start in range(0, rows.height, BLOCK):
        block = conform(rows.slice(start, BLOCK).with_columns(missing), table).with_columns(pl.lit(False).alias(DELETED))
        files += handle.writer.write(stamp(table, block, handle.next_sequence))
    handle.commit(files, positions={})


class ProcessWatch:
    """Measures this process and its children: CPU seconds, and the peak private memory of a worker and of this process.

    Shared memory is excluded, since the object store is mapped into every process."""

    def __init__(self) -> None:
        self.cpu: dict[int, float] = {}
        self.worker = self.driver = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProcessWatch:
        self._sample()
        self.before = sum(self.cpu.values())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()
        self.spent = sum(self.cpu.values()) - self.before

    def _run(self) -> None:
        while not self._stop.wait(0.3):
            self._sample()

    def _sample(self) -> None:
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
                memory = process.memory_info()
                if process.pid == own.pid:
                    self.driver = max(self.driver, memory.rss - memory.shared)
                elif process.name().startswith("ray::"):
                    self.worker = max(self.worker, memory.rss - memory.shared)
            except psutil.Error:
                continue


def measure_build(home: Path, count: int, check: Path | None) -> dict[str, float]:
    """Build the features of `count` orders and read the training set; return its cost. Write the features to `check`."""
    settings = Settings(home=home / f"lake-{count}", ray=RaySettings(rows_per_task=BLOCK))
    engine = Engine(Lake(settings), TaskPool(settings.ray), BusinessSettings(), QUARANTINE)
    try:
        orders = generate_orders(count)
        write(engine, ORDER_ENTITIES, orders)
        write(engine, EVENTS_CLEAN, generate_events(orders))
        del orders
        engine.pool.start()
        started, cpu = time.monotonic(), time.process_time()
        with ProcessWatch() as building:
            reports = [
                engine.refresh(category_amounts.STEP),
                engine.refresh(fraud_ratios.STEP),
                build(engine, order_features.STEP, LABEL_DELAY),
            ]
        with ProcessWatch() as reading:
            features = engine.lake.load(order_features.ORDER_FEATURES)
            entities = engine.lake.load(ORDER_ENTITIES)
            moment = START + timedelta(days=DAYS)
            labelled = labelled_orders(features, entities, engine.pool, until=moment - LABEL_DELAY, cutoff=moment)
        used = time.process_time() - cpu + sum(report.worker_cpu_seconds for report in reports)
        if check is not None:
            features.read(["order_id", *(f.name for f in FEATURES)]).write_parquet(check)
        return {
            "orders": count,
            "labelled": labelled.height,
            "wall_seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(used, 1),
            "cpu_seconds_with_ray": round(building.spent + reading.spent, 1),
            "building_worker_mb": round(building.worker / 1e6),
            "building_driver_mb": round(building.driver / 1e6),
            "reading_driver_mb": round(reading.driver / 1e6),
        }
    finally:
        engine.pool.close()


def measure_script(home: Path, count: int) -> dict[str, float]:
    """Compute the same features with the plain script in a process of its own; return its cost."""
    orders = generate_orders(count)
    orders.write_parquet(home / "orders.parquet")
    order_features.account_events(generate_events(orders)).write_parquet(home / "events.parquet")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    names = [str(home / name) for name in ("orders.parquet", "events.parquet", "plain.parquet")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "plain_features.py"), *names], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "orders": count,
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "memory_mb": round(after.ru_maxrss / 1024),
    }


def differences(left: Path, right: Path) -> list[str]:
    """Return the features that differ, beyond the last digits of a floating-point division."""
    built, plain = (pl.read_parquet(path).sort("order_id") for path in (left, right))
    found = []
    for feature in FEATURES:
        a, b = built[feature.name], plain[feature.name]
        if feature.type == "category":
            same = bool((a == b).all())
        else:
            b = b.cast(pl.Float64)
            same = bool((a.is_null() == b.is_null()).all()) and bool(((a - b).abs() <= 1e-9 * (1 + a.abs())).all())
        if not same:
            found.append(feature.name)
    return found


def main() -> int:
    """Measure and print; return 1 when values differ or a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--check", type=int, default=50_000, help="orders of which every feature is compared")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shopsphere-bench-"))
    try:
        measure_build(home, options.check, home / "ours.parquet")
        measure_script(home, options.check)
        different = differences(home / "ours.parquet", home / "plain.parquet")
        print(f"features that differ, of {len(FEATURES)} on {options.check:,} orders: {different or 'none'}", flush=True)
        quarter, whole = measure_build(home, options.orders // 4, None), measure_build(home, options.orders, None)
        script = measure_script(home, options.orders)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    for name, cost in (("build, a quarter", quarter), ("build", whole), ("plain script", script)):
        print(json.dumps({"what": name, **cost}), flush=True)
    ratio = whole["cpu_seconds"] / script["cpu_seconds"]
    growth = max(whole[name] / max(quarter[name], 1) for name in ("building_worker_mb", "building_driver_mb"))
    with_ray = whole["cpu_seconds_with_ray"] / script["cpu_seconds"]
    print(f"CPU of the build relative to the plain script: {ratio:.2f} (with Ray's own processes {with_ray:.2f})")
    print(f"memory of the largest process at four times the orders: {growth:.2f} times (blocks of {BLOCK:,} orders)")
    return 0 if not different and ratio <= 2 and growth < 1.5 else 1


if __name__ == "__main__":
    sys.exit(main())
