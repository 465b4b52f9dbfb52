"""The staged snapshot of a table, as opposed to branches that other engines create and move, and the retention of branches."""

from __future__ import annotations

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.snapshots import Snapshot, ancestors_of
from pyiceberg.table.update import RemoveSnapshotRefUpdate, RemoveSnapshotsUpdate, SetSnapshotRefUpdate, TableUpdate

from lakehouse.iceberg.snapshot_properties import POSITIONS

AUDIT_BRANCH = "shopsphere_audit"
"""The branch with a snapshot that is staged until it is published."""


def staged_snapshot(metadata: TableMetadata) -> Snapshot | None:
    """Return the head of the audit branch; None if there is no such branch or its head is another engine's commit."""
    ref = metadata.refs.get(AUDIT_BRANCH)
    if ref is None or ref.snapshot_ref_type is not SnapshotRefType.BRANCH:
        return None
    snapshot = metadata.snapshot_by_id(ref.snapshot_id)
    is_ours = snapshot is not None and snapshot.summary is not None and POSITIONS in snapshot.summary.additional_properties
    return snapshot if is_ours else None


def is_only_staged(metadata: TableMetadata, staged: Snapshot) -> bool:
    """Return whether no other branch or tag has the staged snapshot in its history."""
    heads = (metadata.snapshot_by_id(ref.snapshot_id) for name, ref in metadata.refs.items() if name != AUDIT_BRANCH)
    return all(ancestor.snapshot_id != staged.snapshot_id for head in heads for ancestor in ancestors_of(head, metadata))


def keep_retention(metadata: TableMetadata, update: TableUpdate) -> TableUpdate:
    """Return an update that moves a branch with the retention that the branch has, which PyIceberg's own update resets."""
    if not isinstance(update, SetSnapshotRefUpdate) or (ref := metadata.refs.get(update.ref_name)) is None:
        return update
    retention = {name: getattr(ref, name) for name in ("max_ref_age_ms", "max_snapshot_age_ms", "min_snapshots_to_keep")}
    return update.model_copy(update=retention)


def discard_update(metadata: TableMetadata, staged: Snapshot) -> TableUpdate:
    """Return the update that removes the audit branch, with its snapshot unless another branch or tag needs that."""
    if is_only_staged(metadata, staged):
        return RemoveSnapshotsUpdate(snapshot_ids=[staged.snapshot_id])
    return RemoveSnapshotRefUpdate(ref_name=AUDIT_BRANCH)
