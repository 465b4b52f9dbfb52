"""`python -m app train`: from the silver tables to a judged model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from app import sandbox
from app.cli.output import Output
from lakehouse.code_version import code_version
from lakehouse.engine.engine import Engine, StepResult
from lakehouse.storage import Storage
from ml.evaluation.baselines import Ceiling, LeaderboardEntry, as_text, baselines, ceiling, leaderboard
from ml.evaluation.drift import reference_of
from ml.evaluation.gate import GateSettings, Verdict, admit
from ml.evaluation.metrics import Evaluation, ThresholdSettings, choose_threshold, evaluate
from ml.evaluation.plots import pictures
from ml.features.features import FEATURES
from ml.features.leak_check import moved_features
from ml.registry import Registry, TrainingRecord, Version
from ml.tables import user_fraud_scores
from ml.tables.order_features import refresh
from ml.training.lineage import lineage
from ml.training.search import SearchResult, SearchSettings, search
from ml.training.training import FittedModel, TrainingSettings, discard, fit, fit_here
from ml.training.training_set import SplitSettings, TrainingSet, training_set
from pipelines.runner import open_engine, recorded
from pipelines.settings import Settings

MODEL = "fraud model"
EXAMPLES = 5


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained, judged and kept."""

    cutoff: datetime | None = None
    """What was known when; None: the newest moment that the tables tell of."""
    split: SplitSettings = field(default_factory=SplitSettings)
    search: SearchSettings = field(default_factory=lambda: SearchSettings(trials=8, seconds=300))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    thresholds: ThresholdSettings = field(default_factory=ThresholdSettings)
    gate: GateSettings = field(default_factory=GateSettings)


DEMO = TrainSettings(search=SearchSettings(trials=2, seconds=600, folds=2), training=TrainingSettings(rounds=200, patience=40))
"""A small search, for a small shop. Its limit of seconds is never reached, so that every run has the same winner."""


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    version: Version
    evaluation: Evaluation
    standings: tuple[LeaderboardEntry, ...]
    ceiling: Ceiling | None
    verdict: Verdict
    rows: Mapping[str, int]
    unlabelled: int
    cutoff: datetime
    seconds: float
    cpu_seconds: float
    command: str

    @property
    def beaten(self) -> bool:
        """Whether the model ranks better than every baseline."""
        *others, model = self.standings
        return all(model.average_precision.value > other.average_precision.value for other in others)


def train(output: Output, settings: Settings, options: TrainSettings | None = None) -> Trained:
    """Train a model, record it, and promote it if the gate lets it. Prints what came of it."""
    options = options or TrainSettings()
    registry = Registry(home=settings.home)
    registry.check()
    with open_engine(settings) as engine, output.progress() as show:
        done = train_on(engine, registry, options, show)
    print_trained(output, done)
    return done


def train_on(engine: Engine, registry: Registry, options: TrainSettings, show: Callable[[str, int, int], None]) -> Trained:
    """The same on an engine that is open, without printing."""
    started, cpu = time.monotonic(), time.process_time()
    with _stage(show, "features"), recorded(engine, "train") as features:
        features += refresh(engine, delay=options.split.delay)
        data = training_set(engine.lake, engine.pool, options.cutoff, options.split)
    if options.training.storage is None:
        options = replace(options, training=replace(options.training, storage=Storage.of(engine.lake.settings)))
    with _stage(show, "parameter search"):
        found = search(
            data.known, FEATURES, replace(options.search, delay=options.split.delay), options.training, pool=engine.pool
        )
    with _stage(show, "training"):
        threshold, model = fitted(data, found, options, engine)
    with _stage(show, "evaluation"):
        score = model.score(data.test)
        evaluation = evaluate(data.test, score, options.thresholds, threshold)
        standings, limit = compared(data, score, options, engine)
    with _stage(show, "recording"):
        version = registry.record(
            TrainingRecord(
                model=model,
                features=FEATURES,
                evaluation=evaluation,
                example=data.test.head(EXAMPLES),
                snapshots=lineage(engine.lake),
                seed=options.training.seed,
                code_version=code_version(),
                rows=data.rows,
                pictures=pictures(data.test, score, threshold, model),
                trials=found.trials,
                parameters=recorded_settings(data, options),
                metrics=recorded_figures(standings, limit),
                tables={"baselines.md": as_text(standings, limit)},
                reference=reference_of(data.test, score, FEATURES, evaluation.overall),
                label_delay=options.split.delay,
            )
        )
        discard(model)
    with _stage(show, "gate"):
        moment: Any = data.test["placed_at"].median()
        verdict = admit(
            registry,
            version,
            data.test,
            options.gate,
            leak=lambda: moved_features(engine.lake, moment, delay=options.split.delay, seed=options.training.seed),
        )
    scores: list[StepResult] = []
    with _stage(show, "scores"):
        if registry.champion() is not None:
            with recorded(engine, "train") as scores:
                scores.append(user_fraud_scores.refresh(engine, registry.load()))
    elsewhere = sum(report.worker_cpu_seconds for report in (*features, *scores))
    return Trained(
        version=registry.version(version.number),
        evaluation=evaluation,
        standings=standings,
        ceiling=limit,
        verdict=verdict,
        rows=data.rows,
        unlabelled=data.unlabelled,
        cutoff=data.cutoff,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu + elsewhere,
        command=registry.command,
    )


@contextmanager
def _stage(show: Callable[[str, int, int], None], name: str) -> Iterator[None]:
    """Shows a stage as begun, then as done."""
    show(name, 0, 1)
    yield
    show(name, 1, 1)


