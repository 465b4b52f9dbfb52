"""Removal of the history of all tables, once every table downstream has read it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.rewrite import PurgeResult, has_tombstones, purge_history
from lakehouse.project import Project
from lakehouse.retry import retry_commit
from lakehouse.step import upstream_names
from lakehouse.table import Table
from pipelines.privacy.context import ErasureContext
from pipelines.privacy.leftovers import existing_tables

MAX_ROUNDS = 5


def refresh_all(context: ErasureContext) -> None:
    """Bring every table up to date with its upstream, including those of the model where they exist."""
    for step in context.project.ordered_steps:
        context.engine.refresh(step)
    context.refresh_on_demand(context.engine)


def forget_history(context: ErasureContext) -> tuple[PurgeResult, ...]:
    """Remove tombstones, deleted rows, old snapshots and unreferenced files of all tables.

    Call it when every table is up to date. Beside another run, a tombstone may not have been read by every table downstream:
    then these are refreshed and the purge is repeated. Later tombstones stay, since they contain no row from before the rewrite.

    Raises ShopSphereError if tombstones are left after MAX_ROUNDS; the erasure then stays in progress.
    """
    lake, project = context.lake, context.project
    tables = existing_tables(lake, project)
    until = {table.name: lake.load(table).data_sequence for table in tables if table.keeps_tombstones}
    results: dict[str, PurgeResult] = {}
    for _ in range(MAX_ROUNDS):
        for table in tables:
            result = retry_commit(partial(_purge, lake, project, table))
            results[table.name] = results[table.name] + result if table.name in results else result
        tables = [table for table in tables if table.name in until and _has_tombstones(lake, table, until[table.name])]
        if not tables:
            return tuple(results.values())
        refresh_all(context)
    raise ShopSphereError(_unread_message(lake, project, tables))


def _has_tombstones(lake: Lake, table: Table, until: int) -> bool:
    # another erasure may delete the files of the snapshot that was loaded
    return retry_commit(lambda: has_tombstones(lake.load(table), until))


def _purge(lake: Lake, project: Project, table: Table) -> PurgeResult:
    read_to = min(_read_positions(lake, project, table).values(), default=None) if table.keeps_tombstones else None
    return purge_history(lake, table, tombstones_read_to=read_to)


def _read_positions(lake: Lake, project: Project, table: Table) -> Mapping[str, int]:
    """Return the sequence up to which a table has been read: by itself (all of it) and by each table downstream."""
    handle = lake.load(table)
    positions = {table.name: handle.data_sequence}
    for step in project.all_steps:
        if table.name in upstream_names(step) and lake.exists(step.target):
            stored = lake.load(step.target, create=False).positions.get(table.name)
            is_current = stored is not None and stored["table"] == handle.position["table"]
            positions[step.target.name] = stored["sequence"] if stored is not None and is_current else 0
    return positions


def _unread_message(lake: Lake, project: Project, tables: list[Table]) -> str:
    table = tables[0]
    positions = _read_positions(lake, project, table)
    behind = min(positions, key=lambda name: positions[name])
    return (
        f"{table.name}: deleted rows cannot be removed, because {behind} has not read them after {MAX_ROUNDS} refreshes. "
        "The erasure stays in progress. Run again when no other run or training is active."
    )
