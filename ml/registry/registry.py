"""The versions of a registered model, and their aliases.

A training is recorded as one run with its search trials as nested runs. A version of the registered model is created only
when the whole run is stored, and only then the alias `challenger` moves to it. The version with the alias `champion` is
served; moving that alias is one atomic call. The tag `replaced_champion` of each promoted version names the version that it
replaced, for `rollback`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lakehouse.settings import home_directory
from ml.features.declarations import LABEL_DELAY
from ml.registry.connection import Connection, RegistryError
from ml.registry.recording import log_model, log_training, log_trial, register_version, run_tags
from ml.registry.versions import CHALLENGER, CHAMPION, LoadedModel, TrainingRecord, Version
from ml.training.model import FittedModel

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

REPLACED = "replaced_champion"


class Registry:
    """The registered model `name` at an MLflow server, with its runs in the experiment of the same name."""

    def __init__(self, uri: str = "", name: str = "fraud", home: Path | None = None) -> None:
        self.name = name
        self.connection = Connection(uri, (home or home_directory()).absolute() / "mlflow")

    @property
    def client(self) -> MlflowClient:
        """The MLflow client."""
        return self.connection.client

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return self.connection.uri

    @property
    def local(self) -> bool:
        """Whether MLflow is a local store, not a server."""
        return self.connection.local

    @property
    def command(self) -> str:
        """The shell command that shows the runs."""
        return self.connection.command

    def check(self) -> None:
        """Raise RegistryError when a training could not be recorded. Call it before training."""
        self.connection.check_health()
        with self.connection.errors_of("be used"):
            self.client.search_registered_models(max_results=1)
            self._experiment()

    # --- reading

    def versions(self) -> list[Version]:
        """Return all versions, newest first."""
        with self.connection.errors_of("list the versions"):
            found = self.client.search_model_versions(f"name='{self.name}'")
            aliases = self._aliases()
            return sorted((self._version(one, aliases) for one in found), key=lambda version: -version.number)

    def version(self, which: str | int) -> Version:
        """Return a version by number or alias. Raises RegistryError with the existing versions."""
        versions = self.versions()
        for version in versions:
            if str(which) == str(version.number) or which in version.aliases:
                return version
        existing = ", ".join(" ".join([str(one.number), *(f"({alias})" for alias in one.aliases)]) for one in versions)
        raise RegistryError(
            f"There is no version '{which}' of model '{self.name}'. There are: {existing or 'none'}. "
            + ("Name one of them." if versions else "Train one: python -m app train.")
        )

    def champion(self) -> Version | None:
        """Return the version that is served, if there is one."""
        return self._with(CHAMPION)

    def champion_number(self) -> int | None:
        """Return the number of the version that is served: one cheap call, for polling."""
        with self.connection.errors_of("name the champion"):
            number = self._aliases().get(CHAMPION)
            return int(number) if number is not None else None

    def challenger(self) -> Version | None:
        """Return the last trained version that was not promoted, if there is one."""
        return self._with(CHALLENGER)

    def load(self, which: str | int = CHAMPION) -> LoadedModel:
        """Return a version with its model, by number or alias. Raises RegistryError when its stored bytes were changed."""
        version = self.version(which)
        import mlflow
        from mlflow.models import Model

        with self.connection.errors_of(f"load version {version.number}"), self.connection.as_default():
            directory = Path(mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version.number}"))
            booster = (directory / "model.ubj").read_bytes()
            metadata = (Model.load(directory).metadata or {})["shopsphere"]
        described = json.loads(metadata)
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
        return LoadedModel(
            version=version,
            model=model,
            threshold=described["threshold"],
            features=tuple(described["features"]),
            reference=described["reference"],
            label_delay=timedelta(seconds=described.get("label_delay_seconds", LABEL_DELAY.total_seconds())),
        )

    # --- writing

    def record(self, training: TrainingRecord) -> Version:
        """Record a training and register its model as challenger: all of it, or none. Raises RegistryError."""
        import mlflow
        from mlflow.entities import RunStatus

        with self.connection.errors_of("record the training"), self.connection.as_default():
            experiment = self._experiment()
            name = f"{self.name}-{training.model.digest[:8]}"
            run = self.client.create_run(experiment, run_name=name, tags=run_tags(training))
            status = RunStatus.to_string(RunStatus.FAILED)
            try:
                log_training(self.client, run.info.run_id, training)
                for trial in training.trials:
                    log_trial(self.client, experiment, run.info.run_id, trial)
                with mlflow.start_run(run_id=run.info.run_id):
                    stored = log_model(training)
                number = register_version(self.client, self.name, stored, run.info.run_id, training)
                status = RunStatus.to_string(RunStatus.FINISHED)
            finally:
                self.client.set_terminated(run.info.run_id, status)
            return self.version(number)

    def promote(self, which: str | int) -> Version:
        """Make a version the champion, and tag it with the number of the one that it replaces."""
        version, champion = self.version(which), self.champion()
        if champion is not None and champion.number == version.number:
            return version
        with self.connection.errors_of(f"promote version {version.number}"):
            self.client.set_model_version_tag(self.name, str(version.number), REPLACED, str(champion.number) if champion else "")
            self.client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
            if CHALLENGER in version.aliases:
                self.client.delete_registered_model_alias(self.name, CHALLENGER)
        return self.version(version.number)

    def rollback(self) -> Version:
        """Make the version that the champion replaced the champion again. Raises RegistryError when there is none."""
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
        with self.connection.errors_of(f"roll back to version {version.number}"):
            self.client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
        return self.version(version.number)

    def annotate(self, which: str | int, **tags: str) -> None:
        """Add tags to a version, such as the verdict of the gate."""
        version = self.version(which)
        with self.connection.errors_of(f"annotate version {version.number}"):
            for name, value in tags.items():
                self.client.set_model_version_tag(self.name, str(version.number), name, value)

    def copy_to(self, directory: Path) -> None:
        """Copy everything recorded to a directory: the description and the files of each run and version.

        Raises RegistryError."""
        import mlflow
        from mlflow.entities import ViewType

        with self.connection.errors_of("copy the recorded runs"), self.connection.as_default():
            experiment = self.client.get_experiment_by_name(self.name)
            experiments = [experiment.experiment_id] if experiment is not None else []
            token: str | None = "" if experiments else None
            while token is not None:
                runs = self.client.search_runs(experiments, run_view_type=ViewType.ALL, page_token=token or None)
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

    # --- MLflow's entities

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is not None:
            return str(found.experiment_id)
        artifacts = (self.connection.home / "artifacts").as_uri() if self.local else None
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
