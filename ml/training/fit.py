"""Training on Ray Train: equal data, settings and seed give equal bytes, also after interruptions.

Every worker boosts its own stripe of the training orders. XGBoost sums the workers' histograms, so all of them hold the
same model. Each worker also scores *all* validation orders, so that all make the same decision when to stop. The model is
checkpointed at regular intervals. A worker that dies is replaced, and the run resumes from the last checkpoint. So does a
run whose driver died, when it is started again with the same data and settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from lakehouse.errors import ShopSphereError
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings, home_directory
from lakehouse.storage import Storage
from ml.training.boosting import TrainingProgress, boost, fitted_model
from ml.training.model import FittedModel
from ml.training.settings import FeatureLike, TrainingError, TrainingSettings
from ml.training.training_data import TrainingData, encode_data


def fit(
    train: pl.DataFrame,
    validation: pl.DataFrame | None,
    features: Sequence[FeatureLike],
    settings: TrainingSettings | None = None,
    *,
    pool: TaskPool | None = None,
) -> FittedModel:
    """Train on Ray Train. Frames have the features' columns and `label`; without validation orders all rounds are used.
    A column `weight` weights the training orders; validation orders all count once.

    Raises TrainingError for data that cannot train a model, or when workers keep dying."""
    settings = settings or TrainingSettings()
    data = encode_data(train, validation, features)
    owned = TaskPool(RaySettings()) if pool is None else None
    try:
        (pool or owned or TaskPool(RaySettings())).start()
        return _fit_on_ray(data, settings)
    finally:
        if owned is not None:
            owned.close()


def discard(model: FittedModel) -> FittedModel:
    """Remove the checkpoints of a model that has been recorded."""
    if model.checkpoints is not None:
        model.checkpoints.remove()
    return replace(model, checkpoints=None)


def storage_of(settings: TrainingSettings) -> Storage:
    """Return the directory of the checkpoints."""
    return settings.storage or Storage.on_disk(home_directory() / "training")


def _fit_on_ray(data: TrainingData, settings: TrainingSettings) -> FittedModel:
    # each report waits for the controller's next poll, by default for two seconds
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    started = time.monotonic()
    _check_cpus(settings)
    storage, name = storage_of(settings), _run_name(data, settings)
    storage.create()
    trainer = _trainer(data, settings, storage, name)
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
            f"Training failed after {settings.max_failures} restarts: {_root_cause(error)}. "
            f"Its checkpoints are in {storage / name}: running the same command again resumes from the last one."
        ) from error
    model = fitted_model(progress, data, settings, time.monotonic() - started)
    model = replace(model, checkpoints=storage / name)
    return model if settings.keep else discard(model)


def _check_cpus(settings: TrainingSettings) -> None:
    import ray

    needed, available = settings.workers * settings.threads, ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    if available < needed:
        raise TrainingError(
            f"Training with {settings.workers} workers of {settings.threads} CPUs needs {needed} CPUs, "
            f"but Ray has {available:g}. Lower training.workers or training.threads, or raise SHOPSPHERE_RAY__CPUS."
        )


def _trainer(data: TrainingData, settings: TrainingSettings, storage: Storage, name: str) -> Any:
    import ray
    import ray.train
    from ray.train.xgboost import XGBoostTrainer

    filesystem, path = storage.filesystem()
    return XGBoostTrainer(
        _train_worker,
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


def _run_name(data: TrainingData, settings: TrainingSettings) -> str:
    """Return a name that depends on data and settings only, so that an interrupted run is found again."""
    described = json.dumps(
        [settings.xgboost(), settings.rounds, settings.patience, settings.workers, settings.report_every],
        sort_keys=True,
        default=str,
    )
    return "fit-" + hashlib.sha256((data.digest() + described).encode()).hexdigest()[:16]


def _train_worker(config: dict[str, Any]) -> None:
    """Boost one stripe in a Ray Train worker. Ray has set up XGBoost's communication around it."""
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    data: TrainingData = ray.get(config["stripes"][rank])
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


def _root_cause(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return lines[-1].strip()[:300]
