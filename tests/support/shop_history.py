"""Small generated shops for the tests of features: the silver tables that features read, written as a step writes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import polars as pl

from lakehouse.engine.engine import Engine
from lakehouse.engine.frames import conform, stamp
from lakehouse.engine.row_diff import row_diff
from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import DELETED, Table
from ml.features.declarations import EVENT_KINDS, ORDER_COLUMNS
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.users_scd import USERS_SCD

START = datetime(2026, 1, 1, tzinfo=UTC)


def put(engine: Engine, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the live rows of a silver table as a step would: only differences are written, tombstones are kept."""
    types = polars_schema(table.schema)
    columns = {name: pl.Series(name, [row.get(name) for row in rows], dtype=dtype, strict=False) for name, dtype in types.items()}
    wanted = conform(pl.DataFrame(columns), table)
    handle = engine.lake.load(table)
    files = handle.files()
    old = handle.reader.read(files, [*types, DELETED], positions=True)
    change = row_diff(table, old, wanted)
    if not change.empty:
        written = handle.writer.write(stamp(table, change.written, handle.next_sequence))
        handle.commit([*written, *handle.writer.write_deletes(files, change.deleted)], positions={})


def put_shop(engine: Engine, orders: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]] = ()) -> None:
    """Write a shop. orders: from `made_order`; events: from `made_event`."""
    put(engine, PRODUCTS, [{"product_id": f"P{n}", "category": "ab"[n % 2]} for n in range(4)])
    put(engine, ORDERS_UNIFIED, orders)
    items = [
        {
            "order_id": o["order_id"],
            "line_no": 1,
            "product_id": o["product"],
            "quantity": 1,
            "line_amount": o["total_base"],
            "counts_as_sale": True,
        }
        for o in orders
    ]
    put(engine, ORDER_ITEMS_UNIFIED, items)
    charged = [o for o in orders if o["reported_at"] is not None]
    put(
        engine,
        CHARGEBACKS,
        [
            {"chargeback_id": o["number"], "order_ref": o["order_id"], "reason": "fraud", "reported_at": o["reported_at"]}
            for o in charged
        ],
    )
    users = sorted({o["user_id"] for o in orders if o["user_id"] is not None})
    put(
        engine,
        USERS_SCD,
        [{"user_id": u, "valid_from": START, "is_current": True, "created_at": START - timedelta(days=u)} for u in users],
    )
    put(engine, EVENTS_CLEAN, events)


def made_order(
    number: int,
    minute: int,
    *,
    user: int | None,
    card: int | None,
    device: int | None,
    amount: str | None,
    person: int,
    reported: int | None,
) -> dict[str, Any]:
    """Return an order in the columns of silver. minute: since START; reported: days after the order."""
    placed = START + timedelta(minutes=minute)
    return {
        "number": number,
        "order_id": str(number),
        "source_order_id": str(number),
        "channel": "web" if user is not None else "marketplace",
        "user_id": user,
        "customer_record": None if user is None else f"user:{user}",
        "master_user_id": f"M-{person}",
        "email": None if user is not None else f"buyer{person}@mail.example",
        "card_fingerprint": None if card is None else f"card-{card}",
        "device_id": None if device is None else f"d-{device}",
        "ip_address": f"203.0.113.{(device or 0) % 3}",
        "shipping_address": f"Some Street {person % 4}",
        "payment_method": "card",
        "status": "paid",
        "currency": "USD",
        "total_amount": None if amount is None else Decimal(amount),
        "total_base": None if amount is None else Decimal(amount),
        "placed_at": placed,
        "order_date": placed.date(),
        "updated_at": placed,
        "product": f"P{number % 4}",
        "reported_at": None if reported is None else placed + timedelta(days=reported),
    }


def made_event(number: int, minute: int, kind: str, user: int | None, device: int | None) -> dict[str, Any]:
    """Return an event in the columns of silver.events_clean."""
    return {
        "event_id": f"e{number}",
        "event_type": kind,
        "occurred_at": START + timedelta(minutes=minute),
        "user_id": user,
        "device_id": None if device is None else f"d-{device}",
        "outcome": "declined" if kind == "payment_attempted" else None,
        "topic": "events",
    }


def plain_history(count: int, seed: int, days: int = 120) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return orders, events and category months for `ml.features.compute`, with many ties and shared entities."""
    random = Random(seed)
    rows, events = [], []
    for number in range(count):
        placed = START + timedelta(minutes=random.randrange(days * 1440) // 7 * 7)
        who = random.randrange(max(count // 12, 2))
        fraud = random.random() < 0.15
        rows.append(
            {
                "order_id": f"{number:06d}",
                "placed_at": placed,
                "amount": random.choice([None, 1, *(random.randrange(100, 90_000) for _ in range(30))]),
                "customer": f"user:{who}" if random.random() < 0.9 else None,
                "card": f"card-{random.choice([who, who, random.randrange(20)])}" if random.random() < 0.8 else None,
                "device": f"d-{random.choice([who, random.randrange(9)])}" if random.random() < 0.8 else None,
                "address": f"street {random.randrange(30)}" if random.random() < 0.9 else None,
                "ip": f"198.51.100.{random.randrange(40)}" if random.random() < 0.9 else None,
                "person": f"M-{who // 2}",
                "account": who,
                "account_created_at": START + timedelta(days=random.randrange(-100, 60)),
                "channel": random.choice(["web", "pos", "marketplace", "phone", None]),
                "payment_method": random.choice(["card", "wallet", "gold coins", None]),
                "category": random.choice(["shoes", "shirts", None]),
                "known_at": placed + timedelta(days=random.randrange(0, 70)) if fraud else None,
            }
        )
        for _ in range(random.randrange(3)):
            events.append(
                {
                    "account": who if random.random() < 0.9 else None,
                    "device": f"d-{random.randrange(9)}",
                    "occurred_at": placed - timedelta(minutes=random.randrange(0, 300)),
                    "kind": random.choice(EVENT_KINDS),
                }
            )
    from ml.features.compute import with_ratios
    from ml.features.declarations import EVENT_COLUMNS
    from ml.tables.category_amounts import totals

    orders = with_ratios(pl.DataFrame(rows, schema=ORDER_COLUMNS))
    return orders, pl.DataFrame(events, schema=EVENT_COLUMNS), totals(orders)