def fitted(data: TrainingSet, found: SearchResult, options: TrainSettings, engine: Engine) -> tuple[float, FittedModel]:
    """The threshold, and the model.

    A first model, trained on the training orders, scores the validation orders: from these the threshold is chosen, and
    without a search the number of rounds. The model itself then learns from all orders whose labels were known when the
    test window began."""
    settings = replace(options.training, parameters=found.best, keep=True)
    first = fit_here(data.train, data.validation, FEATURES, settings)
    threshold = choose_threshold(data.validation, first.score(data.validation), options.thresholds)
    rounds = found.rounds or first.best_iteration + 1
    return threshold, fit(data.known, None, FEATURES, replace(settings, rounds=max(rounds, 1), patience=0), pool=engine.pool)


def compared(
    data: TrainingSet, score: np.ndarray[Any, Any], options: TrainSettings, engine: Engine
) -> tuple[tuple[LeaderboardEntry, ...], Ceiling | None]:
    """Baselines and model on the test window, the model last; the ceiling where the truth is known."""
    label = data.test["label"].to_numpy()
    scores = {**baselines(data.train, data.validation, data.known, data.test), MODEL: score}
    truth = sandbox.truth(engine.lake.settings.home)["fraud"]
    fraud = None if truth.is_empty() else data.test["order_id"].is_in(truth["order_id"].implode()).cast(pl.Int8).to_numpy()
    capacity = options.thresholds.capacity
    standings = tuple(leaderboard(name, label, values, capacity, fraud) for name, values in scores.items())
    return standings, None if fraud is None else ceiling(label, fraud)


def recorded_settings(data: TrainingSet, options: TrainSettings) -> dict[str, Any]:
    """The settings that shape the model and its figures, for the registry."""
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


def recorded_figures(standings: tuple[LeaderboardEntry, ...], limit: Ceiling | None) -> dict[str, float]:
    """The figures of the baselines and the ceiling, for the registry."""
    figures = {}
    for one in standings:
        name = one.name.replace(" ", "_").replace("-", "_")
        if one.name == MODEL:
            figures["average_precision_low"] = one.average_precision.low
            figures["average_precision_high"] = one.average_precision.high
            continue
        figures[f"baseline.{name}.average_precision"] = one.average_precision.value
        figures[f"baseline.{name}.roc_auc"] = one.roc_auc
    if limit is not None:
        figures["ceiling.average_precision"] = limit.average_precision
    return figures


def as_json(done: Trained) -> dict[str, Any]:
    """What came of a training, for programs."""
    return {
        "version": done.version.number,
        "aliases": list(done.version.aliases),
        "promoted": done.verdict.passed,
        "refusal": done.verdict.refusal,
        "checks": [{"name": check.name, "passed": check.passed, "text": check.text} for check in done.verdict.checks],
        "metrics": done.evaluation.metrics(),
        "comparison": [
            {
                "name": one.name,
                "average_precision": one.average_precision.value,
                "low": one.average_precision.low,
                "high": one.average_precision.high,
                "roc_auc": one.roc_auc,
                "recall_at_capacity": one.recall_at_capacity,
                "against_truth": one.against_truth,
            }
            for one in done.standings
        ],
        "ceiling": done.ceiling.average_precision if done.ceiling else None,
        "beats_baselines": done.beaten,
        "rows": dict(done.rows),
        "unlabelled": done.unlabelled,
        "cutoff": done.cutoff,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "mlflow": done.command,
    }


def print_trained(output: Output, done: Trained) -> None:
    """What came of a training."""
    if output.as_json:
        output.json(as_json(done))
        return
    rows, figures = done.rows, done.evaluation.overall
    output.say(
        f"Trained on {rows['known']:,} orders, judged on the {rows['test']:,} newest with a known label "
        f"({figures.get('frauds', 0):,.0f} reported frauds); {done.unlabelled:,} are too young to have one "
        f"(known until {done.cutoff:%Y-%m-%d})."
    )
    ranked: list[tuple[str, ...]] = [
        (
            one.name,
            f"{one.average_precision.value:.3f}",
            f"{one.average_precision.low:.3f} to {one.average_precision.high:.3f}",
            f"{one.roc_auc:.3f}",
            f"{one.recall_at_capacity:.3f}",
            "" if one.against_truth is None else f"{one.against_truth:.3f}",
        )
        for one in done.standings
    ]
    if done.ceiling is not None:
        ceiling_row = ("ceiling (knows every fraud, not which are reported)", f"{done.ceiling.average_precision:.3f}")
        ranked.append((*ceiling_row, "", "", "", "1.000"))
    columns = ("scoring", "average precision", "95% interval", "ROC AUC", "recall at capacity", "against the truth")
    shown = len(columns) - (done.ceiling is None)
    output.table(columns[:shown], [row[:shown] for row in ranked], title="Newest window")
    if done.ceiling is not None and done.standings[-1].average_precision.value > done.ceiling.average_precision:
        output.say("(The ceiling is what such an oracle expects: with few frauds, luck can lift a scoring above it.)")
    named = ("card_precision_at_100", "precision_at_threshold", "recall_at_threshold", "reviewed_share", "cost_saved", "ece")
    output.table(
        ("figure", "value"),
        [("threshold", f"{done.evaluation.threshold:.4f}"), *((n, f"{figures[n]:,.4f}") for n in named if n in figures)],
        title="The model at its threshold",
    )
    output.table(
        ("check", "passed", "what was measured"),
        [(check.name, check.passed, check.text) for check in done.verdict.checks],
        title="Gate",
    )
    if done.verdict.passed:
        output.say(f"\nVersion {done.version.number} is the champion now ({done.seconds:.0f} s).")
    else:
        output.say(f"\nVersion {done.version.number} stays challenger. Refused by {done.verdict.refusal}.")
    output.say(f"Look at the run: {done.command}")
