"""Cost of an incremental change: a full build, then 1% more orders; on a history, and on one a quarter as long.

Prints CPU seconds, rows read and bytes written per changed row, and two ratios:
- the change against the full build (target: at most 0.10 at 500,000 orders);
- the same change on the long history against the short one (target: below 1.5).

CPU of the full build is that of steps and Ray tasks, without Ray's own processes, which makes the ratio worse. CPU of the
change is that of the whole process, including its start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cost:
    """The cost of one run."""

    orders: int
    label: str
    wall_seconds: float
    cpu_seconds: float
    process_cpu_seconds: float
    rows_changed_in_bronze: int
    rows_read: int
    rows_written: int
    bytes_written: int


def app(home: Path, *arguments: str) -> tuple[str, float, float]:
    """Run a command. Return its output, wall seconds, and CPU seconds of the process and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, "SHOPSPHERE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(home: Path, orders: int, label: str) -> Cost:
    """Run once and return the cost."""
    output, wall, process_cpu = app(home, "run", "--json")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    steps = result["steps"]
    cost = Cost(
        orders,
        label,
        round(wall, 1),
        round(result["cpu_seconds"], 1),
        round(process_cpu, 1),
        sum(s["rows_written"] for s in steps if s["table"].startswith("bronze.")),
        sum(s["rows_read"] for s in steps if not s["table"].startswith("bronze.")),
        sum(s["rows_written"] for s in steps if not s["table"].startswith("bronze.")),
        sum(s["bytes_written"] for s in steps),
    )
    print(json.dumps(asdict(cost)), flush=True)
    if os.environ.get("BENCH_STEPS"):
        for s in steps:
            figures = (
                f"read {s['rows_read']:>10,} written {s['rows_written']:>9,} {s['seconds']:7.2f} s {s['cpu_seconds']:7.2f} cpu"
            )
            print(f"    {s['table']:42} {s['status']:10} {figures}")
    return cost


def measure(orders: int, change: int, seed: int) -> tuple[Cost, Cost, Cost]:
    """Return the cost of a full build, of a run without new data, and of a run with `change` more orders."""
    home = Path(tempfile.mkdtemp(prefix="shopsphere-bench-"))
    try:
        _, wall, _ = app(home, "sandbox", "start", "--orders", str(orders), "--seed", str(seed), "--json")
        print(f"sandbox with {orders:,} orders: {wall:.0f} s", flush=True)
        full = run(home, orders, "full build")
        unchanged = run(home, orders, "no new data")
        app(home, "sandbox", "step", "--orders", str(change))
        return full, unchanged, run(home, orders, f"{change:,} more orders")
    finally:
        app(home, "sandbox", "stop")
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    """Measure and print. Return 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    change = options.orders // 100
    _, _, short = measure(options.orders // 4, change, options.seed)
    full, unchanged, long = measure(options.orders, change, options.seed)
    share = long.process_cpu_seconds / full.cpu_seconds
    growth = long.process_cpu_seconds / short.process_cpu_seconds
    changed = long.rows_changed_in_bronze
    lines = (
        f"{change:,} more orders on {options.orders:,}: {long.process_cpu_seconds} CPU s = {share:.3f} of the full build "
        f"({full.cpu_seconds} CPU s)",
        f"the same on {options.orders // 4:,}: {short.process_cpu_seconds} CPU s; four times the history costs "
        f"{growth:.2f} times as much",
        f"no new data: {unchanged.wall_seconds} s",
        f"per changed row in bronze: {long.rows_read / changed:.1f} rows read, {long.bytes_written / changed:.0f} bytes written",
    )
    print("\n" + "\n".join(lines))
    return 0 if share <= 0.10 and growth < 1.5 and unchanged.wall_seconds < 10 else 1


if __name__ == "__main__":
    sys.exit(main())
