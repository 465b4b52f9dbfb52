"""Commits, maintenance and purges beside other writers, other engines, and their branches, tags and statistics."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.statistics import PartitionStatisticsFile, StatisticsFile
from pyiceberg.table.update import (
    SetPartitionStatisticsUpdate,
    SetSnapshotRefUpdate,
    SetStatisticsUpdate,
    TableUpdate,
)
from pyiceberg.transforms import IdentityTransform
from support.sales_lake import SALES, SALES_RECEIVED, SALES_STEP, TOTALS, TOTALS_STEP, receive, sales_engine

from lakehouse.engine.engine import Engine
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import ExpectationsFailed
from lakehouse.iceberg import maintenance, rewrite
from lakehouse.iceberg.compaction import compact
from lakehouse.iceberg.maintenance import expire, maintain
from lakehouse.iceberg.reader import FileReader
from lakehouse.iceberg.rewrite import purge_history
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import Table, column, year

LATER = timedelta(days=30)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return sales_engine(tmp_path)


def run(engine: Engine) -> None:
    engine.refresh(SALES_STEP)
    engine.refresh(TOTALS_STEP)


def totals(engine: Engine) -> dict[str, int]:
    return dict(engine.lake.load(TOTALS).read(["shop", "amount"]).iter_rows())


def sales_received(engine: Engine) -> list[int]:
    return sorted(engine.lake.load(SALES_RECEIVED).read(["id"])["id"])


def stage_refused_build(engine: Engine) -> TableHandle:
    """Publish north = 10, then stage a build that an expectation refuses: north = -490."""
    receive(engine, (1, "north", 10))
    run(engine)
    receive(engine, (2, "north", -500), position="2")
    with pytest.raises(ExpectationsFailed):
        run(engine)
    return engine.lake.load(TOTALS)


def update_as_other_engine(handle: TableHandle, *updates: TableUpdate) -> None:
    table = handle.iceberg_table
    table.catalog.commit_table(table, (), updates)


def set_ref(handle: TableHandle, name: str, snapshot_id: int, kind=SnapshotRefType.BRANCH, **retention: int) -> None:
    update_as_other_engine(handle, SetSnapshotRefUpdate(ref_name=name, type=kind, snapshot_id=snapshot_id, **retention))


def snapshot_ids(handle: TableHandle) -> list[int]:
    return [snapshot.snapshot_id for snapshot in handle.iceberg_table.metadata.snapshots]


def refs(handle: TableHandle) -> set[str]:
    return set(handle.iceberg_table.metadata.refs)


# purges beside a writer


def test_a_purge_keeps_the_files_of_a_writer_that_can_still_commit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(engine, (1, "north", 10))
    receive(engine, (2, "north", 20))
    writers = []

    def expire_beside_writer(*arguments) -> int:
        handle = engine.lake.load(SALES_RECEIVED)
        rows = handle.read(handle.arrow_schema.names).with_columns(id=pl.lit(3, pl.Int64))
        writers.append((handle, handle.writer.write(rows)))
        return expire(*arguments)

    monkeypatch.setattr(rewrite, "expire", expire_beside_writer)
    assert purge_history(engine.lake, SALES_RECEIVED, tombstones_read_to=None).snapshots_expired
    ((handle, files),) = writers
    handle.commit(files, positions={})
    assert sales_received(engine) == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(FileReader, "read"), (TableHandle, "files"), (maintenance, "referenced_files"), (maintenance, "delete_file")],
)
def test_maintenance_starts_over_when_a_purge_deletes_its_files(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.setattr("lakehouse.retry.time.sleep", lambda seconds: None)
    for number in (1, 2):
        receive(engine, (number, "north", number))
    orphan = Path(engine.lake.load(SALES_RECEIVED).iceberg_table.location().removeprefix("file://")) / "data" / "orphan.parquet"
    orphan.write_bytes(b"PAR1")
    pending, original = [True], getattr(owner, name)

    def beside_a_purge(*arguments: Any, **named: Any) -> Any:
        if pending:
            pending.clear()
            compact(engine.lake, SALES_RECEIVED)
            engine.lake.load(SALES_RECEIVED).commit(positions={})
            purge_history(engine.lake, SALES_RECEIVED, tombstones_read_to=None)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, beside_a_purge)
    maintain(engine.lake, SALES_RECEIVED, datetime.now(UTC) + LATER)
    assert not pending
    assert not orphan.exists()
    assert sales_received(engine) == [1, 2]


# staged snapshots and branches of others


def test_a_build_that_another_engine_has_published_stays(engine: Engine) -> None:
    handle = stage_refused_build(engine)
    set_ref(handle, MAIN_BRANCH, handle.staged.snapshot_id)  # as CALL fast_forward and cherrypick_snapshot do
    published = handle.staged.snapshot_id
    engine.refresh(TOTALS_STEP)
    after = engine.lake.load(TOTALS)
    assert after.snapshot is not None
    assert after.snapshot.snapshot_id == published
    assert refs(after) == {MAIN_BRANCH}
    maintain(engine.lake, TOTALS, datetime.now(UTC) + LATER)
    assert totals(engine) == {"north": -490}


def test_the_next_build_keeps_what_another_engine_has_published(engine: Engine) -> None:
    handle = stage_refused_build(engine)
    set_ref(handle, MAIN_BRANCH, handle.staged.snapshot_id)
    receive(engine, (3, "south", 7), position="3")
    engine.refresh(SALES_STEP)
    engine.refresh(TOTALS_STEP)
    assert totals(engine) == {"north": -490, "south": 7}
    assert handle.staged.snapshot_id in snapshot_ids(engine.lake.load(TOTALS))


def test_a_staged_snapshot_with_a_tag_stays_when_it_is_discarded(engine: Engine) -> None:
    handle = stage_refused_build(engine)
    staged = handle.staged.snapshot_id
    set_ref(handle, "evidence", staged, SnapshotRefType.TAG)
    engine.lake.load(TOTALS).discard_staged()
    after = engine.lake.load(TOTALS)
    assert refs(after) == {MAIN_BRANCH, "evidence"}
    assert staged in snapshot_ids(after)
    maintain(engine.lake, TOTALS, datetime.now(UTC) + LATER)
    files = engine.lake.load(TOTALS).files(snapshot_id=staged)
    assert engine.lake.load(TOTALS).reader.read(files, ["amount"])["amount"].to_list() == [-490]
    assert totals(engine) == {"north": 10}


@pytest.mark.parametrize("name", ["audit", AUDIT_BRANCH])
def test_maintenance_of_bronze_leaves_a_branch_of_any_name(engine: Engine, name: str) -> None:
    receive(engine, (1, "north", 10))
    handle = engine.lake.load(SALES_RECEIVED)
    set_ref(handle, name, handle.snapshot.snapshot_id)
    maintain(engine.lake, SALES_RECEIVED, datetime.now(UTC) + LATER)
    assert sales_received(engine) == [1]
    assert refs(engine.lake.load(SALES_RECEIVED)) == {MAIN_BRANCH, name}


@pytest.mark.parametrize("name", ["audit", AUDIT_BRANCH])
def test_a_gold_table_keeps_main_when_a_branch_points_to_it(engine: Engine, name: str) -> None:
    receive(engine, (1, "north", 10))
    run(engine)
    handle = engine.lake.load(TOTALS)
    set_ref(handle, name, handle.snapshot.snapshot_id)
    engine.refresh(TOTALS_STEP)
    maintain(engine.lake, TOTALS, datetime.now(UTC) + LATER)
    assert totals(engine) == {"north": 10}
    receive(engine, (2, "north", 5), position="2")
    run(engine)
    assert totals(engine) == {"north": 15}
    assert ("audit" in refs(engine.lake.load(TOTALS))) == (name == "audit")


def test_a_build_takes_the_branch_but_not_the_snapshot_of_another_engine(engine: Engine) -> None:
    receive(engine, (1, "north", 10))
    run(engine)
    handle = engine.lake.load(TOTALS)
    set_ref(handle, AUDIT_BRANCH, handle.snapshot.snapshot_id)
    table = engine.lake.load(TOTALS).iceberg_table
    table.append(table.scan().to_arrow(), branch=AUDIT_BRANCH)
    theirs = table.metadata.refs[AUDIT_BRANCH].snapshot_id
    assert engine.lake.load(TOTALS).staged is None
    receive(engine, (2, "north", 5), position="2")
    run(engine)
    assert totals(engine) == {"north": 15}
    assert theirs in snapshot_ids(engine.lake.load(TOTALS))


# statistics


def test_registered_statistics_survive_maintenance_and_a_purge(engine: Engine) -> None:
    receive(engine, (1, "north", 10))
    handle = engine.lake.load(SALES_RECEIVED)
    number, folder = handle.snapshot.snapshot_id, handle.iceberg_table.location().removeprefix("file://")
    files = [Path(folder) / "metadata" / name for name in ("table.stats", "partitions.parquet")]
    for file in files:
        file.write_bytes(b"PFA1")
    common = {"snapshot-id": number, "file-size-in-bytes": 4}
    table_statistics = {**common, "statistics-path": f"file://{files[0]}", "file-footer-size-in-bytes": 4, "blob-metadata": []}
    update_as_other_engine(
        handle,
        SetStatisticsUpdate(statistics=StatisticsFile.model_validate(table_statistics)),
        SetPartitionStatisticsUpdate.model_validate(
            {"partition-statistics": PartitionStatisticsFile.model_validate({**common, "statistics-path": f"file://{files[1]}"})}
        ),
    )
    maintain(engine.lake, SALES_RECEIVED, datetime.now(UTC) + LATER)
    assert all(file.exists() for file in files)
    purge_history(engine.lake, SALES_RECEIVED, tombstones_read_to=None)
    assert all(file.exists() for file in files)
    # a later purge expires their snapshot, and they go with it
    receive(engine, (2, "north", 20))
    purge_history(engine.lake, SALES_RECEIVED, tombstones_read_to=None)
    assert not any(file.exists() for file in files)
    metadata = engine.lake.load(SALES_RECEIVED).iceberg_table.metadata
    assert not metadata.statistics
    assert not metadata.partition_statistics


# expiry


def test_a_snapshot_that_was_just_replaced_by_an_older_build_stays(engine: Engine) -> None:
    handle = stage_refused_build(engine)
    previous, moment = handle.snapshot.snapshot_id, datetime.now(UTC)
    assert handle.staged.timestamp_ms < moment.timestamp() * 1000
    published = handle.publish()
    expire(engine.lake, TOTALS, 0, moment)
    assert previous in snapshot_ids(engine.lake.load(TOTALS))
    expire(engine.lake, TOTALS, 0, datetime.now(UTC) + timedelta(seconds=1))
    assert snapshot_ids(engine.lake.load(TOTALS)) == [published]


def test_a_snapshot_that_was_current_again_after_a_rollback_counts_from_its_last_end(engine: Engine) -> None:
    receive(engine, (1, "north", 10))
    first = engine.lake.load(SALES_RECEIVED).snapshot.snapshot_id
    receive(engine, (2, "north", 20))
    handle = engine.lake.load(SALES_RECEIVED)
    second, moment = handle.snapshot.snapshot_id, datetime.now(UTC) + timedelta(milliseconds=1)
    while datetime.now(UTC) <= moment:
        pass
    set_ref(handle, MAIN_BRANCH, first)
    receive(engine, (3, "north", 30))
    expire(engine.lake, SALES_RECEIVED, 0, moment)
    assert {first, second} <= set(snapshot_ids(engine.lake.load(SALES_RECEIVED)))


def test_expiry_keeps_what_the_retention_of_a_branch_asks_for(engine: Engine) -> None:
    numbers = []
    for number in range(1, 7):
        receive(engine, (number, "north", number))
        numbers.append(engine.lake.load(SALES_RECEIVED).snapshot.snapshot_id)
    first, second, third, fourth, fifth, sixth = numbers
    month_ms = int(LATER.total_seconds() * 1000)
    set_ref(engine.lake.load(SALES_RECEIVED), "counted", second, min_snapshots_to_keep=2)
    set_ref(engine.lake.load(SALES_RECEIVED), "plain", fourth)
    set_ref(engine.lake.load(SALES_RECEIVED), "short", fifth, max_ref_age_ms=month_ms // 2)
    set_ref(engine.lake.load(SALES_RECEIVED), "short-tag", fifth, SnapshotRefType.TAG, max_ref_age_ms=month_ms // 2)
    set_ref(engine.lake.load(SALES_RECEIVED), "long-tag", third, SnapshotRefType.TAG, max_ref_age_ms=month_ms * 2)
    expire(engine.lake, SALES_RECEIVED, 1, datetime.now(UTC) + LATER)
    after = engine.lake.load(SALES_RECEIVED)
    assert refs(after) == {MAIN_BRANCH, "counted", "plain", "long-tag"}
    assert snapshot_ids(after) == [first, second, third, fourth, sixth]
    set_ref(after, "aged", fourth, max_snapshot_age_ms=month_ms * 2)
    update = SetSnapshotRefUpdate(ref_name="counted", type=SnapshotRefType.BRANCH, snapshot_id=second)
    update_as_other_engine(engine.lake.load(SALES_RECEIVED), update)
    expire(engine.lake, SALES_RECEIVED, 1, datetime.now(UTC) + LATER)
    assert first in snapshot_ids(engine.lake.load(SALES_RECEIVED)), "the branch 'aged' keeps its history for two months"
    expire(engine.lake, SALES_RECEIVED, 1, datetime.now(UTC) + 3 * LATER)
    assert snapshot_ids(engine.lake.load(SALES_RECEIVED)) == [second, fourth, sixth]


# what else a table may look like after another engine


def test_deletes_of_an_earlier_partition_spec_go_to_its_manifest(engine: Engine) -> None:
    things = Table(
        "silver.things",
        "Things by day and kind.",
        (
            column("id", pa.int64(), "Id."),
            column("kind", pa.string(), "Kind."),
            column("at", pa.timestamp("us", tz="UTC"), "Moment."),
        ),
        key=("id",),
        partition_by=(year("at"),),
    )

    def write(ids: list[int]) -> None:
        handle = engine.lake.load(things)
        rows = pl.DataFrame({"id": ids, "kind": ["a"] * len(ids)}).with_columns(
            at=pl.lit(datetime(2026, 1, 1, tzinfo=UTC)).cast(pl.Datetime("us", "UTC")),
            _seq=pl.lit(handle.next_sequence, pl.Int64),
            _group_hash=pl.lit(0, pl.Int32),
            _deleted=pl.lit(False),
        )
        handle.commit(handle.writer.write(rows.select(handle.arrow_schema.names)), positions={})

    write([1, 2])
    with engine.lake.load(things).iceberg_table.update_spec() as update:
        update.add_field("kind", IdentityTransform(), "kind")
    write([3, 4])
    handle = engine.lake.load(things)
    files = handle.files()
    found = handle.reader.read(files, ["id"], pl.col("id").is_in([1, 3]), positions=True)
    handle.commit(handle.writer.write_deletes(files, found.select("_file", "_pos")), positions={})
    after = engine.lake.load(things)
    assert sorted(after.read(["id"])["id"]) == [2, 4]
    specs = after.iceberg_table.metadata.specs()
    written = [m for m in after.snapshot.manifests(after.iceberg_table.io) if m.content == 1]
    for manifest in written:
        (entry,) = manifest.fetch_manifest_entry(after.iceberg_table.io)
        assert len(entry.data_file.partition) == len(specs[manifest.partition_spec_id].fields)
    assert {manifest.partition_spec_id for manifest in written} == {0, 1}
    assert sorted(after.iceberg_table.scan().to_arrow()["id"].to_pylist()) == [2, 4]


def test_another_engine_is_told_how_to_leave_the_tombstones_of_silver_out(engine: Engine) -> None:
    receive(engine, (1, "north", 10), (2, "north", 20))
    run(engine)
    receive(engine, (2, "north", 20), position="2", op="d")
    run(engine)
    silver = engine.lake.load(SALES).iceberg_table
    assert silver.scan().to_arrow().num_rows == 2
    (condition,) = re.findall(r"WHERE (NOT _deleted)", silver.properties["comment"])
    assert f"WHERE {condition}" in silver.schema().find_field("_deleted").doc
    rows = duckdb.from_arrow(silver.scan().to_arrow())
    assert rows.filter(condition).project("id").fetchall() == [(1,)]
    assert "WHERE" not in engine.lake.load(TOTALS).iceberg_table.properties["comment"]


def test_a_table_of_another_format_version_is_refused(engine: Engine) -> None:
    receive(engine, (1, "north", 10))
    metadata = Path(engine.lake.load(SALES_RECEIVED).iceberg_table.metadata_location.removeprefix("file://"))
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "format-version": 3, "next-row-id": 0}))
    with pytest.raises(ShopSphereError, match=r"bronze\.sales has Iceberg format version 3"):
        engine.lake.load(SALES_RECEIVED)
    with pytest.raises(ShopSphereError, match="format version 3"):
        engine.refresh(SALES_STEP)
