"""The four tables that features are stored in: how they are refreshed and rebuilt."""

from __future__ import annotations

from datetime import timedelta

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.table import Table
from ml.features.declarations import LABEL_DELAY
from ml.tables import category_amounts, fraud_ratios, order_entities, order_features
from ml.tables.full_build import build, needs_build
from ml.tables.order_features import ORDER_FEATURES

STEPS = (order_entities.STEP, category_amounts.STEP, fraud_ratios.STEP, order_features.STEP)
"""The steps of the feature tables, in dependency order."""


def refresh(engine: Engine, *, rebuild: bool = False, delay: timedelta = LABEL_DELAY) -> list[StepResult]:
    """Bring the four tables up to date."""
    *upstream, _ = STEPS
    results = [engine.refresh(step, rebuild=rebuild) for step in upstream]
    last = order_features.step(delay)
    if rebuild or needs_build(engine, last):
        return [*results, build(engine, last, delay)]
    return [*results, engine.refresh(last)]


def rebuild(engine: Engine, table: Table, *, delay: timedelta = LABEL_DELAY) -> StepResult:
    """Rebuild one of the four tables from all rows upstream."""
    if table.name == ORDER_FEATURES.name:
        return build(engine, order_features.step(delay), delay)
    return engine.refresh(next(step for step in STEPS if step.target.name == table.name), rebuild=True)
