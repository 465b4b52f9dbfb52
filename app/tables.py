"""Table of contents of the whole lake: the tables of the pipelines, and those that the fraud model's features fill."""

from __future__ import annotations

import pipelines
from lakehouse.step import Step
from lakehouse.table import Table
from ml.order_features import STEPS as FEATURE_STEPS

DECLARED: tuple[Step, ...] = (*pipelines.DECLARED, *FEATURE_STEPS)
"""Every step. `run` takes those of the pipelines; `train`, `monitor` and `models compare` take FEATURE_STEPS."""

FEATURE_TABLES: frozenset[str] = frozenset(step.target.name for step in FEATURE_STEPS)

TABLES: dict[str, Table] = {
    table.name: table
    for layer in ("bronze", "silver", "gold")
    for table in (*pipelines.TABLES.values(), *(step.target for step in FEATURE_STEPS))
    if table.layer == layer
}
"""Every table by name, bronze first."""
