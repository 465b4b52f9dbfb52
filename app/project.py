"""The whole project: the retail lakehouse with the fraud model's tables."""

from __future__ import annotations

from dataclasses import replace

import pipelines
from ml.tables import MODEL_STEPS, REBUILD

PROJECT = replace(
    pipelines.PROJECT,
    on_demand=MODEL_STEPS,
    on_demand_refresh="the next train or monitor",
    rebuild_on_demand=REBUILD,
)
