"""The model commands, without a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from app.cli.model_commands import register
from lakehouse.errors import ShopSphereError
from ml.evaluation.drift import MonitorError
from ml.evaluation.leak_check import differing, with_other_future
from ml.features.compute import compute
from ml.features.declarations import ORDER_COLUMNS, OrderHistory
from ml.features.groups import FEATURES
from ml.registry import RegistryError

APP = typer.Typer()
register(APP)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_models_without_any(home: Path) -> None:
    runner = CliRunner()
    assert "python -m app train" in runner.invoke(APP, ["models", "list"]).output
    assert json.loads(runner.invoke(APP, ["models", "list", "--json"]).output) == []
    assert isinstance(runner.invoke(APP, ["models", "promote"]).exception, RegistryError)
    assert isinstance(runner.invoke(APP, ["models", "rollback"]).exception, RegistryError)
    assert isinstance(runner.invoke(APP, ["monitor"]).exception, MonitorError)


def test_an_unreachable_tracking_server_is_reported_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = CliRunner().invoke(APP, ["train"]).exception
    assert isinstance(found, RegistryError)
    assert "Nothing was trained" in str(found)
    assert not (home / "warehouse").exists()


def test_errors_name_the_valid_values(home: Path) -> None:
    for arguments, told in (
        (["train", "--cutoff", "yesterday"], "2026-01-31"),
        (["train", "--capacity", "7"], "share of orders"),
        (["monitor", "--moved", "0.9"], "moved"),
        (["benchmark", "handbook", "--data", str(home)], "handbook"),
    ):
        found = CliRunner().invoke(APP, arguments).exception
        assert isinstance(found, ShopSphereError), arguments
        assert told in str(found)


def test_the_leak_check_detects_leaks_only() -> None:
    from datetime import UTC, datetime, timedelta

    begin = datetime(2026, 1, 1, tzinfo=UTC)
    rows = pl.DataFrame(
        {
            "order_id": [f"{n:03d}" for n in range(90)],
            "placed_at": [begin + timedelta(days=n) for n in range(90)],
            "amount": [1000 + 37 * n for n in range(90)],
            "customer": [f"c{n % 3}" for n in range(90)],
            "device": [f"d{n % 5}" for n in range(90)],
            "known_at": [begin + timedelta(days=n + 20) if n % 7 == 0 else None for n in range(90)],
        }
    )
    moment = begin + timedelta(days=59, hours=1)
    history = OrderHistory(orders=compute_ready(rows))
    asked = rows.filter(pl.col("placed_at") <= moment).tail(20)
    now, then = compute(asked, history), compute(asked, with_other_future(history, moment, 7))
    assert differing(now, then) == []
    # a feature that looks at what is reported later
    later = dict(zip(history.orders["order_id"], history.orders["known_at"].is_not_null(), strict=True))
    other = with_other_future(history, moment, 7).orders
    told = dict(zip(other["order_id"], other["known_at"].is_not_null(), strict=True))
    leaky = [
        frame.with_columns(amount=frame["order_id"].replace_strict(known, return_dtype=pl.Float64))
        for frame, known in ((now, later), (then, told))
    ]
    assert differing(*leaky) == ["amount"]
    assert "amount" in {f.name for f in FEATURES}


def compute_ready(rows: pl.DataFrame) -> pl.DataFrame:
    """Return all columns of an order."""
    return rows.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in ORDER_COLUMNS.items() if name not in rows.columns
    ).select(pl.col(name).cast(dtype) for name, dtype in ORDER_COLUMNS.items())
