"""The model registry: the only package that uses MLflow."""

from __future__ import annotations

from ml.registry.connection import RegistryError
from ml.registry.registry import Registry
from ml.registry.versions import CHALLENGER, CHAMPION, LoadedModel, TrainingRecord, Version

__all__ = ["CHALLENGER", "CHAMPION", "LoadedModel", "Registry", "RegistryError", "TrainingRecord", "Version"]
