"""Settings of a training, and the features it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lakehouse.errors import SettingsError, ShopSphereError
from lakehouse.storage import Storage

DEFAULT_PARAMETERS: Mapping[str, Any] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    # 256 bins are too coarse for amounts, and a fitted base score would depend on the data
    "max_bin": 1024,
    "base_score": 0.5,
    "eta": 0.05,
    "max_depth": 6,
    "min_child_weight": 3.0,
    "subsample": 0.8,
    "colsample_bytree": 0.6,
    "lambda": 2.0,
}


LOWEST = {"rounds": 1, "patience": 0, "workers": 1, "threads": 1, "report_every": 1, "max_failures": 0}
"""Lowest allowed values of settings."""


class TrainingError(ShopSphereError):
    """A model cannot be trained, or does not fit the data to score."""


class FeatureLike(Protocol):
    """The part of a feature that training uses. A feature of type 'category' also has `categories`."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training."""

    rounds: int = 600
    """Maximum number of trees; without validation orders, the exact number."""
    patience: int = 60
    """Rounds without a lower log loss over the validation orders after which training stops; 0: never. A ranking metric would
    stop training long before the scores are calibrated probabilities."""
    workers: int = 1
    """Ray Train workers. Their number affects the bytes of the model."""
    threads: int = 1
    """CPUs of each worker."""
    report_every: int = 100
    """Rounds between two checkpoints. Each checkpoint reseeds the random numbers, so this affects the bytes of the model."""
    seed: int = 7
    max_failures: int = 3
    """Worker failures after which the run fails."""
    storage: Storage | None = None
    """Directory of the checkpoints, in a cluster one that all nodes share; None: `training` in SHOPSPHERE_HOME."""
    keep: bool = False
    """Keep the checkpoints until `discard`: repeating the same training then returns at once."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_PARAMETERS)

    def __post_init__(self) -> None:
        for name, lowest in LOWEST.items():
            if getattr(self, name) < lowest:
                raise SettingsError(f"training.{name} is {getattr(self, name)}: expected {lowest} or more.")

    def with_parameters(self, **parameters: Any) -> TrainingSettings:
        """Return these settings with some XGBoost parameters replaced."""
        return replace(self, parameters={**self.parameters, **parameters})

    def xgboost(self) -> dict[str, Any]:
        """Return the parameters of XGBoost."""
        return {**self.parameters, "seed": self.seed, "nthread": self.threads, "verbosity": 0}
