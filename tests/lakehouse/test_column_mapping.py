"""Columns are read by field id: renamed, dropped and re-added by another engine, and in files without field ids."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.table.update import RemoveSchemasUpdate

from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.column_mapping import ColumnMapping
from lakehouse.iceberg.compaction import compact
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import Table, column
from pipelines.settings import Settings

THINGS = Table(
    "bronze.things",
    "Things.",
    (column("id", pa.int64(), "Id."), column("label", pa.string(), "Label."), column("size", pa.int64(), "Size.")),
)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(Settings(home=tmp_path))


def append(lake: Lake, **values: list[Any]) -> None:
    handle = lake.load(THINGS)
    rows = pl.DataFrame(values).with_columns(_seq=pl.lit(handle.next_sequence, pl.Int64))
    handle.commit(handle.writer.write(rows), positions={})


def rows_of(handle: TableHandle) -> list[dict[str, Any]]:
    return handle.read(handle.arrow_schema.names).sort("id").to_dicts()


def rows_of_pyiceberg(lake: Lake) -> list[dict[str, Any]]:
    return lake.load(THINGS).iceberg_table.scan().to_arrow().sort_by("id").to_pylist()


def rename_and_add_again(lake: Lake) -> None:
    """Rename the column `label` and add another of that name, as another engine."""
    table = lake.load(THINGS).iceberg_table
    with table.update_schema() as update:
        update.rename_column("label", "old_label")
    with table.update_schema() as update:
        update.union_by_name(pa.schema([pa.field("label", pa.string())]))


def test_a_renamed_column_keeps_its_values_and_a_new_one_of_its_name_is_empty(lake: Lake) -> None:
    append(lake, id=[1, 2], label=["a", "b"], size=[10, 20])
    rename_and_add_again(lake)
    append(lake, id=[3], label=["new"], size=[30])
    handle = lake.load(THINGS)
    assert rows_of(handle) == rows_of_pyiceberg(lake)
    assert handle.read(["id", "label", "old_label"]).sort("id").rows() == [(1, None, "a"), (2, None, "b"), (3, "new", None)]
    found = handle.reader.read(handle.files(), ["id"], pl.col("old_label") == "b", positions=True)
    assert found.select("id", "_pos").rows() == [(2, 1)]
    assert handle.read(["id"], pl.col("label") == "a").height == 0
    compact(lake, THINGS)
    assert rows_of(lake.load(THINGS)) == rows_of_pyiceberg(lake)
    assert len(lake.load(THINGS).files()) == 1


def test_a_column_that_was_dropped_and_added_again_is_empty_and_has_its_new_type(lake: Lake) -> None:
    append(lake, id=[1], label=["not a number"], size=[10])
    with lake.load(THINGS).iceberg_table.update_schema() as update:
        update.delete_column("label")
    with lake.load(THINGS).iceberg_table.update_schema() as update:
        update.union_by_name(pa.schema([pa.field("label", pa.int64())]))
    assert rows_of(lake.load(THINGS)) == rows_of_pyiceberg(lake)


def test_columns_are_told_apart_although_another_engine_removed_the_earlier_schemas(lake: Lake) -> None:
    append(lake, id=[1], label=["a"], size=[10])
    rename_and_add_again(lake)
    table = lake.load(THINGS).iceberg_table
    old = [schema.schema_id for schema in table.metadata.schemas if schema.schema_id != table.metadata.current_schema_id]
    table.catalog.commit_table(table, (), (RemoveSchemasUpdate(schema_ids=old),))
    handle = lake.load(THINGS)
    assert len(handle.iceberg_table.metadata.schemas) == 1
    assert handle.read(["label", "old_label"]).rows() == [(None, "a")]


def test_a_file_without_field_ids_is_read_by_the_name_mapping(lake: Lake, tmp_path: Path) -> None:
    handle = lake.load(THINGS)
    pq.write_table(pa.table({"id": [1], "label": ["a"], "size": [10], "_seq": [1]}), tmp_path / "imported.parquet")
    handle.iceberg_table.add_files([f"file://{tmp_path}/imported.parquet"])
    assert rows_of(lake.load(THINGS)) == rows_of_pyiceberg(lake)
    assert lake.load(THINGS).reader.mapping is None
    with lake.load(THINGS).iceberg_table.update_schema() as update:
        update.rename_column("size", "extent")
    # not loaded by the lake, which would add the declared column
    renamed = TableHandle(THINGS, lake.catalog.load_table(THINGS.name))
    assert renamed.read(["id", "label", "extent"]).rows() == [(1, "a", 10)]


def test_the_names_suffice_when_columns_were_only_added_and_promoted(lake: Lake) -> None:
    append(lake, id=[1], label=["a"], size=[10])
    handle = lake.load(THINGS)
    handle.evolve_schema(pa.schema([pa.field("more", pa.string())]))
    handle.commit(positions={})
    assert len(lake.load(THINGS).metadata.schemas) > 1
    assert lake.load(THINGS).reader.mapping is None


def test_a_stream_is_left_at_its_position() -> None:
    stream = io.BytesIO()
    schema = pa.schema([pa.field("stored", pa.int64(), metadata={"PARQUET:field_id": "7"}), pa.field("plain", pa.int64())])
    pq.write_table(pa.table([[1], [2]], schema=schema), stream)
    stream.seek(0)
    assert ColumnMapping({"now": 7, "plain": 8}, {"plain": 8}).names_in(stream) == {"now": "stored"}
    assert (stream.closed, stream.tell()) == (False, 0)
