"""Baselines that the model has to beat, and an upper bound that no model can beat.

Three baselines score the same orders from the same features as the model: the amount alone, the hand-weighted rules of
gold.user_risk_scores, and a logistic regression. The upper bound needs the ground truth, which only generated data has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from ml.evaluation.metrics import Array, Interval, average_precision, capacity_threshold, interval, roc_auc
from ml.features.declarations import Feature
from ml.features.groups import FEATURES
from pipelines.gold.user_risk_scores import RULES

Floats = npt.NDArray[np.float64]
STRENGTHS = (3.0, 30.0, 300.0)
"""L2 penalties to try on the validation orders."""

MAX_STEPS, MIN_GAIN = 15, 1e-4
"""Maximum number of Newton steps, and the relative gain below which the fit has converged."""

MAX_DEVIATIONS = 5.0
"""Values of the logistic regression are clipped to this many standard deviations from the mean."""


@dataclass(frozen=True, kw_only=True)
class LeaderboardEntry:
    """A scoring of the newest labelled window, with its metrics."""

    name: str
    average_precision: Interval
    roc_auc: float
    recall_at_capacity: float
    against_truth: float | None = None
    """Average precision over all frauds, reported or not; None: the true frauds are unknown."""


def leaderboard_entry(name: str, label: Array, score: Array, capacity: float, fraud: Array | None = None) -> LeaderboardEntry:
    """Return the metrics of a scoring. fraud: 1 for every true fraud, if known."""
    within = score >= capacity_threshold(score, capacity)
    recall = float(label[within].sum() / max(int(label.sum()), 1))
    truth = average_precision(fraud, score) if fraud is not None else None
    return LeaderboardEntry(
        name=name,
        average_precision=interval(label, score, average_precision),
        roc_auc=roc_auc(label, score),
        recall_at_capacity=recall,
        against_truth=truth,
    )


def baselines(train: pl.DataFrame, validation: pl.DataFrame, known: pl.DataFrame, test: pl.DataFrame) -> dict[str, Floats]:
    """Return the scores of `test` by each baseline. Frames have FEATURES and `label`.

    The penalty of the logistic regression is chosen on `train` and `validation`; its weights are fitted to `known`."""
    return {
        "amount only": test["amount"].cast(pl.Float64).fill_null(0.0).to_numpy(),
        "hand-weighted risk score": risk_score(test),
        "logistic regression": regression(train, validation, known).score(test),
    }


# --- the rules of gold.user_risk_scores, as of each order ----------------------------------------------------------

SIGNALS: Mapping[str, pl.Expr] = {
    "fraud_chargebacks": pl.coalesce("person_frauds_ever", "customer_frauds_ever"),
    "most_orders_1h": pl.col("customer_orders_1h") + 1,
    "most_orders_24h": pl.coalesce("person_orders_24h", "customer_orders_24h") + 1,
    "cards": pl.col("customer_cards_ever") + pl.col("new_card"),
    "shared_cards": (pl.col("card_customers_ever") > (pl.col("new_card") == 0).cast(pl.Int64)).cast(pl.Int64),
    "crowded_devices": (pl.col("device_customers_ever") > 8).cast(pl.Int64),
    "shipping_addresses": pl.col("customer_addresses_ever") + pl.col("new_address"),
    "most_failed_payments_24h": pl.col("account_failed_payments_24h"),
    "most_failed_logins_1h": pl.col("account_failed_logins_1h"),
}
"""The rules' signals as of the order; counts within an hour or a day end with the order. Cancellations and chargebacks for
other reasons are not features, so their rules never fire."""


def risk_score(frame: pl.DataFrame) -> Floats:
    """Return the hand-weighted score of each order, 0 to 100."""
    signals = frame.select(
        (SIGNALS[rule.signal].fill_null(0).cast(pl.Int64) if rule.signal in SIGNALS else pl.lit(0, pl.Int64)).alias(rule.signal)
        for rule in RULES
    )
    total = signals.select(pl.min_horizontal(pl.sum_horizontal(rule.points for rule in RULES), 100).cast(pl.Float64))
    return total.to_series().to_numpy()


# --- logistic regression -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """A logistic regression with the scaling of its columns."""

    features: tuple[Feature, ...]
    mean: Floats
    deviation: Floats
    weights: Floats
    """Intercept first."""

    def score(self, frame: pl.DataFrame) -> Floats:
        """Return the probability of fraud of each order."""
        return _sigmoid(self.weights[0] + _scaled(columns_of(frame, self.features), self.mean, self.deviation) @ self.weights[1:])


def regression(
    train: pl.DataFrame, validation: pl.DataFrame, known: pl.DataFrame, features: Sequence[Feature] = FEATURES
) -> Regression:
    """Choose the penalty that ranks the validation orders best; return the regression fitted to all known orders."""
    label = validation["label"].to_numpy()
    precision = {}
    for strength in STRENGTHS:
        found = average_precision(label, fit_regression(train, features, strength).score(validation))
        precision[strength] = -1.0 if np.isnan(found) else found
    return fit_regression(known, features, max(STRENGTHS, key=lambda strength: (precision[strength], strength)))


def fit_regression(frame: pl.DataFrame, features: Sequence[Feature], strength: float) -> Regression:
    """Fit by Newton's method: minimise the log loss plus `strength` / 2 times the squared weights, without the intercept."""
    raw = columns_of(frame, features)
    mean = raw.mean(axis=0)
    deviation = raw.std(axis=0)
    columns = np.hstack([np.ones((len(raw), 1)), _scaled(raw, mean, deviation)])
    label = frame["label"].cast(pl.Float64).to_numpy()
    penalty = np.full(columns.shape[1], strength)
    penalty[0] = 1e-9
    weights = np.zeros(columns.shape[1])
    weights[0] = _log_odds(float(label.mean()))
    loss = _loss(columns, label, weights, penalty)
    for _ in range(MAX_STEPS):
        chance = _sigmoid(columns @ weights)
        slope = columns.T @ (chance - label) + penalty * weights
        curve = (columns * (chance * (1 - chance))[:, None]).T @ columns + np.diag(penalty)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (lower := _loss(columns, label, weights - size * step, penalty)) > loss and size > 1e-4:
            size /= 2
        weights = weights - size * step
        if loss - lower < MIN_GAIN * loss:
            break
        loss = lower
    return Regression(tuple(features), mean, deviation, weights)


