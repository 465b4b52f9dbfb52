"""The plain script of the benchmark computes the same features: an independent check of all of them."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from support.shop_history import plain_history

from ml.features.compute import compute, with_ratios
from ml.features.declarations import OrderHistory
from ml.features.groups import FEATURES
from ml.tables.category_amounts import totals

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from plain_features import features as plain_features


@pytest.mark.parametrize("seed", [4, 5])
def test_every_feature_equals_that_of_the_plain_script(seed):
    orders, events, _ = plain_history(2000, seed, days=200)
    # the script does not order simultaneous orders, and uses report times as they are
    orders = orders.sort("placed_at", "order_id").with_columns(
        placed_at=pl.col("placed_at") + pl.duration(microseconds=pl.int_range(pl.len())),
        known_at=pl.when(pl.col("known_at").is_not_null()).then(
            pl.max_horizontal("known_at", pl.col("placed_at") + timedelta(hours=1))
        ),
    )
    ours = compute(with_ratios(orders), OrderHistory(events=events, categories=totals(orders))).sort("order_id")
    theirs = plain_features(orders, events).sort("order_id")
    for feature in FEATURES:
        a, b = ours[feature.name], theirs[feature.name]
        if feature.type == "category":
            assert a.to_list() == b.to_list(), feature.name
        else:
            assert close(a, b.cast(pl.Float64)), feature.name


def close(left: pl.Series, right: pl.Series) -> bool:
    """Return whether series are equal up to the last digits, with nulls in the same rows."""
    return bool((left.is_null() == right.is_null()).all()) and bool(((left - right).abs() <= 1e-9 * (1 + left.abs())).all())
