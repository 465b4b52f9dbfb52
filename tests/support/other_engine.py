"""Commits of another engine, with PyIceberg's own means: properties, tags, branches, compaction and expiry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyiceberg.exceptions import CommitFailedException, ServerError, ValidationException

from lakehouse.engine.engine import Engine
from lakehouse.table import Table


def load(engine: Engine, table: Table) -> Any:
    """Return PyIceberg's table."""
    return engine.lake.catalog.load_table(table.name)


def set_property(engine: Engine, table: Table) -> None:
    """Set a property of the table."""
    loaded = load(engine, table)
    with loaded.transaction() as transaction:
        transaction.set_properties({"reviewed": str(loaded.metadata.last_updated_ms)})


def create_tag(engine: Engine, table: Table) -> None:
    """Tag the current snapshot, whatever else the tag pointed to."""
    _create_ref(engine, table, "create_tag", "reviewed")


def create_branch(engine: Engine, table: Table) -> None:
    """Let a branch begin at the current snapshot."""
    _create_ref(engine, table, "create_branch", "trial")


def _create_ref(engine: Engine, table: Table, method: str, name: str) -> None:
    loaded = load(engine, table)
    if (snapshot := loaded.current_snapshot()) is not None:
        with loaded.manage_snapshots() as snapshots:
            getattr(snapshots, method)(snapshot.snapshot_id, name)


def remove_tag(engine: Engine, table: Table) -> None:
    """Remove the tag."""
    loaded = load(engine, table)
    if "reviewed" in loaded.metadata.refs:
        with loaded.manage_snapshots() as snapshots:
            snapshots.remove_tag("reviewed")


def compact(engine: Engine, table: Table) -> None:
    """Rewrite all files, in one commit of a delete and an append."""
    loaded = load(engine, table)
    if loaded.current_snapshot() is not None:
        loaded.overwrite(loaded.scan().to_arrow())


def expire(engine: Engine, table: Table) -> None:
    """Expire all snapshots to which no branch or tag points."""
    loaded = load(engine, table)
    heads = {ref.snapshot_id for ref in loaded.metadata.refs.values()}
    if old := [snapshot.snapshot_id for snapshot in loaded.metadata.snapshots if snapshot.snapshot_id not in heads]:
        loaded.maintenance.expire_snapshots().by_ids(old).commit()


ACTIONS: dict[str, Callable[..., None]] = {
    "other engine: property": set_property,
    "other engine: tag": create_tag,
    "other engine: branch": create_branch,
    "other engine: remove tag": remove_tag,
    "other engine: compact": compact,
    "other engine: expire": expire,
}


def accepts(kind: str, error: BaseException | None) -> bool:
    """Return whether another engine may end with an error: it does not try again when it is overtaken."""
    overtaken = (CommitFailedException, ServerError, ValidationException, ValueError, FileNotFoundError)
    return kind in ACTIONS and isinstance(error, overtaken)
