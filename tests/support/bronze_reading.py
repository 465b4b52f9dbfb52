"""Read a source without the engine: plan, run the tasks, keep positions and rows, acknowledge."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lakehouse.errors import UnknownColumn
from lakehouse.source import Plan, Position, Reached, Rows, Source


@dataclass
class Reader:
    """Keeps what a lakehouse would store: rows, positions and schemas by bronze table."""

    source: Source
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    positions: dict[str, Position] = field(default_factory=dict)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Return the plan from the current positions."""
        return self.source.plan(self.positions, self.schemas)

    def read(self, plan: Plan) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Position]]:
        """Return the rows and positions of the plan's tasks without keeping them."""
        rows: dict[str, list[dict[str, Any]]] = {}
        positions: dict[str, Position] = dict(plan.positions)
        for task in plan.tasks:
            for item in pickle.loads(pickle.dumps(task)).read():
                if isinstance(item, Reached):
                    positions[item.table] = item.position
                else:
                    assert isinstance(item, Rows)
                    assert item.rows.schema.equals(plan.schemas[item.table])
                    rows.setdefault(item.table, []).extend(item.rows.to_pylist())
        return rows, positions

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Run once and return the new rows by table."""
        for _ in range(5):
            plan = self.plan()
            try:
                rows, positions = self.read(plan)
            except UnknownColumn as error:
                schema = self.schemas.get(error.table, plan.schemas[error.table])
                others = [item for item in schema if item.name != error.column]
                self.schemas[error.table] = pa.schema([*others, pa.field(error.column, error.arrow_type)])
                continue
            finally:
                if plan.held is not None:
                    plan.held.close()
            for table, new in rows.items():
                self.rows.setdefault(table, []).extend(new)
            self.positions |= positions
            self.schemas |= plan.schemas
            self.source.acknowledge(plan)
            return rows
        raise AssertionError("a column stays unknown after five attempts")

    def latest(self, table: str, key: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return the live rows of a table: the newest version of each key in source order, without deleted keys."""
        return live_rows_by_key(self.rows.get(table, []), key)


def live_rows_by_key(rows: list[dict[str, Any]], key: tuple[str, ...]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Return the newest of the rows by key, except deleted ones."""
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row["_source_position"])):
        if row["_op"] == "t":
            newest.clear()
        elif row["_op"] == "d":
            newest.pop(tuple(row[name] for name in key), None)
        else:
            newest[tuple(row[name] for name in key)] = row
    return newest
