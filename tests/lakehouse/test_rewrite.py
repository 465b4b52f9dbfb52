"""Files are replaced, and a table's history is purged."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from lakehouse.byte_search import SearchTerms, search_files
from lakehouse.digest import digest
from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.rewrite import purge_history, replace_rows, rewrite
from lakehouse.iceberg.table_files import file_system, list_files, referenced_files
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import Table, column
from pipelines.settings import Settings

TABLE = Table("silver.things", "Things.", (column("id", pa.int64(), "Id."), column("text", pa.string(), "Text.")), key=("id",))
NEWEST = 2**62


def write(handle: TableHandle, ids: list[int], text: str, deleted: bool = False) -> None:
    frame = pl.DataFrame({"id": ids, "text": [text] * len(ids)}).with_columns(
        _seq=pl.lit(handle.next_sequence, pl.Int64), _group_hash=pl.lit(0, pl.Int32), _deleted=pl.lit(deleted)
    )
    handle.commit(handle.writer.write(frame), positions={"up": handle.next_sequence})


def without(text: str) -> object:
    def edit(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, None]:
        changed = (rows["text"] == text).fill_null(False)
        return rows.with_columns(pl.when(changed).then(pl.lit("replaced")).otherwise("text").alias("text")), changed, None

    return edit


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(Settings(home=tmp_path))
    for number, text in enumerate(("one", "two", "three")):
        write(lake.load(TABLE), [30 + 10 * number, 31 + 10 * number], text)
    return lake


def test_only_changed_rows_get_a_new_sequence(lake: Lake) -> None:
    before = lake.load(TABLE)
    files = {file.path for file in before.files()}
    done = rewrite(lake, TABLE, without("two"), "r1")  # type: ignore[arg-type]
    after = lake.load(TABLE)
    assert (done.rows, done.files) == (2, 1)
    rows = after.read(["id", "text", "_seq"])
    assert rows.filter(pl.col("_seq") == after.data_sequence)["text"].to_list() == ["replaced", "replaced"]
    assert rows.filter(pl.col("text") != "replaced").height == 4
    assert len(files & {file.path for file in after.files()}) == 2
    assert after.positions == before.positions
    # applied once for each reason; the result is read from the snapshot
    assert rewrite(lake, TABLE, without("one"), "r1") == done  # type: ignore[arg-type]
    assert lake.load(TABLE).read(["text"], pl.col("text") == "one").height == 2


def test_rows_with_the_same_key_change_together(lake: Lake) -> None:
    def edit(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
        return (
            rows,
            rows["id"] == 30,
            pl.Series(["same" if number in (30, 50) else None for number in rows["id"]], dtype=pl.String),
        )

    assert rewrite(lake, TABLE, edit, "r").rows == 2


def test_an_earlier_writer_fails_even_if_nothing_was_rewritten(lake: Lake) -> None:
    handle = lake.load(TABLE)
    assert rewrite(lake, TABLE, without("nothing"), "r").rows == 0  # type: ignore[arg-type]
    with pytest.raises(CommitConflict):
        write(handle, [99], "late")


def test_a_purge_leaves_only_the_live_rows(lake: Lake) -> None:
    handle = lake.load(TABLE)
    files = handle.files()
    handle.commit(
        handle.writer.write_deletes(
            files, handle.reader.read(files, ["id"], pl.col("text") == "one", positions=True).select("_file", "_pos")
        ),
        positions=handle.positions,
    )
    write(lake.load(TABLE), [70], "buried", deleted=True)
    stray = list_files(lake.load(TABLE))[0].path + ".left.parquet"
    Path(stray).write_bytes(b"left by a killed run")
    write(lake.load(TABLE), [71], "last")
    expected, positions = digest(lake.load(TABLE)), lake.load(TABLE).positions
    sequence = lake.load(TABLE).data_sequence
    done = purge_history(lake, TABLE, tombstones_read_to=NEWEST)
    after = lake.load(TABLE)
    assert done.tombstones == 1
    assert digest(after) == expected
    assert (after.positions, after.data_sequence) == (positions, sequence)
    assert len(after.iceberg_table.metadata.snapshots) == 1
    assert not Path(stray).exists()
    assert not [file for file in after.files() if file.deletes]
    needed = {path.removeprefix("file://") for path in referenced_files(after)}
    assert {info.path for info in list_files(after)} == needed
    # manifests contain the bounds of columns, and a snapshot those of the files that it removed
    filesystem, _ = file_system(after)
    assert search_files(filesystem, list_files(after), SearchTerms(("one", "buried"))).matches == ()
    assert len(search_files(filesystem, list_files(after), SearchTerms(("three",))).matches) == 2
    assert purge_history(lake, TABLE, tombstones_read_to=NEWEST).files_deleted == 0


def test_files_that_a_killed_writer_left_after_the_last_commit_are_deleted(lake: Lake) -> None:
    handle = lake.load(TABLE)
    purge_history(lake, TABLE, tombstones_read_to=NEWEST)
    stray = Path(list_files(lake.load(TABLE))[0].path + ".left.parquet")
    stray.write_bytes(b"PAR1 half a file")
    expected = digest(lake.load(TABLE))
    assert purge_history(lake, TABLE, tombstones_read_to=NEWEST).files_deleted >= 1
    assert not stray.exists()
    assert digest(lake.load(TABLE)) == expected
    with pytest.raises(CommitConflict):  # from a writer that may have written the file
        write(handle, [99], "late")


def test_branches_tags_and_commits_of_other_engines_do_not_keep_history(lake: Lake) -> None:
    handle = lake.load(TABLE)
    snapshot_id = handle.snapshot.snapshot_id
    with handle.iceberg_table.manage_snapshots() as snapshots:
        snapshots.create_tag(snapshot_id, "year-end").create_branch(snapshot_id, "trial")
    extra = {"id": [80], "text": ["on a branch"], "_seq": [1], "_group_hash": [0], "_deleted": [False]}
    schema = handle.iceberg_table.schema().as_arrow()
    handle.iceberg_table.append(pa.table(extra, schema=schema), branch="trial")
    write(lake.load(TABLE), [90], "kept")
    iceberg_table = lake.load(TABLE).iceberg_table
    iceberg_table.append(pa.table({**extra, "text": ["of another engine"]}, schema=schema))
    expected, positions = digest(lake.load(TABLE)), lake.load(TABLE).positions
    purge_history(lake, TABLE, tombstones_read_to=NEWEST)
    after = lake.load(TABLE)
    assert (digest(after), after.positions) == (expected, positions)
    assert list(after.iceberg_table.metadata.refs) == ["main"]
    assert len(after.iceberg_table.metadata.snapshots) == 1
    assert {info.path for info in list_files(after)} == {path.removeprefix("file://") for path in referenced_files(after)}


def test_a_writer_that_is_active_during_a_purge_fails_and_retries(lake: Lake) -> None:
    handle = lake.load(TABLE)
    written = handle.writer.write(pl.DataFrame({"id": [5], "text": ["x"], "_seq": [9], "_group_hash": [0], "_deleted": [False]}))
    write(lake.load(TABLE), [6], "first")
    purge_history(lake, TABLE, tombstones_read_to=None)
    with pytest.raises(CommitConflict):
        handle.commit(written, positions={})
    write(lake.load(TABLE), [7], "next")
    assert lake.load(TABLE).read(["id"]).height == 8


def test_rows_are_replaced_in_one_commit(lake: Lake) -> None:
    handle = lake.load(TABLE)
    before = len(handle.iceberg_table.metadata.snapshots)
    new = pl.DataFrame({"id": [30], "text": ["new"], "_seq": [handle.next_sequence], "_group_hash": [0], "_deleted": [False]})
    assert replace_rows(handle, pl.col("id") == 30, new) == 1
    after = lake.load(TABLE)
    assert after.read(["text"], pl.col("id") == 30)["text"].to_list() == ["new"]
    assert after.read(["id"]).height == 6
    assert len(after.iceberg_table.metadata.snapshots) == before + 1
