"""The registry on a real MLflow: a SQLite file here, and (slow) a tracking server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.fraud_world import FEATURES, orders, split
from support.mlflow_server import mlflow_server
from support.waiting import free_port

from lakehouse.code_version import code_version
from ml.evaluation.metrics import ThresholdSettings, choose_threshold, evaluate
from ml.evaluation.plots import pictures
from ml.registry import Registry, RegistryError, TrainingRecord
from ml.training.boosting import fit_in_process
from ml.training.search import Trial
from ml.training.settings import TrainingSettings

TEST = split(orders(2500))[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow writes to the working directory by default
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow home")  # with a space, as in real home directories


@pytest.fixture
def registry(home: Path, request: pytest.FixtureRequest) -> Registry:
    registry = Registry(name=f"fraud-{request.node.name.split('[')[0]}", home=home)
    registry.check()
    return registry


@pytest.fixture(scope="module")
def training() -> TrainingRecord:
    train, validation, test = split(orders(2500))
    model = fit_in_process(train, validation, FEATURES, TrainingSettings(rounds=30))
    thresholds = ThresholdSettings()
    threshold = choose_threshold(validation, model.score(validation), thresholds)
    return TrainingRecord(
        model=model,
        features=FEATURES,
        evaluation=evaluate(test, model.score(test), thresholds, threshold),
        example=test.head(5),
        snapshots={"silver.orders_unified": 7_001, "silver.chargebacks": 7_002},
        seed=7,
        code_version=code_version(),
        rows={"train": len(train), "validation": len(validation), "test": len(test)},
        pictures=pictures(test, model.score(test), threshold, model),
        trials=tuple(
            Trial(number=number, parameters=model.parameters, score=score, fold_scores=folds, rounds=20, seconds=1.0)
            for number, (score, folds) in enumerate([(0.4, (0.3, 0.5)), (0.3, (0.3, 0.3))])
        ),
        parameters={"label_delay_days": 45},
        metrics={"baseline_amount_average_precision": 0.1, "unknown": float("nan")},
        tables={"baselines.txt": "amount only .1"},
        reference={"psi": {"amount_ratio": [0.1, 0.2]}},
        label_delay=timedelta(days=12, hours=6),
    )


def test_a_training_is_recorded_completely(registry: Registry, training: TrainingRecord, tmp_path: Path) -> None:
    version = registry.record(training)
    assert (version.number, version.aliases) == (1, ("challenger",))
    assert version.threshold == training.evaluation.threshold
    assert version.metrics["average_precision"] == training.evaluation.overall["average_precision"]
    assert "channel.web.roc_auc" in version.metrics
    assert "unknown" not in version.metrics

    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["seed"], run.data.params["max_bin"], run.data.params["label_delay_days"]) == ("7", "1024", "45")
    assert run.data.tags["snapshot.silver.orders_unified"] == "7001"
    assert run.data.tags["code_version"] == training.code_version
    assert {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}["silver.chargebacks"] == "7002"
    assert {Path(entry.path).name for entry in registry.client.list_artifacts(version.run_id, "pictures")} == set(
        training.pictures
    )
    nested = registry.client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{version.run_id}'")
    assert {child.info.run_name for child in nested} == {"trial-0", "trial-1"}
    assert list(tmp_path.iterdir()) == []  # nothing in MLflow's default directory


def test_a_loaded_model_is_bit_identical(registry: Registry, training: TrainingRecord) -> None:
    registry.record(training)
    loaded = registry.load("challenger")
    assert loaded.model == training.model
    assert loaded.threshold == training.evaluation.threshold
    assert loaded.reference == training.reference
    assert loaded.label_delay == timedelta(days=12, hours=6)
    assert loaded.features[0]["doc"] == "A synthetic feature."
    assert loaded.model.score(TEST).tolist() == training.model.score(TEST).tolist()


def test_the_model_loads_without_this_project(registry: Registry, training: TrainingRecord, tmp_path: Path) -> None:
    registry.promote(registry.record(training).number)
    training.example.write_parquet(tmp_path / "unused.parquet")
    script = (
        "import sys, mlflow\n"
        "assert not any(name.split('.')[0] in ('ml', 'lakehouse') for name in sys.modules)\n"
        f"booster = mlflow.xgboost.load_model('models:/{registry.name}@champion')\n"
        f"model = mlflow.pyfunc.load_model('models:/{registry.name}@champion')\n"
        "example = model.input_example\n"
        "assert list(example.columns) == model.metadata.signature.inputs.input_names() == booster.feature_names\n"
        "print(*model.predict(example))\n"
        "assert not any(name.split('.')[0] in ('ml', 'lakehouse') for name in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environment, "MLFLOW_TRACKING_URI": registry.uri},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    scores = [float(score) for score in process.stdout.split()]
    assert scores == pytest.approx(training.model.score(training.example).tolist())


def test_promotion_and_rollback(registry: Registry, training: TrainingRecord) -> None:
    assert registry.versions() == []
    assert registry.champion() is None
    assert registry.champion_number() is None
    with pytest.raises(RegistryError, match="no champion to roll back"):
        registry.rollback()
    with pytest.raises(RegistryError, match=r"There are: none. Train one"):
        registry.load()
    for _ in range(3):
        registry.record(training)
    registry.promote(1)
    with pytest.raises(RegistryError, match="first champion"):
        registry.rollback()
    registry.promote("challenger")
    assert registry.challenger() is None
    assert registry.champion_number() == 3
    registry.promote(3)  # promoting it again keeps the tag of the replaced version
    assert registry.rollback().number == 1
    assert [(version.number, version.aliases) for version in registry.versions()] == [(3, ()), (2, ()), (1, ("champion",))]
    with pytest.raises(RegistryError, match=r"no version '9'.*There are: 3, 2, 1 \(champion\)"):
        registry.promote(9)


def test_environment_variables_are_restored(registry: Registry, training: TrainingRecord) -> None:
    before = dict(os.environ)
    registry.record(training)
    registry.load(1)
    assert {name: os.environ.get(name) for name in before} == before
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize("failing", ["log_inputs", "log_artifacts", "create_model_version", "set_registered_model_alias"])
def test_a_failure_leaves_versions_and_aliases_unchanged(
    registry: Registry, training: TrainingRecord, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [(version.number, version.aliases) for version in registry.versions()]

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server went away")

    monkeypatch.setattr(registry.client, failing, broken)
    with pytest.raises(RegistryError, match=r"could not record the training: the server went away.*run again"):
        registry.record(training)
    monkeypatch.undo()
    assert [(version.number, version.aliases) for version in registry.versions()] == before
    assert registry.client.search_registered_models(f"name='{registry.name}'") == []
    experiment = registry.client.get_experiment_by_name(registry.name)
    assert experiment is not None
    newest = registry.client.search_runs([experiment.experiment_id], "tags.model_digest != ''", max_results=1)[0]
    assert newest.info.status == "FAILED"


def test_corrupted_bytes_are_detected(registry: Registry, training: TrainingRecord, home: Path) -> None:
    registry.record(training)
    source = registry.client.get_logged_model(registry.client.get_model_version(registry.name, "1").source.rpartition("/")[2])
    stored = Path(source.artifact_location.removeprefix("file://").replace("%20", " ")) / "model.ubj"
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    with pytest.raises(RegistryError, match="not those that were trained"):
        registry.load(1)


def test_an_unreachable_server_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.registry.connection.time.sleep", lambda _: None)
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"http://someone@127.0.0.1:\d+ cannot be reached.*Nothing was trained") as raised:
        Registry(f"http://someone:secret@127.0.0.1:{free_port()}").check()
    assert time.monotonic() - started < 20
    assert "secret" not in str(raised.value)


def test_server_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert Registry(home=home).command == f"mlflow ui --backend-store-uri 'sqlite:///{home}/mlflow/mlflow.db'"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert Registry(home=home).uri == "http://mlflow.example:5000"
    assert Registry(home=home).command == "open http://mlflow.example:5000"


def test_code_version_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "features.py").write_text("A = 1\n")
    first = code_version(tmp_path)
    (tmp_path / "ml" / "features.py").write_text("A = 2\n")
    assert first.startswith("sources:")
    assert code_version(tmp_path) != first


@pytest.mark.slow
def test_a_tracking_server_that_stops(training: TrainingRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server(tmp_path) as server:
        registry = Registry(server.address)
        registry.check()
        number = registry.record(replace(training, trials=())).number
        registry.promote(number)
        assert registry.load().model == training.model
        registry.copy_to(tmp_path / "copy")
        copied = {str(file.relative_to(tmp_path / "copy")) for file in (tmp_path / "copy").rglob("*")}
        assert {f"versions/{number}/version.json", f"versions/{number}/model.ubj"} <= copied
        (run,) = (tmp_path / "copy" / "runs").iterdir()
        assert json.loads((run / "run.json").read_text())["data"]["params"]
        assert any(file.suffix == ".png" for file in (run / "artifacts").rglob("*"))
        server.stop()
        with pytest.raises(RegistryError, match=r"cannot be reached.*Nothing was trained"):
            registry.check()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with pytest.raises(RegistryError, match="could not list the versions"):
            registry.versions()


def test_synthetic_frames_have_the_columns_of_training() -> None:
    assert {"label", "placed_at", "order_id", "amount", "channel", "customer"} <= set(TEST.columns)
    assert TEST.schema["label"] == pl.Int8
