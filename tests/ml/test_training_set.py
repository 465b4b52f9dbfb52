"""Training sets: labels as of the cut-off, and splits separated in time."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from support.engines import make_engine
from support.shop_history import START, made_order, put_shop

from lakehouse.engine.engine import Engine
from lakehouse.errors import SettingsError
from ml.features.groups import FEATURE_NAMES
from ml.tables.feature_tables import refresh
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES
from ml.training.training_set import SplitSettings, TrainingSetError, labelled_orders, newest_moment, training_set

DELAY = timedelta(days=10)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """300 orders, three a day; every tenth is reported after 2 days, every 25th after 30 days."""
    made = make_engine(Path(tmp_path_factory.mktemp("shop")))
    orders = [
        made_order(
            n,
            n * 480,
            user=n % 20,
            card=n % 20,
            device=n % 20,
            amount="10.00",
            person=n % 20,
            reported=2 if n % 10 == 0 else 30 if n % 25 == 1 else None,
        )
        for n in range(300)
    ]
    put_shop(made, orders)
    refresh(made, delay=DELAY)
    return made


def moment(days: float) -> datetime:
    return START + timedelta(days=days)


def test_splits_are_separated_by_the_delay(engine):
    data = training_set(engine.lake, engine.pool, moment(100), SplitSettings(test=0.25, validation=0.15, delay=DELAY))
    assert data.test["placed_at"].max() <= moment(100) - DELAY
    assert data.known["placed_at"].max() < data.test["placed_at"].min() - DELAY
    assert data.train["placed_at"].max() < data.validation["placed_at"].min() - DELAY
    assert data.validation["placed_at"].max() == data.known["placed_at"].max()
    assert data.train["placed_at"].min() == START
    labelled = 271  # of days 0 to 90
    assert data.rows["test"] == round(labelled * 0.25)
    assert data.rows["validation"] == round(labelled * 0.15)
    assert data.unlabelled == 300 - labelled
    assert set(data.snapshots) == {
        "silver.order_features",
        "silver.order_entities",
        "silver.category_amounts",
        "silver.fraud_ratios",
    }
    assert data.train.columns == ["order_id", "placed_at", "customer", *FEATURE_NAMES, "label"]


def test_labels_are_those_known_at_the_cutoff(engine):
    features, entities = engine.lake.load(ORDER_FEATURES), engine.lake.load(ORDER_ENTITIES)

    def labels(cutoff: datetime) -> dict[str, int]:
        frame = labelled_orders(features, entities, engine.pool, until=moment(40), cutoff=cutoff, since=moment(20))
        assert frame["placed_at"].is_between(moment(20), moment(40), closed="right").all()
        return dict(frame.select("order_id", "label").iter_rows())

    # order 90 was placed on day 30 and reported on day 32, order 76 on day 25.3 and reported on day 55.3
    assert [labels(moment(day))["90"] for day in (31, 32, 33)] == [0, 1, 1]
    assert [labels(moment(day))["76"] for day in (55, 56)] == [0, 1]
    # training labels exclude frauds reported after the test window began
    data = training_set(engine.lake, engine.pool, moment(100), SplitSettings(test=0.25, validation=0.15, delay=DELAY))
    began = data.test["placed_at"].min()
    reports = entities.read(["order_id", "known_at"], pl.col("known_at") <= began)["order_id"]
    frauds = data.known.filter(pl.col("label") == 1)["order_id"]
    assert set(frauds) == set(data.known["order_id"]) & set(reports)


def test_newest_moment_is_a_report_or_an_order(engine):
    assert newest_moment(engine.lake.load(ORDER_ENTITIES)) == max(moment(290 / 3 + 2), moment(276 / 3 + 30), moment(299 / 3))


def test_too_little_history_is_an_error_with_a_remedy(engine, tmp_path):
    with pytest.raises(TrainingSetError, match="Wait for more orders"):
        training_set(engine.lake, engine.pool, moment(100), SplitSettings(delay=timedelta(days=45)))
    with pytest.raises(TrainingSetError, match="app run"):
        training_set(make_engine(tmp_path).lake, engine.pool)
    with pytest.raises(SettingsError, match=r"split\.test"):
        SplitSettings(test=0.9, validation=0.2)
