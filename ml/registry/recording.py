"""How a training is stored in MLflow: the run, its trials, the model, and the registered version."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ml.registry.versions import CHALLENGER, TrainingRecord
from ml.training.search import Trial
from ml.training.settings import FeatureLike

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Param
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo

logger = logging.getLogger(__name__)


def run_tags(training: TrainingRecord) -> dict[str, str]:
    """Return the tags of the run."""
    return {
        "code_version": training.code_version,
        "model_digest": training.model.digest,
        **{f"snapshot.{table}": str(snapshot) for table, snapshot in sorted(training.snapshots.items())},
    }


def log_training(client: MlflowClient, run_id: str, training: TrainingRecord) -> None:
    """Log parameters, metrics, datasets, pictures, text files and feature declarations to the run."""
    from mlflow.entities import Metric

    model = training.model
    parameters = {
        **model.parameters,
        "seed": training.seed,
        "best_iteration": model.best_iteration,
        "features": len(model.features),
        **{f"rows.{frame}": count for frame, count in training.rows.items()},
        **training.parameters,
    }
    values = {**training.evaluation.metrics(), **training.metrics, "training_seconds": model.seconds}
    if model.validation_score is not None:
        values["validation_average_precision"] = model.validation_score
    now = int(time.time() * 1000)
    metrics = [Metric(_valid_name(name), float(value), now, 0) for name, value in values.items() if math.isfinite(value)]
    client.log_batch(run_id, metrics=metrics, params=_params(parameters))
    client.log_inputs(run_id, _datasets(training))
    with tempfile.TemporaryDirectory() as directory:
        for name, content in training.pictures.items():
            (Path(directory) / name).write_bytes(content)
        if training.pictures:
            client.log_artifacts(run_id, directory, "pictures")
    for name, text in training.tables.items():
        client.log_text(run_id, text, name)
    client.log_dict(run_id, {"features": _declarations(training.features)}, "features.json")


def log_trial(client: MlflowClient, experiment: str, parent: str, trial: Trial) -> None:
    """Log a trial of the parameter search as a nested run."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    run = client.create_run(experiment, run_name=f"trial-{trial.number}", tags={"mlflow.parentRunId": parent})
    metrics = [
        Metric("average_precision", trial.score, now, 0),
        Metric("seconds", trial.seconds, now, 0),
        *(Metric("fold_average_precision", score, now, step) for step, score in enumerate(trial.fold_scores)),
    ]
    client.log_batch(run.info.run_id, metrics=metrics, params=_params({**trial.parameters, "rounds": trial.rounds}))
    client.set_terminated(run.info.run_id)


def log_model(training: TrainingRecord) -> ModelInfo:
    """Store the model with the active run. It is not registered yet."""
    import mlflow.xgboost
    import xgboost
    from mlflow.models import infer_signature

    model = training.model
    example = pl.DataFrame(model.matrix(training.example), schema=list(model.features), orient="row").to_pandas()
    described = {
        "digest": model.digest,
        "features": _declarations(training.features),
        "feature_types": model.feature_types,
        "categories": model.categories,
        "parameters": model.parameters,
        "best_iteration": model.best_iteration,
        "rounds": model.rounds,
        "validation_score": model.validation_score,
        "threshold": training.evaluation.threshold,
        "reference": training.reference,
        "label_delay_seconds": training.label_delay.total_seconds(),
    }
    info: ModelInfo = mlflow.xgboost.log_model(
        xgboost.Booster(model_file=bytearray(model.booster)),
        name="model",
        model_format="ubj",
        signature=infer_signature(example, model.score(training.example)),
        input_example=example,
        pip_requirements=_requirements(),
        metadata={"shopsphere": json.dumps(described, sort_keys=True)},
    )
    return info


def register_version(client: MlflowClient, name: str, stored: ModelInfo, run_id: str, training: TrainingRecord) -> str:
    """Register a stored model as a version with the alias `challenger`; return its number. A failure is rolled back."""
    from mlflow.exceptions import MlflowException

    created = False
    try:
        client.create_registered_model(name, description="Probability that an order is fraudulent")
        created = True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "threshold": repr(training.evaluation.threshold),
        "model_digest": training.model.digest,
        "code_version": training.code_version,
    }
    version: ModelVersion | None = None
    try:
        version = client.create_model_version(name, stored.model_uri, run_id=run_id, tags=tags, model_id=stored.model_id)
        client.set_registered_model_alias(name, CHALLENGER, str(version.version))
    except Exception:
        _undo_registration(client, name, version, created)
        raise
    return str(version.version)


def _undo_registration(client: MlflowClient, name: str, version: ModelVersion | None, created: bool) -> None:
    """Remove what was registered, as far as the server allows it. A failure is only logged: the first error is the cause."""
    try:
        if version is not None:
            client.delete_model_version(name, str(version.version))
        if created and not client.search_model_versions(f"name='{name}'"):
            client.delete_registered_model(name)
    except Exception as error:
        logger.warning("could not remove an incomplete version of model '%s': %s", name, type(error).__name__)


def _datasets(training: TrainingRecord) -> list[DatasetInput]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def entry(name: str, digest: str, source: Mapping[str, Any], profile: Mapping[str, Any], context: str) -> DatasetInput:
        dataset = Dataset(
            name, digest[:36], "iceberg", json.dumps(source, sort_keys=True), profile=json.dumps(profile, sort_keys=True)
        )
        return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])

    snapshots = json.dumps(dict(training.snapshots), sort_keys=True)
    training_set = entry(
        f"{len(training.model.features)} features",
        hashlib.sha256(snapshots.encode()).hexdigest(),
        {"tables": dict(training.snapshots)},
        {"rows": dict(training.rows), "features": len(training.model.features)},
        "training",
    )
    return [
        training_set,
        *(
            entry(table, str(snapshot), {"table": table, "snapshot_id": snapshot}, {}, "source")
            for table, snapshot in sorted(training.snapshots.items())
        ),
    ]


def _declarations(features: Sequence[FeatureLike]) -> list[dict[str, Any]]:
    fields = ("name", "type", "window", "doc", "reason_text", "categories")
    return [{name: getattr(feature, name) for name in fields if hasattr(feature, name)} for feature in features]


def _params(values: Mapping[str, Any]) -> list[Param]:
    from mlflow.entities import Param

    return [Param(_valid_name(name), str(value)[:500]) for name, value in values.items()]


def _valid_name(text: str) -> str:
    """Return a text with the characters that MLflow forbids in names replaced."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text)[:250]


def _requirements() -> list[str]:
    """Return the packages that loading the model requires; this project is not among them."""
    requirements = []
    for names in (("mlflow",), ("xgboost-cpu", "xgboost"), ("numpy",), ("pandas",)):
        for name in names:
            try:
                requirements.append(f"{name}=={metadata.version(name)}")
                break
            except metadata.PackageNotFoundError:
                continue
    return requirements
