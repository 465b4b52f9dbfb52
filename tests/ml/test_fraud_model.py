"""The fraud model on a sandbox with real servers: `train`, `models`, `monitor`, and point-in-time correctness."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psycopg
import pytest

from app import sandbox
from app.cli.main import main
from app.cli.output import Output
from app.cli.train_output import train_and_print, training_json
from app.project import PROJECT
from lakehouse.engine.engine import Engine
from ml.evaluation import leak_check
from ml.evaluation.leak_check import leaking_features
from ml.features.compute import compute
from ml.features.declarations import ENTITIES, OrderHistory
from ml.features.groups import FEATURE_NAMES, FEATURES
from ml.registry import Registry
from ml.tables import MODEL_STEPS
from ml.tables.feature_tables import STEPS, refresh
from ml.tables.order_features import ORDER_FEATURES, history_of, read_orders
from ml.tables.user_fraud_scores import USER_FRAUD_SCORES
from ml.training.lineage import lineage
from ml.training.train import DEMO, TrainingResult
from pipelines.runner import open_engine, run_once
from pipelines.settings import load_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ORDERS = 20_000
"""As many as in the demo: fewer orders have too few frauds for the gate."""


@dataclass(frozen=True)
class Shop:
    """A sandbox with a lakehouse and a first model, and the output of its training."""

    home: Path
    trained: TrainingResult
    printed: str


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    home = tmp_path_factory.mktemp("fraud shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(home))
        patch.setenv("SHOPSPHERE_RAY__CPUS", "2")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sandbox.start(home, orders=ORDERS, seed=7)
        try:
            with open_engine(load_settings()) as engine:
                assert not run_once(engine, PROJECT, lambda name, report: None).errors
            printed = io.StringIO()
            with redirect_stdout(printed):
                trained = train_and_print(Output(), load_settings(), DEMO)
            yield Shop(home, trained, printed.getvalue())
        finally:
            sandbox.stop(home)


@pytest.fixture
def engine(shop: Shop) -> Iterator[Engine]:
    with open_engine(load_settings()) as opened:
        yield opened


@pytest.fixture
def cli(shop: Shop, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_train_records_and_promotes_a_model(shop: Shop, engine: Engine) -> None:
    done = shop.trained
    assert done.verdict.passed, done.verdict.refusal
    assert {check.name for check in done.verdict.checks} >= {"window", "first model", "calibration", "future", "latency"}
    assert done.version.aliases == ("champion",)
    assert "Version 1 is the champion now" in shop.printed
    assert f"Look at the run: mlflow ui --backend-store-uri 'sqlite:///{shop.home}/mlflow/mlflow.db'" in shop.printed
    assert done.upper_bound is not None
    assert [one.name for one in done.leaderboard] == [
        "amount only",
        "hand-weighted risk score",
        "logistic regression",
        "fraud model",
    ]
    for name in ("upper bound", "95% interval"):
        assert name in shop.printed
    recorded = Registry(home=shop.home).load()
    assert {feature["name"] for feature in recorded.features} == set(FEATURE_NAMES)
    known = {name.removeprefix("snapshot."): int(tag) for name, tag in run_tags(shop).items() if name.startswith("snapshot.")}
    assert known == lineage(engine.lake)
    assert known.keys() >= {step.target.name for step in STEPS} | {"silver.orders_unified", "silver.chargebacks"}
    assert json.loads(json.dumps(training_json(done), default=str))["promoted"] is True


def test_every_person_has_a_score_of_the_champion(shop: Shop, engine: Engine) -> None:
    found = engine.lake.load(USER_FRAUD_SCORES).read(USER_FRAUD_SCORES.schema.names)
    orders = read_orders(engine.lake, pl.lit(True)).drop_nulls("person").sort("placed_at", "order_id")
    assert found.height == orders["person"].n_unique()
    assert int(found["orders"].sum()) == orders.height
    champion = Registry(home=shop.home).load()
    features = engine.lake.load(ORDER_FEATURES).read(["order_id", *FEATURE_NAMES])
    newest = orders.unique("person", keep="last", maintain_order=True).select("order_id", "person")
    scored = newest.join(features, on="order_id", maintain_order="left")
    expected = dict(zip(scored["person"].to_list(), champion.model.score(scored).tolist(), strict=True))
    assert dict(found.select("master_user_id", "fraud_score").iter_rows()) == expected
    assert (found["highest_score"] >= found["fraud_score"]).all()
    # true fraudsters have much higher scores
    truth = sandbox.truth(shop.home)["fraud"]["order_id"]
    culprits = orders.filter(pl.col("order_id").is_in(truth.implode()))["person"].unique()
    risk = found.with_columns(culprit=pl.col("master_user_id").is_in(culprits.implode()))
    means = dict(risk.group_by("culprit").agg(pl.col("highest_score").mean()).iter_rows())
    assert means[True] > 10 * means[False]


def run_tags(shop: Shop) -> dict[str, str]:
    registry = Registry(home=shop.home)
    return dict(registry.client.get_run(registry.version("champion").run_id).data.tags)


# --- point-in-time correctness, on the sandbox's orders ---------------------------------------------------------


def test_a_thousand_training_rows_equal_features_computed_alone(engine: Engine) -> None:
    """Each order is computed alone, from the history that a server would read."""
    stored = engine.lake.load(ORDER_FEATURES).read(["order_id", "placed_at", *FEATURE_NAMES]).sort("placed_at", "order_id")
    whole = read_orders(engine.lake, pl.lit(True))
    about = history_of(engine.lake, whole)
    chosen = np.random.default_rng(11).choice(stored.height, 1000, replace=False)
    differing = set()
    for number in chosen:
        row = stored[int(number)]
        order = whole.filter(pl.col("order_id") == row["order_id"][0])
        # known at the time: earlier orders that share an entity, and earlier reports and events
        known = about.orders.filter(
            pl.any_horizontal(pl.col(kind).is_in(order[kind].drop_nulls().implode()) for kind in ENTITIES)
            & (pl.col("placed_at") <= order["placed_at"][0])
            & (pl.col("order_id") != order["order_id"][0])
        )
        known = known.with_columns(known_at=pl.when(pl.col("known_at") < order["placed_at"][0]).then("known_at"))
        events = about.events.filter(
            (
                pl.col("account").is_in(order["account"].drop_nulls().implode())
                | pl.col("device").is_in(order["device"].drop_nulls().implode())
            )
            & (pl.col("occurred_at") < order["placed_at"][0])
        )
        served = compute(order.with_columns(known_at=None), OrderHistory(known, events, about.categories))
        differing |= {name for name in FEATURE_NAMES if not served[name].eq_missing(row[name]).all()}
    assert differing == set()
    # most features vary, so the comparison is meaningful
    says = [f.name for f in FEATURES if stored[f.name].n_unique() > 1]
    assert len(says) > 0.8 * len(FEATURES), set(FEATURE_NAMES) - set(says)


def test_a_shuffled_future_changes_no_feature_of_the_past(engine: Engine) -> None:
    for moment in moments(engine):
        assert leaking_features(engine.lake, moment, orders=400) == []


def test_leak_check_finds_a_feature_that_uses_the_future(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def peeking(orders: pl.DataFrame, history: OrderHistory) -> pl.DataFrame:
        found = compute(orders, history)
        later = history.orders.filter(pl.col("known_at").is_not_null())["order_id"]
        return found.with_columns(customer_frauds_ever=found["order_id"].is_in(later.implode()).cast(pl.Float64))

    monkeypatch.setattr(leak_check, "compute", peeking)
    assert leaking_features(engine.lake, moments(engine)[1], orders=400) == ["customer_frauds_ever"]


def moments(engine: Engine) -> list[datetime]:
    placed = read_orders(engine.lake, pl.lit(True))["placed_at"]
    return [moment for share in (0.3, 0.6, 0.9) if isinstance(moment := placed.quantile(share, "nearest"), datetime)]


# --- models and monitoring ------------------------------------------------------------------------------------------


def test_refusal_forced_promotion_and_rollback(shop: Shop, cli: Any) -> None:
    again = train_and_print(Output(), load_settings(), DEMO)
    assert not again.verdict.passed
    assert again.verdict.refusal.startswith("gain: average precision +0.0000 against the champion")
    listed = json.loads(cli("models", "list", "--json")[1])
    assert [(one["version"], one["aliases"]) for one in listed] == [(2, ["challenger"]), (1, ["champion"])]
    assert listed[0]["gate"].startswith("refused: gain")
    registry = Registry(home=shop.home)
    # equal data and seed have equal bytes
    assert registry.load("champion").model.digest == registry.load("challenger").model.digest
    code, out, _ = cli("models", "compare")
    assert code == 0
    assert "Average precision of challenger minus champion: +0.0000" in out
    code, _, err = cli("models", "promote", "challenger")
    assert code == 1
    assert "was not promoted, the gate refused: gain" in err
    assert "Version 2 is the champion now" in cli("models", "promote", "challenger", "--force")[1]
    assert "Version 1 is the champion now" in cli("models", "rollback")[1]
    code, _, err = cli("models", "rollback")
    assert code == 1
    assert "there is none before it" in err


def test_monitor_detects_drift_and_only_drift(shop: Shop, cli: Any) -> None:
    """Runs last, since it changes the data: the newest orders cost forty times as much."""
    judged = pl.Series([datetime.fromisoformat(Registry(home=shop.home).load().reference["until"])])[0]
    code, out, _ = cli("monitor", "--json")
    assert code == 0
    baseline = json.loads(out)
    assert {one["name"] for one in baseline["features"]} == set(FEATURE_NAMES)
    assert baseline["alarms"] == []
    page = Path(baseline["report"]).read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    before = {one["name"]: one["psi"] for one in baseline["features"]}
    with psycopg.connect(load_settings().postgres.dsn.get_secret_value()) as connection:
        connection.execute(
            "UPDATE orders SET total_amount = total_amount * 40 WHERE created_at > %s", (judged + timedelta(days=20),)
        )
    assert cli("run", "--json")[0] == 0
    code, out, _ = cli("monitor")
    assert code == 3
    assert "Drift: " in out
    drifted = json.loads(cli("monitor", "--json")[1])
    after = {one["name"]: one for one in drifted["features"]}
    assert after["amount"]["state"] == "drifted"
    assert after["amount"]["psi"] > 10 * before["amount"]
    assert any(alarm.startswith("amount (PSI") for alarm in drifted["alarms"])


def test_feature_tables_support_status_sql_digest_and_rebuild(shop: Shop, cli: Any) -> None:
    found = {one["table"]: one for one in json.loads(cli("status", "--json")[1])}
    for step in MODEL_STEPS:
        assert found[step.target.name]["rows"] > 0
        assert found[step.target.name]["position"]
    assert found["silver.order_features"]["lag"] == "up to date"
    code, out, _ = cli("sql", "SELECT count(*) AS n FROM silver.order_features WHERE new_device = 1", "--json")
    assert code == 0
    assert 0 < json.loads(out)[0]["n"] < ORDERS
    digest = json.loads(cli("digest", "silver.order_features", "--json")[1])
    assert cli("rebuild", "silver.order_features")[0] == 0
    assert json.loads(cli("digest", "silver.order_features", "--json")[1]) == digest
    scores = json.loads(cli("digest", "gold.user_fraud_scores", "--json")[1])
    assert cli("rebuild", "gold.user_fraud_scores")[0] == 0
    assert json.loads(cli("digest", "gold.user_fraud_scores", "--json")[1]) == scores
    with open_engine(load_settings()) as engine:
        assert {report.status for report in refresh(engine)} == {"unchanged"}
