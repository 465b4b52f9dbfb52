"""The commit protocol beside other writers and engines, on a SQLite catalog with local files.

An interleaving is forced by calling the other writer from a patched function, at the critical point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from pyiceberg.exceptions import CommitFailedException, ServerError
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import SetSnapshotRefUpdate
from support.engines import make_engine

from lakehouse.engine.step_result import StepResult
from lakehouse.errors import CommitConflict, QueryError, SourceError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.compaction import compact
from lakehouse.iceberg.maintenance import expire
from lakehouse.iceberg.snapshot_properties import FINGERPRINT, POSITIONS, ROWS
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.query import query
from lakehouse.run_history import RUNS, RunHistory, RunRecord
from lakehouse.source import Plan, Position, Rows
from lakehouse.table import Table, column
from pipelines.settings import Settings

TABLE = Table("gold.things", "Things.", (column("id", pa.int64(), "Id."), column("text", pa.string(), "Text.")))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(Settings(home=tmp_path))


def frame(handle: TableHandle, *ids: int) -> pl.DataFrame:
    return pl.DataFrame({"id": ids, "text": [f"row {number}" for number in ids]}).with_columns(
        _seq=pl.lit(handle.next_sequence, pl.Int64)
    )


def append(handle: TableHandle, *ids: int, **options: Any) -> int:
    """Commit rows with the position "up" at the highest id."""
    return handle.commit(handle.writer.write(frame(handle, *ids)), positions={"up": max(ids)}, **options)


def engine_rows(handle: TableHandle, *ids: int) -> pa.Table:
    """Return rows as another engine writes them."""
    return frame(handle, *ids).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(handle.iceberg_table.schema().as_arrow())


def stored_ids(lake: Lake) -> list[int]:
    return sorted(lake.load(TABLE).read(["id"])["id"])


def before_first_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Run `action` once, right before the first call of a method."""
    original = getattr(owner, name)
    pending = [action]

    def patched(*arguments: Any, **named: Any) -> Any:
        if pending:
            pending.pop()()
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, patched)


def test_a_stale_commit_fails_whatever_the_retry_property_of_the_table(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    with lake.load(TABLE).iceberg_table.transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "4", "commit.retry.min-wait-ms": "1"})
    stale = lake.load(TABLE)
    append(lake.load(TABLE), 2)
    with pytest.raises(CommitConflict):
        append(stale, 2)
    assert stored_ids(lake) == [1, 2]
    assert lake.load(TABLE).positions == {"up": 2}


def test_a_stale_commit_whose_start_has_expired_is_a_conflict(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    with lake.load(TABLE).iceberg_table.transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "4", "commit.retry.min-wait-ms": "1"})
    stale = lake.load(TABLE)
    append(lake.load(TABLE), 2)
    expire(lake, TABLE, 0, datetime(2100, 1, 1, tzinfo=UTC))
    with pytest.raises(CommitConflict):
        append(stale, 2)
    assert stored_ids(lake) == [1, 2]