def columns_of(frame: pl.DataFrame, features: Sequence[Feature]) -> Floats:
    """Return features as columns of a regression: logarithms of long-tailed values, one column per category, and flags for
    missing values."""
    columns: list[Floats] = []
    for feature in features:
        column = frame[feature.name]
        if feature.type == "category":
            columns += [(column == category).fill_null(False).cast(pl.Float64).to_numpy() for category in feature.categories]
            continue
        values = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        missing = np.isnan(values)
        values = np.where(missing, 0.0, values)
        if feature.type != "flag" and feature.name != "hour":
            values = np.sign(values) * np.log1p(np.abs(values))
        columns += [values, missing.astype(np.float64)]
    return np.column_stack(columns)


def _scaled(raw: Floats, mean: Floats, deviation: Floats) -> Floats:
    known = deviation > 1e-12
    scaled = np.where(known, (raw - mean) / np.where(known, deviation, 1.0), 0.0)
    return np.clip(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS)


def _sigmoid(odds: Floats) -> Floats:
    result: Floats = 1.0 / (1.0 + np.exp(-np.clip(odds, -35, 35)))
    return result


def _log_odds(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(share / (1 - share)))


def _loss(columns: Floats, label: Floats, weights: Floats, penalty: Floats) -> float:
    odds = columns @ weights
    return float(np.sum(np.logaddexp(0.0, odds) - label * odds) + 0.5 * np.sum(penalty * weights * weights))


# --- upper bound ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UpperBound:
    """The result of an oracle that knows which orders are fraud, but not which of these will be reported."""

    average_precision: float
    frauds: int
    reported: int


def upper_bound(label: Array, fraud: Array) -> UpperBound:
    """Return the upper bound over labelled orders. label: 1 for a reported fraud; fraud: 1 for any fraud.

    Whether a fraud is reported is random and decided after the order, so nothing known at the time of the order predicts
    it. The oracle therefore scores all frauds equally, and its average precision is the reported share of the frauds."""
    precision = average_precision(label, fraud.astype(np.float64))
    return UpperBound(precision, int(np.count_nonzero(fraud)), int(np.count_nonzero((fraud == 1) & (label == 1))))


def as_text(leaderboard: Sequence[LeaderboardEntry], bound: UpperBound | None) -> str:
    """Return the leaderboard as a Markdown table."""
    lines = [
        "| scoring | average precision | 95% interval | ROC AUC | recall at capacity | against the truth |",
        "|---|---|---|---|---|---|",
    ]
    for entry in leaderboard:
        precision = entry.average_precision
        lines.append(
            f"| {entry.name} | {precision.value:.3f} | {precision.low:.3f} to {precision.high:.3f} "
            f"| {entry.roc_auc:.3f} | {entry.recall_at_capacity:.3f} "
            f"| {_formatted(entry.against_truth)} |"
        )
    if bound is not None:
        lines.append(f"| upper bound (knows every fraud, not which are reported) | {bound.average_precision:.3f} | | | | 1.000 |")
    return "\n".join(lines) + "\n"


def _formatted(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3f}"
