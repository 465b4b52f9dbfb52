"""The promotion gate, and operations on recorded models: list, compare, promote, roll back.

A challenger becomes champion only if, on the newest labelled window, its average precision beats the champion's with a
bootstrap interval that lies above zero, and if it passes every other check. Each check has a text with the measured and the
required value; the refusal lists the failed checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from lakehouse.errors import SettingsError, ShopSphereError
from ml.evaluation.metrics import (
    Array,
    Evaluation,
    Interval,
    ThresholdSettings,
    average_precision,
    bootstrap_gain,
    calibration_error,
    evaluate,
    roc_auc,
)
from ml.registry import Registry, Version
from ml.training.model import FittedModel, encode

LeakCheck = Callable[[], Sequence[str]]
"""Recomputes features after shuffling the future; returns the names of those that changed."""


class GateRefused(ShopSphereError):
    """A model did not pass the gate and was not promoted."""


@dataclass(frozen=True)
class GateSettings:
    """Requirements for a challenger."""

    confidence: float = 0.95
    """Confidence of the bootstrap interval of the gain."""
    bootstrap_rounds: int = 1000
    min_frauds: int = 30
    """Minimum number of frauds in the window."""
    min_roc_auc: float = 0.6
    """Required of a first model, which has no champion to beat."""
    max_calibration_error: float = 0.02
    """Expected calibration error: the mean distance between a score and the share of frauds."""
    calibration_ratio: float = 2.0
    """Maximum ratio between the mean score and the share of frauds, in either direction."""
    channel_loss: float = 0.05
    """Maximum loss of average precision in any channel, compared with the champion."""
    channel_frauds: int = 20
    """Minimum number of frauds for judging a channel."""
    latency_ms: float = 20.0
    """Maximum 95th percentile of the time to score one order, without computing its features."""
    require_leak_check: bool = True
    seed: int = 7

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise SettingsError(f"gate.confidence is {self.confidence}: expected a share between 0.5 and 1, e.g. 0.95.")
        if self.bootstrap_rounds < 1:
            raise SettingsError(f"gate.bootstrap_rounds is {self.bootstrap_rounds}: expected 1 or more.")


@dataclass(frozen=True)
class Check:
    """Result of one check; `text` has the measured and the required value."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """Results of all checks of a challenger."""

    checks: tuple[Check, ...]
    gain: Interval | None
    """Gain of average precision over the champion; None: there is no champion."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def refusal(self) -> str:
        """The failed checks with their texts; empty if all passed."""
        return "; ".join(f"{check.name}: {check.text}" for check in self.checks if not check.passed)

    def summary(self) -> str:
        """Return one line for the version's tags."""
        return "passed" if self.passed else f"refused: {self.refusal}"


def judge(
    window: pl.DataFrame,
    challenger: FittedModel,
    champion: FittedModel | None,
    settings: GateSettings | None = None,
    *,
    leak: LeakCheck | None = None,
) -> Verdict:
    """Run the checks on the newest labelled window.

    window: features, `label`, `channel` and `customer` of orders that were not used in training; leak: checks that no
    feature uses the future."""
    settings = settings or GateSettings()
    label = window.get_column("label").cast(pl.Int64).to_numpy()
    score = challenger.score(window)
    champion_score = champion.score(window) if champion is not None else None
    gain = None
    checks = [_enough_frauds(label, settings)]
    if checks[0].passed:
        if champion_score is None:
            checks.append(_first(label, score, settings))
        else:
            gain = bootstrap_gain(
                label,
                score,
                champion_score,
                groups=_groups(window),
                rounds=settings.bootstrap_rounds,
                confidence=settings.confidence,
                seed=settings.seed,
            )
            checks.append(_gain(gain, settings))
        checks.append(_calibration(label, score, settings))
        checks.append(_channels(window, label, score, champion_score, settings))
    checks.append(_leak(leak, settings))
    checks.append(_latency(challenger, window, settings))
    return Verdict(tuple(checks), gain)


def _enough_frauds(label: Array, settings: GateSettings) -> Check:
    frauds = int(label.sum())
    enough = frauds >= settings.min_frauds and frauds < len(label)
    return Check("window", enough, f"{frauds} frauds among {len(label)} orders, at least {settings.min_frauds} are needed")


