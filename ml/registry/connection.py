"""The connection to an MLflow server or local store.

By default MLflow is a SQLite file and a directory under SHOPSPHERE_HOME/mlflow; MLFLOW_TRACKING_URI names any server.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lakehouse.errors import ShopSphereError

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEALTH_CHECKS, HEALTH_CHECK_SECONDS = 3, 5.0


class RegistryError(ShopSphereError):
    """MLflow cannot be reached, or has no such version."""


class Connection:
    """An MLflow client for a tracking URI. home: directory of the local store."""

    def __init__(self, uri: str, home: Path) -> None:
        self.home = home
        configured = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self.local = not configured
        self.uri = configured or f"sqlite:///{home / 'mlflow.db'}"
        self.registry_uri = os.environ.get("MLFLOW_REGISTRY_URI", self.uri)
        self._client: MlflowClient | None = None

    @property
    def command(self) -> str:
        """The shell command that shows the runs; it contains no password."""
        shown = _without_password(self.uri)
        if self.uri.startswith(("http://", "https://")):
            return f"open {shown}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri) if shown == self.uri else '$MLFLOW_TRACKING_URI'}"

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, created on first use."""
        if self._client is None:
            _silence()
            if self.local:
                self.home.mkdir(parents=True, exist_ok=True)
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.registry_uri)
        return self._client

    def check_health(self) -> None:
        """Raise RegistryError when the server does not answer within a few attempts: MLflow's own client retries for minutes."""
        if not self.uri.startswith(("http://", "https://")):
            return
        reason = ""
        for attempt in range(HEALTH_CHECKS):
            try:
                with urllib.request.urlopen(self.uri.rstrip("/") + "/health", timeout=HEALTH_CHECK_SECONDS):
                    return
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    return  # the server answers; a denied access is reported by the next call
                reason = f"it answers {error.code}"
            except (OSError, ValueError) as error:
                reason = str(getattr(error, "reason", error))
            if attempt + 1 < HEALTH_CHECKS:
                time.sleep(1.0)
        raise RegistryError(
            f"MLflow at {_without_password(self.uri)} cannot be reached: {reason}. Nothing was trained. "
            "Start the server or correct MLFLOW_TRACKING_URI; unset it to keep runs under SHOPSPHERE_HOME."
        )

    @contextmanager
    def errors_of(self, action: str) -> Iterator[None]:
        """Turn errors of MLflow into a RegistryError that names the server and the action, as in 'list the versions'."""
        try:
            yield
        except ShopSphereError:
            raise
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise RegistryError(
                f"MLflow at {_without_password(self.uri)} could not {action}: {lines[0][:300]} "
                "The serving models are unchanged. Correct MLFLOW_TRACKING_URI or start the server, and run again."
            ) from error

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """Make this MLflow's default server: its loaders take no client. The environment is restored afterwards."""
        import mlflow

        # setting the URIs also sets the environment variables, which MLflow falls back to when the URIs are unset
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.registry_uri)
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


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{credentials.split(':')[0]}@{host}" if at else uri


def _silence() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic", "mlflow.store.db.utils", "mlflow.models.model"):
        logging.getLogger(name).setLevel(logging.ERROR)
