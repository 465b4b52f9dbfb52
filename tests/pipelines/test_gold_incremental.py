"""Incremental gold: after any change of silver, a refresh equals a rebuild."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from lakehouse.engine.engine import Engine
from lakehouse.engine.frames import stamp
from lakehouse.engine.row_diff import row_diff
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.schema import polars_schema
from lakehouse.step import Grouped, Step, upstream_names
from lakehouse.table import DELETED, Table
from pipelines import GOLD_STEPS
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.stores import STORES
from pipelines.silver.users_scd import USERS_SCD

STEPS: tuple[Step, ...] = tuple(step for step in GOLD_STEPS if INVENTORY_SNAPSHOTS.name not in upstream_names(step))
"""All steps of gold but those of the stock ledger, which test_inventory covers."""
START = datetime(2025, 11, 1, tzinfo=UTC)

CHANGE_KINDS = 11

Rows = dict[str, Any]
Shop = dict[Table, dict[Any, Rows]]


def new_shop() -> Shop:
    """Return the silver tables of a small shop with 30 orders."""
    shop: Shop = {
        table: {}
        for table in (ORDERS_UNIFIED, EVENTS_CLEAN, ORDER_ITEMS_UNIFIED, USERS_SCD, IDENTITY_GRAPH, CHARGEBACKS, PRODUCTS, STORES)
    }
    for number in range(3):
        shop[PRODUCTS][number] = {"product_id": f"P{number}", "category": "shoes"}
        shop[STORES][number] = {"store_id": f"S{number}", "kind": "store"}
    for user in range(6):
        shop[USERS_SCD][user, 0] = {"user_id": user, "valid_from": START, "is_current": True, "name": f"N{user}"}
    for number in range(30):
        order(shop, number, random.Random(number))
    assign_persons(shop)
    return shop


def order(shop: Shop, number: int, dice: random.Random) -> None:
    """Add or replace an order and its lines."""
    at = START + timedelta(hours=dice.randrange(24 * 90))
    order_id, user, status = str(number), dice.choice([None, *range(6)]), dice.choice(["paid", "paid", "cancelled"])
    shared = {
        "order_id": order_id,
        "order_date": at.date(),
        "placed_at": at,
        "status": status,
        "channel": dice.choice(["web", "pos"]),
        "store_id": dice.choice([None, "S1"]),
        "country": dice.choice(["ID", "DE"]),
    }
    shop[ORDERS_UNIFIED][number] = {
        **shared,
        "user_id": user,
        "total_amount": Decimal(9),
        "total_base": Decimal(9),
        "card_fingerprint": f"c{number % 17}",
    }
    shop[ORDER_ITEMS_UNIFIED] = {key: row for key, row in shop[ORDER_ITEMS_UNIFIED].items() if key[0] != number}
    for line in range(dice.randrange(3)):
        shop[ORDER_ITEMS_UNIFIED][number, line] = {
            **shared,
            "line_no": line,
            "quantity": 1,
            "product_id": f"P{dice.randrange(4)}",
            "counts_as_sale": status != "cancelled",
            "net_base": Decimal(dice.randrange(-99, 999)) / 100,
        }


def assign_persons(shop: Shop, twin: int = 0) -> None:
    """Set the master users everywhere: one per user, but user `twin` is the same person as user 0."""

    def master(user: int | None) -> str | None:
        return None if user is None else f"M-user:{0 if user == twin else user}"

    for row in shop[ORDERS_UNIFIED].values():
        row["master_user_id"] = master(row["user_id"])
    for row in shop[USERS_SCD].values():
        row["master_user_id"] = master(row["user_id"])
    shop[IDENTITY_GRAPH] = {
        user: {
            "record_id": f"user:{user}",
            "node": f"record:user:{user}",
            "kind": "self",
            "status": "linked",
            "trust": 0,
            "reason": "itself",
            "master_user_id": master(user),
            "first_seen": START,
        }
        for user in {row["user_id"] for row in shop[USERS_SCD].values()}
    }


def change(shop: Shop, kind: int, dice: random.Random) -> None:
    """Apply a random change of one of CHANGE_KINDS kinds."""
    number = dice.randrange(34)
    twin = max(user for user in range(6) if shop[IDENTITY_GRAPH][user]["master_user_id"] == "M-user:0")
    if kind == 0:
        twin = dice.randrange(6)
    elif kind <= 2:
        order(shop, number, dice)
    elif kind == 3:
        shop[ORDERS_UNIFIED].pop(number, None)
        shop[ORDER_ITEMS_UNIFIED] = {key: row for key, row in shop[ORDER_ITEMS_UNIFIED].items() if key[0] != number}
    elif kind == 4:
        shop[CHARGEBACKS][number % 3] = {
            "chargeback_id": number % 3,
            "order_ref": str(dice.randrange(34)),
            "reason": dice.choice(["fraud", "other"]),
            "reported_at": START,
        }
    elif kind == 5:
        shop[CHARGEBACKS].pop(number % 3, None)
    elif kind == 6:
        shop[PRODUCTS][number % 4] = {"product_id": f"P{number % 4}", "category": dice.choice([None, "hats", "shoes"])}
    elif kind == 7:
        shop[PRODUCTS].pop(number % 4, None)
    elif kind == 8:
        user, version = dice.randrange(6), dice.randrange(1, 4)
        shop[USERS_SCD][user, version] = {
            "user_id": user,
            "valid_from": START + timedelta(days=version * 20),
            "is_current": False,
            "name": f"N{dice.randrange(3)}",
        }
    elif kind == 9:
        for event in range(dice.randrange(9)):
            shop[EVENTS_CLEAN][number, event] = {
                "event_id": f"{number}-{event}",
                "user_id": number % 6,
                "event_type": "login_failed",
                "occurred_at": START,
            }
    else:
        for key in [key for key in shop[ORDER_ITEMS_UNIFIED] if key[0] == number]:
            shop[ORDER_ITEMS_UNIFIED][key]["net_base"] = Decimal(dice.randrange(999)) / 100
    assign_persons(shop, twin)


def table_frame(table: Table, shop: Shop) -> pl.DataFrame:
    """Return the rows of a silver table."""
    schema = polars_schema(table.schema)
    rows = [{name: row.get(name) for name in schema} for row in shop[table].values()]
    return pl.DataFrame({name: [row[name] for row in rows] for name in schema}, schema=schema)


def put(lake: Lake, table: Table, wanted: pl.DataFrame) -> None:
    """Replace the rows of a silver table as a step would, with tombstones."""
    handle = lake.load(table)
    files = handle.files()
    old = handle.reader.read(files, [*(item.name for item in table.columns), DELETED], positions=True)
    differs = row_diff(table, old, wanted)
    if not differs.empty:
        written = handle.writer.write(stamp(table, differs.written, handle.next_sequence))
        handle.commit([*written, *handle.writer.write_deletes(files, differs.deleted)], positions={})


def rebuilt(step: Step, shop: Shop) -> pl.DataFrame:
    """Return the table computed from all rows at once, without the engine."""
    frames = {}
    for name, read in step.reads.items():
        frames[name] = table_frame(read.table, shop)
        if isinstance(read, Grouped):
            frames[name] = frames[name].filter(
                pl.any_horizontal(pl.all_horizontal(*(k.is_not_null() for k in keys)) for keys in read.keys)
            )
        if read.columns:
            frames[name] = frames[name].select(read.columns)
    types = polars_schema(step.target.schema)
    return (
        step.transform(frames, BusinessSettings())
        .select(pl.col(name).cast(dtype) for name, dtype in types.items())
        .sort(step.target.key)
    )


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_refresh_equals_rebuild(engine: Engine, seed: int) -> None:
    dice, shop = random.Random(seed), new_shop()
    for kind in dice.sample(range(CHANGE_KINDS), CHANGE_KINDS):
        for table in shop:
            put(engine.lake, table, table_frame(table, shop))
        for step in STEPS:
            engine.refresh(step)
            handle = engine.lake.load(step.target)
            kept = handle.read([item.name for item in step.target.columns]).sort(step.target.key)
            assert_frame_equal(kept, rebuilt(step, shop), check_exact=True)
        change(shop, kind, dice)


def test_refresh_without_changes_writes_nothing(engine: Engine) -> None:
    shop = new_shop()
    for table in shop:
        put(engine.lake, table, table_frame(table, shop))
    for step in STEPS:
        engine.refresh(step)
        assert engine.refresh(step).rows_written == 0, step.target.name


def test_new_order_writes_few_rows(engine: Engine) -> None:
    shop = new_shop()
    for table in shop:
        put(engine.lake, table, table_frame(table, shop))
    for step in STEPS:
        engine.refresh(step)
    order(shop, 99, random.Random(7))
    shop[ORDERS_UNIFIED][99]["order_date"] = date(2025, 12, 24)
    assign_persons(shop)
    for table in shop:
        put(engine.lake, table, table_frame(table, shop))
    written = {step.target.short_name: engine.refresh(step).rows_written for step in STEPS}
    assert written["fact_orders"] == 1
    assert written["customer_360"] <= 1
    assert written["dim_users"] == written["dim_products"] == written["dim_stores"] == 0
