"""A fraud model on a small sandbox, and one application that scores with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from starlette.testclient import TestClient

from app.project import PROJECT
from lakehouse.iceberg.catalog import Lake
from ml.evaluation.metrics import ThresholdSettings, choose_threshold, evaluate
from ml.features.compute import compute
from ml.features.declarations import OrderHistory
from ml.features.groups import FEATURES
from ml.registry import TrainingRecord
from ml.tables.order_features import account_events
from ml.training.boosting import fit_in_process
from ml.training.settings import TrainingSettings
from pipelines.settings import Settings, business_settings
from pipelines.silver.events_clean import EVENTS_CLEAN
from serve.application import Application
from serve.http.keys import Keys
from serve.settings import ServeSettings
from serve.state.reference_data import read_reference_data
from serve.state.score_topic import Score
from serve.state.table_cache import TableCache

TOPIC = f"scores{time.time_ns():x}"


@dataclass
class Desk:
    """A replica, a client of it, and the scores it has written."""

    settings: Settings
    application: Application
    client: TestClient
    written: list[Score] = field(default_factory=list)

    def score(self, **order: Any) -> Any:
        response = self.client.post("/v1/fraud/score", json=order_body(**order))
        assert response.status_code == 200, response.text
        return response.json()

    def features(self, order_id: str) -> Any:
        features = next(one.features for one in self.written if one.order_id == order_id)
        return {name: None if value != value else value for name, value in features.items()}


def order_body(**order: Any) -> dict[str, Any]:
    return {
        "order_id": f"n{time.time_ns()}",
        "currency": "USD",
        "total_amount": "120.00",
        "items": [{"product_id": "P0001", "quantity": 2, "unit_price": "60.00"}],
        "payment_method": "card",
    } | order


def train_model(settings: Settings, seed: int) -> TrainingRecord:
    """Train a model on the sandbox's features with a synthetic label, so that there is something to learn."""
    reference = read_reference_data(TableCache(Lake(settings)), business_settings(settings))
    events = account_events(Lake(settings).load(EVENTS_CLEAN).read(EVENTS_CLEAN.schema.names))
    frame = compute(reference.entities, OrderHistory(reference.entities, events, reference.categories)).sort(
        "placed_at", "order_id"
    )
    is_fraud = (frame["amount"] > 80) ^ pl.Series(np.random.default_rng(seed).random(frame.height) < 0.2)
    frame = frame.with_columns(label=is_fraud.fill_null(False).cast(pl.Int8)).join(
        reference.entities.select("order_id", "customer"), on="order_id"
    )
    train, test = frame.head(frame.height // 2), frame.tail(frame.height // 2)
    model = fit_in_process(train, None, FEATURES, TrainingSettings(rounds=15, seed=seed))
    thresholds = ThresholdSettings()
    threshold = choose_threshold(test, model.score(test), thresholds)
    return TrainingRecord(
        model=model,
        features=FEATURES,
        evaluation=evaluate(test, model.score(test), thresholds, threshold),
        example=test.head(3),
        snapshots={},
        seed=seed,
        code_version="test",
    )


def replica(settings: Settings, **serving: Any) -> Application:
    options = {"scores_topic": TOPIC, "refresh_seconds": 0.3, "model_seconds": 0.3, "probe_seconds": 0.05} | serving
    keys = None if "keys_file" in serving else Keys()
    return Application(settings, ServeSettings(**options), business_settings(settings), keys, project=PROJECT)


@contextlib.contextmanager
def running(application: Application) -> Iterator[TestClient]:
    with TestClient(application.asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1") as client:
        deadline = time.monotonic() + 60
        while client.get("/-/readyz").status_code != 200:
            assert time.monotonic() < deadline, client.get("/-/readyz").text
            time.sleep(0.05)
        yield client
