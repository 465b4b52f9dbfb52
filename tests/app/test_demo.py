"""`python -m app demo` works end to end, up to answers over HTTP, and leaves no process running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.demo.serving_process import DemoError, serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.timeout(600)
def test_the_demo_scores_orders_and_returns_stock_over_http(tmp_path: Path) -> None:
    environment = {**os.environ, "SHOPSPHERE_HOME": str(tmp_path)}
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "app", "demo", "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    fraudulent, honest = (one["answer"] for one in result["serving"]["scores"])
    assert fraudulent["score"] > fraudulent["threshold"] > honest["score"]
    assert fraudulent["decision"] in ("review", "decline")
    assert honest["decision"] == "approve"
    assert fraudulent["reasons"]
    stock = result["serving"]["stock"]
    assert stock["stores"]
    assert stock["staleness_ms"] < 60_000
    assert result["seconds"] < 300
    assert not [
        one
        for one in psutil.process_iter(["environ"])
        if (one.info["environ"] or {}).get("SHOPSPHERE_HOME") == environment["SHOPSPHERE_HOME"] + "/demo"
    ]


def test_serving_that_cannot_start_reports_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPSPHERE_SERVE_REASONS", "-1")
    with pytest.raises(DemoError, match=r"exit code 1 .*reasons"), serving(tmp_path):
        pytest.fail("serving must not become ready")
