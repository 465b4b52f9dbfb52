"""Training: XGBoost boosted round by round on Ray Train, the same bytes for the same data and seed.

Every worker boosts its own stripe of the training orders; XGBoost adds the workers' histograms up, so all of them hold
the same model. Each worker also scores *all* validation orders, so that all take the same decision when to stop, from a
figure over the whole. Every so many rounds the model goes to a checkpoint. A worker that dies is replaced and the run
goes on from the last checkpoint; a run whose driver died goes on too, when it is started again with the same data and
settings. An interrupted run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.errors import SettingsError, ShopSphereError
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings, home_directory
from lakehouse.storage import Storage
from ml.evaluation.metrics import average_precision, log_loss

if TYPE_CHECKING:
    import xgboost

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]

DEFAULT_PARAMETERS: Mapping[str, Any] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    # 256 bins blur the thresholds of amounts, and a fitted base score moves with the data
    "max_bin": 1024,
    "base_score": 0.5,
    "eta": 0.05,
    "max_depth": 6,
    "min_child_weight": 3.0,
    "subsample": 0.8,
    "colsample_bytree": 0.6,
    "lambda": 2.0,
}


class TrainingError(ShopSphereError):
    """A model cannot be trained, or does not fit the data it is asked about."""


class FeatureLike(Protocol):
    """What training needs to know of a feature. One of type 'category' may also have `categories`."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained."""

    rounds: int = 600
    """Trees, at most; exactly, without validation orders."""
    patience: int = 60
    """Rounds without a lower log loss over the validation orders after which training stops; 0: never. Ranking alone would
    stop long before the scores are probabilities."""
    workers: int = 1
    """Ray Train workers. The number is part of what makes the bytes of a model."""
    threads: int = 1
    """CPUs of each worker."""
    report_every: int = 100
    """Rounds between two checkpoints; randomness is seeded anew at each, so it is part of what makes the bytes."""
    seed: int = 7
    max_failures: int = 3
    """Workers that may die before the run is given up."""
    storage: Storage | None = None
    """Where checkpoints go, in a cluster a place that all nodes share; None: `training` in SHOPSPHERE_HOME."""
    keep: bool = False
    """Leave the checkpoints there, until `discard`: the same training asked for again then ends at once."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_PARAMETERS)

    def __post_init__(self) -> None:
        for name, lowest in (
            ("rounds", 1),
            ("patience", 0),
            ("workers", 1),
            ("threads", 1),
            ("report_every", 1),
            ("max_failures", 0),
        ):
            if getattr(self, name) < lowest:
                raise SettingsError(f"training.{name} is {getattr(self, name)}: expected {lowest} or more.")

    def with_parameters(self, **parameters: Any) -> TrainingSettings:
        """These settings with some XGBoost parameters replaced."""
        return replace(self, parameters={**self.parameters, **parameters})

    def xgboost(self) -> dict[str, Any]:
        """The parameters that go to XGBoost."""
        return {**self.parameters, "seed": self.seed, "nthread": self.threads, "verbosity": 0}


@dataclass(frozen=True)
class FittedModel:
    """A trained model: XGBoost's own bytes, and how its columns are made from features."""

    booster: bytes
    """UBJSON, cut to the best round."""
    features: tuple[str, ...]
    feature_types: tuple[str, ...]
    """XGBoost's: 'q' a number, 'c' a category's code."""
    categories: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Any]
    best_iteration: int
    rounds: int
    """Rounds that were boosted, before the cut."""
    validation_score: float | None = None
    """Average precision over the validation orders at the best round."""
    seconds: float = field(default=0.0, compare=False)
    checkpoints: Storage | None = field(default=None, compare=False)
    """Where its checkpoints are, if they were kept."""

    @property
    def digest(self) -> str:
        """SHA-256 of the booster's bytes."""
        return hashlib.sha256(self.booster).hexdigest()

    @cached_property
    def _loaded(self) -> xgboost.Booster:
        import xgboost

        return xgboost.Booster(params={"nthread": 1}, model_file=bytearray(self.booster))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}

    def matrix(self, frame: pl.DataFrame) -> Floats:
        """The model's columns of a frame of features."""
        return encode(frame, self.features, self.feature_types, self.categories)

    def score(self, frame: pl.DataFrame) -> npt.NDArray[np.float64]:
        """The probability of fraud of each order. Raises TrainingError when the frame lacks a feature."""
        return self.score_matrix(self.matrix(frame))

    def score_matrix(self, columns: Floats) -> npt.NDArray[np.float64]:
        """The same for columns made by `matrix`."""
        if not len(columns):
            return np.zeros(0)
        return np.asarray(self._loaded.inplace_predict(columns, validate_features=False), dtype=np.float64)

    def contributions(self, frame: pl.DataFrame) -> npt.NDArray[np.float32]:
        """What each feature adds to an order's log-odds (TreeSHAP); the last column is the model's own level."""
        return self.contributions_matrix(self.matrix(frame))

    def contributions_matrix(self, columns: Floats, approximate: bool = False) -> npt.NDArray[np.float32]:
        """The same for columns made by `matrix`. approximate: by Saabas' rule, as `ml.forest` gives them."""
        data = _dmatrix(columns, None, self.features, self.feature_types)
        return np.asarray(self._loaded.predict(data, pred_contribs=True, approx_contribs=approximate))


