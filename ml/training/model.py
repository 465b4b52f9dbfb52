"""A trained model, and the encoding of features as its columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.storage import Storage
from ml.training.settings import TrainingError

if TYPE_CHECKING:
    import xgboost

FloatMatrix = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class FittedModel:
    """A trained model: its bytes in XGBoost's format, and how its columns are encoded from features."""

    booster: bytes
    """UBJSON, truncated to the best round."""
    features: tuple[str, ...]
    feature_types: tuple[str, ...]
    """In XGBoost's terms: 'q' for a number, 'c' for a category code."""
    categories: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Any]
    best_iteration: int
    rounds: int
    """Rounds that were boosted, before truncation."""
    validation_score: float | None = None
    """Average precision over the validation orders at the best round."""
    seconds: float = field(default=0.0, compare=False)
    checkpoints: Storage | None = field(default=None, compare=False)
    """Directory of its checkpoints, if they were kept."""

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

    def matrix(self, frame: pl.DataFrame) -> FloatMatrix:
        """Return the model's columns of a frame of features."""
        return encode(frame, self.features, self.feature_types, self.categories)

    def score(self, frame: pl.DataFrame) -> npt.NDArray[np.float64]:
        """Return the probability of fraud of each order. Raises TrainingError when the frame lacks a feature."""
        return self.score_matrix(self.matrix(frame))

    def score_matrix(self, columns: FloatMatrix) -> npt.NDArray[np.float64]:
        """Return the probability of fraud for each row of columns encoded by `matrix`."""
        if not len(columns):
            return np.zeros(0)
        return np.asarray(self._loaded.inplace_predict(columns, validate_features=False), dtype=np.float64)

    def contributions(self, frame: pl.DataFrame) -> npt.NDArray[np.float32]:
        """Return the contribution of each feature to the log-odds of each order (TreeSHAP); the last column is the bias."""
        return self.contributions_matrix(self.matrix(frame))

    def contributions_matrix(self, columns: FloatMatrix, approximate: bool = False) -> npt.NDArray[np.float32]:
        """Return the contributions for columns encoded by `matrix`. approximate: by Saabas' method, as `ml.forest` does."""
        data = dmatrix(columns, None, self.features, self.feature_types)
        return np.asarray(self._loaded.predict(data, pred_contribs=True, approx_contribs=approximate))


def encode(
    frame: pl.DataFrame, names: Sequence[str], types: Sequence[str], categories: Mapping[str, tuple[str, ...]]
) -> FloatMatrix:
    """Return features as 32-bit floats: null becomes NaN, a category its index among the declared categories.

    Raises TrainingError for missing features and for an undeclared category."""
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
            f"({', '.join(declared) or 'none declared'}). Declare it, or map it to 'other' in the feature."
        )
    return column.replace_strict(list(declared), list(range(len(declared))), return_dtype=pl.Int32) if declared else column


def dmatrix(columns: FloatMatrix, label: Labels | None, names: Sequence[str], types: Sequence[str]) -> xgboost.DMatrix:
    """Return columns, with labels or without, as XGBoost's matrix."""
    import xgboost

    return xgboost.DMatrix(
        columns, label=label, feature_names=list(names), feature_types=list(types), enable_categorical="c" in types, nthread=1
    )
