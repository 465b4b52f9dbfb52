"""Which person an identifier names, on tables of a few rows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from lakehouse.engine.frames import conform, stamp
from lakehouse.engine.row_diff import with_deleted_flag
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import TIMESTAMP, Table
from pipelines.privacy.person import SubjectQuery, find_person
from pipelines.settings import Settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

DEFAULTS: dict[pa.DataType, Any] = {
    pa.string(): "",
    pa.bool_(): True,
    pa.int32(): 0,
    pa.int64(): 0,
    TIMESTAMP: datetime(2026, 1, 1, tzinfo=UTC),
}
"""Defaults of required columns that a test leaves out."""


def write(lake: Lake, table: Table, *rows: dict[str, Any]) -> None:
    handle = lake.load(table)
    schema = polars_schema(table.schema)
    defaults = {column.name: DEFAULTS[column.type] for column in table.columns if column.required and column.type in DEFAULTS}
    complete = [{name: {**defaults, **row}.get(name) for name in schema} for row in rows]
    frame = conform(pl.DataFrame(complete, schema=schema), table)
    handle.commit(handle.writer.write(stamp(table, with_deleted_flag(table, frame, False), handle.next_sequence)), positions={})


def node(record: str, shown: str, master: str) -> dict[str, Any]:
    return {"record_id": record, "node": shown, "kind": shown.split(":")[0], "master_user_id": master, "status": "linked"}


def user(number: int, email: str, name: str, master: str | None = None) -> dict[str, Any]:
    return {"user_id": number, "email": email, "name": name, "master_user_id": master}


def test_a_closed_account_belongs_to_the_person_who_used_its_email_on_a_marketplace(tmp_path: Path) -> None:
    lake = Lake(Settings(home=tmp_path))
    write(lake, IDENTITY_GRAPH, node("order:lazada:1", "email:ada@x.example", "M-1"), node("user:8", "email:bo@x.example", "M-2"))
    write(lake, USERS_SCD, user(7, "ada@x.example", "Ada"), user(8, "bo@x.example", "Bo", "M-2"))
    write(lake, ORDERS_UNIFIED, {"order_id": "lazada:1", "customer_record": "order:lazada:1", "email": "ada@x.example"})
    for asked in (SubjectQuery(master_user_id="M-1"), SubjectQuery(email="ADA@x.example")):
        person = find_person(lake, asked)
        assert (person.accounts, person.orders, person.masters) == ({7}, {"order:lazada:1"}, {"M-1"})
    assert find_person(lake, SubjectQuery(user_id=8)).accounts == {8}
    with pytest.raises(ShopSphereError, match="No customer"):
        find_person(lake, SubjectQuery(user_id=9))


def test_closed_accounts_with_a_shared_email_are_not_attributed(tmp_path: Path) -> None:
    lake = Lake(Settings(home=tmp_path))
    write(lake, IDENTITY_GRAPH, node("user:8", "email:none@x.example", "M-2"))
    write(lake, USERS_SCD, user(8, "none@x.example", "Bo", "M-2"), *(user(n, "none@x.example", f"No {n}") for n in range(20, 30)))
    write(lake, ORDERS_UNIFIED, {"order_id": "1", "customer_record": "user:8", "email": None})
    assert find_person(lake, SubjectQuery(user_id=8)).accounts == {8}
