"""The baselines and the upper bound, on orders with a known answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from ml.evaluation.baselines import as_text, baselines, columns_of, fit_regression, leaderboard_entry, risk_score, upper_bound
from ml.evaluation.metrics import average_precision, roc_auc
from ml.features.groups import FEATURES
from pipelines.gold.user_risk_scores import RULES

START = datetime(2026, 1, 1, tzinfo=UTC)


def frame(rows: int, seed: int = 1) -> pl.DataFrame:
    """Orders of which the frauds are large, and young at their device."""
    random = np.random.default_rng(seed)
    label = (random.random(rows) < 0.1).astype(np.int8)
    columns = {
        f.name: pl.Series(random.choice(f.categories, rows)) if f.type == "category" else pl.Series(np.zeros(rows))
        for f in FEATURES
    }
    return pl.DataFrame(columns).with_columns(
        pl.Series("amount", np.exp(random.normal(3, 1, rows) + label)),
        pl.Series(
            "device_minutes_since_first",
            np.where(random.random(rows) < 0.2, np.nan, random.exponential(9000, rows) * (1 - 0.9 * label)),
        ).fill_nan(None),
        pl.Series("label", label),
        pl.Series("placed_at", [START + timedelta(minutes=n) for n in range(rows)]),
    )


def test_regression_recovers_the_simulated_effects() -> None:
    known, test = frame(4000), frame(3000, 2)
    label = test["label"].to_numpy()
    found = fit_regression(known, FEATURES, 3.0)
    score = found.score(test)
    assert roc_auc(label, score) > max(0.85, roc_auc(label, test["amount"].to_numpy()))
    # calibrated on the orders it learned from
    assert found.score(known).mean() == pytest.approx(known["label"].mean(), abs=1e-3)
    assert np.array_equal(
        score, fit_regression(known.sample(fraction=1, shuffle=True, seed=1), FEATURES, 3.0).score(test).round(12)
    ) or np.allclose(score, fit_regression(known.sample(fraction=1, shuffle=True, seed=1), FEATURES, 3.0).score(test))


def test_missing_values_and_undeclared_categories_are_scored() -> None:
    rows = frame(50).with_columns(pl.lit(None, pl.Float64).alias("amount"), pl.lit("smoke signal").alias("channel"))
    assert not np.isnan(columns_of(rows, FEATURES)).any()
    assert not np.isnan(fit_regression(frame(2000), FEATURES, 30.0).score(rows)).any()


def test_risk_score_is_the_sum_of_the_rules() -> None:
    quiet = frame(1).with_columns(pl.lit(0.0).alias("card_customers_ever"), pl.lit(0.0).alias("new_card"))
    assert risk_score(quiet).tolist() == [0.0]
    loud = quiet.with_columns(
        pl.lit(2.0).alias("person_frauds_ever"),
        pl.lit(5.0).alias("account_failed_logins_1h"),
        pl.lit(2.0).alias("card_customers_ever"),
    )
    by_name = {rule.signal: rule for rule in RULES}
    frauds, logins, shared = (by_name[name] for name in ("fraud_chargebacks", "most_failed_logins_1h", "shared_cards"))
    assert risk_score(loud).tolist() == [float(frauds.first + frauds.each + logins.first + shared.first)]
    # no person: the customer's own
    alone = loud.with_columns(pl.lit(None, pl.Float64).alias("person_frauds_ever"), pl.lit(2.0).alias("customer_frauds_ever"))
    assert risk_score(alone).tolist() == risk_score(loud).tolist()


def test_a_missing_signal_adds_no_points() -> None:
    rows = frame(20).with_columns(pl.lit(None, f.dtype).alias(f.name) for f in FEATURES)
    assert risk_score(rows).tolist() == [0.0] * 20


def test_every_baseline_scores_every_order() -> None:
    train, validation, test = frame(1500), frame(700, 2), frame(600, 3)
    found = baselines(train, validation, pl.concat([train, validation]), test)
    assert list(found) == ["amount only", "hand-weighted risk score", "logistic regression"]
    assert all(len(score) == test.height and not np.isnan(score).any() for score in found.values())


def test_upper_bound_is_the_reported_share_of_frauds() -> None:
    fraud = np.zeros(1000, dtype=np.int8)
    fraud[:50] = 1
    label = fraud.copy()
    label[40:50] = 0
    bound = upper_bound(label, fraud)
    assert (bound.average_precision, bound.frauds, bound.reported) == (0.8, 50, 40)
    # a scoring that separates frauds perfectly but ranks them at random reaches it on average
    random = np.random.default_rng(1)
    lots = [average_precision(label, fraud + random.random(1000) / 2) for _ in range(300)]
    assert np.mean(lots) == pytest.approx(bound.average_precision, abs=0.02)


def test_table_has_a_row_per_scoring_and_the_upper_bound() -> None:
    fraud = np.array([1, 1, 0, 0] * 20, dtype=np.int8)
    label = np.array([1, 0, 0, 0] * 20, dtype=np.int8)
    one = leaderboard_entry("amount only", label, fraud.astype(float), 0.5, fraud)
    assert (one.average_precision.value, one.recall_at_capacity, one.against_truth) == (0.5, 1.0, 1.0)
    text = as_text([one], upper_bound(label, fraud))
    assert [line.split(" |")[0] for line in text.splitlines()[2:]] == [
        "| amount only",
        "| upper bound (knows every fraud, not which are reported)",
    ]
