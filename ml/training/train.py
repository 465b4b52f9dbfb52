"""Train a fraud model: from the silver tables to a version that the promotion gate has judged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from lakehouse.code_version import code_version
from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.storage import Storage
from ml.evaluation.baselines import LeaderboardEntry, UpperBound, as_text, baselines, leaderboard_entry, upper_bound
from ml.evaluation.drift import reference_of
from ml.evaluation.gate import GateSettings, Verdict, admit
from ml.evaluation.leak_check import leaking_features
from ml.evaluation.metrics import Evaluation, ThresholdSettings, choose_threshold, evaluate
from ml.evaluation.plots import pictures
from ml.features.groups import FEATURES
from ml.registry import Registry, TrainingRecord, Version
from ml.stages import StageCallback, ignore_progress, stage
from ml.tables import user_fraud_scores
from ml.tables.feature_tables import refresh
from ml.training.boosting import fit_in_process
from ml.training.fit import discard, fit
from ml.training.lineage import lineage
from ml.training.model import FittedModel
from ml.training.search import SearchResult, SearchSettings, search
from ml.training.settings import TrainingSettings
from ml.training.training_set import SplitSettings, TrainingSet, training_set
from pipelines.runner import open_engine, recorded
from pipelines.settings import Settings

MODEL = "fraud model"
"""Name of the trained model on the leaderboard, beside the baselines."""
EXAMPLE_ROWS = 5


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training: data, search, model, threshold, promotion gate."""

    cutoff: datetime | None = None
    """Train as of this time; None: the newest order or fraud report."""
    split: SplitSettings = field(default_factory=SplitSettings)
    search: SearchSettings = field(default_factory=lambda: SearchSettings(trials=8, seconds=300))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    thresholds: ThresholdSettings = field(default_factory=ThresholdSettings)
    gate: GateSettings = field(default_factory=GateSettings)


DEMO = TrainSettings(search=SearchSettings(trials=2, seconds=600, folds=2), training=TrainingSettings(rounds=200, patience=40))
"""A small search for a small dataset. It never reaches its time limit, so every run finds the same best trial."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A recorded and judged model version, with its evaluation and cost."""

    version: Version
    evaluation: Evaluation
    leaderboard: tuple[LeaderboardEntry, ...]
    """The baselines, then the model."""
    upper_bound: UpperBound | None
    """None: the true frauds are unknown."""
    verdict: Verdict
    rows: Mapping[str, int]
    unlabelled: int
    cutoff: datetime
    seconds: float
    cpu_seconds: float
    command: str
    """Shell command, or address, that shows the run in MLflow."""

    @property
    def beats_baselines(self) -> bool:
        """Whether the model has a higher average precision than every baseline."""
        *others, model = self.leaderboard
        return all(model.average_precision.value > other.average_precision.value for other in others)


def train(
    settings: Settings,
    options: TrainSettings | None = None,
    progress: StageCallback = ignore_progress,
    true_frauds: pl.Series | None = None,
) -> TrainingResult:
    """Train a model, record it, and promote it if it passes the gate.

    true_frauds: ids of all fraudulent orders, reported or not, for the upper bound. Only generated data has them; None or
    empty leaves the upper bound out. Raises RegistryError before any training when MLflow cannot be reached."""
    registry = Registry(home=settings.home)
    registry.check()
    with open_engine(settings) as engine:
        return train_on(engine, registry, options or TrainSettings(), progress, true_frauds)


def train_on(
    engine: Engine,
    registry: Registry,
    options: TrainSettings,
    progress: StageCallback = ignore_progress,
    true_frauds: pl.Series | None = None,
) -> TrainingResult:
    """Do the same as `train` on an open engine and a checked registry."""
    started, cpu = time.monotonic(), time.process_time()
    if options.training.storage is None:
        options = replace(options, training=replace(options.training, storage=Storage.from_settings(engine.lake.settings)))
    delay = options.split.delay
    with stage(progress, "features"), recorded(engine, "train") as feature_results:
        feature_results += refresh(engine, delay=delay)
        data = training_set(engine.lake, engine.pool, options.cutoff, options.split)
    with stage(progress, "parameter search"):
        found = search(data.known, FEATURES, replace(options.search, delay=delay), options.training, pool=engine.pool)
    with stage(progress, "training"):
        threshold, model = fit_with_threshold(data, found, options, engine)
    with stage(progress, "evaluation"):
        candidate = evaluate_candidate(data, model, threshold, options, true_frauds)
    with stage(progress, "recording"):
        version = registry.record(training_record(engine, data, found, candidate, options))
        discard(model)
    with stage(progress, "gate"):
        verdict = judge_version(engine, registry, version, data, options)
    with stage(progress, "scores"):
        score_results = refresh_scores(engine, registry)
    worker_cpu = sum(result.worker_cpu_seconds for result in (*feature_results, *score_results))
    return TrainingResult(
        version=registry.version(version.number),
        evaluation=candidate.evaluation,
        leaderboard=candidate.leaderboard,
        upper_bound=candidate.upper_bound,
        verdict=verdict,
        rows=data.rows,
        unlabelled=data.unlabelled,
        cutoff=data.cutoff,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu + worker_cpu,
        command=registry.command,
    )


