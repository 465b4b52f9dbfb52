"""Corrections of PostgreSQL rows, including columns that the corrected row did not have."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl

from lakehouse.iceberg.schema import polars_schema
from pipelines.bronze.corrections import corrected_row
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import PRODUCTS, PRODUCTS_KEY

TYPES = polars_schema(PRODUCTS.schema)


def product(**values: Any) -> pl.DataFrame:
    return pl.DataFrame([{name: values.get(name) for name in TYPES}], schema=TYPES)


def test_a_column_that_the_update_did_not_send_can_be_corrected() -> None:
    first = product(product_id="P", name="old name", brand="b", currency="USD", _op="r", _source_position="0-000000.0")
    update = product(
        product_id="P",
        currency="USD",
        _op="u",
        _source_position="1/1",
        _unchanged="name,brand",
        _unreadable='{"list_price": "NaN"}',
    )
    fix = corrected_row(PRODUCTS, update, b'{"list_price": "5", "name": "right name"}', PRODUCTS.schema)
    assert (fix["_unchanged"].item(), fix["_unreadable"].item()) == ("brand", None)
    later = fix.with_columns(pl.lit(datetime.now(UTC)).cast(TYPES["_ingested_at"]).alias("_ingested_at"))
    now = current_rows(pl.concat([first, update, later]), PRODUCTS_KEY)
    assert now.select("name", "brand", pl.col("list_price").cast(pl.Float64)).rows() == [("right name", "b", 5.0)]


def test_a_deleted_row_is_never_quarantined() -> None:
    """A correction would restore it."""
    rows = [
        product(product_id="P", name="n", _op=op, _source_position=position, _unreadable=unreadable)
        for op, position, unreadable in (("u", "1/1", '{"list_price": "NaN"}'), ("d", "1/2", '{"list_price": "NaN"}'))
    ]
    judged = unreadable_rows(pl.concat(rows))
    assert judged.rejected is not None
    assert judged.rejected["source_position"].to_list() == ["1/1"]
    assert judged.parsed_positions is not None
    assert judged.parsed_positions.to_list() == ["1/2"]
