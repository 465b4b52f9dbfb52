"""The promotion gate: which models pass, which are refused, and the text of a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support.fraud_world import FEATURES, orders, split

from lakehouse.errors import SettingsError
from ml.evaluation.gate import (
    GateRefused,
    GateSettings,
    Verdict,
    admit,
    compare_models,
    compare_recorded,
    judge,
    latency,
    list_models,
    promote_model,
    rollback_model,
)
from ml.evaluation.metrics import ThresholdSettings, choose_threshold, evaluate
from ml.registry import Registry, TrainingRecord
from ml.training.boosting import fit_in_process
from ml.training.model import FittedModel
from ml.training.settings import TrainingSettings

SETTINGS = GateSettings(bootstrap_rounds=200, latency_ms=1000)
TRAIN, VALIDATION, WINDOW = split(orders(9000, seed=3))


def no_leak() -> list[str]:
    return []


@pytest.fixture(scope="module")
def good() -> FittedModel:
    return fit_in_process(TRAIN, VALIDATION, FEATURES, TrainingSettings(rounds=200))


@pytest.fixture(scope="module")
def weak() -> FittedModel:
    """A model with a single feature."""
    return fit_in_process(TRAIN, VALIDATION, FEATURES[1:2], TrainingSettings(rounds=100))


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def test_a_better_model_passes(good: FittedModel, weak: FittedModel) -> None:
    verdict = judge(WINDOW, good, weak, SETTINGS, leak=no_leak)
    assert verdict.passed, verdict.refusal
    assert (verdict.refusal, verdict.summary()) == ("", "passed")
    assert verdict.gain is not None
    assert verdict.gain.low > 0
    assert [check.name for check in verdict.checks] == ["window", "gain", "calibration", "channels", "future", "latency"]


def test_worse_and_equal_models_are_refused(good: FittedModel, weak: FittedModel) -> None:
    worse = judge(WINDOW, weak, good, SETTINGS, leak=no_leak)
    assert "gain" in failed(worse)
    assert "channels" in failed(worse)
    assert "gain: average precision -0." in worse.refusal
    assert "the interval must lie above 0" in worse.refusal
    assert "of average precision, at most 0.0500 is allowed" in worse.refusal
    assert failed(judge(WINDOW, good, good, SETTINGS, leak=no_leak)) == ["gain"]


def test_a_first_model_must_beat_chance(good: FittedModel) -> None:
    assert judge(WINDOW, good, None, SETTINGS, leak=no_leak).passed
    chance = fit_in_process(TRAIN, VALIDATION, FEATURES[4:], TrainingSettings(rounds=5))
    assert "first model" in failed(judge(WINDOW, chance, None, SETTINGS, leak=no_leak))


def test_a_leak_is_named(good: FittedModel) -> None:
    verdict = judge(WINDOW, good, None, SETTINGS, leak=lambda: ["orders_1h", "amount_ratio"])
    assert verdict.refusal == "future: 2 features change when the future is shuffled: amount_ratio, orders_1h"
    assert failed(judge(WINDOW, good, None, SETTINGS)) == ["future"]
    assert judge(WINDOW, good, None, replace(SETTINGS, require_leak_check=False)).passed


def test_uncalibrated_scores_are_refused() -> None:
    # only every tenth honest order is kept, so scores are far too high
    frauds, honest = TRAIN.filter(pl.col("label") == 1), TRAIN.filter(pl.col("label") == 0)
    overconfident = fit_in_process(
        pl.concat([frauds, honest.gather_every(10)]), VALIDATION, FEATURES, TrainingSettings(rounds=100)
    )
    verdict = judge(WINDOW, overconfident, None, SETTINGS, leak=no_leak)
    assert failed(verdict) == ["calibration"]
    assert "mean score 0." in verdict.refusal


def test_a_window_with_too_few_frauds_is_refused(good: FittedModel, weak: FittedModel) -> None:
    few = WINDOW.filter((pl.col("label") == 0) | (pl.col("label").cum_sum() <= 5))
    verdict = judge(few, good, weak, SETTINGS, leak=no_leak)
    assert failed(verdict) == ["window"]
    assert verdict.refusal == f"window: 5 frauds among {len(few)} orders, at least 30 are needed"
    assert failed(judge(WINDOW[:0], good, weak, SETTINGS, leak=no_leak)) == ["window"]


def test_a_channel_with_a_loss_is_named(good: FittedModel) -> None:
    # the challenger is blind in one channel and perfect in the others
    blind = _Fake(np.where(WINDOW["channel"] == "pos", 0.0, WINDOW["label"].cast(pl.Float64)), good)
    verdict = judge(WINDOW, blind, good, replace(SETTINGS, channel_frauds=5), leak=no_leak)  # type: ignore[arg-type]
    assert failed(verdict)[0] == "channels"
    assert "channel pos loses 0." in verdict.refusal


def test_a_slow_model_is_refused(good: FittedModel) -> None:
    assert failed(judge(WINDOW, good, None, replace(SETTINGS, latency_ms=1e-6), leak=no_leak)) == ["latency"]
    assert latency(good, WINDOW[:0]) == 0


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"gate\.confidence is 95"):
        GateSettings(confidence=95)


class _Fake:
    """Returns given scores, with the latency of a real model."""

    def __init__(self, scores: Any, model: FittedModel) -> None:
        self._scores, self._model = scores, model

    def score(self, frame: pl.DataFrame) -> Any:
        return self._scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


# --- with the registry --------------------------------------------------------------------------------------------


def _training(model: FittedModel) -> TrainingRecord:
    thresholds = ThresholdSettings()
    threshold = choose_threshold(VALIDATION, model.score(VALIDATION), thresholds)
    return TrainingRecord(
        model=model,
        features=[feature for feature in FEATURES if feature.name in model.features],
        evaluation=evaluate(WINDOW, model.score(WINDOW), thresholds, threshold),
        example=WINDOW.head(3),
        snapshots={"silver.orders_unified": 1},
        seed=7,
        code_version="test",
    )


def test_registered_models_from_training_to_rollback(
    good: FittedModel, weak: FittedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    registry = Registry(home=tmp_path)
    assert list_models(registry) == []

    first = registry.record(_training(weak))
    with pytest.raises(GateRefused, match=r"Version 1 of model 'fraud' was not promoted, the gate has not judged it"):
        promote_model(registry, 1)
    assert admit(registry, first, WINDOW, replace(SETTINGS, min_roc_auc=0.5, max_calibration_error=1), leak=no_leak).passed
    assert registry.champion_number() == 1

    second = registry.record(_training(good))
    assert admit(registry, second, WINDOW, SETTINGS, leak=no_leak).passed
    assert registry.champion_number() == 2

    third = registry.record(_training(weak))
    verdict = admit(registry, third, WINDOW, SETTINGS, leak=no_leak)
    assert not verdict.passed
    assert registry.champion_number() == 2
    with pytest.raises(GateRefused, match=r"the gate refused: gain: average precision -.*--force"):
        promote_model(registry, "challenger")

    listed = list_models(registry)
    assert [(entry["version"], entry["aliases"]) for entry in listed] == [(3, ["challenger"]), (2, ["champion"]), (1, [])]
    assert listed[0]["gate"].startswith("refused: gain")
    recorded = compare_recorded(registry, 1, 2)
    assert recorded["average_precision"] == (listed[2]["average_precision"], listed[1]["average_precision"])
    compared = compare_models(registry, 1, 2, WINDOW, settings=SETTINGS)
    assert compared.gain.low > 0
    assert compared.figures["average_precision"] == pytest.approx(recorded["average_precision"])

    assert promote_model(registry, 3, force=True).tags["gate_overruled"] == "yes"
    assert rollback_model(registry).number == 2
    assert registry.champion_number() == 2


def test_a_champion_with_removed_features_is_not_compared(
    good: FittedModel, weak: FittedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    registry = Registry(home=tmp_path)
    registry.promote(registry.record(_training(good)).number)
    without = WINDOW.drop(next(name for name in good.features if name not in weak.features))
    verdict = admit(registry, registry.record(_training(weak)), without, replace(SETTINGS, min_roc_auc=0.5), leak=no_leak)
    assert verdict.checks[0].name == "champion"
    assert "version 1 needs amount_ratio, which orders no longer have: evaluated as a first model" in verdict.checks[0].text
    assert "first model" in {check.name for check in verdict.checks}
