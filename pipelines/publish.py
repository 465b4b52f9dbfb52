"""Publishes a staged snapshot by hand."""

from __future__ import annotations

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import published_by_hand, results_from_json
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS
from lakehouse.project import Project
from pipelines.runner import recorded


def publish_staged(engine: Engine, project: Project, name: str) -> int:
    """Publish the staged snapshot of a table although its expectations failed; return its id. Raises ShopSphereError."""
    table = project.find_table(name)
    handle = engine.lake.load(table, create=False)
    if handle.staged is None:
        others = "" if table.layer == "gold" else " Only gold tables are staged; other tables keep their previous rows."
        raise ShopSphereError(f"{table.name} has no staged snapshot to publish.{others} See `python -m app status`.")
    with recorded(engine, "publish") as results:
        outcomes = tuple(
            published_by_hand(outcome)
            for outcome in results_from_json(handle.snapshot_property(EXPECTATIONS, handle.staged.snapshot_id))
        )
        snapshot = handle.publish()
        results.append(StepResult(table.name, "published", snapshot=snapshot, results=outcomes))
    return snapshot
