"""The model registry: the only module that speaks to MLflow.

A training is recorded as one run with its search trials as nested runs. Only when everything about it is stored does a
version of the registered model come into being, and only then the alias `challenger` moves to it. What serves is the
version with the alias `champion`; moving that alias is one atomic call. Each promoted version remembers, in the tag
`replaced_champion`, which one it replaced, for `rollback`.

By default MLflow is a SQLite file and a directory under SHOPSPHERE_HOME/mlflow; MLFLOW_TRACKING_URI names any server.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lakehouse.errors import ShopSphereError
from lakehouse.settings import home_directory
from ml.evaluation.metrics import Evaluation
from ml.features.declarations import LABEL_DELAY
from ml.training.search import Trial
from ml.training.training import FeatureLike, FittedModel

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Param
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo

CHAMPION, CHALLENGER = "champion", "challenger"
REPLACED = "replaced_champion"
ROOT = Path(__file__).resolve().parents[1]
PROBES, PROBE_SECONDS = 3, 5.0


class RegistryError(ShopSphereError):
    """MLflow cannot be reached, or does not hold what was asked."""


@dataclass(frozen=True)
class TrainingRecord:
    """Everything about one training that is to be remembered."""

    model: FittedModel
    features: Sequence[FeatureLike]
    evaluation: Evaluation
    """Over the newest labelled window."""
    example: pl.DataFrame
    """A few orders' features."""
    snapshots: Mapping[str, int]
    """The Iceberg snapshot of each table that the data set was made from."""
    seed: int
    code_version: str
    rows: Mapping[str, int] = field(default_factory=dict)
    """Orders in 'train', 'validation', 'test'."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    trials: Sequence[Trial] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """More settings to record: cut-off, label delay, threshold settings, ..."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """More figures: baselines, ceiling, ..."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Text files to keep with the run, by name: a report, the baselines' table."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    """What monitoring compares live data with; any JSON."""
    label_delay: timedelta = LABEL_DELAY
    """How long frauds take to be reported, as its features assume."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: int
    aliases: tuple[str, ...]
    run_id: str
    created: datetime
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def threshold(self) -> float:
        """The score from which on an order is reviewed."""
        return float(self.tags.get("threshold", "nan"))


@dataclass(frozen=True)
class LoadedModel:
    """A version with its model."""

    version: Version
    model: FittedModel
    threshold: float
    features: tuple[Mapping[str, Any], ...]
    """The declarations it was trained with."""
    reference: Mapping[str, Any]
    label_delay: timedelta = LABEL_DELAY
    """What its features assume; of a version from before it was recorded the default."""


class Registry:
    """The registered model `name` at an MLflow server, with its runs in the experiment of the same name."""

    def __init__(self, uri: str = "", name: str = "fraud", home: Path | None = None) -> None:
        self.name = name
        self.home = (home or home_directory()).absolute() / "mlflow"
        given = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self.local = not given
        self.uri = given or f"sqlite:///{self.home / 'mlflow.db'}"
        self._registry_uri = os.environ.get("MLFLOW_REGISTRY_URI", self.uri)
        self._client: MlflowClient | None = None

    @property
    def command(self) -> str:
        """What to do to look at the runs: a shell command, or the server's address."""
        if self.uri.startswith(("http://", "https://")):
            return f"open {self.uri}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def check(self) -> None:
        """Make sure that a training could be recorded. To be called before training. Raises RegistryError."""
        if self.uri.startswith(("http://", "https://")):
            _probe(self.uri)
        with self._reached("be used"):
            self.client.search_registered_models(max_results=1)
            self._experiment()

    # --- reading

    def versions(self) -> list[Version]:
        """All versions, the newest first."""
        with self._reached("list the versions"):
            found = self.client.search_model_versions(f"name='{self.name}'")
            aliases = self._aliases()
            return sorted((self._version(one, aliases) for one in found), key=lambda version: -version.number)

    def version(self, which: str | int) -> Version:
        """A version by number or alias. Raises RegistryError naming those there are."""
        every = self.versions()
        for version in every:
            if str(which) == str(version.number) or which in version.aliases:
                return version
        there = ", ".join(" ".join([str(one.number), *(f"({alias})" for alias in one.aliases)]) for one in every)
        raise RegistryError(
            f"There is no version '{which}' of model '{self.name}'. There are: {there or 'none'}. "
            + ("Name one of them." if every else "Train one: python -m app train.")
        )

    def champion(self) -> Version | None:
        """The version that serves, if there is one."""
        return self._with(CHAMPION)

    def champion_number(self) -> int | None:
        """The number of the version that serves: one cheap call, for those who ask often."""
        with self._reached("name the champion"):
            number = self._aliases().get(CHAMPION)
            return int(number) if number is not None else None

    def challenger(self) -> Version | None:
        """The version that was trained last and not promoted, if there is one."""
        return self._with(CHALLENGER)

    def load(self, which: str | int = CHAMPION) -> LoadedModel:
        """A version with its model, by number or alias."""
        version = self.version(which)
        import mlflow
        from mlflow.models import Model

        with self._reached(f"load version {version.number}"), self._current():
            directory = Path(mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version.number}"))
            booster = (directory / "model.ubj").read_bytes()
            told = (Model.load(directory).metadata or {})["shopsphere"]
        described = json.loads(told)
        if hashlib.sha256(booster).hexdigest() != described["digest"]:
            raise RegistryError(
                f"The stored bytes of version {version.number} of model '{self.name}' are not those that were trained. "
                "Roll back (python -m app models rollback), or train again."
            )
        model = FittedModel(
            booster=booster,
            features=tuple(feature["name"] for feature in described["features"]),
            feature_types=tuple(described["feature_types"]),
            categories={name: tuple(values) for name, values in described["categories"].items()},
            parameters=described["parameters"],
            best_iteration=described["best_iteration"],
            rounds=described["rounds"],
            validation_score=described["validation_score"],
        )
        delay = timedelta(seconds=described.get("label_delay_seconds", LABEL_DELAY.total_seconds()))
        return LoadedModel(version, model, described["threshold"], tuple(described["features"]), described["reference"], delay)

    # --- writing

    def record(self, training: TrainingRecord) -> Version:
        """Record a training and register its model as challenger: all of it, or none. Raises RegistryError."""
        import mlflow
        from mlflow.entities import RunStatus

        with self._reached("record the training"), self._current():
            experiment = self._experiment()
            run = self.client.create_run(
                experiment, run_name=f"{self.name}-{training.model.digest[:8]}", tags=self._tags(training)
            )
            status = RunStatus.to_string(RunStatus.FAILED)
            try:
                self._log(run.info.run_id, training)
                for trial in training.trials:
                    self._log_trial(experiment, run.info.run_id, trial)
                with mlflow.start_run(run_id=run.info.run_id):
                    stored = self._log_model(training)
                number = self._register(stored, run.info.run_id, training)
                status = RunStatus.to_string(RunStatus.FINISHED)
            finally:
                self.client.set_terminated(run.info.run_id, status)
            return self.version(number)

    def promote(self, which: str | int) -> Version:
        """Make a version the champion. It remembers the one it replaces."""
        version, champion = self.version(which), self.champion()
        if champion is not None and champion.number == version.number:
            return version
        with self._reached(f"promote version {version.number}"):
            self.client.set_model_version_tag(self.name, str(version.number), REPLACED, str(champion.number) if champion else "")
            self.client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
            if CHALLENGER in version.aliases:
                self.client.delete_registered_model_alias(self.name, CHALLENGER)
        return self.version(version.number)

    def rollback(self) -> Version:
        """Make the version that the champion replaced the champion again."""
        champion = self.champion()
        if champion is None:
            raise RegistryError(
                f"Model '{self.name}' has no champion to roll back. Promote one: python -m app models promote VERSION."
            )
        before = champion.tags.get(REPLACED, "")
        if not before:
            raise RegistryError(
                f"Version {champion.number} of model '{self.name}' was the first champion: there is none before it. "
                "Promote another: python -m app models promote VERSION."
            )
        version = self.version(int(before))
        with self._reached(f"roll back to version {version.number}"):
            self.client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
        return self.version(version.number)

    def annotate(self, which: str | int, **tags: str) -> None:
        """Add tags to a version, such as what the gate said."""
        version = self.version(which)
        with self._reached(f"annotate version {version.number}"):
            for name, value in tags.items():
                self.client.set_model_version_tag(self.name, str(version.number), name, value)

    def copy_to(self, directory: Path) -> None:
        """Write all that is recorded to a directory: each run's and version's description, and all their files.

        Raises RegistryError."""
        import mlflow
        from mlflow.entities import ViewType

        with self._reached("tell what is recorded"), self._current():
            experiment = self.client.get_experiment_by_name(self.name)
            known = [experiment.experiment_id] if experiment is not None else []
            token: str | None = "" if known else None
            while token is not None:
                runs = self.client.search_runs(known, run_view_type=ViewType.ALL, page_token=token or None)
                for run in runs:
                    place = directory / "runs" / run.info.run_id
                    place.mkdir(parents=True)
                    (place / "run.json").write_text(json.dumps(run.to_dictionary(), default=str))
                    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(place / "artifacts"))
                token = runs.token or None
            for version in self.client.search_model_versions(f"name='{self.name}'"):
                place = directory / "versions" / str(version.version)
                place.mkdir(parents=True)
                (place / "version.json").write_text(json.dumps(dict(version), default=str))
                mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version.version}", dst_path=str(place))

    # --- how

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, made when first needed."""
        if self._client is None:
            _quiet()
            if self.local:
                self.home.mkdir(parents=True, exist_ok=True)
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self._registry_uri)
        return self._client

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except ShopSphereError:
            raise
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise RegistryError(
                f"MLflow at {_without_password(self.uri)} could not {what}: {lines[0][:300]} "
                "Nothing was changed for the models that serve. Correct MLFLOW_TRACKING_URI or start the server, and run again."
            ) from error

    @contextmanager
    def _current(self) -> Iterator[None]:
        """MLflow's own loaders know one tracking server at a time: ours, for as long as it takes."""
        import mlflow

        # setting them also sets the environment, which is what MLflow falls back to when they are unset
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self._registry_uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
            mlflow.set_registry_uri(None)  # type: ignore[arg-type]
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is not None:
            return str(found.experiment_id)
        artifacts = (self.home / "artifacts").as_uri() if self.local else None
        return str(self.client.create_experiment(self.name, artifact_location=artifacts))

    def _aliases(self) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            return dict(self.client.get_registered_model(self.name).aliases)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    def _with(self, alias: str) -> Version | None:
        return next((version for version in self.versions() if alias in version.aliases), None)

    def _version(self, found: ModelVersion, aliases: Mapping[str, str]) -> Version:
        return Version(
            number=int(found.version),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(found.version))),
            run_id=str(found.run_id or ""),
            created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
            metrics=dict(self.client.get_run(found.run_id).data.metrics) if found.run_id else {},
            tags=dict(found.tags),
        )

    def _tags(self, training: TrainingRecord) -> dict[str, str]:
        return {
            "code_version": training.code_version,
            "model_digest": training.model.digest,
            **{f"snapshot.{table}": str(snapshot) for table, snapshot in sorted(training.snapshots.items())},
        }

    def _log(self, run_id: str, training: TrainingRecord) -> None:
        from mlflow.entities import Metric

        model = training.model
        parameters = {
            **model.parameters,
            "seed": training.seed,
            "best_iteration": model.best_iteration,
            "features": len(model.features),
            **{f"rows.{part}": count for part, count in training.rows.items()},
            **training.parameters,
        }
        figures = {**training.evaluation.metrics(), **training.metrics, "training_seconds": model.seconds}
        if model.validation_score is not None:
            figures["validation_average_precision"] = model.validation_score
        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), float(value), now, 0) for name, value in figures.items() if math.isfinite(value)]
        self.client.log_batch(run_id, metrics=metrics, params=_params(parameters))
        self.client.log_inputs(run_id, _datasets(training))
        with tempfile.TemporaryDirectory() as directory:
            for name, content in training.pictures.items():
                (Path(directory) / name).write_bytes(content)
            if training.pictures:
                self.client.log_artifacts(run_id, directory, "pictures")
        for name, text in training.tables.items():
            self.client.log_text(run_id, text, name)
        self.client.log_dict(run_id, {"features": _declared(training.features)}, "features.json")

    def _log_trial(self, experiment: str, parent: str, trial: Trial) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        run = self.client.create_run(experiment, run_name=f"trial-{trial.number}", tags={"mlflow.parentRunId": parent})
        metrics = [
            Metric("average_precision", trial.score, now, 0),
            Metric("seconds", trial.seconds, now, 0),
            *(Metric("fold_average_precision", score, now, step) for step, score in enumerate(trial.fold_scores)),
        ]
        self.client.log_batch(run.info.run_id, metrics=metrics, params=_params({**trial.parameters, "rounds": trial.rounds}))
        self.client.set_terminated(run.info.run_id)

    def _log_model(self, training: TrainingRecord) -> ModelInfo:
        """Store the model with the run. Nothing is registered yet."""
        import mlflow.xgboost
        import xgboost
        from mlflow.models import infer_signature

        model = training.model
        example = pl.DataFrame(model.matrix(training.example), schema=list(model.features), orient="row").to_pandas()
        described = {
            "digest": model.digest,
            "features": _declared(training.features),
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

    def _register(self, stored: ModelInfo, run_id: str, training: TrainingRecord) -> str:
        from mlflow.exceptions import MlflowException

        made = False
        try:
            self.client.create_registered_model(self.name, description="The chance that an order is fraudulent")
            made = True
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
            version = self.client.create_model_version(
                self.name, stored.model_uri, run_id=run_id, tags=tags, model_id=stored.model_id
            )
            self.client.set_registered_model_alias(self.name, CHALLENGER, str(version.version))
        except Exception:
            _undo(self.client, self.name, version, made)
            raise
        return str(version.version)


def _undo(client: MlflowClient, name: str, version: ModelVersion | None, made: bool) -> None:
    """Take back what was registered, as far as the server lets us; the first error is the one to tell."""
    try:
        if version is not None:
            client.delete_model_version(name, str(version.version))
        if made and not client.search_model_versions(f"name='{name}'"):
            client.delete_registered_model(name)
    except Exception as error:
        logging.getLogger(__name__).warning("could not take back a version of model '%s': %s", name, type(error).__name__)


def _datasets(training: TrainingRecord) -> list[DatasetInput]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def entry(name: str, digest: str, source: Mapping[str, Any], profile: Mapping[str, Any], context: str) -> DatasetInput:
        dataset = Dataset(
            name, digest[:36], "iceberg", json.dumps(source, sort_keys=True), profile=json.dumps(profile, sort_keys=True)
        )
        return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])

    whole = json.dumps(dict(training.snapshots), sort_keys=True)
    made = entry(
        f"{len(training.model.features)} features",
        hashlib.sha256(whole.encode()).hexdigest(),
        {"tables": dict(training.snapshots)},
        {"rows": dict(training.rows), "features": len(training.model.features)},
        "training",
    )
    return [
        made,
        *(
            entry(table, str(snapshot), {"table": table, "snapshot_id": snapshot}, {}, "source")
            for table, snapshot in sorted(training.snapshots.items())
        ),
    ]


