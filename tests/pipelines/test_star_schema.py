"""Gold as a star schema for BI tools: comments, identifier fields and foreign keys."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from support.engines import make_engine

from app.project import PROJECT
from lakehouse.iceberg.catalog import Lake
from lakehouse.query import query
from lakehouse.table import column, references
from pipelines.gold.dim_date import DIM_DATE
from pipelines.gold.dim_stores import DIM_STORES, NO_STORE
from pipelines.gold.fact_orders import FACT_ORDERS

REFERENCES = [(table, reference) for table in PROJECT.tables.values() for reference in table.references]


@pytest.mark.parametrize(
    ("table", "reference"), REFERENCES, ids=lambda item: getattr(item, "short_name", getattr(item, "column", ""))
)
def test_foreign_keys_have_rows(filled, table, reference):
    lake = Lake(filled)
    if not lake.exists(table):
        assert table.name == "gold.user_fraud_scores"  # created by `train`
        return
    there = f"(SELECT DISTINCT {reference.to} AS key FROM {reference.table.name})"
    found = query(
        lake,
        PROJECT.tables,
        f"SELECT count({reference.column}) AS keys, count(*) FILTER ({reference.column} IS NOT NULL AND key IS NULL) AS lost "
        f"FROM {table.name} LEFT JOIN {there} ON key = {reference.column}",
    ).to_pylist()[0]
    assert found["keys"] > 0
    assert found["lost"] == 0


def test_referenced_columns_are_unique(filled):
    lake = Lake(filled)
    for name, to in {(reference.table.name, reference.to) for _, reference in REFERENCES}:
        (found,) = query(lake, PROJECT.tables, f"SELECT count(*) AS rows, count(DISTINCT {to}) AS keys FROM {name}").to_pylist()
        assert found["rows"] == found["keys"] > 0, name


def test_calendar_covers_every_day_of_gold(filled):
    lake = Lake(filled)
    for table in (FACT_ORDERS, PROJECT.tables["gold.sales_daily"]):
        missing = query(
            lake, PROJECT.tables, f"SELECT count(*) AS n FROM {table.name} ANTI JOIN gold.dim_date ON date = order_date"
        ).to_pylist()
        assert missing == [{"n": 0}]


def test_sales_without_a_store_have_a_member(filled):
    rows = query(Lake(filled), PROJECT.tables, f"SELECT name FROM gold.dim_stores WHERE store_id = '{NO_STORE}'").to_pylist()
    assert rows == [{"name": "No store"}]


def test_reference_to_unknown_column_is_refused():
    with pytest.raises(ValueError, match="no column"):
        replace(FACT_ORDERS, references=(references("nothing", DIM_DATE),))
    with pytest.raises(ValueError, match=r"gold\.dim_date\.nothing"):
        replace(FACT_ORDERS, references=(references("date_key", DIM_DATE, to="nothing"),))


def test_comments_and_identifiers_are_in_the_catalog(filled):
    lake = Lake(filled)
    for table in PROJECT.tables.values():
        if table.layer != "gold" or not lake.exists(table):
            continue
        loaded = lake.catalog.load_table(table.name)
        assert loaded.properties["comment"] == table.doc
        assert {field.name: field.doc for field in loaded.schema().fields if not field.name.startswith("_")} == {
            c.name: c.doc for c in table.columns
        }
        assert loaded.schema().identifier_field_names() == set(table.key), table.name


def test_existing_table_gets_the_current_declaration(tmp_path):
    lake = make_engine(tmp_path).lake
    columns = tuple(replace(item, doc="Once.", required=False) for item in DIM_STORES.columns)
    earlier = replace(DIM_STORES, doc="Stores.", columns=columns, owner="former owner")
    first = lake.load(earlier, evolve=True)
    first.commit(first.writer.write(pl.DataFrame({"store_id": ["S1"], "_seq": [1]})), positions={})
    now = lake.load(DIM_STORES, evolve=True)
    now.commit(now.writer.write(pl.DataFrame({"store_id": ["S2"], "_seq": [2]})), positions={})
    loaded = lake.catalog.load_table(DIM_STORES.name)
    assert (loaded.properties["comment"], loaded.properties["owner"]) == (DIM_STORES.doc, DIM_STORES.owner)
    assert loaded.schema().find_field("store_id").doc == "Store id."
    assert loaded.schema().identifier_field_names() == {"store_id"}
    assert sorted(lake.load(DIM_STORES).read(["store_id"])["store_id"]) == ["S1", "S2"]
    schemas = len(loaded.metadata.schemas)
    again = lake.load(DIM_STORES, evolve=True)
    again.commit(again.writer.write(pl.DataFrame({"store_id": ["S3"], "_seq": [3]})), positions={})
    assert len(lake.catalog.load_table(DIM_STORES.name).metadata.schemas) == schemas


def test_nullable_key_is_no_identifier():
    loose = replace(DIM_STORES, columns=(column("store_id", DIM_STORES.columns[0].type, "Store."), *DIM_STORES.columns[1:]))
    assert loose.identifier == ()
