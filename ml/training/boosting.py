"""Boosting with XGBoost, round by round and resumable: equal data, settings and seed give equal bytes."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ml.evaluation.metrics import average_precision, log_loss
from ml.training.model import FittedModel, dmatrix
from ml.training.settings import FeatureLike, TrainingSettings
from ml.training.training_data import TrainingData, encode_data

if TYPE_CHECKING:
    import xgboost


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """State of a training after some rounds: the content of a checkpoint."""

    booster: bytes
    rounds: int
    best_iteration: int
    best_loss: float
    """Log loss over the validation orders at the best round."""
    best_score: float
    """Average precision over the validation orders at the best round."""
    done: bool

    @staticmethod
    def none() -> TrainingProgress:
        """Return the state before the first round."""
        return TrainingProgress(booster=b"", rounds=0, best_iteration=-1, best_loss=float("inf"), best_score=0.0, done=False)

    def write(self, directory: Path) -> None:
        """Write the files of a checkpoint."""
        (directory / "model.ubj").write_bytes(self.booster)
        state = {name: value for name, value in asdict(self).items() if name != "booster"}
        (directory / "progress.json").write_text(json.dumps(state))

    @staticmethod
    def read(directory: Path) -> TrainingProgress:
        """Read the files of a checkpoint."""
        return TrainingProgress(
            booster=(directory / "model.ubj").read_bytes(), **json.loads((directory / "progress.json").read_text())
        )


def boost(
    data: TrainingData,
    parameters: Mapping[str, Any],
    rounds: int,
    patience: int,
    start: TrainingProgress,
    report_every: int,
) -> Iterator[TrainingProgress]:
    """Boost from `start`; yield the progress every `report_every` rounds and at the end.

    In a distributed run every worker boosts the same rounds and yields equally often."""
    if start.done:
        yield start
        return
    train = _quantile_matrix(data, parameters)
    validation = None
    if data.validation_columns is not None:
        validation = dmatrix(data.validation_columns, data.validation_label, data.features, data.feature_types)
    cache = [train] if validation is None else [train, validation]
    booster = _reopen(start.booster, start.rounds, parameters, cache)
    best, best_loss, best_score, done = start.best_iteration, start.best_loss, start.best_score, False
    for number in range(start.rounds, rounds):
        booster.update(train, number)
        if validation is not None and data.validation_label is not None:
            score = booster.predict(validation)
            loss = log_loss(data.validation_label, score)
            if loss < best_loss:
                best, best_loss, best_score = number, loss, average_precision(data.validation_label, score)
            done = bool(patience) and number - best >= patience
        else:
            best = number
        done = done or number == rounds - 1
        if done or (number + 1) % report_every == 0:
            state = bytes(booster.save_raw("ubj"))
            yield TrainingProgress(
                booster=state, rounds=number + 1, best_iteration=best, best_loss=best_loss, best_score=best_score, done=done
            )
            if done:
                return
            booster = _reopen(state, number + 1, parameters, cache)


def _quantile_matrix(data: TrainingData, parameters: Mapping[str, Any]) -> xgboost.QuantileDMatrix:
    import xgboost

    return xgboost.QuantileDMatrix(
        data.columns,
        label=data.label,
        weight=data.weight,
        feature_names=list(data.features),
        feature_types=list(data.feature_types),
        enable_categorical="c" in data.feature_types,
        max_bin=int(parameters.get("max_bin", 256)),
        nthread=int(parameters.get("nthread", 1)),
    )


def _reopen(state: bytes, number: int, parameters: Mapping[str, Any], cache: Sequence[xgboost.DMatrix]) -> xgboost.Booster:
    """Return a new booster with the state after `number` rounds.

    XGBoost's random state cannot be saved. A booster that is re-created after each checkpoint, with the seed of that round,
    draws the same numbers whether or not the run was interrupted there."""
    import xgboost

    seeded = {**parameters, "seed": int(parameters.get("seed", 0)) + number}
    return xgboost.Booster(seeded, cache, bytearray(state) if state else None)


def last(steps: Iterator[TrainingProgress]) -> TrainingProgress:
    """Boost to the end and return the final progress."""
    return deque(steps, maxlen=1)[0]


def fitted_model(progress: TrainingProgress, data: TrainingData, settings: TrainingSettings, seconds: float) -> FittedModel:
    """Return the model of a complete training, truncated to its best round."""
    import xgboost

    booster = xgboost.Booster(model_file=bytearray(progress.booster))
    booster = booster[: progress.best_iteration + 1]
    return FittedModel(
        booster=bytes(booster.save_raw("ubj")),
        features=data.features,
        feature_types=data.feature_types,
        categories=data.categories,
        parameters=dict(settings.parameters),
        best_iteration=progress.best_iteration,
        rounds=progress.rounds,
        validation_score=progress.best_score if data.validation_label is not None else None,
        seconds=seconds,
    )


def fit_in_process(
    train: pl.DataFrame,
    validation: pl.DataFrame | None,
    features: Sequence[FeatureLike],
    settings: TrainingSettings | None = None,
) -> FittedModel:
    """Train in this process, without Ray. The model equals that of `fit` with one worker, bit for bit.

    Frames have the features' columns and `label`; without validation orders all rounds are used. A column `weight` weights
    the training orders. Raises TrainingError for data that cannot train a model."""
    settings = settings or TrainingSettings()
    data = encode_data(train, validation, features)
    started = time.monotonic()
    progress = last(
        boost(data, settings.xgboost(), settings.rounds, settings.patience, TrainingProgress.none(), settings.report_every)
    )
    return fitted_model(progress, data, settings, time.monotonic() - started)