def _first(label: Array, score: Array, settings: GateSettings) -> Check:
    area = roc_auc(label, score)
    text = f"ROC AUC {area:.3f}, at least {settings.min_roc_auc:.3f} is needed"
    return Check("first model", area >= settings.min_roc_auc, text)


def _gain(gain: Interval, settings: GateSettings) -> Check:
    text = (
        f"average precision {gain.value:+.4f} against the champion "
        f"({settings.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}), the interval must lie above 0"
    )
    return Check("gain", bool(gain.low > 0), text)


def _calibration(label: Array, score: Array, settings: GateSettings) -> Check:
    error, mean, rate = calibration_error(label, score), float(score.mean()), float(label.mean())
    # the share of frauds in a window is itself uncertain
    margin = 3 * float(np.sqrt(rate * (1 - rate) / len(label)))
    low, high = max(0.0, rate - margin) / settings.calibration_ratio, (rate + margin) * settings.calibration_ratio
    text = (
        f"calibration error {error:.4f}, at most {settings.max_calibration_error:.4f} is allowed; "
        f"mean score {mean:.4f}, between {low:.4f} and {high:.4f} is allowed"
    )
    return Check("calibration", error <= settings.max_calibration_error and low <= mean <= high, text)


def _channels(window: pl.DataFrame, label: Array, score: Array, champion_score: Array | None, settings: GateSettings) -> Check:
    if champion_score is None:
        return Check("channels", True, "no champion to compare with")
    worst, judged = ("", 0.0), 0
    channel = window.get_column("channel")
    for name in sorted(channel.drop_nulls().unique().to_list()):
        rows = (channel == name).fill_null(False).to_numpy()
        if label[rows].sum() < settings.channel_frauds:
            continue
        judged += 1
        loss = average_precision(label[rows], champion_score[rows]) - average_precision(label[rows], score[rows])
        worst = max(worst, (str(name), loss), key=lambda entry: entry[1])
    if not judged:
        return Check("channels", True, f"no channel has {settings.channel_frauds} frauds to compare by")
    if not worst[0]:
        return Check("channels", True, f"no channel of {judged} loses average precision")
    text = f"channel {worst[0]} loses {worst[1]:.4f} of average precision, at most {settings.channel_loss:.4f} is allowed"
    return Check("channels", worst[1] <= settings.channel_loss, text)


def _leak(leak: LeakCheck | None, settings: GateSettings) -> Check:
    if leak is None:
        if settings.require_leak_check:
            return Check("future", False, "the leak check was not run; pass one, or set gate.require_leak_check to false")
        return Check("future", True, "the leak check was not requested")
    moved = sorted(leak())
    if not moved:
        return Check("future", True, "no feature changes when the future is shuffled")
    shown = ", ".join(moved[:5]) + (f" and {len(moved) - 5} more" if len(moved) > 5 else "")
    return Check("future", False, f"{len(moved)} features change when the future is shuffled: {shown}")


def _latency(model: FittedModel, window: pl.DataFrame, settings: GateSettings) -> Check:
    duration = latency(model, window)
    text = f"one order takes {duration:.2f} ms (95th percentile), at most {settings.latency_ms:g} ms is allowed"
    return Check("latency", duration <= settings.latency_ms, text)


def latency(model: FittedModel, frame: pl.DataFrame, *, rows: int = 100, turns: int = 3) -> float:
    """Return the 95th percentile, in milliseconds, of the time to score one order with computed features.

    The best of several turns counts, since other load can only slow it down."""
    if not len(frame):
        return 0.0
    columns = encode(frame.head(rows), model.features, model.feature_types, model.categories)
    single = [columns[place : place + 1] for place in range(len(columns))]
    model.score_matrix(single[0])
    best = float("inf")
    for _ in range(turns):
        durations = []
        for row in single:
            started = time.perf_counter()
            model.score_matrix(row)
            durations.append(time.perf_counter() - started)
        best = min(best, float(np.quantile(durations, 0.95)) * 1000)
    return best


def _groups(window: pl.DataFrame) -> Array:
    """Return the customer of each order; an order without one is a group of its own."""
    customer = window.get_column("customer").cast(pl.String)
    singles = pl.Series([f"\0{place}" for place in range(len(window))], dtype=pl.String)
    return customer.fill_null(singles).to_numpy()