def _declared(features: Sequence[FeatureLike]) -> list[dict[str, Any]]:
    told = ("name", "type", "window", "doc", "reason_text", "categories")
    return [{name: getattr(feature, name) for name in told if hasattr(feature, name)} for feature in features]


def _params(values: Mapping[str, Any]) -> list[Param]:
    from mlflow.entities import Param

    return [Param(_name(name), str(value)[:500]) for name, value in values.items()]


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text)[:250]


def _requirements() -> list[str]:
    """What loading the model needs; not this project."""
    wanted = []
    for names in (("mlflow",), ("xgboost-cpu", "xgboost"), ("numpy",), ("pandas",)):
        for name in names:
            try:
                wanted.append(f"{name}=={metadata.version(name)}")
                break
            except metadata.PackageNotFoundError:
                continue
    return wanted


def _probe(uri: str) -> None:
    """Ask the server for its health, a few times: MLflow's own client would try for minutes."""
    told = ""
    for attempt in range(PROBES):
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PROBE_SECONDS):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # something answers there; whether it lets us in, the next call tells
            told = f"it answers {error.code}"
        except (OSError, ValueError) as error:
            told = str(getattr(error, "reason", error))
        if attempt + 1 < PROBES:
            time.sleep(1.0)
    raise RegistryError(
        f"MLflow at {_without_password(uri)} cannot be reached: {told}. Nothing was trained. "
        "Start the server or correct MLFLOW_TRACKING_URI; without it, runs are kept under SHOPSPHERE_HOME."
    )


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{credentials.split(':')[0]}@{host}" if at else uri


def _quiet() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic", "mlflow.store.db.utils", "mlflow.models.model"):
        logging.getLogger(name).setLevel(logging.ERROR)