def fit(
    train: pl.DataFrame,
    validation: pl.DataFrame | None,
    features: Sequence[FeatureLike],
    settings: TrainingSettings | None = None,
    *,
    pool: TaskPool | None = None,
) -> FittedModel:
    """Train on Ray Train. Frames have the features' columns and `label`; without validation orders all rounds count.
    With a column `weight`, a training order counts so many times; validation orders count once each.

    Raises TrainingError when the data cannot train a model, or when workers keep dying."""
    settings = settings or TrainingSettings()
    data = prepare(train, validation, features)
    owned = TaskPool(RaySettings()) if pool is None else None
    try:
        (pool or owned or TaskPool(RaySettings())).start()
        return _fit_on_ray(data, settings)
    finally:
        if owned is not None:
            owned.close()


def discard(model: FittedModel) -> FittedModel:
    """Remove the checkpoints of a model, once it is recorded."""
    if model.checkpoints is not None:
        model.checkpoints.remove()
    return replace(model, checkpoints=None)


def fit_here(
    train: pl.DataFrame,
    validation: pl.DataFrame | None,
    features: Sequence[FeatureLike],
    settings: TrainingSettings | None = None,
) -> FittedModel:
    """The same training in this process, without Ray: the model of `fit` with one worker, bit by bit."""
    settings = settings or TrainingSettings()
    data = prepare(train, validation, features)
    begun = time.monotonic()
    progress = last(
        boost(data, settings.xgboost(), settings.rounds, settings.patience, TrainingProgress.none(), settings.report_every)
    )
    return _finished(progress, data, settings, time.monotonic() - begun)


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Training and validation orders as XGBoost takes them."""

    columns: Floats
    label: Labels
    validation_columns: Floats | None
    validation_label: Labels | None
    features: tuple[str, ...]
    feature_types: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    weight: Floats | None = None
    """How many times each training order counts; None: once each."""

    def stripe(self, number: int, of: int) -> Prepared:
        """Every `of`-th training order: one worker's part. All validation orders stay."""
        part = slice(number, None, of)
        weight = None if self.weight is None else self.weight[part]
        return replace(self, columns=np.ascontiguousarray(self.columns[part]), label=self.label[part], weight=weight)

    def digest(self) -> str:
        """SHA-256 over the data and its declaration."""
        hashed = hashlib.sha256(json.dumps([self.features, self.feature_types, dict(self.categories)]).encode())
        for array in (self.columns, self.label, self.validation_columns, self.validation_label):
            hashed.update(b"-" if array is None else np.ascontiguousarray(array).data)
        if self.weight is not None:
            hashed.update(np.ascontiguousarray(self.weight).data)
        return hashed.hexdigest()


def prepare(train: pl.DataFrame, validation: pl.DataFrame | None, features: Sequence[FeatureLike]) -> Prepared:
    """Check the frames and make XGBoost's columns. The order of rows is made to be that of (placed_at, order_id) where
    the frame has those, so that the same set of orders gives the same model."""
    names = tuple(feature.name for feature in features)
    types = tuple("c" if feature.type == "category" else "q" for feature in features)
    categories = {
        feature.name: tuple(getattr(feature, "categories", ()) or ()) for feature in features if feature.type == "category"
    }
    train = _in_order(train)
    label = _checked_label(train, "training")
    held = validation is not None and len(validation) > 0
    ordered = _in_order(validation) if validation is not None and held else None
    return Prepared(
        columns=encode(train, names, types, categories),
        label=label,
        validation_columns=encode(ordered, names, types, categories) if ordered is not None else None,
        validation_label=_checked_label(ordered, "validation") if ordered is not None else None,
        features=names,
        feature_types=types,
        categories=categories,
        weight=_checked_weight(train),
    )


def matrix(frame: pl.DataFrame, features: Sequence[FeatureLike]) -> Floats:
    """XGBoost's columns of features, in their order."""
    names = tuple(feature.name for feature in features)
    types = tuple("c" if feature.type == "category" else "q" for feature in features)
    categories = {feature.name: tuple(getattr(feature, "categories", ()) or ()) for feature in features}
    return encode(frame, names, types, categories)