def test_a_commit_to_another_branch_makes_ours_a_conflict(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    with lake.load(TABLE).iceberg_table.manage_snapshots() as snapshots:
        snapshots.create_branch(lake.load(TABLE).snapshot.snapshot_id, "trial")
    stale = lake.load(TABLE)
    lake.load(TABLE).iceberg_table.append(engine_rows(stale, 9), branch="trial")
    with pytest.raises(CommitConflict):
        append(stale, 2)
    append(lake.load(TABLE), 2)
    assert stored_ids(lake) == [1, 2]


def test_a_snapshot_that_another_writer_staged_makes_ours_a_conflict(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    stale = lake.load(TABLE)
    append(lake.load(TABLE), 2, branch=AUDIT_BRANCH)
    with pytest.raises(CommitConflict):
        append(stale, 2)


def test_two_expiries_at_once_are_a_conflict(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        append(lake.load(TABLE), number)
    end_of_time = datetime(2100, 1, 1, tzinfo=UTC)
    before_first_call(monkeypatch, lake.catalog, "commit_table", lambda: expire(lake, TABLE, 0, end_of_time))
    with pytest.raises(CommitConflict):
        expire(lake, TABLE, 0, end_of_time)
    assert len(lake.load(TABLE).iceberg_table.metadata.snapshots) == 1


def test_time_travel_reads_what_main_was_at_that_time(lake: Lake) -> None:
    first = append(lake.load(TABLE), 1)
    lake.load(TABLE).iceberg_table.append(engine_rows(lake.load(TABLE), 8), branch="trial")
    append(lake.load(TABLE), 2)
    with lake.load(TABLE).iceberg_table.manage_snapshots() as snapshots:
        snapshots.rollback_to_snapshot(first)
    assert ids_at(lake, datetime.now(UTC)) == [1]  # the snapshot with row 2 was rolled back, that with row 8 is on a branch
    log = lake.load(TABLE).iceberg_table.metadata.snapshot_log
    assert [ids_at(lake, from_milliseconds(entry.timestamp_ms)) for entry in log] == [[1], [1, 2], [1]]


def test_a_published_snapshot_is_visible_from_its_publication_on(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    append(lake.load(TABLE), 1)
    append(lake.load(TABLE), 2, branch=AUDIT_BRANCH)
    staged_at = lake.load(TABLE).staged.timestamp_ms
    while datetime.now(UTC) <= from_milliseconds(staged_at + 1):
        pass
    lake.load(TABLE).publish()
    assert ids_at(lake, from_milliseconds(staged_at)) == [1]
    assert ids_at(lake, datetime.now(UTC)) == [1, 2]


def test_time_travel_to_an_expired_snapshot_is_an_error_although_an_earlier_one_is_left(lake: Lake) -> None:
    first = append(lake.load(TABLE), 1)
    with lake.load(TABLE).iceberg_table.manage_snapshots() as snapshots:
        snapshots.create_tag(first, "year-end")
    for number in (2, 3):
        wait_for_the_next_millisecond(lake)
        append(lake.load(TABLE), number)
    times = [from_milliseconds(entry.timestamp_ms) for entry in lake.load(TABLE).iceberg_table.metadata.snapshot_log]
    assert [ids_at(lake, time) for time in times] == [[1], [1, 2], [1, 2, 3]]
    expire(lake, TABLE, 0, datetime(2100, 1, 1, tzinfo=UTC))
    assert ids_at(lake, times[2]) == [1, 2, 3]
    assert query(lake, {TABLE.name: TABLE}, "SELECT id FROM gold.things FOR VERSION AS OF 'year-end'").num_rows == 1
    for time in times[:2]:  # when the first one was replaced is no longer known
        with pytest.raises(QueryError, match=f"or it has expired. The oldest that is left is of {times[2].date()}"):
            ids_at(lake, time)


def test_time_travel_to_a_rolled_back_snapshot_that_has_expired_is_an_error(lake: Lake) -> None:
    first = append(lake.load(TABLE), 1)
    wait_for_the_next_millisecond(lake)
    append(lake.load(TABLE), 2)
    wait_for_the_next_millisecond(lake)
    with lake.load(TABLE).iceberg_table.manage_snapshots() as snapshots:
        snapshots.rollback_to_snapshot(first)
    times = [from_milliseconds(entry.timestamp_ms) for entry in lake.load(TABLE).iceberg_table.metadata.snapshot_log]
    expire(lake, TABLE, 0, datetime(2100, 1, 1, tzinfo=UTC))
    assert ids_at(lake, times[2]) == [1]
    with pytest.raises(QueryError, match="or it has expired"):
        ids_at(lake, times[1])


def wait_for_the_next_millisecond(lake: Lake) -> None:
    last = from_milliseconds(lake.load(TABLE).iceberg_table.metadata.last_updated_ms + 1)
    while datetime.now(UTC) <= last:
        pass


def from_milliseconds(timestamp: int) -> datetime:
    return datetime.fromtimestamp(timestamp / 1000, UTC)


def ids_at(lake: Lake, moment: datetime) -> list[int]:
    statement = f"SELECT id FROM gold.things FOR TIMESTAMP AS OF '{moment.isoformat()}' ORDER BY id"
    return [row["id"] for row in query(lake, {TABLE.name: TABLE}, statement).to_pylist()]


def expired_by_another_engine(lake: Lake) -> None:
    """Let another engine compact the table and expire every snapshot but its own."""
    table = lake.load(TABLE).iceberg_table
    rows = engine_rows(lake.load(TABLE), *stored_ids(lake))
    table.overwrite(rows)
    table.refresh()
    old = [one.snapshot_id for one in table.metadata.snapshots if one.snapshot_id != table.metadata.current_snapshot_id]
    table.maintenance.expire_snapshots().by_ids(old).commit()


def test_positions_survive_the_expiry_of_another_engine(lake: Lake) -> None:
    append(lake.load(TABLE), 1, 2, properties={FINGERPRINT: "f", ROWS: "2"})
    before = lake.load(TABLE)
    expired_by_another_engine(lake)
    after = lake.load(TABLE)
    assert after.positions == {"up": 2}
    assert after.data_sequence == before.data_sequence > 0
    assert (after.snapshot_property(FINGERPRINT), after.snapshot_property(ROWS)) == ("f", "2")


def test_positions_of_a_staged_snapshot_are_kept_from_its_publication_on(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    append(lake.load(TABLE), 2, branch=AUDIT_BRANCH)
    assert json.loads(lake.load(TABLE).metadata.properties[POSITIONS]) == {"up": 1}
    lake.load(TABLE).publish()
    expired_by_another_engine(lake)
    assert lake.load(TABLE).positions == {"up": 2}


def test_a_rollback_of_another_engine_takes_the_positions_back(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    lake.load(TABLE).iceberg_table.append(engine_rows(lake.load(TABLE), 5))
    foreign = lake.load(TABLE).snapshot.snapshot_id
    append(lake.load(TABLE), 6)
    with lake.load(TABLE).iceberg_table.manage_snapshots() as snapshots:
        snapshots.rollback_to_snapshot(foreign)
    assert lake.load(TABLE).positions == {"up": 1}
    table = lake.load(TABLE).iceberg_table
    old = [one.snapshot_id for one in table.metadata.snapshots if one.snapshot_id != foreign]
    table.maintenance.expire_snapshots().by_ids(old).commit()
    assert lake.load(TABLE).positions == {}  # those of the table's properties are past its rows


def retention(lake: Lake, branch: str = "main") -> tuple[int | None, int | None]:
    ref = lake.load(TABLE).metadata.refs[branch]
    return ref.min_snapshots_to_keep, ref.max_snapshot_age_ms


def test_commits_keep_the_retention_of_main(lake: Lake) -> None:
    append(lake.load(TABLE), 1)
    table = lake.load(TABLE).iceberg_table
    head = table.current_snapshot().snapshot_id
    update = SetSnapshotRefUpdate(
        ref_name="main", type="branch", snapshot_id=head, min_snapshots_to_keep=5, max_snapshot_age_ms=86_400_000
    )
    table.catalog.commit_table(table, (), (update,))
    append(lake.load(TABLE), 2)
    assert retention(lake) == (5, 86_400_000)
    append(lake.load(TABLE), 3, branch=AUDIT_BRANCH)
    assert retention(lake, AUDIT_BRANCH) == (None, None)
    lake.load(TABLE).publish()
    assert retention(lake) == (5, 86_400_000)
    assert stored_ids(lake) == [1, 2, 3]


@dataclass(frozen=True)
class NumberSource:
    """A source of the numbers 1 to `upto`, read from the stored position on."""

    upto: int
    name: str = "numbers"
    tables: tuple[str, ...] = (TABLE.name,)

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        start = (positions[TABLE.name] or {}).get("number", 0)
        return Plan(tasks=(NumberTask(start, self.upto),), positions={TABLE.name: {"number": self.upto}})

    def acknowledge(self, plan: Plan) -> None:
        pass

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class NumberTask:
    """Reads the numbers after `start` up to `upto`."""

    start: int
    upto: int

    def read(self) -> Iterator[Rows]:
        numbers = range(self.start + 1, self.upto + 1)
        yield Rows(TABLE.name, pa.table({"id": pa.array(numbers, pa.int64()), "text": [str(number) for number in numbers]}))


def test_ingestion_continues_after_the_expiry_of_another_engine(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.ingest(NumberSource(3), {TABLE.name: TABLE})
    expired_by_another_engine(engine.lake)
    engine.ingest(NumberSource(5), {TABLE.name: TABLE})
    assert stored_ids(engine.lake) == [1, 2, 3, 4, 5]


def test_a_table_with_rows_and_no_position_is_not_ingested(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.ingest(NumberSource(3), {TABLE.name: TABLE})
    expired_by_another_engine(engine.lake)
    with engine.lake.load(TABLE).iceberg_table.transaction() as transaction:
        transaction.remove_properties(POSITIONS)
    with pytest.raises(SourceError, match=r"gold\.things has rows, but no position of 'numbers'") as caught:
        engine.ingest(NumberSource(5), {TABLE.name: TABLE})
    assert (caught.value.remedy, caught.value.remedy_tables) == ("rebuild", (TABLE.name,))
    assert stored_ids(engine.lake) == [1, 2, 3]
    engine.ingest(NumberSource(5), {TABLE.name: TABLE}, resnapshot=frozenset({TABLE.name}))
    assert engine.lake.load(TABLE).positions == {"numbers": {"number": 5}}


def test_a_compaction_is_a_replace_with_the_totals_of_the_files(lake: Lake) -> None:
    for number in (1, 2, 3):
        append(lake.load(TABLE), number)
    handle = lake.load(TABLE)
    files = handle.files()
    located = handle.reader.read(files, ["id"], pl.col("id") == 2, positions=True).select("_file", "_pos")
    handle.commit(handle.writer.write_deletes(files, located), positions=handle.positions)
    compact(lake, TABLE)
    table = lake.load(TABLE).iceberg_table
    summary = table.current_snapshot().summary
    assert summary.operation == Operation.REPLACE
    totals = ("total-records", "total-data-files", "total-delete-files", "total-position-deletes")
    assert [summary[name] for name in totals] == ["2", "1", "0", "0"]
    assert int(summary["total-files-size"]) == sum(file.bytes for file in lake.load(TABLE).files())
    assert sorted(table.scan().to_arrow()["id"].to_pylist()) == stored_ids(lake) == [1, 3]
    append(lake.load(TABLE), 4)
    summary = lake.load(TABLE).snapshot.summary
    assert (summary.operation, summary["total-records"], summary["total-data-files"]) == (Operation.APPEND, "3", "2")


@pytest.mark.parametrize("error", [CommitFailedException("lost"), ServerError("lost")])
def test_a_run_is_recorded_once_although_the_response_was_lost(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("lakehouse.retry.time.sleep", lambda seconds: None)
    commit, lost = lake.catalog.commit_table, [error]

    def losing_the_first_response(*arguments: Any, **named: Any) -> Any:
        response = commit(*arguments, **named)
        if lost:
            raise lost.pop()
        return response

    step = StepResult("gold.totals", "changed", rows_read=1)
    RunHistory(lake).record(RunRecord("run"), [step])
    monkeypatch.setattr(lake.catalog, "commit_table", losing_the_first_response)
    RunHistory(lake).record(RunRecord("run"), [step])
    assert not lost
    assert lake.load(RUNS).read(["run_id"])["run_id"].n_unique() == lake.load(RUNS).read(["run_id"]).height == 2


def test_a_table_that_another_driver_has_re_created_is_not_dropped(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    append(lake.load(TABLE), 1)
    changed = replace(TABLE, columns=(column("id", pa.int64(), "Id."), column("text", pa.int64(), "Text.")))
    load, pending = lake.catalog.load_table, [True]

    def loaded_before_the_other_driver(identifier: str) -> Any:
        stored = load(identifier)
        if pending:
            pending.clear()
            other = lake.load(changed, evolve=True)
            other.commit(other.writer.write(pl.DataFrame({"id": [7], "text": [7], "_seq": [1]})), positions={"up": 7})
        return stored

    monkeypatch.setattr(lake.catalog, "load_table", loaded_before_the_other_driver)
    slow = lake.load(changed, evolve=True)
    assert slow.read(["text"])["text"].to_list() == [7]
    assert slow.positions == {"up": 7}
