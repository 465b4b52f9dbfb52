"""Table of contents of the fraud model's tables."""

from __future__ import annotations

from functools import partial

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.project import Rebuild
from lakehouse.step import Step
from ml.registry import Registry
from ml.tables import feature_tables, user_fraud_scores

MODEL_STEPS: tuple[Step, ...] = (*feature_tables.STEPS, user_fraud_scores.DECLARED)
"""The steps of the fraud model: refreshed by `train` and `monitor`, not by `run`."""


def _rebuild_user_fraud_scores(engine: Engine) -> StepResult:
    return user_fraud_scores.refresh(engine, Registry(home=engine.lake.settings.home).load(), rebuild=True)


REBUILD: dict[str, Rebuild] = {
    **{step.target.name: partial(feature_tables.rebuild, table=step.target) for step in feature_tables.STEPS},
    user_fraud_scores.USER_FRAUD_SCORES.name: _rebuild_user_fraud_scores,
}
"""The rebuild of each table of the fraud model."""
