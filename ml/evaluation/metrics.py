"""Metrics of a scoring: ranking, review, costs, calibration; over all orders and per channel.

Functions take arrays and return numbers. A label is 1 for a fraudulent order, a score is its probability. Orders of equal
score are always selected together, so no metric depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.errors import SettingsError

Array = npt.NDArray[Any]
CARDS = 100
"""Customers reviewed per day in card precision."""
BINS = 10


@dataclass(frozen=True)
class ThresholdSettings:
    """How the review threshold is chosen.

    `capacity`: the share `capacity` of the orders can be reviewed, and the threshold selects as many. `costs`: the threshold
    that saves most, where a review costs `review_cost` (in the base currency) and a fraudulent order that is not reviewed
    loses `loss_share` of its amount."""

    by: Literal["capacity", "costs"] = "capacity"
    capacity: float = 0.02
    review_cost: float = 3.0
    loss_share: float = 1.0

    def __post_init__(self) -> None:
        if self.by not in ("capacity", "costs"):
            raise SettingsError(f"threshold.by is '{self.by}': expected 'capacity' or 'costs'.")
        if not 0 < self.capacity <= 1:
            raise SettingsError(
                f"threshold.capacity is {self.capacity}: expected a share of orders above 0 and up to 1, e.g. 0.02."
            )
        if self.review_cost < 0 or self.loss_share < 0:
            raise SettingsError("threshold.review_cost and threshold.loss_share cannot be negative: set them to 0 or more.")


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one model over one window. A metric that is undefined, such as ROC AUC for a channel without frauds, is
    left out."""

    threshold: float
    overall: dict[str, float]
    channels: dict[str, dict[str, float]]

    def metrics(self) -> dict[str, float]:
        """Return all metrics by flat names: `average_precision`, `channel.web.average_precision`, ..."""
        named = {f"channel.{channel}.{name}": value for channel, own in self.channels.items() for name, value in own.items()}
        return {**self.overall, "threshold": self.threshold, **named}


@dataclass(frozen=True)
class Interval:
    """A metric with its bootstrap interval."""

    value: float
    low: float
    high: float


def roc_auc(label: Array, score: Array) -> float:
    """Return the probability that a fraud scores above an honest order, ties counted half. NaN with only one class."""
    frauds = int(np.count_nonzero(label))
    honest = len(label) - frauds
    if not frauds or not honest:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[label == 1].sum() - frauds * (frauds + 1) / 2) / (frauds * honest))


def average_precision(label: Array, score: Array) -> float:
    """Return the mean of the precision at each distinct score, weighted by the gain in recall. NaN without frauds."""
    return Ranking(label, score).average_precision(np.ones(len(label)))