def fit_with_threshold(
    data: TrainingSet, found: SearchResult, options: TrainSettings, engine: Engine
) -> tuple[float, FittedModel]:
    """Return the review threshold and the model.

    A first model, trained on the training orders, scores the validation orders. These scores determine the threshold and,
    without a search, the number of rounds. The model itself is then trained on all orders whose labels were known when the
    test window began."""
    settings = replace(options.training, parameters=found.best, keep=True)
    first = fit_in_process(data.train, data.validation, FEATURES, settings)
    threshold = choose_threshold(data.validation, first.score(data.validation), options.thresholds)
    rounds = found.rounds or first.best_iteration + 1
    return threshold, fit(data.known, None, FEATURES, replace(settings, rounds=max(rounds, 1), patience=0), pool=engine.pool)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trained model, evaluated on the test window."""

    model: FittedModel
    threshold: float
    score: np.ndarray[Any, Any]
    """Scores of the test orders."""
    evaluation: Evaluation
    leaderboard: tuple[LeaderboardEntry, ...]
    upper_bound: UpperBound | None


def evaluate_candidate(
    data: TrainingSet, model: FittedModel, threshold: float, options: TrainSettings, true_frauds: pl.Series | None
) -> Candidate:
    """Evaluate a model and the baselines on the test window."""
    score = model.score(data.test)
    evaluation = evaluate(data.test, score, options.thresholds, threshold)
    leaderboard, bound = compare_with_baselines(data, score, options, true_frauds)
    return Candidate(
        model=model,
        threshold=threshold,
        score=score,
        evaluation=evaluation,
        leaderboard=leaderboard,
        upper_bound=bound,
    )


def compare_with_baselines(
    data: TrainingSet, score: np.ndarray[Any, Any], options: TrainSettings, true_frauds: pl.Series | None
) -> tuple[tuple[LeaderboardEntry, ...], UpperBound | None]:
    """Return the leaderboard of the test window, the model last, and the upper bound if the true frauds are known."""
    label = data.test["label"].to_numpy()
    scores = {**baselines(data.train, data.validation, data.known, data.test), MODEL: score}
    fraud = None
    if true_frauds is not None and len(true_frauds):
        fraud = data.test["order_id"].is_in(true_frauds.implode()).cast(pl.Int8).to_numpy()
    capacity = options.thresholds.capacity
    leaderboard = tuple(leaderboard_entry(name, label, values, capacity, fraud) for name, values in scores.items())
    return leaderboard, None if fraud is None else upper_bound(label, fraud)


def training_record(
    engine: Engine, data: TrainingSet, found: SearchResult, candidate: Candidate, options: TrainSettings
) -> TrainingRecord:
    """Return everything about a training that the registry records."""
    model, score, evaluation = candidate.model, candidate.score, candidate.evaluation
    return TrainingRecord(
        model=model,
        features=FEATURES,
        evaluation=evaluation,
        example=data.test.head(EXAMPLE_ROWS),
        snapshots=lineage(engine.lake),
        seed=options.training.seed,
        code_version=code_version(),
        rows=data.rows,
        pictures=pictures(data.test, score, candidate.threshold, model),
        trials=found.trials,
        parameters=recorded_parameters(data, options),
        metrics=recorded_metrics(candidate.leaderboard, candidate.upper_bound),
        tables={"baselines.md": as_text(candidate.leaderboard, candidate.upper_bound)},
        reference=reference_of(data.test, score, FEATURES, evaluation.overall),
        label_delay=options.split.delay,
    )


def judge_version(engine: Engine, registry: Registry, version: Version, data: TrainingSet, options: TrainSettings) -> Verdict:
    """Run the promotion gate on the test window, with the leak check at the window's median order."""
    moment: Any = data.test["placed_at"].median()

    def leaks() -> list[str]:
        return leaking_features(engine.lake, moment, delay=options.split.delay, seed=options.training.seed)

    return admit(registry, version, data.test, options.gate, leak=leaks)


def refresh_scores(engine: Engine, registry: Registry) -> list[StepResult]:
    """Bring gold.user_fraud_scores up to date, if there is a champion."""
    if registry.champion() is None:
        return []
    with recorded(engine, "train") as results:
        results.append(user_fraud_scores.refresh(engine, registry.load()))
    return results


def recorded_parameters(data: TrainingSet, options: TrainSettings) -> dict[str, Any]:
    """Return the settings that determine the model and its metrics, for the registry."""
    return {
        "cutoff": data.cutoff.isoformat(),
        "label_delay_days": options.split.delay.days,
        "unlabelled": data.unlabelled,
        "split.test": options.split.test,
        "split.validation": options.split.validation,
        "test.since": str(data.test["placed_at"].min()),
        "test.until": str(data.test["placed_at"].max()),
        "workers": options.training.workers,
        "search.trials": options.search.trials,
        **{f"threshold.{name}": getattr(options.thresholds, name) for name in ("by", "capacity", "review_cost", "loss_share")},
    }


def recorded_metrics(leaderboard: tuple[LeaderboardEntry, ...], bound: UpperBound | None) -> dict[str, float]:
    """Return the metrics of the baselines and the upper bound, for the registry."""
    metrics = {}
    for entry in leaderboard:
        name = entry.name.replace(" ", "_").replace("-", "_")
        if entry.name == MODEL:
            metrics["average_precision_low"] = entry.average_precision.low
            metrics["average_precision_high"] = entry.average_precision.high
            continue
        metrics[f"baseline.{name}.average_precision"] = entry.average_precision.value
        metrics[f"baseline.{name}.roc_auc"] = entry.roc_auc
    if bound is not None:
        metrics["ceiling.average_precision"] = bound.average_precision
    return metrics
