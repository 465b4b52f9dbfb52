"""Values of the registry: a training to record, a version, and a version with its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from ml.evaluation.metrics import Evaluation
from ml.features.declarations import LABEL_DELAY
from ml.training.model import FittedModel
from ml.training.search import Trial
from ml.training.settings import FeatureLike

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of the serving version, and of the last trained version that was not promoted."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Everything about one training that is recorded."""

    model: FittedModel
    features: Sequence[FeatureLike]
    evaluation: Evaluation
    """Over the newest labelled window."""
    example: pl.DataFrame
    """Features of a few orders."""
    snapshots: Mapping[str, int]
    """Iceberg snapshot of each table that the training set was read from."""
    seed: int
    code_version: str
    rows: Mapping[str, int] = field(default_factory=dict)
    """Number of orders in 'train', 'validation', 'test'."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    trials: Sequence[Trial] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Further settings: cut-off, label delay, threshold settings, ..."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further metrics: baselines, upper bound, ..."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Text files of the run, by name: the table of baselines."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    """Distributions that monitoring compares live data with, as JSON values."""
    label_delay: timedelta = LABEL_DELAY
    """Label delay that its features assume."""


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A version with its model."""

    version: Version
    model: FittedModel
    threshold: float
    features: tuple[Mapping[str, Any], ...]
    """Feature declarations that it was trained with."""
    reference: Mapping[str, Any]
    label_delay: timedelta = LABEL_DELAY
    """Label delay that its features assume; the default for versions that did not record it."""