# --- operations on recorded models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Metrics of two versions on the same orders."""

    first: Version
    second: Version
    figures: dict[str, tuple[float | None, float | None]]
    gain: Interval
    """Gain of average precision of the second over the first."""


def list_models(registry: Registry) -> list[dict[str, Any]]:
    """Return one entry per version, newest first, with the metrics of its training."""
    return [
        {
            "version": version.number,
            "aliases": list(version.aliases),
            "created": version.created.isoformat(timespec="seconds"),
            "average_precision": version.metrics.get("average_precision"),
            "roc_auc": version.metrics.get("roc_auc"),
            "card_precision_at_100": version.metrics.get("card_precision_at_100"),
            "threshold": version.threshold,
            "gate": version.tags.get("gate", ""),
            "run": version.run_id,
        }
        for version in registry.versions()
    ]


def compare_recorded(registry: Registry, first: str | int, second: str | int) -> dict[str, tuple[float | None, float | None]]:
    """Return the metrics that two versions recorded in training, by name. Their windows may differ."""
    one, two = registry.version(first), registry.version(second)
    names = [name for name in one.metrics if not name.startswith("channel.")]
    names += [name for name in two.metrics if not name.startswith("channel.") and name not in one.metrics]
    return {name: (one.metrics.get(name), two.metrics.get(name)) for name in sorted(names)}


def compare_models(
    registry: Registry,
    first: str | int,
    second: str | int,
    window: pl.DataFrame,
    thresholds: ThresholdSettings | None = None,
    settings: GateSettings | None = None,
) -> Comparison:
    """Evaluate two versions, each with its own threshold, on the same labelled orders."""
    thresholds, settings = thresholds or ThresholdSettings(), settings or GateSettings()
    one, two = registry.load(first), registry.load(second)
    scores = [loaded.model.score(window) for loaded in (one, two)]
    evaluations: list[Evaluation] = [
        evaluate(window, score, thresholds, loaded.threshold) for loaded, score in zip((one, two), scores, strict=True)
    ]
    flat = [evaluation.metrics() for evaluation in evaluations]
    names = sorted({*flat[0], *flat[1]})
    gain = bootstrap_gain(
        window.get_column("label").cast(pl.Int64).to_numpy(),
        scores[1],
        scores[0],
        groups=_groups(window),
        rounds=settings.bootstrap_rounds,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    return Comparison(one.version, two.version, {name: (flat[0].get(name), flat[1].get(name)) for name in names}, gain)


def admit(
    registry: Registry,
    version: Version,
    window: pl.DataFrame,
    settings: GateSettings | None = None,
    *,
    leak: LeakCheck | None = None,
) -> Verdict:
    """Judge a recorded version against the champion and promote it if it passes. The verdict is stored in its tag `gate`."""
    champion = registry.champion()
    champion_model = registry.load(champion.number).model if champion is not None and champion.number != version.number else None
    missing = [name for name in champion_model.features if name not in window.columns] if champion_model is not None else []
    verdict = judge(window, registry.load(version.number).model, None if missing else champion_model, settings, leak=leak)
    if missing and champion is not None:
        text = (
            f"version {champion.number} needs {', '.join(missing[:3])}, which orders no longer have: evaluated as a first model"
        )
        verdict = replace(verdict, checks=(Check("champion", True, text), *verdict.checks))
    registry.annotate(version.number, gate=verdict.summary()[:4000])
    if verdict.passed:
        registry.promote(version.number)
    return verdict


def promote_model(registry: Registry, which: str | int, *, force: bool = False) -> Version:
    """Promote a version that passed the gate; with `force`, any version. Raises GateRefused with the gate's verdict."""
    version = registry.version(which)
    verdict = version.tags.get("gate", "")
    if verdict != "passed" and not force:
        raise GateRefused(
            f"Version {version.number} of model '{registry.name}' was not promoted, the gate "
            + (f"{verdict}. " if verdict else "has not judged it. ")
            + "Train a better one (python -m app train), or override the promotion gate with --force."
        )
    if force and verdict != "passed":
        registry.annotate(version.number, gate_overruled="yes")
    return registry.promote(version.number)


def rollback_model(registry: Registry) -> Version:
    """Make the version that the champion replaced the champion again."""
    return registry.rollback()
