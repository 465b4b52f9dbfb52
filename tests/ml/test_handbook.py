"""The handbook's protocol, on synthetic transactions."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from ml.evaluation import handbook
from ml.evaluation.gate import Verdict
from ml.evaluation.handbook import (
    DELAY,
    PUBLISHED,
    SELECTED_FEATURES,
    HandbookError,
    HandbookMetrics,
    HandbookResult,
    HandbookWeek,
    as_orders,
    training_rows,
    with_features,
)
from ml.features.compute import with_ratios
from ml.features.declarations import Feature
from ml.training.boosting import fit_in_process
from ml.training.model import FittedModel
from ml.training.settings import TrainingSettings

START = date(2018, 8, 8)


def transactions(days: int = 40, per_day: int = 60, seed: int = 1) -> pl.DataFrame:
    """Return transactions around START; those over 200 are frauds."""
    random = np.random.default_rng(seed)
    count = days * per_day
    seconds = np.sort(random.integers(0, days * 86_400, count))
    begin = datetime(2018, 8, 8) - timedelta(days=days - 10)
    amount = np.where(random.random(count) < 0.05, 250.0, 20.0) + random.random(count).round(2)
    return pl.DataFrame(
        {
            "TRANSACTION_ID": np.arange(count),
            "TX_DATETIME": [begin + timedelta(seconds=int(s)) for s in seconds],
            "CUSTOMER_ID": random.integers(0, 50, count),
            "TERMINAL_ID": random.integers(0, 80, count),
            "TX_AMOUNT": amount,
            "TX_FRAUD": (amount > 200).astype(np.int64),
        }
    )


def row(number: int, day: int, customer: str, label: int) -> dict[str, object]:
    placed = datetime(2018, 8, 8, 12, tzinfo=UTC) + timedelta(days=day)
    return {"order_id": str(number), "placed_at": placed, "customer": customer, "label": label}


def test_customers_with_a_known_fraud_are_excluded_from_the_test_week():
    frame = pl.DataFrame(
        [
            *(row(n, n, "honest", 0) for n in range(7)),
            # a fraud of the book's training week, and one before it
            row(10, -10, "early", 1),
            row(11, 1, "early", 0),
            row(12, -15, "long ago", 1),
            row(13, 1, "long ago", 0),
            # a fraud of two days before the week is known from the seventh day on
            row(14, -2, "later", 1),
            *(row(20 + n, n, "later", 0) for n in range(7)),
        ]
    )
    kept = handbook.test_rows(frame, START)
    days = {str(key[0]): len(part) for key, part in kept.partition_by("customer", as_dict=True).items()}
    assert days == {"honest": 7, "long ago": 1, "later": 6}


def test_training_ends_one_delay_before_the_week():
    frame = pl.DataFrame([row(n, -n, "x", 0) for n in range(200)])
    days = training_rows(frame, START)["order_id"].cast(pl.Int64)
    assert (days.min(), days.max()) == (8, 127)


def test_a_fraud_is_reported_one_delay_after_the_order():
    orders = as_orders(transactions())
    frauds = orders.filter(pl.col("label") == 1)
    assert frauds.height > 50
    assert (frauds["known_at"] - frauds["placed_at"]).unique().to_list() == [DELAY]
    assert orders.filter(pl.col("label") == 0)["known_at"].null_count() == orders.filter(pl.col("label") == 0).height
    assert orders["amount"].min() >= 2000


def test_unsuspicious_orders_have_a_low_weight_whatever_their_label():
    quiet = {"amount": 200.0, "customer_ratio": 1.9, "device_unexplained_28d": 0.0}
    suspicious = ({"amount": 221.0}, {"customer_ratio": 2.0}, {"device_unexplained_28d": 1.0})
    rows = [{**quiet, **change, "label": label} for change in ({}, {"customer_ratio": None}, *suspicious) for label in (0, 1)]
    weight = handbook.with_weights(pl.DataFrame(rows))["weight"].to_list()
    assert weight == [handbook.QUIET_WEIGHT] * 4 + [1.0] * 6


def test_the_protocol_from_end_to_end(tmp_path):
    transactions().write_parquet(tmp_path / "handbook.parquet")

    def fit(train: pl.DataFrame, features: tuple[Feature, ...]) -> FittedModel:
        return fit_in_process(train, None, features, TrainingSettings(rounds=5, patience=0, report_every=5))

    seen: list[HandbookWeek] = []
    outcome = handbook.run(tmp_path, starts=(START,), fit=fit, on_week=seen.append)
    assert seen == list(outcome.weeks)
    assert outcome.mean.roc_auc > 0.99
    names = [name for name, *_ in handbook.table(outcome)]
    assert names == ["week of 2018-08-08", "this model, mean", *PUBLISHED]
    low, high = outcome.spread["ROC AUC"]
    assert low <= outcome.mean.roc_auc <= high
    assert outcome.verdict.refusal.startswith("window: 15 frauds among 256 orders, at least 30 are needed")
    assert next(check for check in outcome.verdict.checks if check.name == "future").text.startswith("no feature changes")


def test_no_feature_is_the_label(tmp_path):
    frame, features = with_features(with_ratios(as_orders(transactions())))
    assert "label" not in {f.name for f in features}
    assert {"amount", "customer_ratio", "device_risk_28d"} <= {f.name for f in features}
    assert {f.name for f in features} == SELECTED_FEATURES
    assert frame.height == 2400


def test_results_are_compared_on_all_three_metrics():
    def outcome(*figures: float) -> HandbookResult:
        week = HandbookWeek(start=START, trained_on=1, tested_on=1, figures=HandbookMetrics(*figures), seconds=0.0)
        return HandbookResult(weeks=(week,), feature_seconds=0.0, spread={}, verdict=Verdict((), None))

    assert outcome(0.885, 0.7616, 0.311).reaches_target
    assert outcome(0.8834, 0.77, 0.309).short_of_target == {"ROC AUC": 0.001, "card precision@100": 0.001}
    assert outcome(0.875, 0.70, 0.304).beats_published
    assert not outcome(0.875, 0.70, 0.304).reaches_target
    assert not outcome(0.89, 0.70, 0.30).beats_published
    assert outcome(0.89, 0.85, 0.31).suggests_leak


def test_the_interval_of_a_mean_shrinks_with_the_number_of_weeks():
    random = np.random.default_rng(3)
    label = (random.random(3000) < 0.05).astype(np.int64)
    week = (label, label + random.normal(0, 1.5, 3000))
    one, four = handbook.spread_of([week])["ROC AUC"], handbook.spread_of([week] * 4)["ROC AUC"]
    assert one[0] < four[0] < four[1] < one[1]
    assert (four[1] - four[0]) / (one[1] - one[0]) == pytest.approx(0.5, abs=0.12)


def test_missing_data_is_an_error_that_names_the_option(tmp_path):
    with pytest.raises(HandbookError, match="--data"):
        handbook.run(tmp_path)
