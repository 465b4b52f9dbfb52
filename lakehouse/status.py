"""What `status` shows: for each table its rows, snapshot, position, lag and last run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import polars as pl

from lakehouse.errors import OffsetExpired, SourceError, TableNotFound
from lakehouse.expectations import ExpectationResult, Fresh, evaluate_freshness
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.run_history import last_results
from lakehouse.step import upstream_names
from lakehouse.table import DELETED, Table

LOST: Final = "has lost a file"
"""Instead of a lag."""


@dataclass(frozen=True)
class TableStatus:
    """The state of one table; None where it has never been filled."""

    table: str
    rows: int
    snapshot: int | None
    position: Any
    lag: str
    last_run: datetime | None
    files: int
    bytes: int
    expectations: str = ""
    """'5 hold', or what does not; '' where none was judged."""
    broken: tuple[str, ...] = ()
    """The expectations that do not hold, with what was found."""


def statuses(lake: Lake, project: Project) -> list[TableStatus]:
    """The state of every table, bronze first. A source that cannot be reached shows as such in `lag`."""
    loaded = {name: _loaded(lake, table) for name, table in project.tables.items()}
    handles = {name: None if handle == LOST else handle for name, handle in loaded.items()}
    lags = {
        **_source_lags(lake, project, handles),
        **_step_lags(project, handles),
        **{name: LOST for name in loaded if loaded[name] == LOST},
    }
    judged: dict[str, list[ExpectationResult]] = {}
    for result in last_results(lake):
        judged.setdefault(result.table, []).append(result)
    now = datetime.now(UTC)
    return [
        replace(
            _status(project.tables[name], handle, lags.get(name, "")), **_expectations(lake, handle, judged.get(name, []), now)
        )
        for name, handle in handles.items()
    ]


def _loaded(lake: Lake, table: Table) -> TableHandle | Literal["has lost a file"] | None:
    try:
        return lake.load(table, create=False)
    except TableNotFound:
        return None
    except FileNotFoundError:
        return LOST


def _expectations(lake: Lake, handle: TableHandle | None, results: list[ExpectationResult], now: datetime) -> dict[str, Any]:
    """How a table's expectations came out last; freshness is judged now. Of rules that are no longer declared nothing."""
    if handle is None or not results:
        return {}
    rules = {str(rule): rule for rule in handle.table.rules}
    found = [result for result in results if result.expectation in rules and not isinstance(rules[result.expectation], Fresh)]
    if lake.settings.freshness:
        fresh = [rule for rule in rules.values() if isinstance(rule, Fresh)]
        found += [evaluate_freshness(handle.table.name, rule, handle.max_value(rule.columns[0]), now) for rule in fresh]
    broken = [result for result in found if result.outcome != "pass"]
    counts = [(word, sum(result.outcome == word for result in broken)) for word in ("fail", "quarantine", "warn")]
    text = ", ".join(f"{count} {word}" for word, count in counts if count) or f"{len(found)} hold"
    return {"expectations": text, "broken": tuple(f"{result.outcome}: {result}" for result in broken)}


def _source_lags(lake: Lake, project: Project, handles: Mapping[str, TableHandle | None]) -> dict[str, str]:
    lags: dict[str, str] = {}
    for source in project.sources(lake.settings):
        positions = {name: handle.positions.get(source.name) if (handle := handles[name]) else None for name in source.tables}
        try:
            lags |= source.lag(positions)
        except OffsetExpired:
            lags |= dict.fromkeys(source.tables, "changes gone, see `run`")
        except SourceError:
            lags |= dict.fromkeys(source.tables, f"{source.name} unreachable")
    return lags


def _step_lags(project: Project, handles: Mapping[str, TableHandle | None]) -> dict[str, str]:
    lags = {}
    for step in project.all_steps:
        handle = handles[step.target.name]
        stored = handle.positions if handle else {}
        late = [name for name in sorted(upstream_names(step)) if (above := handles[name]) and _unread(above, stored.get(name))]
        behind = f"behind {', '.join(n.split('.')[1] for n in late)}"
        # `run` leaves the model's tables to the commands that need them
        until = " until the next train or monitor" if project.is_on_demand(step.target.name) else ""
        lags[step.target.name] = f"{behind}{until}" if late else "up to date"
    return lags


def _unread(above: TableHandle, position: Any) -> bool:
    """Whether a table upstream has what the position does not stand for; it may have been made anew."""
    if position is None:
        return above.data_sequence > 0
    return bool(above.position["table"] != position["table"] or above.data_sequence > position["sequence"])


def living_rows(handle: TableHandle) -> int:
    """Rows of a table that are not deleted."""
    files = handle.files()
    if handle.table.keeps_tombstones:
        return handle.reader.read(files, [DELETED], ~pl.col(DELETED).fill_null(False)).height
    if any(file.deletes for file in files):
        return handle.reader.read(files, [handle.table.columns[0].name]).height
    return sum(file.rows for file in files)


def _status(table: Table, handle: TableHandle | None, lag: str) -> TableStatus:
    if handle is None or handle.snapshot is None:
        return TableStatus(table.name, 0, None, None, lag, None, 0, 0)
    try:
        files = handle.files()
        rows = living_rows(handle)
    except FileNotFoundError:
        return TableStatus(table.name, 0, handle.snapshot.snapshot_id, None, LOST, None, 0, 0)
    return TableStatus(
        table.name,
        rows,
        handle.snapshot.snapshot_id,
        handle.positions,
        lag,
        datetime.fromtimestamp(handle.snapshot.timestamp_ms / 1000, UTC),
        len(files),
        sum(file.bytes for file in files),
    )


def short_position(position: Any) -> str:
    """A position in a few words."""
    if not position:
        return ""
    parts = []
    for name, value in position.items():
        if isinstance(value, Mapping) and "sequence" in value:
            parts.append(f"{name.split('.')[-1]}@{value['sequence']}")
        else:
            parts.append(json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value)
    return " ".join(parts)
