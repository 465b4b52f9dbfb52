"""The snapshots of all tables that a training set is derived from, directly or through other tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table
from ml.tables.feature_tables import STEPS

SOURCES: dict[str, Table] = {
    table.name: table
    for step in STEPS
    for read in step.reads.values()
    for table in (read.table, getattr(read, "through", None))
    if table is not None
}
"""The tables that the feature tables read."""


def lineage(lake: Lake) -> dict[str, int]:
    """Return the snapshot of each feature table, and of each table upstream at the position that was read."""
    handles = {table.name: lake.load(table) for table in (step.target for step in STEPS)}
    found = {name: handle.snapshot.snapshot_id for name, handle in handles.items() if handle.snapshot}
    for handle in handles.values():
        for name, position in handle.positions.items():
            if name not in found and (snapshot := _snapshot_at(lake, name, position)) is not None:
                found[name] = snapshot
    return dict(sorted(found.items()))


def _snapshot_at(lake: Lake, name: str, position: Any) -> int | None:
    """Return the snapshot of a table at a position; None if it has been expired."""
    table = SOURCES.get(name)
    if table is None or not isinstance(position, Mapping) or not lake.exists(table):
        return None
    snapshots = lake.load(table, create=False).iceberg_table.metadata.snapshots
    return next((one.snapshot_id for one in snapshots if one.sequence_number == position.get("sequence")), None)
