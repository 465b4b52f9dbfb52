"""Table of contents of the whole lake: the tables of the pipelines, and those of the fraud model."""

from __future__ import annotations

import pipelines
from lakehouse.engine.engine import Engine, StepResult
from lakehouse.step import Step
from lakehouse.table import Table
from ml.registry import Registry
from ml.tables import order_features, user_fraud_scores

MODEL_STEPS: tuple[Step, ...] = (*order_features.STEPS, user_fraud_scores.DECLARED)
"""The steps of the fraud model: `train` and `monitor` take them, `run` leaves them alone."""

DECLARED: tuple[Step, ...] = (*pipelines.DECLARED, *MODEL_STEPS)
"""Every step."""

MODEL_TABLES: frozenset[str] = frozenset(step.target.name for step in MODEL_STEPS)

TABLES: dict[str, Table] = {
    table.name: table
    for layer in ("bronze", "silver", "gold")
    for table in (*pipelines.TABLES.values(), *(step.target for step in MODEL_STEPS))
    if table.layer == layer
}
"""Every table by name, bronze first."""


def rebuild_model_table(engine: Engine, table: Table) -> StepResult:
    """Fill a table of the fraud model again from everything upstream."""
    if table.name == user_fraud_scores.USER_FRAUD_SCORES.name:
        return user_fraud_scores.refresh(engine, Registry(home=engine.lake.settings.home).load(), rebuild=True)
    return order_features.rebuild(engine, table)
