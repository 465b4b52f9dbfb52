"""The status of every table: rows, snapshot, position, lag, last run, expectations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import polars as pl

from lakehouse.errors import OffsetExpired, SourceError, TableNotFound
from lakehouse.expectations import ExpectationResult, Fresh, evaluate_freshness
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.run_history import last_results
from lakehouse.step import upstream_names
from lakehouse.table import DELETED, Table

MISSING_FILE = "has lost a file"
"""The lag of a table whose files or metadata are missing."""


@dataclass(frozen=True, kw_only=True)
class TableStatus:
    """The status of one table.

    snapshot      id of the current snapshot; None for a table that was never filled
    position      how far its upstream tables or its source have been read
    lag           how far it is behind them, as a short text
    last_run      when the current snapshot was committed
    expectations  '5 hold', or counts by severity of those that are violated; '' if none was evaluated
    broken        the violated expectations, with their counts
    """

    table: str
    rows: int = 0
    snapshot: int | None = None
    position: Any = None
    lag: str = ""
    last_run: datetime | None = None
    files: int = 0
    bytes: int = 0
    expectations: str = ""
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedTable:
    """A table as it was loaded; without a handle if it does not exist or its metadata is missing."""

    handle: TableHandle | None
    is_missing_files: bool = False


def statuses(lake: Lake, project: Project) -> list[TableStatus]:
    """Return the status of every table, bronze first. `lag` says so if a source is unreachable."""
    loaded = {name: _load(lake, table) for name, table in project.tables.items()}
    handles = {name: table.handle for name, table in loaded.items()}
    lags = {
        **_source_lags(lake, project, handles),
        **_step_lags(project, handles),
        **{name: MISSING_FILE for name, table in loaded.items() if table.is_missing_files},
    }
    results: dict[str, list[ExpectationResult]] = {}
    for result in last_results(lake):
        results.setdefault(result.table, []).append(result)
    now = datetime.now(UTC)
    return [
        with_expectations(_status(project.tables[name], handle, lags.get(name, "")), lake, handle, results.get(name, []), now)
        for name, handle in handles.items()
    ]


def _load(lake: Lake, table: Table) -> LoadedTable:
    try:
        return LoadedTable(lake.load(table, create=False))
    except TableNotFound:
        return LoadedTable(None)
    except FileNotFoundError:
        return LoadedTable(None, is_missing_files=True)


def with_expectations(
    status: TableStatus, lake: Lake, handle: TableHandle | None, results: list[ExpectationResult], now: datetime
) -> TableStatus:
    """Add the last results of the expectations that are still declared; freshness is evaluated now."""
    if handle is None or not results:
        return status
    rules = {str(rule): rule for rule in handle.table.rules}
    current = [result for result in results if result.expectation in rules and not isinstance(rules[result.expectation], Fresh)]
    if lake.settings.freshness:
        fresh = [rule for rule in rules.values() if isinstance(rule, Fresh)]
        current += [evaluate_freshness(handle.table.name, rule, handle.max_value(rule.columns[0]), now) for rule in fresh]
    broken = [result for result in current if result.outcome != "pass"]
    counts = [(outcome, sum(result.outcome == outcome for result in broken)) for outcome in ("fail", "quarantine", "warn")]
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts if count) or f"{len(current)} hold"
    return replace(status, expectations=text, broken=tuple(f"{result.outcome}: {result}" for result in broken))


def _source_lags(lake: Lake, project: Project, handles: Mapping[str, TableHandle | None]) -> dict[str, str]:
    lags: dict[str, str] = {}
    for source in project.sources(lake.settings):
        positions = {name: handle.positions.get(source.name) if (handle := handles[name]) else None for name in source.tables}
        try:
            lags |= source.lag(positions)
        except OffsetExpired:
            lags |= dict.fromkeys(source.tables, f"changes expired at {source.name}")
        except SourceError:
            lags |= dict.fromkeys(source.tables, f"{source.name} unreachable")
    return lags


def _step_lags(project: Project, handles: Mapping[str, TableHandle | None]) -> dict[str, str]:
    lags = {}
    for step in project.all_steps:
        handle = handles[step.target.name]
        stored = handle.positions if handle else {}
        upstream = {name: handles[name] for name in sorted(upstream_names(step))}
        unread = [name for name, table in upstream.items() if table is not None and _is_unread(table, stored.get(name))]
        until = f" until {project.on_demand_refresh}" if project.is_on_demand(step.target.name) else ""
        names = ", ".join(name.split(".")[1] for name in unread)
        lags[step.target.name] = f"behind {names}{until}" if unread else "up to date"
    return lags


def _is_unread(upstream: TableHandle, position: Any) -> bool:
    """Return whether an upstream table has rows past the position, or was re-created since."""
    if position is None:
        return upstream.data_sequence > 0
    return bool(upstream.position["table"] != position["table"] or upstream.data_sequence > position["sequence"])


def count_live_rows(handle: TableHandle) -> int:
    """Return the number of rows that are not deleted. Reads as little as the table allows."""
    files = handle.files()
    if handle.table.keeps_tombstones:
        return handle.reader.read(files, [DELETED], ~pl.col(DELETED).fill_null(False)).height
    if any(file.deletes for file in files):
        return handle.reader.read(files, [handle.table.columns[0].name]).height
    return sum(file.rows for file in files)


def _status(table: Table, handle: TableHandle | None, lag: str) -> TableStatus:
    if handle is None or handle.snapshot is None:
        return TableStatus(table=table.name, lag=lag)
    try:
        files = handle.files()
        rows = count_live_rows(handle)
    except FileNotFoundError:
        return TableStatus(table=table.name, snapshot=handle.snapshot.snapshot_id, lag=MISSING_FILE)
    return TableStatus(
        table=table.name,
        rows=rows,
        snapshot=handle.snapshot.snapshot_id,
        position=handle.positions,
        lag=lag,
        last_run=datetime.fromtimestamp(handle.snapshot.timestamp_ms / 1000, UTC),
        files=len(files),
        bytes=sum(file.bytes for file in files),
    )


def short_position(position: Any) -> str:
    """Return a position as a short text, for example 'orders_unified@12'."""
    if not position:
        return ""
    parts = []
    for name, value in position.items():
        if isinstance(value, Mapping) and "sequence" in value:
            parts.append(f"{name.split('.')[-1]}@{value['sequence']}")
        else:
            parts.append(json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value)
    return " ".join(parts)
