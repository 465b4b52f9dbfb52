"""Which snapshot of which table a training set was made from, directly or through other tables."""

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
"""The tables that the features' tables are made from."""


def lineage(lake: Lake) -> dict[str, int]:
    """The snapshot of each table of the features, and of each table that these were made from, as far as they have read it."""
    handles = {table.name: lake.load(table) for table in (step.target for step in STEPS)}
    found = {name: handle.snapshot.snapshot_id for name, handle in handles.items() if handle.snapshot}
    for handle in handles.values():
        for name, position in handle.positions.items():
            if name not in found and (snapshot := _snapshot_at(lake, name, position)) is not None:
                found[name] = snapshot
    return dict(sorted(found.items()))


def _snapshot_at(lake: Lake, name: str, position: Any) -> int | None:
    """The snapshot of a table that a position tells of; None when it has been expired."""
    table = SOURCES.get(name)
    if table is None or not isinstance(position, Mapping) or not lake.exists(table):
        return None
    every = lake.load(table, create=False).iceberg_table.metadata.snapshots
    return next((one.snapshot_id for one in every if one.sequence_number == position.get("sequence")), None)
