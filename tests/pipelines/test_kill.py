"""Kills `run` at random times and runs two at once: nothing is lost or duplicated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS_PER_STAGE = (12, 9, 9)
ORDERS = 1500


def environment(home: Path, config: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "SHOPSPHERE_HOME": str(home), "SHOPSPHERE_CONFIG": str(config), **more}


def app(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done


def digests(env: dict[str, str]) -> dict[str, str]:
    return json.loads(app("digest", "--json", env=env).stdout.splitlines()[-1])


@pytest.fixture
def shop(tmp_path):
    home = tmp_path / "shop"
    config = home / "shopsphere.toml"
    env = environment(home, config)
    app("sandbox", "start", "--orders", str(ORDERS), "--seed", "11", env=env)
    try:
        yield tmp_path, config, env
    finally:
        app("sandbox", "stop", env=env)


def kill_at_random(env: dict[str, str], chance: random.Random, longest: float) -> bool:
    """Start a run, kill it after a random time, and return whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "run"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(chance.uniform(0.3, longest))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_leave_the_tables_of_an_uninterrupted_run(shop):
    folder, config, source = shop
    chance = random.Random(2026)
    uninterrupted = environment(folder / "uninterrupted", config, SHOPSPHERE_POSTGRES__SLOT="uninterrupted")
    interrupted = environment(folder / "killed", config, SHOPSPHERE_POSTGRES__SLOT="killed")
    spread_on_ray = {**interrupted, "SHOPSPHERE_RAY__INLINE_ROWS": "2000", "SHOPSPHERE_RAY__ROWS_PER_TASK": "4000"}
    killed = 0
    for stage, kills in enumerate(KILLS_PER_STAGE):
        if stage:
            app("sandbox", "step", "--orders", "150", env=source)
        started = time.monotonic()
        app("run", env=uninterrupted)
        length = time.monotonic() - started
        for number in range(4 * kills):
            if killed == sum(KILLS_PER_STAGE[: stage + 1]):
                break
            spread = number % 3 == 2
            killed += kill_at_random(spread_on_ray if spread else interrupted, chance, length * (1.8 if spread else 0.9))
        app("run", env=interrupted)
        assert digests(interrupted) == digests(uninterrupted), f"after stage {stage}"
    assert killed == sum(KILLS_PER_STAGE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_concurrent_runs_duplicate_nothing(shop):
    folder, config, source = shop
    uninterrupted = environment(folder / "uninterrupted", config, SHOPSPHERE_POSTGRES__SLOT="uninterrupted")
    both = environment(folder / "both", config, SHOPSPHERE_POSTGRES__SLOT="both")
    for stage in range(2):
        if stage:
            app("sandbox", "step", "--orders", "200", env=source)
        app("run", env=uninterrupted)
        runs = [
            subprocess.Popen(
                [sys.executable, "-m", "app", "run"],
                cwd=ROOT,
                env=both,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        ends = [(process.communicate(timeout=240), process.returncode) for process in runs]
        assert any(code == 0 for _, code in ends), ends
        for (_, errors), code in ends:
            assert "Traceback" not in errors
            assert code in (0, 1), errors
        app("run", env=both)
        assert digests(both) == digests(uninterrupted), f"after stage {stage}"
