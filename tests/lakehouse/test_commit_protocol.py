"""The commit protocol beside other writers and engines, on a SQLite catalog with local files.

An interleaving is forced by calling the other writer from a patched function, at the critical point.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import expire
from lakehouse.iceberg.staging import AUDIT_BRANCH
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.query import query
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


def from_milliseconds(timestamp: int) -> datetime:
    return datetime.fromtimestamp(timestamp / 1000, UTC)


def ids_at(lake: Lake, moment: datetime) -> list[int]:
    statement = f"SELECT id FROM gold.things FOR TIMESTAMP AS OF '{moment.isoformat()}' ORDER BY id"
    return [row["id"] for row in query(lake, {TABLE.name: TABLE}, statement).to_pylist()]
