"""One Iceberg snapshot that adds and removes data files and position deletes.

PyIceberg 0.12 has neither a row delta nor a merge-on-read write, so this module extends its private snapshot producer.
There are no conflict checks. It is safe only from a handle loaded before the read, and because a commit in between makes it
fail: it is never rebased, whatever the table property `commit.retry.num-retries` is.

A snapshot that is audited before publication is staged on a branch: its parent is main's head, but main does not move.
A table has at most one staged snapshot; the next one replaces it (staging.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import TableProperties
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Operation, SnapshotSummaryCollector, Summary, update_snapshot_summaries
from pyiceberg.table.update import AssertRefSnapshotId, RemoveSnapshotsUpdate, UpdatesAndRequirements
from pyiceberg.table.update.snapshot import _ManifestMergeManager, _SnapshotProducer
from pyiceberg.utils.properties import property_as_bool, property_as_int

from lakehouse.iceberg.staging import is_only_staged, keep_retention, staged_snapshot

if TYPE_CHECKING:
    from pyiceberg.io import FileIO
    from pyiceberg.table import Transaction


class DeleteManifestWriter(ManifestWriterV2):
    """A manifest of position delete files."""

    def content(self) -> ManifestContent:
        """Return the content type of the entries."""
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class RowDelta(_SnapshotProducer["RowDelta"]):
    """Adds data files and position delete files and removes files by path, all in one snapshot."""

    def __init__(
        self,
        transaction: Transaction,
        io: FileIO,
        *,
        added: Iterable[DataFile] = (),
        removed_paths: frozenset[str] = frozenset(),
        properties: dict[str, str],
        branch: str = MAIN_BRANCH,
        replaces_files: bool = False,
    ) -> None:
        """Prepare a row delta. replaces_files: the added files have the rows of the removed ones, so no row changes."""
        added = tuple(added)
        deletes = [file for file in added if file.content != DataFileContent.DATA]
        changed = Operation.REPLACE if replaces_files else Operation.OVERWRITE
        operation = changed if deletes or removed_paths else Operation.APPEND
        super().__init__(operation, transaction, io, snapshot_properties=properties, branch=branch)
        for file in added:
            if file.content == DataFileContent.DATA:
                self.append_data_file(file)
        self._added_delete_files = deletes
        self._removed_paths = removed_paths
        self._removed_files: list[DataFile] = []

    def _current_branch_head_id(self) -> int | None:
        """Return main's head: a staged snapshot continues main, whatever its branch contains."""
        return self._transaction.table_metadata.current_snapshot_id

    def _commit(self) -> UpdatesAndRequirements:
        updates, requirements = super()._commit()
        metadata = self._transaction.table_metadata
        if self._target_branch == MAIN_BRANCH:
            return tuple(keep_retention(metadata, update) for update in updates), requirements
        staged = staged_snapshot(metadata)
        remove_staged = (
            (RemoveSnapshotsUpdate(snapshot_ids=[staged.snapshot_id]),) if staged and is_only_staged(metadata, staged) else ()
        )
        main_unchanged = AssertRefSnapshotId(ref=MAIN_BRANCH, snapshot_id=metadata.current_snapshot_id)
        return (*remove_staged, *updates), (*requirements, main_unchanged)

    def _validate_concurrency(self) -> None:
        """Check nothing: a commit in between makes this one fail."""

    def _refresh_for_retry(self) -> None:
        """Refuse the rebase that PyIceberg attempts if the table's properties allow retries.

        The files and positions were computed from the parent snapshot. After a rebase they would be committed twice.
        """
        raise CommitFailedException("A row delta cannot be rebased on another writer's commit.")

    def _clean_all_uncommitted(self) -> None:
        """Delete nothing.

        A commit that is reported as failed may have succeeded, if a proxy or the catalog's client retried it after a lost
        response. Maintenance deletes unreferenced files as orphans.
        """

    def _parent_manifests(self) -> list[ManifestFile]:
        if self._parent_snapshot_id is None:
            return []
        snapshot = self._transaction.table_metadata.snapshot_by_id(self._parent_snapshot_id)
        return snapshot.manifests(io=self._io) if snapshot else []

    def _writer(self, content: ManifestContent, spec_id: int) -> ManifestWriterV2:
        if content == ManifestContent.DATA:
            return self.new_manifest_writer(self.spec(spec_id))  # type: ignore[return-value]
        return DeleteManifestWriter(
            self.spec(spec_id), self.schema(), self.new_manifest_output(), self._snapshot_id, self._compression
        )

    def _rewrite_manifest(self, manifest: ManifestFile) -> list[ManifestFile]:
        """Return the manifest without the removed files, and a manifest that records their removal."""
        entries = manifest.fetch_manifest_entry(io=self._io, discard_deleted=True)
        removed = [entry for entry in entries if entry.data_file.file_path in self._removed_paths]
        if not removed:
            return [manifest]
        self._removed_files.extend(entry.data_file for entry in removed)
        kept = [entry for entry in entries if entry.data_file.file_path not in self._removed_paths]
        result = []
        for status, group in ((ManifestEntryStatus.EXISTING, kept), (ManifestEntryStatus.DELETED, removed)):
            if group:
                with self._writer(manifest.content, manifest.partition_spec_id) as writer:
                    for entry in group:
                        writer.add_entry(self._with_status(entry, status))
                result.append(writer.to_manifest_file())
        return result

    def _with_status(self, entry: ManifestEntry, status: ManifestEntryStatus) -> ManifestEntry:
        return ManifestEntry.from_args(
            status=status,
            snapshot_id=self._snapshot_id if status == ManifestEntryStatus.DELETED else entry.snapshot_id,
            sequence_number=entry.sequence_number,
            file_sequence_number=entry.file_sequence_number,
            data_file=entry.data_file,
        )

    def _existing_manifests(self) -> list[ManifestFile]:
        live = [m for m in self._parent_manifests() if m.has_added_files() or m.has_existing_files()]
        if not self._removed_paths:
            return live
        return [rewritten for manifest in live for rewritten in self._rewrite_manifest(manifest)]

    def _deleted_entries(self) -> list[ManifestEntry]:
        return []

    def _manifests(self) -> list[ManifestFile]:
        manifests = super()._manifests()
        return [*manifests, *self._added_delete_manifests()]

    def _added_delete_manifests(self) -> list[ManifestFile]:
        """Write one manifest per partition spec, since the partition values of its entries have the columns of that spec."""
        by_spec: dict[int, list[DataFile]] = {}
        for file in self._added_delete_files:
            by_spec.setdefault(file.spec_id, []).append(file)
        manifests = []
        for spec_id, files in by_spec.items():
            with self._writer(ManifestContent.DELETES, spec_id) as writer:
                for file in files:
                    writer.add_entry(
                        ManifestEntry.from_args(
                            status=ManifestEntryStatus.ADDED,
                            snapshot_id=self._snapshot_id,
                            sequence_number=None,
                            file_sequence_number=None,
                            data_file=file,
                        )
                    )
            manifests.append(writer.to_manifest_file())
        return manifests

    def _process_manifests(self, manifests: list[ManifestFile]) -> list[ManifestFile]:
        """Merge small manifests, as Iceberg's merge append does, so that scan planning stays cheap."""
        properties = self._transaction.table_metadata.properties
        data = [manifest for manifest in manifests if manifest.content == ManifestContent.DATA]
        deletes = [manifest for manifest in manifests if manifest.content == ManifestContent.DELETES]
        min_count = property_as_int(properties, TableProperties.MANIFEST_MIN_MERGE_COUNT, 20) or 20
        merger = _ManifestMergeManager(
            target_size_bytes=property_as_int(  # type: ignore[arg-type]
                properties, TableProperties.MANIFEST_TARGET_SIZE_BYTES, TableProperties.MANIFEST_TARGET_SIZE_BYTES_DEFAULT
            ),
            min_count_to_merge=min_count,
            merge_enabled=property_as_bool(properties, TableProperties.MANIFEST_MERGE_ENABLED, True),
            snapshot_producer=self,
        )
        if len(deletes) >= min_count:
            deletes = self._merge_delete_manifests(deletes)
        return (merger.merge_manifests(data) if data else []) + deletes

    def _merge_delete_manifests(self, manifests: list[ManifestFile]) -> list[ManifestFile]:
        by_spec: dict[int, list[ManifestFile]] = {}
        for manifest in manifests:
            by_spec.setdefault(manifest.partition_spec_id, []).append(manifest)
        merged = []
        for spec_id, group in by_spec.items():
            with self._writer(ManifestContent.DELETES, spec_id) as writer:
                for manifest in group:
                    for entry in manifest.fetch_manifest_entry(io=self._io, discard_deleted=True):
                        writer.add_entry(self._with_status(entry, ManifestEntryStatus.EXISTING))
            merged.append(writer.to_manifest_file())
        return merged

    def _summary(self, snapshot_properties: dict[str, str] | None = None) -> Summary:
        metadata = self._transaction.table_metadata
        collector = SnapshotSummaryCollector()
        specs = metadata.specs()
        for file in self._added_data_files:
            collector.add_file(data_file=file, partition_spec=metadata.spec(), schema=metadata.schema())
        for file in self._added_delete_files:
            collector.add_file(data_file=file, partition_spec=specs[file.spec_id], schema=metadata.schema())
        for file in self._removed_files:
            collector.remove_file(data_file=file, partition_spec=specs[file.spec_id], schema=metadata.schema())
        parent = metadata.snapshot_by_id(self._parent_snapshot_id) if self._parent_snapshot_id is not None else None
        # PyIceberg computes no totals for a replace
        summary = update_snapshot_summaries(
            summary=Summary(operation=Operation.OVERWRITE, **collector.build(), **self.snapshot_properties),
            previous_summary=parent.summary if parent is not None else None,
        )
        return Summary(operation=self._operation, **summary.additional_properties)