def encode(frame: pl.DataFrame, names: Sequence[str], types: Sequence[str], categories: Mapping[str, tuple[str, ...]]) -> Floats:
    """Features as 32-bit floats: a missing value is NaN, a category its place among the declared ones.

    Raises TrainingError naming missing features, or a category that was not declared."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise TrainingError(
            f"The model needs the feature{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which the orders lack. "
            "Compute features with the version of ml/features/groups that the model was trained with, or train again."
        )
    columns = np.empty((len(frame), len(names)), dtype=np.float32)
    for number, (name, kind) in enumerate(zip(names, types, strict=True)):
        column = frame.get_column(name)
        if kind == "c" and column.dtype in (pl.String, pl.Categorical, pl.Enum):
            column = _codes(column.cast(pl.String), categories.get(name, ()))
        columns[:, number] = column.cast(pl.Float32).fill_null(float("nan")).to_numpy()
    return columns


def _codes(column: pl.Series, declared: tuple[str, ...]) -> pl.Series:
    unknown = set(column.drop_nulls().unique().to_list()) - set(declared)
    if unknown:
        raise TrainingError(
            f"Feature '{column.name}' has the value '{sorted(unknown)[0]}', which is not among its categories "
            f"({', '.join(declared) or 'none declared'}). Declare it, or let the feature turn it into an explicit 'other'."
        )
    return column.replace_strict(list(declared), list(range(len(declared))), return_dtype=pl.Int32) if declared else column


def _in_order(frame: pl.DataFrame) -> pl.DataFrame:
    keys = [name for name in ("placed_at", "order_id") if name in frame.columns]
    return frame.sort(keys, maintain_order=True) if keys else frame


def _checked_label(frame: pl.DataFrame, which: str) -> Labels:
    if "label" not in frame.columns:
        raise TrainingError(f"The {which} orders have no column 'label'. Read them with ml.training.training_set.")
    label = frame.get_column("label")
    if label.null_count() or not set(label.unique().to_list()) <= {0, 1}:
        raise TrainingError(f"A label of the {which} orders is neither 0 nor 1. Leave out orders whose label is not known yet.")
    if label.n_unique() < 2:
        only = "is a fraud" if len(label) and label[0] == 1 else "is honest"
        told = "there are none" if not len(label) else f"every one of {len(label)} {only}"
        raise TrainingError(
            f"The {which} orders need both frauds and honest orders, but {told}. "
            "Take a longer window, or a cut-off at which more chargebacks were reported."
        )
    return label.cast(pl.Int8).to_numpy()


def _checked_weight(frame: pl.DataFrame) -> Floats | None:
    if "weight" not in frame.columns:
        return None
    weight = frame.get_column("weight").cast(pl.Float32).fill_null(float("nan")).to_numpy()
    if not bool(np.all(np.isfinite(weight) & (weight > 0))):
        raise TrainingError("A weight of the training orders is no positive number. Leave out orders that are not to count.")
    return weight


def _dmatrix(columns: Floats, label: Labels | None, names: Sequence[str], types: Sequence[str]) -> xgboost.DMatrix:
    import xgboost

    return xgboost.DMatrix(
        columns, label=label, feature_names=list(names), feature_types=list(types), enable_categorical="c" in types, nthread=1
    )


# --- boosting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is: what a checkpoint holds."""

    booster: bytes
    rounds: int
    best_iteration: int
    best_loss: float
    """Log loss over the validation orders at the best round."""
    best_score: float
    """Average precision there."""
    done: bool

    @staticmethod
    def none() -> TrainingProgress:
        """Before the first round."""
        return TrainingProgress(b"", 0, -1, float("inf"), 0.0, False)

    def write(self, directory: Path) -> None:
        """Write the files of a checkpoint."""
        (directory / "model.ubj").write_bytes(self.booster)
        state = {name: value for name, value in asdict(self).items() if name != "booster"}
        (directory / "progress.json").write_text(json.dumps(state))

    @staticmethod
    def read(directory: Path) -> TrainingProgress:
        """Read them back."""
        return TrainingProgress(
            booster=(directory / "model.ubj").read_bytes(), **json.loads((directory / "progress.json").read_text())
        )


