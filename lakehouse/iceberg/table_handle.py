"""A table as it was when it was loaded: its files, rows and positions, and the one commit that may follow.

Everything read through a `TableHandle` comes from that moment, and a commit through it succeeds only if no other writer
has committed since. A stale commit is never rebased: it fails instead of writing its rows twice.

A snapshot that must be audited before readers see it is staged: it is committed to the branch AUDIT_BRANCH, continues main,
and becomes the table's current snapshot with `publish` (write-audit-publish).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import AlwaysTrue, BooleanExpression, GreaterThan
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table import Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRef, SnapshotRefType
from pyiceberg.table.snapshots import Snapshot, ancestors_of
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    RemovePartitionStatisticsUpdate,
    RemovePropertiesUpdate,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableRequirement,
    TableUpdate,
)
from pyiceberg.types import DateType, TimestamptzType

from lakehouse.errors import CommitConflict, SchemaConflict
from lakehouse.iceberg.column_mapping import column_mapping
from lakehouse.iceberg.errors import committing
from lakehouse.iceberg.reader import File, FileReader, live_rows
from lakehouse.iceberg.row_delta import RowDelta
from lakehouse.iceberg.schema import arrow_schema, is_compatible, promoted_type, stored_columns, table_comment
from lakehouse.iceberg.snapshot_properties import (
    COPIED,
    COPIED_SEQUENCE,
    DATA_SEQUENCE,
    FINGERPRINT,
    POSITIONS,
    ROWS,
    VIOLATIONS,
)
from lakehouse.iceberg.staging import AUDIT_BRANCH, discard_update, is_only_staged, keep_retention, staged_snapshot
from lakehouse.iceberg.writer import FileWriter
from lakehouse.table import SEQUENCE, Table

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

greater_than: Any = GreaterThan
"""PyIceberg's predicate. Its constructor is typed for bound terms, but accepts a column's name and a value."""


class TableHandle:
    """A table as it was when it was loaded: what can be read, and the one commit that may follow."""

    def __init__(self, table: Table, iceberg_table: IcebergTable) -> None:
        self.table = table
        self.iceberg_table = iceberg_table
        self._transaction: Transaction | None = None

    @property
    def metadata(self) -> TableMetadata:
        """The metadata, with the schema changes prepared so far."""
        return self._transaction.table_metadata if self._transaction else self.iceberg_table.metadata

    @property
    def snapshot(self) -> Snapshot | None:
        """The current snapshot, None for an empty table."""
        return self.iceberg_table.metadata.current_snapshot()

    @property
    def has_rows(self) -> bool:
        """Whether the current snapshot has data files; deleted rows count until their file is compacted."""
        return self.snapshot is not None and bool(self.files())

    @property
    def next_sequence(self) -> int:
        """The sequence number of the next commit, provided that no other writer commits first."""
        return self.iceberg_table.metadata.next_sequence_number()

    @property
    def published_snapshots(self) -> list[Snapshot]:
        """All snapshots that readers have seen, that is, all but a staged one."""
        staged, metadata = self.staged, self.iceberg_table.metadata
        hidden = staged.snapshot_id if staged is not None and is_only_staged(metadata, staged) else None
        return [s for s in metadata.snapshots if s.snapshot_id != hidden]

    def _lineage(self, snapshot: Snapshot | None) -> Iterator[Snapshot]:
        """Yield the snapshot and its ancestors, back to the newest one that ShopSphere committed.

        Commits of other engines (a compaction, for example) lack our properties; each of our commits has all of them.
        """
        while snapshot is not None:
            yield snapshot
            if snapshot.summary and POSITIONS in snapshot.summary.additional_properties:
                return
            parent = snapshot.parent_snapshot_id
            snapshot = self.iceberg_table.metadata.snapshot_by_id(parent) if parent is not None else None

    def snapshot_property(self, name: str, snapshot_id: int | None = None) -> str | None:
        """Return a property as of a snapshot (default: the current one), from the newest snapshot of its lineage that has it.

        If another engine expired that one, the copy in the table's properties counts for the current snapshot.
        """
        start = self.snapshot if snapshot_id is None else self.iceberg_table.metadata.snapshot_by_id(snapshot_id)
        for snapshot in self._lineage(start):
            properties = snapshot.summary.additional_properties if snapshot.summary else {}
            if name in properties:
                return str(properties[name])
            if POSITIONS in properties:
                return None
        return self._copied_property(name) if start is not None and start == self.snapshot else None

    def _copied_property(self, name: str) -> str | None:
        """Return a property's copy in the table's properties, or None if it is of a snapshot after the current one."""
        properties, snapshot = self.iceberg_table.metadata.properties, self.snapshot
        committed = properties.get(COPIED_SEQUENCE)
        # another engine may have rolled the table back
        if committed is None or snapshot is None or int(committed) > (snapshot.sequence_number or 0):
            return None
        return properties.get(name)

    @property
    def lineage_snapshot_ids(self) -> frozenset[int]:
        """The snapshots from which properties are read; maintenance must keep them."""
        return frozenset(snapshot.snapshot_id for snapshot in self._lineage(self.snapshot))

    @property
    def positions(self) -> dict[str, Any]:
        """The position read up to in each upstream, as of the current snapshot."""
        stored: dict[str, Any] = json.loads(self.snapshot_property(POSITIONS) or "{}")
        return stored

    @property
    def data_sequence(self) -> int:
        """The sequence of the last commit that changed rows; 0 if there is none."""
        return int(self.snapshot_property(DATA_SEQUENCE) or 0)

    def snapshot_id_of(self, sequence: int) -> int | None:
        """Return the id of the snapshot with this sequence number, or None if it has expired."""
        return next((s.snapshot_id for s in self.iceberg_table.metadata.snapshots if s.sequence_number == sequence), None)

    def snapshot_id_at(self, timestamp_ms: float) -> int | None:
        """Return the id of the snapshot that was current at a time, or None if there was none or it has expired.

        The snapshot log counts, not when a snapshot was committed: it may have been staged, on a branch, or rolled back.
        PyIceberg removes expired snapshots from the log, so the one before the time may not be the one that was current.
        """
        log = self.iceberg_table.metadata.snapshot_log
        count = next((n for n in range(len(log), 0, -1) if log[n - 1].timestamp_ms <= timestamp_ms), 0)
        if count == 0 or (count < len(log) and not self._follows(log[count].snapshot_id, log[count - 1].snapshot_id)):
            return None
        found = log[count - 1].snapshot_id
        return found if self.iceberg_table.metadata.snapshot_by_id(found) else None

    def _follows(self, later: int, earlier: int) -> bool:
        """Return whether one snapshot continues the other, or is a rollback to it, without an expired one in between."""
        metadata = self.iceberg_table.metadata
        if later == earlier:
            return False  # a rollback, whose snapshots in between have expired
        for start, end in ((later, earlier), (earlier, later)):
            if any(ancestor.snapshot_id == end for ancestor in ancestors_of(metadata.snapshot_by_id(start), metadata)):
                return True
        return False

    @property
    def position(self) -> dict[str, Any]:
        """The position that a downstream table stores for this one: its identity and the last commit that changed rows."""
        return {"table": str(self.iceberg_table.metadata.table_uuid), "sequence": self.data_sequence}

    @property
    def arrow_schema(self) -> pa.Schema:
        """The stored columns and their Arrow types."""
        return arrow_schema(self.metadata.schema())

    @property
    def reader(self) -> FileReader:
        """A picklable reader of this table's files."""
        return FileReader(self.iceberg_table.io, self.arrow_schema, column_mapping(self.metadata))

    @property
    def writer(self) -> FileWriter:
        """A picklable writer of files for this table."""
        return FileWriter(self.iceberg_table.io, self.metadata)

    def files(
        self, since: int | None = None, where: BooleanExpression | None = None, snapshot_id: int | None = None
    ) -> list[File]:
        """Return the data files of a snapshot (default: the current one), ordered by path.

        With `since`, return only those that may contain rows with a later sequence; with `where`, those that may match.
        """
        if self.snapshot is None:
            return []
        row_filter: BooleanExpression = where or AlwaysTrue()
        if since is not None:
            row_filter = greater_than(SEQUENCE, since)
        scan = self.iceberg_table.scan(row_filter=row_filter, snapshot_id=snapshot_id)
        files = [
            File(
                path=task.file.file_path,
                deletes=tuple(sorted(delete.file_path for delete in task.delete_files)),
                rows=task.file.record_count,
                bytes=task.file.file_size_in_bytes,
                spec_id=task.file.spec_id,
                partition=task.file.partition,
            )
            for task in scan.plan_files()
        ]
        return sorted(files, key=lambda file: file.path)

    def read(self, columns: Sequence[str], predicate: pl.Expr | None = None, *, tombstones: bool = False) -> pl.DataFrame:
        """Return the live rows that match `predicate`; with `tombstones`, deleted ones too."""
        return self.reader.read(self.files(), columns, live_rows(self.table, predicate, tombstones))

    def evolve_schema(self, columns: pa.Schema) -> None:
        """Prepare the schema for rows with these columns; committed with the data. Raises SchemaConflict."""
        current = self.arrow_schema
        new = [f for f in columns if f.name not in current.names]
        promoted = [
            (f.name, target)
            for f in columns
            if f.name in current.names
            and current.field(f.name).type != f.type
            and (target := promoted_type(self.metadata.schema().find_field(f.name).field_type, f.type)) is not None
        ]
        for f in columns:
            if f.name in current.names and not is_compatible(current.field(f.name).type, f.type):
                raise SchemaConflict(self.table.name, f.name, str(current.field(f.name).type), str(f.type))
        if not new and not promoted:
            return
        with self._begin().update_schema() as update:
            if new:
                update.union_by_name(pa.schema([pa.field(f.name, f.type, nullable=True) for f in new]))
            for name, target in promoted:
                update.update_column(name, target)

    def update_documentation(self) -> None:
        """Prepare the comments, owner and identifier of the declaration; committed with the data."""
        schema, table = self.metadata.schema(), self.table
        declared = {"comment": table_comment(table), "owner": table.owner}
        docs = [
            (column.name, column.doc)
            for column in stored_columns(table)
            if column.name in schema.column_names and schema.find_field(column.name).doc != column.doc
        ]
        same_identifier = schema.identifier_field_names() == set(table.identifier)
        changed = {name: text for name, text in declared.items() if self.metadata.properties.get(name) != text}
        if not docs and same_identifier and not changed:
            return
        transaction = self._begin()
        if changed:
            transaction.set_properties(changed)
        # Iceberg refuses to make a column required, since it cannot know that the engine never writes a null to this one
        with transaction.update_schema(allow_incompatible_changes=True) as update:
            for name, doc in docs:
                update.update_column(name, doc=doc)
            if not same_identifier:
                for name in table.identifier:
                    update.update_column(name, required=True)
                update.set_identifier_fields(*table.identifier)

    def _begin(self) -> Transaction:
        """Return the open transaction, starting one if there is none."""
        if self._transaction is None:
            self._transaction = self.iceberg_table.transaction()
        return self._transaction

    def commit(
        self,
        added: Iterable[DataFile] = (),
        *,
        positions: Mapping[str, Any],
        removed_paths: frozenset[str] = frozenset(),
        changes_rows: bool = True,
        replaces_files: bool = False,
        properties: Mapping[str, str] | None = None,
        branch: str | None = None,
    ) -> int:
        """Commit files and positions in one snapshot and return its id.

        With `branch=AUDIT_BRANCH` (default: main) the snapshot is staged: readers do not see it until `publish`.

        With `replaces_files` the added files have exactly the rows of the removed ones.

        Raises CommitConflict if another writer committed first or the catalog's answer was lost. In the latter case the
        commit may have succeeded; the positions of the reloaded table show whether it did.
        """
        transaction = self._transaction or self.iceberg_table.transaction()
        inherited = {
            name: value for name in (FINGERPRINT, ROWS, VIOLATIONS) if (value := self.snapshot_property(name)) is not None
        }
        summary = {
            **inherited,
            POSITIONS: json.dumps(dict(positions), sort_keys=True),
            DATA_SEQUENCE: str(self.next_sequence if changes_rows else self.data_sequence),
            **(properties or {}),
        }
        delta = RowDelta(
            transaction,
            self.iceberg_table.io,
            added=added,
            removed_paths=removed_paths,
            properties=summary,
            branch=branch or MAIN_BRANCH,
            replaces_files=replaces_files,
        )
        with committing(self.table.name):
            if branch is None:
                copied, obsolete = self._copies(summary, self.next_sequence)
                transaction.set_properties(copied)
                if obsolete:
                    transaction.remove_properties(*obsolete)
            delta.commit()
            transaction.commit_transaction()
        self._transaction = None
        return delta.snapshot_id

    def _copies(self, summary: Mapping[str, str], sequence: int) -> tuple[dict[str, str], list[str]]:
        """Return the table properties that copy a snapshot's, and the names of those to remove."""
        copied = {name: str(summary[name]) for name in COPIED if name in summary} | {COPIED_SEQUENCE: str(sequence)}
        stored = self.iceberg_table.metadata.properties
        return copied, [name for name in COPIED if name in stored and name not in copied]

    @property
    def staged(self) -> Snapshot | None:
        """The snapshot that is staged for publication, or None. Only gold tables have one."""
        return staged_snapshot(self.iceberg_table.metadata) if self.table.layer == "gold" else None

    @property
    def other_refs(self) -> dict[str, SnapshotRef]:
        """The branches and tags that ShopSphere did not create, by name."""
        own = {MAIN_BRANCH, AUDIT_BRANCH} if self.staged is not None else {MAIN_BRANCH}
        return {name: ref for name, ref in self.iceberg_table.metadata.refs.items() if name not in own}

    @property
    def staged_is_stale(self) -> bool:
        """Whether the staged snapshot no longer continues the current one, so that it cannot be published."""
        staged, main = self.staged, self.snapshot
        return staged is not None and main is not None and staged.parent_snapshot_id != main.snapshot_id

    def publish(self) -> int:
        """Make the staged snapshot the current one and remove its branch, in one commit. Returns its id.

        Raises CommitConflict if there is none, or if it does not continue main as it was loaded, or if either has moved since.
        """
        staged = self.staged
        if staged is None or self.staged_is_stale:
            raise CommitConflict(
                f"{self.table.name}: the snapshot staged on branch '{AUDIT_BRANCH}' does not continue the table, which has "
                "changed since. The next run discards it and stages a new one if there is a change to publish.",
                remedy="run",
            )
        summary = staged.summary.additional_properties if staged.summary else {}
        copied, obsolete = self._copies(summary, staged.sequence_number or 0)
        move_main = SetSnapshotRefUpdate.model_validate(
            {"ref-name": MAIN_BRANCH, "type": SnapshotRefType.BRANCH, "snapshot-id": staged.snapshot_id}
        )
        self._update(
            (
                SetPropertiesUpdate(updates=copied),
                *((RemovePropertiesUpdate(removals=obsolete),) if obsolete else ()),
                keep_retention(self.iceberg_table.metadata, move_main),
                RemoveSnapshotRefUpdate(ref_name=AUDIT_BRANCH),
            ),
            (MAIN_BRANCH, AUDIT_BRANCH),
        )
        return staged.snapshot_id

    def discard_staged(self) -> None:
        """Remove the branch of the staged snapshot, if there is one, and the snapshot unless another branch or tag needs it.

        Raises CommitConflict if the branch has moved since.
        """
        if (staged := self.staged) is not None:
            self._update((discard_update(self.iceberg_table.metadata, staged),), (MAIN_BRANCH, AUDIT_BRANCH))

    def remove_refs(self, names: Iterable[str]) -> None:
        """Remove branches and tags; their snapshots stay. Raises CommitConflict if one of them has moved since."""
        if names := tuple(names):
            self._update(tuple(RemoveSnapshotRefUpdate(ref_name=name) for name in names), names)

    def expire_snapshots(self, snapshot_ids: Iterable[int]) -> None:
        """Remove snapshots and their statistics. Raises CommitConflict."""
        expired = list(snapshot_ids)
        statistics = self.iceberg_table.metadata.partition_statistics
        updates: list[TableUpdate] = [
            RemovePartitionStatisticsUpdate(snapshot_id=file.snapshot_id) for file in statistics if file.snapshot_id in expired
        ]
        # PyIceberg's own removal of snapshots leaves their partition statistics behind
        self._update((*updates, RemoveSnapshotsUpdate(snapshot_ids=expired)), self.iceberg_table.metadata.refs)

    def _update(self, updates: tuple[TableUpdate, ...], unchanged: Iterable[str]) -> None:
        """Commit changes of refs and snapshots, on condition that the `unchanged` refs are as they were loaded."""
        metadata = self.iceberg_table.metadata
        heads = {name: ref.snapshot_id for name, ref in metadata.refs.items()}
        requirements: tuple[TableRequirement, ...] = (
            AssertTableUUID(uuid=metadata.table_uuid),
            *(AssertRefSnapshotId(ref=name, snapshot_id=heads.get(name)) for name in unchanged),
        )
        with committing(self.table.name):
            response = self.iceberg_table.catalog.commit_table(self.iceberg_table, requirements, updates)
        self.iceberg_table.metadata = response.metadata
        self.iceberg_table.metadata_location = response.metadata_location

    def max_value(self, column: str) -> datetime | None:
        """Return the maximum of a date or timestamp column from the statistics of the data files, or None.

        Deleted rows count until their file is compacted.
        """
        if self.snapshot is None:
            return None
        f = self.iceberg_table.metadata.schema().find_field(column)
        assert isinstance(f.field_type, DateType | TimestamptzType)
        bounds = [(task.file.upper_bounds or {}).get(f.field_id) for task in self.iceberg_table.scan().plan_files()]
        values: list[Any] = [from_bytes(f.field_type, bound) for bound in bounds if bound is not None]
        if not values:
            return None
        # Iceberg stores days since 1970 for a date, microseconds for a timestamp
        unit = timedelta(days=1) if isinstance(f.field_type, DateType) else timedelta(microseconds=1)
        return EPOCH + int(max(values)) * unit
