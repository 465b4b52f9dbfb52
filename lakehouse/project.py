"""Declarations: the sources, tables and steps of an application. Frozen values, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lakehouse.errors import ShopSphereError
from lakehouse.source import Source
from lakehouse.step import Step, in_dependency_order
from lakehouse.table import Table

if TYPE_CHECKING:
    from lakehouse.engine.engine import Engine
    from lakehouse.engine.step_result import StepResult

Rebuild = Callable[["Engine"], "StepResult"]
"""rebuild(engine) -> result of recomputing one table from all upstream rows."""


@dataclass(frozen=True, kw_only=True)
class Project:
    """The sources, tables and steps of an application: the one list from which all others derive.

    sources            sources(settings) -> the enabled ones
    source_tables      the tables that sources append to
    steps              refreshed by every run
    quarantine         the table of rows that cannot be parsed or violate an expectation
    on_demand          steps that a run does not refresh
    on_demand_refresh  what refreshes them, as a noun for texts
    rebuild_on_demand  by table name, how each of their tables is rebuilt
    other_tables       tables that neither a source nor a step writes
    """

    sources: Callable[[Any], tuple[Source, ...]]
    source_tables: tuple[Table, ...]
    steps: tuple[Step, ...]
    quarantine: Table
    on_demand: tuple[Step, ...] = ()
    on_demand_refresh: str = "the next refresh on demand"
    rebuild_on_demand: Mapping[str, Rebuild] = field(default_factory=dict)
    other_tables: tuple[Table, ...] = ()

    @cached_property
    def all_steps(self) -> tuple[Step, ...]:
        """Return every step, those on demand last."""
        return (*self.steps, *self.on_demand)

    @cached_property
    def ordered_steps(self) -> tuple[Step, ...]:
        """Return the steps of a run, each after the steps whose tables it reads."""
        return in_dependency_order(self.steps)

    @cached_property
    def bronze(self) -> dict[str, Table]:
        """Return the tables that sources append to, by name."""
        return {table.name: table for table in self.source_tables}

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Return every table by name: bronze, then silver, then gold."""
        on_demand = (step.target for step in self.on_demand)
        declared = (*self.source_tables, *self.other_tables, *(step.target for step in self.steps), self.quarantine, *on_demand)
        return {table.name: table for layer in ("bronze", "silver", "gold") for table in declared if table.layer == layer}

    def find_table(self, name: str) -> Table:
        """Return the table of that name, with or without its layer. Raises ShopSphereError that lists the tables."""
        found = [table for full_name, table in self.tables.items() if name in (full_name, table.short_name)]
        if len(found) != 1:
            raise ShopSphereError(f"There is no table '{name}'. Tables: {', '.join(self.tables)}.")
        return found[0]

    def is_on_demand(self, name: str) -> bool:
        """Return whether a run leaves the table alone."""
        return any(step.target.name == name for step in self.on_demand)
