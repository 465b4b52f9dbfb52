"""Files replaced, and a table's past forgotten."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from lakehouse.byte_search import SearchTerms, search_files
from lakehouse.digest import digest
from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.maintenance import referenced_files
from lakehouse.iceberg.rewrite import file_system, list_files, purge_history, replace_rows, rewrite
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import Table, column
from pipelines.settings import Settings

TABLE = Table("silver.things", "Things.", (column("id", pa.int64(), "Id."), column("text", pa.string(), "Text.")), key=("id",))


def write(handle: TableHandle, ids: list[int], text: str, deleted: bool = False) -> None:
    frame = pl.DataFrame({"id": ids, "text": [text] * len(ids)}).with_columns(
        _seq=pl.lit(handle.next_sequence, pl.Int64), _group_hash=pl.lit(0, pl.Int32), _deleted=pl.lit(deleted)
    )
    handle.commit(handle.writer.write(frame), positions={"up": handle.next_sequence})


def without(text: str) -> object:
    def edit(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, None]:
        changed = (rows["text"] == text).fill_null(False)
        return rows.with_columns(pl.when(changed).then(pl.lit("gone")).otherwise("text").alias("text")), changed, None

    return edit


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake(Settings(home=tmp_path))
    for number, text in enumerate(("one", "two", "three")):
        write(made.load(TABLE), [30 + 10 * number, 31 + 10 * number], text)
    return made


def test_changed_rows_are_news_and_others_are_not(lake: Lake) -> None:
    before = lake.load(TABLE)
    files = {file.path for file in before.files()}
    done = rewrite(lake, TABLE, without("two"), "r1")  # type: ignore[arg-type]
    after = lake.load(TABLE)
    assert (done.rows, done.files) == (2, 1)
    rows = after.read(["id", "text", "_seq"])
    assert rows.filter(pl.col("_seq") == after.data_sequence)["text"].to_list() == ["gone", "gone"]
    assert rows.filter(pl.col("text") != "gone").height == 4
    assert len(files & {file.path for file in after.files()}) == 2
    assert after.positions == before.positions
    # once for each reason, and what it did is still told
    assert rewrite(lake, TABLE, without("one"), "r1") == done  # type: ignore[arg-type]
    assert lake.load(TABLE).read(["text"], pl.col("text") == "one").height == 2


def test_rows_of_one_key_change_together(lake: Lake) -> None:
    def edit(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
        return (
            rows,
            rows["id"] == 30,
            pl.Series(["same" if number in (30, 50) else None for number in rows["id"]], dtype=pl.String),
        )

    assert rewrite(lake, TABLE, edit, "r").rows == 2


def test_a_writer_that_began_before_fails_even_when_nothing_was_rewritten(lake: Lake) -> None:
    handle = lake.load(TABLE)
    assert rewrite(lake, TABLE, without("nothing"), "r").rows == 0  # type: ignore[arg-type]
    with pytest.raises(CommitConflict):
        write(handle, [99], "late")


def test_forgetting_leaves_the_rows_and_nothing_else(lake: Lake) -> None:
    handle = lake.load(TABLE)
    gone = handle.files()
    handle.commit(
        handle.writer.write_deletes(
            gone, handle.reader.read(gone, ["id"], pl.col("text") == "one", positions=True).select("_file", "_pos")
        ),
        positions=handle.positions,
    )
    write(lake.load(TABLE), [70], "buried", deleted=True)
    stray = list_files(lake.load(TABLE))[0].path + ".left.parquet"
    Path(stray).write_bytes(b"of a run that died")
    write(lake.load(TABLE), [71], "last")
    was, positions = digest(lake.load(TABLE)), lake.load(TABLE).positions
    sequence = lake.load(TABLE).data_sequence
    done = purge_history(lake, TABLE, tombstones=True)
    after = lake.load(TABLE)
    assert done.tombstones == 1
    assert digest(after) == was
    assert (after.positions, after.data_sequence) == (positions, sequence)
    assert len(after.iceberg_table.metadata.snapshots) == 1
    assert not Path(stray).exists()
    assert not [file for file in after.files() if file.deletes]
    needed = {path.removeprefix("file://") for path in referenced_files(after)}
    assert {info.path for info in list_files(after)} == needed
    # manifests tell the bounds of columns, and a snapshot those of the files that it removed
    filesystem, _ = file_system(after)
    assert search_files(filesystem, list_files(after), SearchTerms(("one", "buried"))).matches == ()
    assert len(search_files(filesystem, list_files(after), SearchTerms(("three",))).matches) == 2
    assert purge_history(lake, TABLE, tombstones=True).files_deleted == 0


def test_what_a_dead_writer_left_after_the_last_commit_goes_too(lake: Lake) -> None:
    handle = lake.load(TABLE)
    purge_history(lake, TABLE, tombstones=True)
    stray = Path(list_files(lake.load(TABLE))[0].path + ".left.parquet")
    stray.write_bytes(b"PAR1 half a file")
    was = digest(lake.load(TABLE))
    assert purge_history(lake, TABLE, tombstones=True).files_deleted >= 1
    assert not stray.exists()
    assert digest(lake.load(TABLE)) == was
    with pytest.raises(CommitConflict):  # whoever may have written it
        write(handle, [99], "late")


def test_no_branch_tag_or_other_engine_keeps_the_past(lake: Lake) -> None:
    handle = lake.load(TABLE)
    number = handle.snapshot.snapshot_id
    with handle.iceberg_table.manage_snapshots() as snapshots:
        snapshots.create_tag(number, "year-end").create_branch(number, "trial")
    extra = {"id": [80], "text": ["on a branch"], "_seq": [1], "_group_hash": [0], "_deleted": [False]}
    schema = handle.iceberg_table.schema().as_arrow()
    handle.iceberg_table.append(pa.table(extra, schema=schema), branch="trial")
    write(lake.load(TABLE), [90], "kept")
    loaded = lake.load(TABLE).iceberg_table
    loaded.append(pa.table({**extra, "text": ["of another engine"]}, schema=schema))
    was, positions = digest(lake.load(TABLE)), lake.load(TABLE).positions
    purge_history(lake, TABLE, tombstones=True)
    after = lake.load(TABLE)
    assert (digest(after), after.positions) == (was, positions)
    assert list(after.iceberg_table.metadata.refs) == ["main"]
    assert len(after.iceberg_table.metadata.snapshots) == 1
    assert {info.path for info in list_files(after)} == {path.removeprefix("file://") for path in referenced_files(after)}


def test_a_writer_at_work_while_the_past_is_forgotten_begins_anew(lake: Lake) -> None:
    handle = lake.load(TABLE)
    written = handle.writer.write(pl.DataFrame({"id": [5], "text": ["x"], "_seq": [9], "_group_hash": [0], "_deleted": [False]}))
    write(lake.load(TABLE), [6], "first")
    purge_history(lake, TABLE, tombstones=False)
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
