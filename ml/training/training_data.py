"""Training and validation orders, checked and encoded for XGBoost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from ml.training.model import FloatMatrix, Labels, encode
from ml.training.settings import FeatureLike, TrainingError


@dataclass(frozen=True)
class TrainingData:
    """Training and validation orders, encoded for XGBoost."""

    columns: FloatMatrix
    label: Labels
    validation_columns: FloatMatrix | None
    validation_label: Labels | None
    features: tuple[str, ...]
    feature_types: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    weight: FloatMatrix | None = None
    """Weight of each training order; None: all 1."""

    def stripe(self, number: int, of: int) -> TrainingData:
        """Return the data of one worker: every `of`-th training order, and all validation orders."""
        stripe = slice(number, None, of)
        weight = None if self.weight is None else self.weight[stripe]
        return replace(self, columns=np.ascontiguousarray(self.columns[stripe]), label=self.label[stripe], weight=weight)

    def digest(self) -> str:
        """Return the SHA-256 digest of the data and its declaration."""
        hashed = hashlib.sha256(json.dumps([self.features, self.feature_types, dict(self.categories)]).encode())
        for array in (self.columns, self.label, self.validation_columns, self.validation_label):
            hashed.update(b"-" if array is None else np.ascontiguousarray(array).data)
        if self.weight is not None:
            hashed.update(np.ascontiguousarray(self.weight).data)
        return hashed.hexdigest()


def encode_data(train: pl.DataFrame, validation: pl.DataFrame | None, features: Sequence[FeatureLike]) -> TrainingData:
    """Check and encode the frames. Rows are sorted by (placed_at, order_id) where the frame has these columns, so that the
    same set of orders always trains the same model. Raises TrainingError for invalid labels, weights or features."""
    names = tuple(feature.name for feature in features)
    types = tuple("c" if feature.type == "category" else "q" for feature in features)
    categories = {
        feature.name: tuple(getattr(feature, "categories", ()) or ()) for feature in features if feature.type == "category"
    }
    train = _in_order(train)
    label = _checked_label(train, "training")
    held_out = _in_order(validation) if validation is not None and len(validation) else None
    return TrainingData(
        columns=encode(train, names, types, categories),
        label=label,
        validation_columns=encode(held_out, names, types, categories) if held_out is not None else None,
        validation_label=_checked_label(held_out, "validation") if held_out is not None else None,
        features=names,
        feature_types=types,
        categories=categories,
        weight=_checked_weight(train),
    )


def _in_order(frame: pl.DataFrame) -> pl.DataFrame:
    keys = [name for name in ("placed_at", "order_id") if name in frame.columns]
    return frame.sort(keys, maintain_order=True) if keys else frame


def _checked_label(frame: pl.DataFrame, which: str) -> Labels:
    if "label" not in frame.columns:
        raise TrainingError(f"The {which} orders have no column 'label'. Read them with ml.training.training_set.")
    label = frame.get_column("label")
    if label.null_count() or not set(label.unique().to_list()) <= {0, 1}:
        raise TrainingError(f"A label of the {which} orders is neither 0 nor 1. Leave out orders whose label is not yet mature.")
    if label.n_unique() < 2:
        only = "is a fraud" if len(label) and label[0] == 1 else "is honest"
        found = "there are none" if not len(label) else f"every one of {len(label)} {only}"
        raise TrainingError(
            f"The {which} orders need both frauds and honest orders, but {found}. "
            "Use a longer window, or a later cut-off with more reported chargebacks."
        )
    return label.cast(pl.Int8).to_numpy()


def _checked_weight(frame: pl.DataFrame) -> FloatMatrix | None:
    if "weight" not in frame.columns:
        return None
    weight = frame.get_column("weight").cast(pl.Float32).fill_null(float("nan")).to_numpy()
    if not bool(np.all(np.isfinite(weight) & (weight > 0))):
        raise TrainingError("A weight of the training orders is not a positive number. Leave out orders that must not count.")
    return weight
