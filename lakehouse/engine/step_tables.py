"""The tables of a step, each loaded once at the beginning of a refresh."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lakehouse.engine.fingerprint import definition_fingerprint
from lakehouse.engine.plan import StagedSnapshot, TableState
from lakehouse.engine.upstream_table import UpstreamTable, open_upstream
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.snapshot_properties import FINGERPRINT, POSITIONS
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.step import Context, Delta, Grouped, Step, upstream_tables
from lakehouse.table import Table


@dataclass(frozen=True, kw_only=True)
class StepTables:
    """A step and its tables as they were when the refresh began.

    upstream  by table name; includes the tables that `Broadcast` and `Lookup` reads go through
    """

    step: Step
    target: TableHandle
    quarantine: TableHandle
    upstream: Mapping[str, TableHandle]

    def reads(self) -> dict[str, UpstreamTable]:
        """Return the snapshots that the step reads, by the name of the read."""
        return {name: open_upstream(self.upstream[read.table.name]) for name, read in self.step.reads.items()}

    def state(self, context: Context) -> TableState:
        """Return the stored and the current positions, for the plan."""
        stored = self.target.snapshot_property(FINGERPRINT)
        quarantine = {"table": str(self.quarantine.metadata.table_uuid), "sequence": 0}
        return TableState(
            positions=self.target.positions,
            stored_fingerprint=stored if self.target.snapshot is not None else None,
            fingerprint=definition_fingerprint(self.step, context),
            upstream={name: handle.position for name, handle in self.upstream.items()},
            incremental={read.table.name for read in self.step.reads.values() if isinstance(read, Grouped | Delta)},
            quarantine={self.quarantine.table.name: quarantine} if quarantines(self.step) else {},
            staged=staged_snapshot(self.target),
        )


def load_step_tables(lake: Lake, step: Step, quarantine: Table) -> StepTables:
    """Load the target first, then everything upstream, so that a commit to the target in between makes ours fail."""
    return StepTables(
        step=step,
        target=lake.load(step.target, evolve=True),
        quarantine=lake.load(quarantine, evolve=True),
        upstream={table.name: lake.load(table) for table in upstream_tables(step)},
    )


def quarantines(step: Step) -> bool:
    """Return whether refreshing the step can write to the quarantine table."""
    parses = any(isinstance(read, Grouped | Delta) and read.parse for read in step.reads.values())
    return step.target.quarantines or parses


def staged_snapshot(target: TableHandle) -> StagedSnapshot | None:
    """Return the staged snapshot of a table, if it continues the current one."""
    build = target.staged
    if build is None or target.staged_is_stale:
        return None
    properties = build.summary.additional_properties if build.summary else {}
    return StagedSnapshot(json.loads(properties.get(POSITIONS) or "{}"), properties.get(FINGERPRINT))
