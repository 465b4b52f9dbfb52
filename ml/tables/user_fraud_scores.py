"""gold.user_fraud_scores: the champion's fraud scores per person, beside the hand-weighted gold.user_risk_scores.

A new champion re-scores all persons. Otherwise only persons with new orders or changed features are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial

import polars as pl
import pyarrow as pa

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import within
from lakehouse.step import Grouped, Lookup, Step
from lakehouse.table import TIMESTAMP, Table, column, references
from ml.features.groups import FEATURE_NAMES
from ml.registry import LoadedModel
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES
from pipelines.affected_rows import rows_with
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.settings import BusinessSettings

RECENT = timedelta(days=30)

USER_FRAUD_SCORES = Table(
    "gold.user_fraud_scores",
    doc="Fraud risk per person with an order, by the champion of the fraud model: the probability that an order is "
    "fraudulent, from data known when it was placed.",
    columns=(
        column("master_user_id", pa.string(), "The person.", required=True),
        column("fraud_score", pa.float64(), "Score of the newest order, 0 to 1.", required=True),
        column(
            "highest_score",
            pa.float64(),
            f"Highest score among the orders in the {RECENT.days} days up to the newest.",
            required=True,
        ),
        column("orders", pa.int32(), "Number of scored orders.", required=True),
        column("orders_over_threshold", pa.int32(), "Number of orders at or above the model's threshold.", required=True),
        column("last_order_id", pa.string(), "The newest order, as in silver.orders_unified.", required=True),
        column("last_order_at", TIMESTAMP, "When it was placed.", required=True),
        column("model_version", pa.int32(), "Version of the registered model.", required=True),
    ),
    key=("master_user_id",),
    references=(references("master_user_id", CUSTOMER_360),),
    owner="risk",
    expectations=(
        within("fraud_score", 0, 1),
        within("highest_score", 0, 1),
        within("orders", 1, None),
    ),
)


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings, champion: LoadedModel) -> pl.DataFrame:
    """Return the rows of the affected persons."""
    orders = frames["orders"].unique("order_id").join(frames["features"].unique("order_id"), on="order_id")
    scored = orders.select(
        "order_id",
        "placed_at",
        pl.col("person").alias("master_user_id"),
        pl.Series("score", champion.model.score(orders), dtype=pl.Float64),
    ).sort("master_user_id", "placed_at", "order_id")
    recent = pl.col("placed_at") > pl.col("placed_at").last() - RECENT
    return scored.group_by("master_user_id", maintain_order=True).agg(
        pl.col("score").last().alias("fraud_score"),
        pl.col("score").filter(recent).max().alias("highest_score"),
        pl.len().cast(pl.Int32).alias("orders"),
        (pl.col("score") >= champion.threshold).sum().cast(pl.Int32).alias("orders_over_threshold"),
        pl.col("order_id").last().alias("last_order_id"),
        pl.col("placed_at").last().alias("last_order_at"),
        pl.lit(champion.version.number, pl.Int32).first().alias("model_version"),
    )


READS: Mapping[str, Grouped | Lookup] = {
    "orders": Grouped(ORDER_ENTITIES, keys=((pl.col("person"),),), columns=("order_id", "placed_at", "person")),
    "features": Lookup(
        ORDER_FEATURES,
        on="order_id",
        values=lambda frames: frames["orders"]["order_id"],
        columns=("order_id", *FEATURE_NAMES),
        affects=rows_with("order_id"),
        through=ORDER_ENTITIES,
        affected_keys=(pl.col("person"),),
    ),
}


def step(champion: LoadedModel) -> Step:
    """Return the step that fills the table with a champion's scores."""
    parameter = ("champion", f"{champion.version.number} {champion.model.digest} {champion.threshold!r}")
    return Step(target=USER_FRAUD_SCORES, reads=READS, transform=partial(transform, champion=champion), parameters=(parameter,))


def refresh(engine: Engine, champion: LoadedModel, *, rebuild: bool = False) -> StepResult:
    """Bring the table up to date with silver.order_features and the champion."""
    return engine.refresh(step(champion), rebuild=rebuild)


def _without_champion(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    raise ShopSphereError(f"{USER_FRAUD_SCORES.name} is filled by a champion. Train one: python -m app train.")


DECLARED = Step(target=USER_FRAUD_SCORES, reads=READS, transform=_without_champion)
"""The table's reads, for lineage and documentation; `step` fills it."""
