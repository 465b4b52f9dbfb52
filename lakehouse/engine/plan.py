"""The plan of a refresh: whether there is work, and of which kind. Pure: positions and flags in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

TablePosition = Mapping[str, Any]
"""How far a table has been read downstream: {"table": its UUID, "sequence": the last commit that changed rows}."""


class RefreshKind(Enum):
    """The kinds of work that a refresh can find."""

    UNCHANGED = "unchanged"
    PUBLISH_STAGED = "publish the staged snapshot"
    INCREMENTAL = "incremental"
    FULL = "full"


@dataclass(frozen=True)
class StagedSnapshot:
    """A snapshot on the audit branch that continues the table: the positions and the definition it was built from."""

    positions: TablePosition
    fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class TableState:
    """The state of a step's table and of its upstream tables.

    positions           stored in the table's current snapshot, by upstream table
    stored_fingerprint  stored there too; None for a table without one
    fingerprint         of the step as it is declared now
    upstream            current positions of the upstream tables
    incremental         upstream tables that are read by their new rows: those of `Grouped` and `Delta` reads
    quarantine          current position of the quarantine table, if the step quarantines rows: its rows are then written
                        together with the table's, so a re-created quarantine table must be filled again
    staged              a staged snapshot that could be published
    """

    positions: Mapping[str, TablePosition]
    stored_fingerprint: str | None
    fingerprint: str
    upstream: Mapping[str, TablePosition]
    incremental: Set[str]
    quarantine: Mapping[str, TablePosition] = field(default_factory=dict)
    staged: StagedSnapshot | None = None


@dataclass(frozen=True, kw_only=True)
class RefreshPlan:
    """The work of one refresh.

    reason       why there is work, or none
    since        by upstream table, the sequence up to which it has been read; None: never, or re-created since
    positions    to store with the result
    fingerprint  to store with the result
    redefined    the table was built by another definition
    """

    kind: RefreshKind
    reason: str
    since: Mapping[str, int | None]
    positions: Mapping[str, TablePosition]
    fingerprint: str
    redefined: bool

    @property
    def full(self) -> bool:
        """Return whether every group is recomputed."""
        return self.kind is RefreshKind.FULL


def plan_refresh(state: TableState, *, rebuild: bool = False, replay: bool = False) -> RefreshPlan:
    """Return the work that a refresh has to do.

    rebuild  recompute every group, whatever has changed
    replay   some source positions are read again, whether there are new rows or not
    """
    since = {name: _read_until(state.positions.get(name), position) for name, position in state.upstream.items()}
    positions = {**state.upstream, **state.quarantine}
    redefined = state.stored_fingerprint not in (None, state.fingerprint)
    kind, reason = _kind(state, since, rebuild=rebuild, replay=replay, redefined=redefined)
    is_staged = state.staged == StagedSnapshot(positions, state.fingerprint)
    if kind is not RefreshKind.UNCHANGED and is_staged and not rebuild and not replay:
        # refused by an audit, or left by a run that was killed: nothing is new since, so it need not be built again
        kind, reason = RefreshKind.PUBLISH_STAGED, "a snapshot of these positions is staged"
    return RefreshPlan(
        kind=kind,
        reason=reason,
        since=since,
        positions=positions,
        fingerprint=state.fingerprint,
        redefined=redefined,
    )


def _read_until(stored: TablePosition | None, current: TablePosition) -> int | None:
    """Return the sequence up to which a table has been read; None if never, or if it was re-created since."""
    return stored["sequence"] if stored is not None and stored["table"] == current["table"] else None


def _kind(
    state: TableState, since: Mapping[str, int | None], *, rebuild: bool, replay: bool, redefined: bool
) -> tuple[RefreshKind, str]:
    never_read = [name for name in sorted(state.incremental) if since[name] is None and state.upstream[name]["sequence"]]
    new_rows = [name for name, position in state.upstream.items() if _has_new_rows(since[name], position)]
    empty = all(position["sequence"] == 0 for position in state.upstream.values())
    if rebuild:
        return RefreshKind.FULL, "a rebuild was requested"
    if recreated := _recreated(state):
        return RefreshKind.FULL, f"{', '.join(recreated)} was re-created"
    if redefined:
        return RefreshKind.FULL, "the definition has changed"
    if not replay and (not new_rows or empty):
        return RefreshKind.UNCHANGED, "no new rows upstream"
    if never_read:
        return RefreshKind.FULL, f"{', '.join(never_read)} has never been read"
    if replay:
        return RefreshKind.INCREMENTAL, "source positions are replayed"
    return RefreshKind.INCREMENTAL, f"new rows in {', '.join(new_rows)}"


def _has_new_rows(since: int | None, position: TablePosition) -> bool:
    return since is None or bool(position["sequence"] > since)


def _recreated(state: TableState) -> list[str]:
    """Return the tables whose stored positions are of an earlier table of that name."""
    upstream = [
        name
        for name, position in state.upstream.items()
        if (stored := state.positions.get(name)) is not None and stored["table"] != position["table"]
    ]
    quarantine = [name for name, position in state.quarantine.items() if state.positions.get(name, position) != position]
    return [*upstream, *quarantine]
