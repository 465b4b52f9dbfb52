"""Metrics, compared with scikit-learn where it has them, and with worked examples."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_curve, roc_auc_score
from support.fraud_world import FEATURES, orders, split

from lakehouse.errors import SettingsError
from ml.evaluation.metrics import (
    Ranking,
    ThresholdSettings,
    average_precision,
    bootstrap_gain,
    calibration_error,
    capacity_threshold,
    card_precision,
    choose_threshold,
    cost_saved,
    cost_threshold,
    evaluate,
    interval,
    log_loss,
    precision_recall,
    roc_auc,
)
from ml.evaluation.plots import pictures
from ml.training.boosting import fit_in_process
from ml.training.settings import TrainingSettings

# few distinct scores, so that ties are common
SCORED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=60).filter(
    lambda rows: 0 < sum(label for label, _ in rows) < len(rows)
)


@given(SCORED)
def test_ranking_metrics_equal_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label, score = (np.array(column) for column in zip(*rows, strict=True))
    assert roc_auc(label, score / 8) == pytest.approx(roc_auc_score(label, score / 8))
    assert average_precision(label, score / 8) == pytest.approx(average_precision_score(label, score / 8))
    precision, recall, at = precision_recall(label, score / 8)
    theirs = precision_recall_curve(label, score / 8)
    assert precision == pytest.approx(theirs[0][:-1][::-1])
    assert recall == pytest.approx(theirs[1][:-1][::-1])
    assert at == pytest.approx(theirs[2][::-1])
    assert log_loss(label, score / 8) == pytest.approx(sklearn.metrics.log_loss(label, np.clip(score / 8, 1e-12, 1 - 1e-12)))


@given(SCORED, st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_rows(rows: list[tuple[int, int]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    figures = [
        (roc_auc(label, score), average_precision(label, score))
        for label, score in ((np.array([row[0] for row in of]), np.array([row[1] / 8 for row in of])) for of in (rows, shuffled))
    ]
    assert figures[0] == figures[1]


@given(SCORED, st.integers(1, 4))
def test_a_weight_equals_repeated_rows(rows: list[tuple[int, int]], times: int) -> None:
    label, score = (np.array(column) for column in zip(*rows, strict=True))
    weight = np.arange(len(label)) % (times + 1)
    if label[weight > 0].sum() == 0:
        return
    repeated = average_precision(np.repeat(label, weight), np.repeat(score, weight))
    assert Ranking(label, score).average_precision(weight.astype(float)) == pytest.approx(repeated)


def test_ranking_metrics_are_nan_with_a_single_class() -> None:
    nothing = np.zeros(5, dtype=int)
    assert np.isnan(roc_auc(nothing, np.arange(5.0)))
    assert np.isnan(average_precision(nothing, np.arange(5.0)))
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0)))


def test_card_precision_of_a_worked_example() -> None:
    # day 1: a .9 fraud, b .8 honest, c .7 fraud; day 2: a .9 (found on day 1), b .5 fraud, c .4 honest
    customer = np.array(["a", "b", "c", "a", "b", "c", "a"])
    day = np.array([1, 1, 1, 2, 2, 2, 1])
    label = np.array([0, 0, 1, 1, 1, 0, 1])
    score = np.array([0.9, 0.8, 0.7, 0.9, 0.5, 0.4, 0.2])
    # k=2, day 1 looks at a (a fraud that day, if not the order with the highest score) and b: 1/2; day 2 at b and c: 1/2
    assert card_precision(label, score, customer, day, k=2) == pytest.approx(0.5)
    # k=1: day 1 a: 1; day 2 b: 1
    assert card_precision(label, score, customer, day, k=1) == 1.0
    # fewer customers than k: of those there are
    assert card_precision(label, score, customer, day, k=100) == pytest.approx((2 / 3 + 1 / 1) / 2)


def test_card_precision_ignores_orders_without_customer() -> None:
    customer = pl.Series([None, "a"], dtype=pl.String)
    assert card_precision(np.array([1, 0]), np.array([0.9, 0.1]), customer, np.array([1, 1])) == 0.0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=80), st.floats(0.01, 1))
def test_the_capacity_is_never_exceeded(scores: list[int], capacity: float) -> None:
    score = np.array(scores) / 20
    taken = score >= capacity_threshold(score, capacity)
    assert taken.sum() <= capacity * len(score)
    left = np.unique(score[~taken])
    if len(left):  # taking the next score too would be more than allowed
        assert (score >= left[-1]).sum() > int(capacity * len(score))


@given(SCORED, st.floats(0, 30))
def test_no_threshold_saves_more_than_the_chosen_one(rows: list[tuple[int, int]], cost: float) -> None:
    label, score = np.array([row[0] for row in rows]), np.array([row[1] / 8 for row in rows])
    amount = np.arange(1.0, len(rows) + 1)
    thresholds = ThresholdSettings(by="costs", review_cost=cost)
    chosen = cost_saved(label, amount, score >= cost_threshold(label, amount, score, thresholds), thresholds)
    every = [cost_saved(label, amount, score >= at, thresholds) for at in [*np.unique(score), 2.0]]
    assert chosen == pytest.approx(max(every))


def test_invalid_settings_name_the_expected_values() -> None:
    with pytest.raises(SettingsError, match="share of orders"):
        ThresholdSettings(capacity=2)
    with pytest.raises(SettingsError, match="'capacity' or 'costs'"):
        ThresholdSettings(by="luck")  # type: ignore[arg-type]


def test_calibration_error_detects_a_shifted_score() -> None:
    random = np.random.default_rng(1)
    truth = random.uniform(0, 0.4, 40_000)
    label = (random.random(40_000) < truth).astype(int)
    assert calibration_error(label, truth) < 0.01
    assert calibration_error(label, truth + 0.1) == pytest.approx(0.1, abs=0.01)


def test_bootstrap_separates_a_gain_from_none() -> None:
    random = np.random.default_rng(2)
    label = (random.random(4000) < 0.05).astype(int)
    good, bad = label + random.normal(0, 0.7, 4000), label + random.normal(0, 1.5, 4000)
    customers = random.integers(0, 500, 4000)
    better = bootstrap_gain(label, good, bad, groups=customers, rounds=200)
    assert 0 < better.low < better.value < better.high
    assert bootstrap_gain(label, good, bad, groups=customers, rounds=200) == better
    same = bootstrap_gain(label, good, good, groups=customers, rounds=200)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    twin = bootstrap_gain(label, label + random.normal(0, 0.7, 4000), good, rounds=200)
    assert twin.low < 0 < twin.high
    none = bootstrap_gain(np.zeros(10, dtype=int), good[:10], bad[:10], rounds=10)
    assert np.isnan(none.low)


def test_evaluation_has_all_metrics_overall_and_by_channel() -> None:
    frame = orders(3000)
    score = 1 / (1 + np.exp(-frame["amount_ratio"].to_numpy() + 4))
    thresholds = ThresholdSettings(capacity=0.05)
    found = evaluate(frame, score, thresholds, choose_threshold(frame, score, thresholds))
    metrics = found.metrics()
    label = frame["label"].to_numpy()
    assert metrics["brier"] == pytest.approx(brier_score_loss(label, score))
    assert metrics["reviewed_share"] <= 0.05
    assert metrics["recall_at_capacity"] == metrics["recall_at_threshold"]
    assert set(found.channels) == {"web", "pos", "marketplace"}
    assert sum(of["orders"] for of in found.channels.values()) == 3000
    for name in ("roc_auc", "average_precision", "recall_at_capacity", "cost_saved", "brier", "ece"):
        assert f"channel.web.{name}" in metrics
    assert "card_precision_at_100" in metrics
    bounds = interval(label, score, average_precision, rounds=50)
    assert bounds.low < bounds.value < bounds.high


def test_a_channel_without_frauds_has_no_undefined_metrics() -> None:
    frame = orders(500).with_columns(label=pl.when(pl.col("channel") == "pos").then(0).otherwise(pl.col("label")))
    found = evaluate(frame, np.full(500, 0.1), ThresholdSettings(), 0.5)
    assert "roc_auc" not in found.channels["pos"]
    assert found.channels["pos"]["frauds"] == 0


def test_pictures_are_png_files() -> None:
    train, validation, test = split(orders(1500))
    model = fit_in_process(train, validation, FEATURES, TrainingSettings(rounds=10))
    drawn = pictures(test, model.score(test), 0.2, model)
    assert sorted(drawn) == ["calibration.png", "confusion.png", "gain.png", "pr_curve.png", "roc_curve.png", "shap_summary.png"]
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    honest = test.filter(pl.col("label") == 0)
    assert sorted(pictures(honest, model.score(honest), 0.2)) == ["confusion.png"]