def boost(
    data: Prepared,
    parameters: Mapping[str, Any],
    rounds: int,
    patience: int,
    start: TrainingProgress,
    report_every: int,
) -> Iterator[TrainingProgress]:
    """Boost from `start`, giving the progress every so many rounds and at the end.

    In a distributed run every worker goes through the same rounds and gives the same number of progresses."""
    import xgboost

    if start.done:
        yield start
        return
    train = xgboost.QuantileDMatrix(
        data.columns,
        label=data.label,
        weight=data.weight,
        feature_names=list(data.features),
        feature_types=list(data.feature_types),
        enable_categorical="c" in data.feature_types,
        max_bin=int(parameters.get("max_bin", 256)),
        nthread=int(parameters.get("nthread", 1)),
    )
    watched = None
    if data.validation_columns is not None:
        watched = _dmatrix(data.validation_columns, data.validation_label, data.features, data.feature_types)
    cache = [train] if watched is None else [train, watched]

    def reopened(state: bytes, number: int) -> xgboost.Booster:
        # XGBoost's sources of randomness cannot be saved. A booster that is made anew after each checkpoint, with the seed
        # of that round, draws the same whether or not the run was interrupted there.
        seeded = {**parameters, "seed": int(parameters.get("seed", 0)) + number}
        return xgboost.Booster(seeded, cache, bytearray(state) if state else None)

    booster = reopened(start.booster, start.rounds)
    best, best_loss, best_score, done = start.best_iteration, start.best_loss, start.best_score, False
    for number in range(start.rounds, rounds):
        booster.update(train, number)
        if watched is not None and data.validation_label is not None:
            score = booster.predict(watched)
            loss = log_loss(data.validation_label, score)
            if loss < best_loss:
                best, best_loss, best_score = number, loss, average_precision(data.validation_label, score)
            done = bool(patience) and number - best >= patience
        else:
            best = number
        done = done or number == rounds - 1
        if done or (number + 1) % report_every == 0:
            state = bytes(booster.save_raw("ubj"))
            yield TrainingProgress(state, number + 1, best, best_loss, best_score, done)
            if done:
                return
            booster = reopened(state, number + 1)


def last(steps: Iterator[TrainingProgress]) -> TrainingProgress:
    """Boost to the end."""
    return deque(steps, maxlen=1)[0]


def _finished(progress: TrainingProgress, data: Prepared, settings: TrainingSettings, seconds: float) -> FittedModel:
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


# --- Ray Train ----------------------------------------------------------------------------------------------------


def _fit_on_ray(data: Prepared, settings: TrainingSettings) -> FittedModel:
    # each report waits for the controller's next poll, by default two seconds
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray
    import ray.train
    from ray.train.xgboost import XGBoostTrainer

    begun = time.monotonic()
    needed, there = settings.workers * settings.threads, ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    if there < needed:
        raise TrainingError(
            f"Training with {settings.workers} workers of {settings.threads} CPUs needs {needed} CPUs, but Ray has {there:g}. "
            "Lower training.workers or training.threads, or raise SHOPSPHERE_RAY__CPUS."
        )
    storage, name = storage_of(settings), _run_name(data, settings)
    storage.create()
    filesystem, path = storage.filesystem()
    trainer = XGBoostTrainer(
        _worker,
        train_loop_config={
            "stripes": [ray.put(data.stripe(number, settings.workers)) for number in range(settings.workers)],
            "parameters": settings.xgboost(),
            "rounds": settings.rounds,
            "patience": settings.patience,
            "report_every": settings.report_every,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, resources_per_worker={"CPU": settings.threads}),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
        if result.checkpoint is None:
            raise TrainingError("Training ended without a checkpoint. Run it again.")
        with result.checkpoint.as_directory() as directory:
            progress = TrainingProgress.read(Path(directory))
    except ShopSphereError:
        raise
    except Exception as error:
        raise TrainingError(
            f"Training failed after {settings.max_failures} restarts: {_root(error)}. "
            f"Its checkpoints are in {storage / name}: the same command goes on from the last one."
        ) from error
    model = _finished(progress, data, settings, time.monotonic() - begun)
    model = replace(model, checkpoints=storage / name)
    return model if settings.keep else discard(model)


def storage_of(settings: TrainingSettings) -> Storage:
    """Where checkpoints go."""
    return settings.storage or Storage.on_disk(home_directory() / "training")


def _run_name(data: Prepared, settings: TrainingSettings) -> str:
    """The same data and settings have the same name, so a run that was cut off is found again."""
    told = json.dumps(
        [settings.xgboost(), settings.rounds, settings.patience, settings.workers, settings.report_every],
        sort_keys=True,
        default=str,
    )
    return "fit-" + hashlib.sha256((data.digest() + told).encode()).hexdigest()[:16]


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Ray has set up XGBoost's communication around it."""
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    data: Prepared = ray.get(config["stripes"][rank])
    start, checkpoint = TrainingProgress.none(), ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            start = TrainingProgress.read(Path(directory))
    steps = boost(data, config["parameters"], config["rounds"], config["patience"], start, config["report_every"])
    for progress in steps:
        metrics = {"rounds": progress.rounds, "average_precision": progress.best_score}
        with tempfile.TemporaryDirectory() if rank == 0 else contextlib.nullcontext() as directory:
            if directory is None:
                ray.train.report(metrics)
            else:
                progress.write(Path(directory))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _root(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return lines[-1].strip()[:300]
