"""Search for XGBoost's parameters: random trials on Ray Tune, evaluated on time-ordered folds, within a budget.

A fold trains on the orders whose labels were known when its window began and is evaluated on the window, as the model
itself will be. Trial 0 uses the configured parameters, so the search never does worse on the folds. The parameters of trial
n depend on the seed and n alone, so the same number of completed trials always has the same winner. (A search that reaches
its time limit completes as many trials as the machine can run.)
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.errors import SettingsError
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings
from lakehouse.storage import Storage
from ml.training.boosting import TrainingProgress, boost, last
from ml.training.fit import storage_of
from ml.training.settings import FeatureLike, TrainingError, TrainingSettings
from ml.training.training_data import TrainingData, encode_data

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search. `trials` 0 disables it."""

    trials: int = 12
    seconds: float = 600.0
    folds: int = 3
    delay: timedelta = timedelta(days=7)
    """Gap between the last training order of a fold and its window: the time until a label is mature."""
    concurrent: int = 1
    seed: int = 7

    def __post_init__(self) -> None:
        for name, lowest in (("trials", 0), ("seconds", 1), ("folds", 1), ("concurrent", 1)):
            if getattr(self, name) < lowest:
                raise SettingsError(f"search.{name} is {getattr(self, name)}: expected {lowest} or more.")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of parameters with its score, the mean average precision over the folds."""

    number: int
    parameters: Mapping[str, Any]
    score: float
    fold_scores: tuple[float, ...]
    rounds: int
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """The best parameters, and all completed trials by number."""

    best: Mapping[str, Any]
    rounds: int
    """Median over the folds of the best trial's number of rounds; 0: the search was disabled."""
    trials: tuple[Trial, ...]


def search(
    frame: pl.DataFrame,
    features: Sequence[FeatureLike],
    settings: SearchSettings,
    training: TrainingSettings,
    *,
    pool: TaskPool | None = None,
) -> SearchResult:
    """Search with training orders: a frame with the features, `label` and `placed_at`.

    Raises TrainingError when no fold has frauds on both sides of its gap, or when no trial completes."""
    if not settings.trials:
        return SearchResult(dict(training.parameters), 0, ())
    folds = [
        encode_data(frame.filter(pl.Series(before)), frame.filter(pl.Series(window)), features)
        for before, window in time_folds(frame, settings.folds, settings.delay)
    ]
    owned = TaskPool(RaySettings()) if pool is None else None
    try:
        (pool or owned or TaskPool(RaySettings())).start()
        trials = _tune(folds, settings, training)
    finally:
        if owned is not None:
            owned.close()
    if not trials:
        raise TrainingError(
            f"No trial of the parameter search completed within {settings.seconds:g} seconds. "
            "Raise search.seconds, or set search.trials to 0 to train with the configured parameters."
        )
    winner = max(trials, key=lambda trial: (trial.score, -trial.number))
    return SearchResult(dict(winner.parameters), winner.rounds, tuple(trials))


def time_folds(frame: pl.DataFrame, folds: int, delay: timedelta) -> list[tuple[Mask, Mask]]:
    """Return (training rows, window's rows) of each usable fold.

    The newer half of the orders is divided into `folds` windows with equally many orders. The training orders of a window
    were placed more than `delay` before its first order. Raises TrainingError when no fold is usable."""
    times = frame.get_column("placed_at").dt.timestamp("us").to_numpy()
    label = frame.get_column("label").to_numpy()
    gap = int(delay.total_seconds() * 1_000_000)
    ordered = np.sort(times)
    edges = (
        [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in np.linspace(0.5, 1, folds + 1)]
        if len(ordered)
        else []
    )
    found = []
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        window = (times >= begin) & ((times <= end) if number == folds - 1 else (times < end))
        before = times < begin - gap
        if all(len(np.unique(label[rows])) == 2 for rows in (before, window)):
            found.append((before, window))
    if not found:
        raise TrainingError(
            f"The parameter search needs frauds and honest orders both in a window and more than {delay.days} days before it, "
            f"but none of {folds} windows over {len(times)} orders has them. "
            "Use a longer history, fewer search.folds, or set search.trials to 0."
        )
    return found


def parameters_of(number: int, settings: SearchSettings, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a trial; trial 0 has those of `base`."""
    if number == 0:
        return dict(base)
    random = np.random.default_rng([settings.seed, number])

    def between(low: float, high: float, *, log: bool = False) -> float:
        drawn = np.exp(random.uniform(np.log(low), np.log(high))) if log else random.uniform(low, high)
        return float(np.round(drawn, 4))

    return {
        **base,
        "max_depth": int(random.integers(3, 10)),
        "eta": between(0.02, 0.2, log=True),
        "min_child_weight": between(0.5, 30, log=True),
        "subsample": between(0.5, 1),
        "colsample_bytree": between(0.3, 1),
        "lambda": between(0.3, 30, log=True),
        "gamma": between(0, 2),
    }


def _evaluate(fold: TrainingData, training: TrainingSettings, parameters: Mapping[str, Any]) -> tuple[float, int]:
    """Return score and number of rounds of parameters on a fold."""
    settings = training.with_parameters(**parameters)
    progress = last(
        boost(fold, settings.xgboost(), settings.rounds, settings.patience, TrainingProgress.none(), settings.report_every)
    )
    return progress.best_score, progress.best_iteration + 1


def _tune(folds: Sequence[TrainingData], settings: SearchSettings, training: TrainingSettings) -> list[Trial]:
    """Run the trials on Ray Tune; return the completed ones, by number."""
    # Tune's newer output prints tables at any verbosity
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    storage = storage_of(training) / f"search-{uuid.uuid4().hex[:12]}"
    storage.create()
    try:
        grid = _tuner(folds, settings, training, storage).fit()
        results = [grid[place] for place in range(len(grid))]
    finally:
        storage.remove()
    completed = [result for result in results if result.error is None and result.metrics and "score" in result.metrics]
    trials = [_trial(result, settings, training) for result in completed if result.config]
    return sorted(trials, key=lambda trial: trial.number)


def _tuner(folds: Sequence[TrainingData], settings: SearchSettings, training: TrainingSettings, storage: Storage) -> Any:
    import ray
    from ray import tune

    def run_trial(config: dict[str, Any], *, folds: Sequence[Any]) -> None:
        started = time.monotonic()
        parameters = parameters_of(config["number"], settings, training.parameters)
        results = [_evaluate(ray.get(fold), training, parameters) for fold in folds]
        scores, rounds = [score for score, _ in results], [count for _, count in results]
        tune.report(
            {
                "score": float(np.mean(scores)),
                "fold_scores": scores,
                "rounds": int(np.median(rounds)),
                "seconds": time.monotonic() - started,
            }
        )

    filesystem, path = storage.filesystem()
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, folds=[ray.put(fold) for fold in folds]), {"cpu": training.threads}),
        param_space={"number": tune.grid_search(list(range(settings.trials)))},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            max_concurrent_trials=settings.concurrent,
            time_budget_s=settings.seconds,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
        ),
    )


def _trial(result: Any, settings: SearchSettings, training: TrainingSettings) -> Trial:
    number = result.config["number"]
    return Trial(
        number=number,
        parameters=parameters_of(number, settings, training.parameters),
        score=float(result.metrics["score"]),
        fold_scores=tuple(float(score) for score in result.metrics["fold_scores"]),
        rounds=int(result.metrics["rounds"]),
        seconds=float(result.metrics["seconds"]),
    )
