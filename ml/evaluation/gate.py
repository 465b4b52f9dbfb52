"""The gate between a challenger and the orders it would judge, and what people do with models.

A challenger becomes champion only if, on the newest labelled window, its average precision beats the champion's with a
bootstrap interval that excludes no gain, and if it passes every other check. Each check says by how much it passed or
failed; the refusal names the ones that failed.
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
"""Recomputes features after shuffling the future; gives the names of those that moved."""


class GateRefused(ShopSphereError):
    """A model did not pass the gate and stays what it is."""


@dataclass(frozen=True)
class GateSettings:
    """What a challenger has to reach."""

    confidence: float = 0.95
    """Of the bootstrap interval of the gain."""
    bootstrap_rounds: int = 1000
    min_frauds: int = 30
    """Frauds in the window below which nothing can be said."""
    min_roc_auc: float = 0.6
    """What a first model has to reach, since there is no champion to beat."""
    max_calibration_error: float = 0.02
    """Expected calibration error: the mean distance between a score and the share of frauds."""
    calibration_ratio: float = 2.0
    """How many times the share of frauds the mean score may be, or the other way round."""
    channel_loss: float = 0.05
    """Average precision that a channel may lose against the champion."""
    channel_frauds: int = 20
    """Frauds below which a channel is not judged."""
    latency_ms: float = 20.0
    """95th percentile of scoring one order whose features are there."""
    require_leak_check: bool = True
    seed: int = 7

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise SettingsError(f"gate.confidence is {self.confidence}: expected a share between 0.5 and 1, e.g. 0.95.")
        if self.bootstrap_rounds < 1:
            raise SettingsError(f"gate.bootstrap_rounds is {self.bootstrap_rounds}: expected 1 or more.")


@dataclass(frozen=True)
class Check:
    """One check: `text` says what was measured and what was asked."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a challenger."""

    checks: tuple[Check, ...]
    gain: Interval | None
    """Average precision over the champion's; None: there is no champion."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    @property
    def refusal(self) -> str:
        """Which checks failed and by how much; empty when none did."""
        return "; ".join(f"{check.name}: {check.text}" for check in self.checks if not check.passed)

    def summary(self) -> str:
        """One line for the run's tags."""
        return "passed" if self.passed else f"refused: {self.refusal}"


def judge(
    window: pl.DataFrame,
    challenger: FittedModel,
    champion: FittedModel | None,
    settings: GateSettings | None = None,
    *,
    leak: LeakCheck | None = None,
) -> Verdict:
    """Judge a challenger on the newest labelled window: the orders' features, `label`, `channel`, `customer`, none of
    them used in its training. `leak` is the check that no feature knows the future."""
    settings = settings or GateSettings()
    label = window.get_column("label").cast(pl.Int64).to_numpy()
    score = challenger.score(window)
    rival = champion.score(window) if champion is not None else None
    gain = None
    checks = [_enough(label, settings)]
    if checks[0].passed:
        if rival is None:
            checks.append(_first(label, score, settings))
        else:
            gain = bootstrap_gain(
                label,
                score,
                rival,
                groups=_groups(window),
                rounds=settings.bootstrap_rounds,
                confidence=settings.confidence,
                seed=settings.seed,
            )
            checks.append(_gain(gain, settings))
        checks.append(_calibration(label, score, settings))
        checks.append(_channels(window, label, score, rival, settings))
    checks.append(_leak(leak, settings))
    checks.append(_latency(challenger, window, settings))
    return Verdict(tuple(checks), gain)


def _enough(label: Array, settings: GateSettings) -> Check:
    frauds = int(label.sum())
    enough = frauds >= settings.min_frauds and frauds < len(label)
    return Check("window", enough, f"{frauds} frauds among {len(label)} orders, at least {settings.min_frauds} are needed")


def _first(label: Array, score: Array, settings: GateSettings) -> Check:
    area = roc_auc(label, score)
    told = f"ROC AUC {area:.3f}, at least {settings.min_roc_auc:.3f} is needed"
    return Check("first model", area >= settings.min_roc_auc, told)


def _gain(gain: Interval, settings: GateSettings) -> Check:
    told = (
        f"average precision {gain.value:+.4f} against the champion "
        f"({settings.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}), the interval must lie above 0"
    )
    return Check("gain", bool(gain.low > 0), told)


def _calibration(label: Array, score: Array, settings: GateSettings) -> Check:
    error, mean, rate = calibration_error(label, score), float(score.mean()), float(label.mean())
    # the share of frauds in a window is itself uncertain
    unsure = 3 * float(np.sqrt(rate * (1 - rate) / len(label)))
    low, high = max(0.0, rate - unsure) / settings.calibration_ratio, (rate + unsure) * settings.calibration_ratio
    told = (
        f"calibration error {error:.4f}, at most {settings.max_calibration_error:.4f} is allowed; "
        f"mean score {mean:.4f}, between {low:.4f} and {high:.4f} is allowed"
    )
    return Check("calibration", error <= settings.max_calibration_error and low <= mean <= high, told)