class Ranking:
    """A scoring, sorted once: its average precision is cheap to compute for many weightings of the rows."""

    def __init__(self, label: Array, score: Array) -> None:
        self._order = np.argsort(-score, kind="stable")
        ordered = score[self._order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else np.zeros(0, np.int64)
        self._label = (label[self._order] == 1).astype(np.float64)

    def average_precision(self, weight: Array) -> float:
        """Return the average precision when row i counts `weight[i]` times. NaN when no fraud counts."""
        weights = weight[self._order]
        found = np.cumsum(weights * self._label)[self._ends]
        taken = np.cumsum(weights)[self._ends]
        if not len(found) or found[-1] <= 0:
            return float("nan")
        precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
        return float(np.sum(np.diff(found, prepend=0.0) * precision) / found[-1])


def precision_recall(label: Array, score: Array) -> tuple[Array, Array, Array]:
    """Return precision, recall and score at each distinct score, highest first."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    found = np.cumsum(label[order] == 1)[ends]
    return found / (ends + 1), found / max(int(found[-1]), 1), ordered[ends]


def log_loss(label: Array, score: Array) -> float:
    """Return the mean negative log likelihood of the labels, in nats."""
    clipped = np.clip(score.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(label == 1, np.log(clipped), np.log1p(-clipped))))


def card_precision(label: Array, score: Array, customer: Array | pl.Series, day: Array | pl.Series, k: int = CARDS) -> float:
    """Return card precision@k: the share of the k customers with the highest scores of a day that have a fraud that day,
    averaged over days. Customers detected on an earlier day are excluded. A day with fewer than k customers uses all of
    them. Orders without a customer are ignored; NaN if none has one."""
    frame = pl.DataFrame({"customer": customer, "day": day, "label": label, "score": score}).drop_nulls("customer")
    found: set[Any] = set()
    precisions = []
    daily = (
        frame.group_by("day", "customer")
        .agg(pl.max("score"), pl.max("label"))
        .sort("day", "score", "customer", descending=[False, True, False])
    )
    for part in daily.partition_by("day", maintain_order=True):
        top = part.filter(~pl.col("customer").is_in(list(found))).head(k) if found else part.head(k)
        if not len(top):
            continue
        caught = top.filter(pl.col("label") == 1).get_column("customer").to_list()
        precisions.append(len(caught) / len(top))
        found.update(caught)
    return float(np.mean(precisions)) if precisions else float("nan")


def capacity_threshold(score: Array, capacity: float) -> float:
    """Return the lowest score that at most the share `capacity` of the orders reaches; above every score if too many orders
    share the highest."""
    allowed = int(capacity * len(score))
    values, counts = np.unique(score, return_counts=True)
    at_least = np.cumsum(counts[::-1])[::-1]
    fitting = np.flatnonzero(at_least <= allowed)
    if len(fitting):
        return float(values[fitting[0]])
    return float(np.nextafter(values[-1], np.inf)) if len(values) else 1.0


def cost_threshold(label: Array, amount: Array, score: Array, settings: ThresholdSettings) -> float:
    """Return the threshold that saves most; above every score if no review pays off."""
    if not len(score):
        return 1.0
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    saved = np.cumsum((label[order] == 1) * amount[order])[ends] * settings.loss_share - settings.review_cost * (ends + 1)
    best = int(np.argmax(saved))
    return float(ordered[ends[best]]) if saved[best] > 0 else float(np.nextafter(ordered[0], np.inf))


def choose_threshold(frame: pl.DataFrame, score: Array, settings: ThresholdSettings) -> float:
    """Return the threshold for orders with `label` and `amount`. Call it with validation orders, never with test orders."""
    if settings.by == "capacity":
        return capacity_threshold(score, settings.capacity)
    return cost_threshold(_labels(frame), _amounts(frame), score, settings)


def cost_saved(label: Array, amount: Array, flagged: Array, settings: ThresholdSettings) -> float:
    """Return the savings of reviewing the flagged orders over reviewing none, in the base currency."""
    return float(settings.loss_share * amount[flagged & (label == 1)].sum() - settings.review_cost * np.count_nonzero(flagged))


def reliability(label: Array, score: Array, bins: int = BINS, *, weight: Array | None = None) -> tuple[Array, Array, Array]:
    """Return mean score, share of frauds and number of orders per bin, by increasing score. Bins have about the same number
    of orders, or the same sum of `weight`."""
    order = np.lexsort((label, score))
    count = min(bins, max(len(order), 1))
    if weight is None:
        parts = np.array_split(order, count)
    else:
        sums = np.cumsum(weight[order])
        parts = np.split(order, np.searchsorted(sums, sums[-1] * np.arange(1, count) / count)) if len(order) else []
    parts = [part for part in parts if len(part)]
    return (
        np.array([score[part].mean() for part in parts]),
        np.array([label[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def calibration_error(label: Array, score: Array, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance between score and share of frauds over bins of equal size."""
    predicted, observed, count = reliability(label, score, bins)
    return float(np.sum(np.abs(predicted - observed) * count) / max(int(count.sum()), 1))


def evaluate(frame: pl.DataFrame, score: Array, settings: ThresholdSettings, threshold: float) -> Evaluation:
    """Return the metrics of scores over orders (`label`, `amount`, `channel`, `customer`, `placed_at`).

    `*_at_capacity` selects the highest-scored orders that the review capacity allows in this window; `*_at_threshold` and
    `cost_saved` select the orders from `threshold` on, as serving does."""
    overall = _metrics(frame, score, settings, threshold)
    days = frame.get_column("placed_at").dt.date().to_physical().to_numpy()
    customers = frame.get_column("customer")
    overall[f"card_precision_at_{CARDS}"] = card_precision(_labels(frame), score, customers, days)
    channels = {}
    for channel in sorted(frame.get_column("channel").drop_nulls().unique().to_list()):
        mask = (frame.get_column("channel") == channel).fill_null(False)
        channels[str(channel)] = _defined(_metrics(frame.filter(mask), score[mask.to_numpy()], settings, threshold))
    return Evaluation(threshold, _defined(overall), channels)


def _metrics(frame: pl.DataFrame, score: Array, settings: ThresholdSettings, threshold: float) -> dict[str, float]:
    label, amount = _labels(frame), _amounts(frame)
    frauds = int(label.sum())
    within = score >= capacity_threshold(score, settings.capacity)
    flagged = score >= threshold
    lost = settings.loss_share * float(amount[label == 1].sum())
    saved = cost_saved(label, amount, flagged, settings)
    return {
        "orders": float(len(label)),
        "frauds": float(frauds),
        "roc_auc": roc_auc(label, score),
        "average_precision": average_precision(label, score),
        "recall_at_capacity": _share(int(label[within].sum()), frauds),
        "precision_at_capacity": _share(int(label[within].sum()), int(within.sum())),
        "recall_at_threshold": _share(int(label[flagged].sum()), frauds),
        "precision_at_threshold": _share(int(label[flagged].sum()), int(flagged.sum())),
        "reviewed_share": _share(int(flagged.sum()), len(label)),
        "cost_saved": saved,
        "cost_saved_share": saved / lost if lost > 0 else float("nan"),
        "brier": float(np.mean((score - label) ** 2)) if len(label) else float("nan"),
        "ece": calibration_error(label, score) if len(label) else float("nan"),
        "mean_score": float(score.mean()) if len(label) else float("nan"),
        "fraud_rate": _share(frauds, len(label)),
    }


def bootstrap_gain(
    label: Array,
    challenger: Array,
    champion: Array,
    *,
    groups: Array | None = None,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 7,
) -> Interval:
    """Return the gain of average precision of `challenger` over `champion` on the same orders, with a bootstrap interval.

    Whole `groups` (customers) are resampled, since one customer's frauds are correlated; without `groups`, single orders.
    The bounds are NaN without frauds."""
    first, second = Ranking(label, challenger), Ranking(label, champion)
    ones = np.ones(len(label))
    gain = first.average_precision(ones) - second.average_precision(ones)
    group = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(label))
    number = int(group.max()) + 1 if len(group) else 0
    random = np.random.default_rng(seed)
    gains = np.full(rounds, np.nan)
    if number and not np.isnan(gain):
        for turn in range(rounds):
            weight = np.bincount(random.integers(0, number, number), minlength=number)[group].astype(np.float64)
            gains[turn] = first.average_precision(weight) - second.average_precision(weight)
    gains = gains[~np.isnan(gains)]
    if not len(gains):
        return Interval(gain, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail])
    return Interval(gain, float(low), float(high))


def interval(
    label: Array, score: Array, metric: Callable[[Array, Array], float], *, rounds: int = 200, seed: int = 7
) -> Interval:
    """Return a metric of one scoring with its 95% bootstrap interval over orders."""
    random = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        drawn = random.integers(0, len(label), len(label))
        values.append(metric(label[drawn], score[drawn]))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Interval(metric(label, score), float(low), float(high))


def _labels(frame: pl.DataFrame) -> Array:
    return frame.get_column("label").cast(pl.Int64).to_numpy()


def _amounts(frame: pl.DataFrame) -> Array:
    return frame.get_column("amount").cast(pl.Float64).fill_null(0.0).to_numpy()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _defined(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not np.isnan(value)}
