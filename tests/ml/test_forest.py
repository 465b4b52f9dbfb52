"""The array forest has the same scores and contributions as XGBoost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import xgboost

from ml.forest import forest_of
from ml.training.boosting import fit_in_process
from ml.training.model import FittedModel
from ml.training.settings import TrainingError, TrainingSettings


@dataclass(frozen=True)
class Declared:
    name: str
    type: str
    categories: tuple[str, ...] = ()


FEATURES = (
    Declared("amount", "amount"),
    Declared("channel", "category", ("web", "pos", "marketplace", "other", "missing")),
    Declared("age", "minutes"),
    Declared("weekday", "category", tuple("abcdefg")),
    Declared("flag", "flag"),
)


def orders(count: int, seed: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    amount, age = random.lognormal(3, 1, count), random.exponential(100, count)
    channel, day = random.integers(0, 5, count), random.integers(0, 7, count)
    fraud = (amount > 40) & np.isin(channel, [0, 3]) | (np.isin(day, [2, 5]) & (age < 30))
    fraud ^= random.random(count) < 0.05
    return pl.DataFrame(
        {
            "amount": pl.Series(np.where(random.random(count) < 0.1, np.nan, amount)).fill_nan(None),
            "channel": [FEATURES[1].categories[n] for n in channel],
            "age": pl.Series(np.where(random.random(count) < 0.3, np.nan, age)).fill_nan(None),
            "weekday": [FEATURES[3].categories[n] if random.random() > 0.1 else None for n in day],
            "flag": pl.Series(random.integers(0, 2, count)).cast(pl.Float64),
            "label": fraud.astype(np.int8),
        }
    )


@pytest.fixture(
    scope="module", params=[{}, {"max_depth": 1}, {"max_depth": 9, "base_score": 0.1}, {"max_cat_to_onehot": 9}], ids=str
)
def model(request: pytest.FixtureRequest) -> FittedModel:
    settings = TrainingSettings(rounds=60, patience=0).with_parameters(**request.param)
    return fit_in_process(orders(4000, 1), None, FEATURES, settings)


def test_scores_equal_those_of_xgboost(model: FittedModel) -> None:
    rows = model.matrix(orders(500, 2))
    forest = forest_of(model, rows)
    assert np.abs(np.array([forest.score(row) for row in rows]) - model.score_matrix(rows)).max() < 1e-6


def test_contributions_equal_those_of_xgboost_and_add_up(model: FittedModel) -> None:
    rows = model.matrix(orders(300, 3))
    forest = forest_of(model)
    booster = xgboost.Booster(model_file=bytearray(model.booster))
    types = ["c" if f.type == "category" else "q" for f in FEATURES]
    data = xgboost.DMatrix(rows, feature_names=[f.name for f in FEATURES], feature_types=types, enable_categorical=True)
    theirs = booster.predict(data, pred_contribs=True, approx_contribs=True)
    for row, want in zip(rows, theirs, strict=True):
        score, added = forest.explain(row)
        assert np.abs(added - want[:-1]).max() < 1e-3
        assert forest.bias == pytest.approx(want[-1], abs=1e-3)
        assert np.log(score / (1 - score)) == pytest.approx(forest.bias + added.sum(), abs=1e-9)


def test_a_row_with_only_missing_values(model: FittedModel) -> None:
    row = np.full((1, len(FEATURES)), np.nan, dtype=np.float32)
    assert forest_of(model).score(row[0]) == pytest.approx(float(model.score_matrix(row)[0]), abs=1e-6)


def test_other_kinds_of_models_are_rejected() -> None:
    data = orders(500, 4)
    settings = TrainingSettings(rounds=5, patience=0).with_parameters(objective="reg:squarederror")
    with pytest.raises(TrainingError, match="reg:squarederror"):
        forest_of(fit_in_process(data, None, FEATURES, settings))
