"""Every text column is declared personal or harmless, so that `erase` cannot miss a new one."""

from __future__ import annotations

import pyarrow as pa

from app.project import PROJECT
from pipelines.bronze.tables import DOCUMENT_PATHS, EVENT_PATHS
from pipelines.privacy.pseudonyms import Pseudonyms, is_pseudonym

WORDS = """
    _op _source_position _unchanged brand category changed_field channel chargeback_reason closed_by country currency
    customer_record day_name digest document_id erasure event_id event_type favourite_channel kind last_order_id master_user_id
    month_name mp_order_id order_id order_ref outcome payment_method person platform platforms product_id product_name
    purchase_order reason reasons record_id risk_band rule_version scope source source_order_id source_position source_table
    status store_id to_store_id topic user_key variant weekday
"""
HARMLESS = frozenset(WORDS.split())
"""Columns without personal values in any table: keys of records and business terms."""
NAMES_OF_THINGS = {("name", table) for table in ("products", "stores", "dim_products", "dim_stores")} | {
    ("city", table) for table in ("stores", "dim_stores")
}
"""Names of products and stores."""


def test_text_columns_are_declared_personal_or_harmless() -> None:
    forgotten = [
        f"{table.name}.{column.name}"
        for table in PROJECT.tables.values()
        for column in table.columns
        if (pa.types.is_string(column.type) or pa.types.is_binary(column.type))
        and not column.personal
        and not (table.name == "silver.identity_graph" and column.name == "reason")
        and column.name not in HARMLESS
        and (column.name, table.short_name.removeprefix("bronze_postgres__")) not in NAMES_OF_THINGS
    ]
    assert not forgotten


def test_no_column_is_both_personal_and_harmless() -> None:
    both = {
        column.name
        for table in PROJECT.tables.values()
        for column in table.columns
        if column.personal and column.name in HARMLESS and table.name != "silver.identity_graph"
    }
    assert not both


def test_every_personal_kind_of_bronze_has_a_recognisable_pseudonym() -> None:
    pseudonyms = Pseudonyms(b"0123456789abcdefghijklmnopqrstuvwxyz", "ID")
    columns = [
        c.personal for t in PROJECT.tables.values() if t.layer == "bronze" for c in t.columns if isinstance(c.personal, str)
    ]
    kinds = {*columns, *(kind for _, kind in (*DOCUMENT_PATHS, *EVENT_PATHS))} - {"", "account", "name", "city"}
    assert {"email", "phone", "address", "card", "device", "ip", "loyalty", "session"} <= kinds
    for kind in kinds:
        assert is_pseudonym(kind, pseudonyms.pseudonym(kind, "somebody"))