def _channels(window: pl.DataFrame, label: Array, score: Array, rival: Array | None, settings: GateSettings) -> Check:
    if rival is None:
        return Check("channels", True, "no champion to compare with")
    worst, judged = ("", 0.0), 0
    channel = window.get_column("channel")
    for name in sorted(channel.drop_nulls().unique().to_list()):
        rows = (channel == name).fill_null(False).to_numpy()
        if label[rows].sum() < settings.channel_frauds:
            continue
        judged += 1
        loss = average_precision(label[rows], rival[rows]) - average_precision(label[rows], score[rows])
        worst = max(worst, (str(name), loss), key=lambda entry: entry[1])
    if not judged:
        return Check("channels", True, f"no channel has {settings.channel_frauds} frauds to compare by")
    if not worst[0]:
        return Check("channels", True, f"no channel of {judged} loses average precision")
    told = f"channel {worst[0]} loses {worst[1]:.4f} of average precision, at most {settings.channel_loss:.4f} is allowed"
    return Check("channels", worst[1] <= settings.channel_loss, told)


def _leak(leak: LeakCheck | None, settings: GateSettings) -> Check:
    if leak is None:
        if settings.require_leak_check:
            return Check("future", False, "the leak check was not run; give it, or set gate.require_leak_check to false")
        return Check("future", True, "the leak check was not asked for")
    moved = sorted(leak())
    if not moved:
        return Check("future", True, "no feature changes when the future is shuffled")
    shown = ", ".join(moved[:5]) + (f" and {len(moved) - 5} more" if len(moved) > 5 else "")
    return Check("future", False, f"{len(moved)} features change when the future is shuffled: {shown}")


def _latency(model: FittedModel, window: pl.DataFrame, settings: GateSettings) -> Check:
    took = latency(model, window)
    told = f"one order takes {took:.2f} ms (95th percentile), at most {settings.latency_ms:g} ms is allowed"
    return Check("latency", took <= settings.latency_ms, told)


def latency(model: FittedModel, frame: pl.DataFrame, *, rows: int = 100, turns: int = 3) -> float:
    """95th percentile in milliseconds of scoring one order whose features are there. The best of some turns: a busy
    machine can only make it look slower."""
    if not len(frame):
        return 0.0
    columns = encode(frame.head(rows), model.features, model.feature_types, model.categories)
    single = [columns[place : place + 1] for place in range(len(columns))]
    model.score_matrix(single[0])
    best = float("inf")
    for _ in range(turns):
        took = []
        for row in single:
            begun = time.perf_counter()
            model.score_matrix(row)
            took.append(time.perf_counter() - begun)
        best = min(best, float(np.quantile(took, 0.95)) * 1000)
    return best


def _groups(window: pl.DataFrame) -> Array:
    """Customers; an order without one stands alone."""
    customer = window.get_column("customer").cast(pl.String)
    alone = pl.Series([f"\0{place}" for place in range(len(window))], dtype=pl.String)
    return customer.fill_null(alone).to_numpy()


# --- what people do with models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same orders."""

    first: Version
    second: Version
    figures: dict[str, tuple[float | None, float | None]]
    gain: Interval
    """Average precision of the second over the first."""


def list_models(registry: Registry) -> list[dict[str, Any]]:
    """One entry a version, the newest first, with the figures of its training."""
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
    """The figures that two versions' trainings recorded, by name. They may be over different windows."""
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
    """Two versions, each with its own threshold, on the same labelled orders."""
    thresholds, settings = thresholds or ThresholdSettings(), settings or GateSettings()
    one, two = registry.load(first), registry.load(second)
    scores = [loaded.model.score(window) for loaded in (one, two)]
    told: list[Evaluation] = [
        evaluate(window, score, thresholds, loaded.threshold) for loaded, score in zip((one, two), scores, strict=True)
    ]
    flat = [evaluation.metrics() for evaluation in told]
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
    """Judge a recorded version against the champion and promote it if it passes; what was said stays with the version."""
    champion = registry.champion()
    rival = registry.load(champion.number).model if champion is not None and champion.number != version.number else None
    lost = [name for name in rival.features if name not in window.columns] if rival is not None else []
    verdict = judge(window, registry.load(version.number).model, None if lost else rival, settings, leak=leak)
    if lost and champion is not None:
        told = f"version {champion.number} needs {', '.join(lost[:3])}, which no order has any more: judged as a first model"
        verdict = replace(verdict, checks=(Check("champion", True, told), *verdict.checks))
    registry.annotate(version.number, gate=verdict.summary()[:4000])
    if verdict.passed:
        registry.promote(version.number)
    return verdict


def promote_model(registry: Registry, which: str | int, *, force: bool = False) -> Version:
    """Promote a version that the gate has passed; with `force`, any. Raises GateRefused telling what the gate said."""
    version = registry.version(which)
    said = version.tags.get("gate", "")
    if said != "passed" and not force:
        raise GateRefused(
            f"Version {version.number} of model '{registry.name}' was not promoted, the gate "
            + (f"{said}. " if said else "has not judged it. ")
            + "Train a better one (python -m app train), or promote it all the same with --force."
        )
    if force and said != "passed":
        registry.annotate(version.number, gate_overruled="yes")
    return registry.promote(version.number)


def rollback_model(registry: Registry) -> Version:
    """Make the version that the champion replaced the champion again."""
    return registry.rollback()
