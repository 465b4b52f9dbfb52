"""silver.inventory_snapshots, gold.inventory_health and gold.inventory_shrinkage: from stock events to stock levels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.engines import make_engine
from support.property_tests import property_test

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.schema import as_arrow
from lakehouse.table import Table
from pipelines.bronze import tables as bronze
from pipelines.gold import inventory_health, inventory_shrinkage
from pipelines.settings import BusinessSettings
from pipelines.silver import events_clean, exchange_rates, inventory_snapshots, products
from pipelines.silver.events_clean import EVENTS_CLEAN, STOCK_EVENTS
from pipelines.silver.inventory_snapshots import EVENT_COLUMNS, INVENTORY_SNAPSHOTS, STEP, STOCK_LEVELS, STORE_PRODUCT, as_of

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TS = pl.Datetime("us", "UTC")
EVENTS = {name: dtype for name, dtype in pl.DataFrame(EVENTS_CLEAN.schema.empty_table()).schema.items() if name in EVENT_COLUMNS}
LEDGER = pl.DataFrame(INVENTORY_SNAPSHOTS.schema.empty_table()).schema


def event(event_type: str, quantity: int = 1, hour: float = 0, **fields: Any) -> dict[str, Any]:
    known = {
        "event_type": event_type,
        "quantity": quantity,
        "occurred_at": T0 + timedelta(hours=hour),
        "store_id": "S1",
        "product_id": "P1",
    }
    return dict.fromkeys(EVENTS) | {"event_id": f"e{hour:07.2f}"} | known | fields


def frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{name: row[name] for name in EVENTS} for row in rows], schema=EVENTS)


def all_groups(events: pl.DataFrame) -> pl.DataFrame:
    legs = pl.concat([events.select(STORE_PRODUCT), events.select(pl.col("to_store_id").alias("store_id"), "product_id")])
    return legs.drop_nulls().unique().with_columns(since=pl.lit(None, TS))


def ledger(
    events: Sequence[dict[str, Any]] | pl.DataFrame, groups: pl.DataFrame | None = None, opening: pl.DataFrame | None = None
) -> pl.DataFrame:
    given_rows = events if isinstance(events, pl.DataFrame) else frame(events)
    filled = STEP.transform(
        {
            "events": given_rows,
            "groups": all_groups(given_rows) if groups is None else groups,
            "opening": pl.DataFrame(schema=LEDGER) if opening is None else opening,
        },
        BusinessSettings(),
    )
    assert filled.columns == INVENTORY_SNAPSHOTS.schema.names
    filled.to_arrow().cast(INVENTORY_SNAPSHOTS.schema)
    return filled.cast(dict(LEDGER)).sort(INVENTORY_SNAPSHOTS.key)


def after(*events: dict[str, Any], store: str = "S1") -> tuple[int, ...]:
    """Return on_hand, reserved, incoming, safety_stock and available_to_promise after the events."""
    last = as_of(ledger(events), T0 + timedelta(days=999)).filter(store_id=store)
    return tuple(last.select(*STOCK_LEVELS, "available_to_promise").row(0))


@pytest.mark.parametrize(
    ("last", "figures"),
    [
        (event("stock_received", 5, 9), (15, 4, 6, 2, 9)),
        (event("stock_received", 5, 9, purchase_order="PO1"), (15, 4, 1, 2, 9)),
        (event("stock_received", 5, 9, purchase_order="PO9"), (15, 4, 6, 2, 9)),
        (event("stock_incoming", 5, 9), (10, 4, 11, 2, 4)),
        (event("stock_reserved", 5, 9), (10, 9, 6, 2, -1)),
        (event("reservation_released", 3, 9), (10, 1, 6, 2, 7)),
        (event("stock_sold", 3, 9), (7, 4, 6, 2, 1)),
        (event("stock_sold", 3, 9, reserved=True), (7, 1, 6, 2, 4)),
        (event("stock_sold", 30, 9, reserved=False), (-20, 4, 6, 2, -26)),
        (event("stock_returned", 3, 9), (13, 4, 6, 2, 7)),
        (event("stock_adjusted", 3, 9, sign=-1, reason="theft"), (7, 4, 6, 2, 1)),
        (event("stock_adjusted", 3, 9, sign=1, reason="found"), (13, 4, 6, 2, 7)),
        (event("stock_transferred", 3, 9, to_store_id="S2"), (7, 4, 6, 2, 1)),
        (event("stock_transferred", 3, 9, to_store_id="S1"), (10, 4, 6, 2, 4)),
        (event("stock_counted", 8, 9), (8, 4, 6, 2, 2)),
        (event("safety_stock_set", 7, 9), (10, 4, 6, 7, -1)),
    ],
)
def test_effect_of_each_event(last: dict[str, Any], figures: tuple[int, ...]) -> None:
    before = [
        event("stock_counted", 10, 1),
        event("stock_reserved", 4, 2),
        event("stock_incoming", 6, 3, purchase_order="PO1"),
        event("safety_stock_set", 2, 4),
    ]
    assert after(*before, last) == figures


def test_transfer_has_two_legs() -> None:
    moved = event("stock_transferred", 3, 1, to_store_id="S2")
    assert after(moved) == (-3, 0, 0, 0, -3)
    assert after(moved, store="S2") == (3, 0, 0, 0, 3)
    assert ledger([moved])["leg"].to_list() == [0, 1]


def test_count_reveals_shrinkage_but_not_known_losses() -> None:
    rows = ledger(
        [
            event("stock_received", 10, 1),
            event("stock_adjusted", 2, 2, sign=-1, reason="damage"),
            event("stock_counted", 7, 3),
            event("stock_counted", 9, 4),
        ]
    )
    figures = rows.select("on_hand", "expected_on_hand", "shrinkage").rows()
    assert figures == [(10, None, None), (8, None, None), (7, 8, 1), (9, 7, -2)]


def test_receipt_ignores_announcements_made_later_or_elsewhere() -> None:
    received = event("stock_received", 5, 2, purchase_order="PO1")
    assert after(received, event("stock_incoming", 5, 3, purchase_order="PO1"))[2] == 5
    assert after(received, event("stock_incoming", 5, 1, purchase_order="PO1", store_id="S2"))[2] == 0
    assert after(received, event("stock_incoming", 5, 1, purchase_order="PO1"))[2] == 0


def test_simultaneous_events_are_ordered_by_event_id() -> None:
    sold, counted = event("stock_sold", 3, 1, event_id="a"), event("stock_counted", 9, 1, event_id="b")
    assert after(sold, counted)[0] == 9
    assert after(sold | {"event_id": "b"}, counted | {"event_id": "a"})[0] == 6


def test_other_events_and_groups_are_ignored() -> None:
    events = frame([event("view_product", 1, 1), event("stock_sold", 1, 2), event("stock_sold", 1, 3, store_id="S2")])
    groups = pl.DataFrame({"store_id": ["S1"], "product_id": ["P1"], "since": [None]}, schema_overrides={"since": TS})
    assert ledger(events, groups).select("store_id", "event_type").rows() == [("S1", "stock_sold")]
    assert ledger([]).is_empty()


def test_as_of_returns_last_row_at_or_before() -> None:
    rows = ledger([event("stock_received", 5, 1), event("stock_sold", 1, 2), event("stock_sold", 1, 3, store_id="S2")])
    at_two = as_of(rows.lazy(), (T0 + timedelta(hours=2)).replace(tzinfo=None))
    assert at_two.select("store_id", "on_hand").rows() == [("S1", 4)]
    assert as_of(rows, T0 + timedelta(hours=1))["on_hand"].to_list() == [5]
    assert as_of(rows, T0).is_empty()


KINDS = [
    "stock_received", "stock_received", "stock_incoming", "stock_incoming", "stock_reserved", "reservation_released",
    "stock_sold",
    "stock_sold", "stock_returned", "stock_adjusted", "stock_transferred", "stock_counted", "safety_stock_set", "view_product",
]  # fmt: skip
stock_events = st.lists(
    st.builds(
        event,
        event_type=st.sampled_from(KINDS),
        quantity=st.integers(1, 9),
        hour=st.integers(0, 9),
        event_id=st.integers(0, 99).map(str),
        store_id=st.sampled_from(["S1", "S2"]),
        product_id=st.sampled_from(["P1", "P2"]),
        to_store_id=st.sampled_from(["S1", "S2", "S3"]),
        purchase_order=st.sampled_from([None, "A", "B"]),
        reserved=st.sampled_from([None, True, False]),
        sign=st.sampled_from([1, -1]),
    ).map(lambda row: row if row["event_type"] == "stock_transferred" else row | {"to_store_id": None}),
    max_size=25,
    unique_by=lambda row: row["event_id"],
)


def oracle(events: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the ledger, computed one event at a time."""
    stock = [row for row in events if row["event_type"] != "view_product"]
    legs = [(row["occurred_at"], row["event_id"], 0, row["store_id"], row) for row in stock]
    legs += [(row["occurred_at"], row["event_id"], 1, row["to_store_id"], row) for row in stock if row["to_store_id"]]
    state: dict[tuple[str, str], dict[str, int]] = {}
    announced: set[tuple[str, str, str]] = set()
    result = []
    for occurred_at, event_id, leg, store, row in sorted(legs, key=lambda item: item[:3]):
        kind, q, pair = row["event_type"], row["quantity"], (store, row["product_id"])
        now = state.setdefault(pair, dict.fromkeys(STOCK_LEVELS, 0))
        expected = shrinkage = None
        order = (*pair, row["purchase_order"]) if row["purchase_order"] else None
        if kind == "stock_received":
            now["on_hand"] += q
            now["incoming"] -= q if order in announced else 0
        elif kind == "stock_incoming":
            now["incoming"] += q
            if order:
                announced.add(order)
        elif kind == "stock_reserved":
            now["reserved"] += q
        elif kind == "reservation_released":
            now["reserved"] -= q
        elif kind == "stock_sold":
            now["on_hand"] -= q
            now["reserved"] -= q if row["reserved"] else 0
        elif kind == "stock_returned":
            now["on_hand"] += q
        elif kind == "stock_adjusted":
            now["on_hand"] += q * row["sign"]
        elif kind == "stock_transferred":
            now["on_hand"] += q if leg else -q
        elif kind == "stock_counted":
            expected, shrinkage = now["on_hand"], now["on_hand"] - q
            now["on_hand"] = q
        elif kind == "safety_stock_set":
            now["safety_stock"] = q
        atp = now["on_hand"] - now["reserved"] - now["safety_stock"]
        result.append(
            (*pair, occurred_at, event_id, leg, kind, q, *(now[name] for name in STOCK_LEVELS), atp, expected, shrinkage)
        )
    return sorted(result)


@settings(max_examples=300, deadline=None)
@given(stock_events, st.randoms(use_true_random=False))
def test_any_order_and_duplication_equals_the_oracle(events: list[dict[str, Any]], random: Any) -> None:
    delivered = events + random.sample(events, random.randint(0, len(events)))
    random.shuffle(delivered)
    rows = ledger(delivered)
    assert rows.drop("purchase_order", "reason").rows() == oracle(events)


@settings(max_examples=300, deadline=None)
@given(stock_events, st.integers(0, 25))
@pytest.mark.slow
def test_late_events_recompute_only_later_rows(events: list[dict[str, Any]], cut: int) -> None:
    """For late events, `since`, `opening` and announcements are sufficient to compute the ledger of all events."""
    before, late = frame(events[:cut]), frame(events[cut:])
    everything = pl.concat([before, late])
    stored = ledger(before)
    stock = late.filter(pl.col("event_type") != "view_product")
    receiving = stock.select(pl.col("to_store_id").alias("store_id"), "product_id", "occurred_at")
    legs = pl.concat([stock.select(*STORE_PRODUCT, "occurred_at"), receiving])
    groups = legs.drop_nulls().group_by(STORE_PRODUCT).agg(since=pl.col("occurred_at").min())
    recompute = pl.col("occurred_at") >= pl.col("since")
    affected = stored.join(groups, on=STORE_PRODUCT)
    opening = (
        affected.filter(~recompute)
        .sort(INVENTORY_SNAPSHOTS.key)
        .unique(STORE_PRODUCT, keep="last", maintain_order=True)
        .drop("since")
    )
    earliest: Any = groups["since"].min()
    announcements = everything.filter(pl.col("event_type") == "stock_incoming")
    recent = everything.filter(pl.col("occurred_at") >= earliest) if earliest is not None else late
    gathered = pl.concat([announcements, recent])
    suffix = ledger(gathered, groups, opening)
    kept = pl.concat([affected.filter(~recompute).drop("since"), stored.join(groups, on=STORE_PRODUCT, how="anti")])
    assert_frame_equal(pl.concat([kept, suffix]).sort(INVENTORY_SNAPSHOTS.key), ledger(everything))
    assert suffix.join(groups, on=STORE_PRODUCT).filter(~recompute).is_empty()


def health(events: Sequence[dict[str, Any]], context: BusinessSettings | None = None) -> dict[str, Any]:
    wanted = inventory_health.STEP.reads["ledger"].columns
    rows = ledger(events).select(wanted)
    filled = inventory_health.transform({"ledger": pl.concat([rows, rows])}, context or BusinessSettings())
    assert filled.columns == inventory_health.INVENTORY_HEALTH.schema.names
    filled.to_arrow().cast(inventory_health.INVENTORY_HEALTH.schema)
    assert_frame_equal(
        filled, inventory_health.transform({"ledger": rows[::-1]}, context or BusinessSettings()), check_row_order=False
    )
    return filled.sort(STORE_PRODUCT).row(0, named=True)


def test_health_of_a_product_in_a_store() -> None:
    events = [
        event("stock_received", 100, 0),
        event("stock_sold", 50, 1),
        event("stock_sold", 7, 24 * 20, reserved=True),
        event("stock_sold", 21, 24 * 60),
        event("stock_counted", 20, 24 * 70),
        event("stock_incoming", 9, 24 * 70, event_id="f"),
    ]
    assert health(events) == {
        "store_id": "S1",
        "product_id": "P1",
        "on_hand": 20,
        "reserved": -7,
        "incoming": 9,
        "safety_stock": 0,
        "available_to_promise": 27,
        "last_event_at": T0 + timedelta(days=70),
        "last_counted_at": T0 + timedelta(days=70),
        "sold_28d": 21,
        "sold_90d": 78,
        "daily_sales": 0.75,
        "days_of_cover": 36.0,
        "low_stock": False,
        "counts": 1,
        "shrinkage_units": 2,
        "shrinkage_rate": 2 / 22,
    }


def test_low_stock() -> None:
    few = [event("stock_received", 10, 0), event("stock_sold", 8, 48)]
    found = health(few)
    assert (found["daily_sales"], found["days_of_cover"], found["low_stock"]) == (4.0, 0.5, True)
    assert not health(few, BusinessSettings(low_stock_days=0.5))["low_stock"]
    assert health([event("stock_received", 1, 0), event("stock_reserved", 1, 1)])["low_stock"]
    unsold = health([event("stock_received", 1, 0)])
    assert not unsold["low_stock"]
    assert [unsold[name] for name in ("days_of_cover", "shrinkage_rate", "last_counted_at")] == [None, None, None]


def test_health_uses_the_last_of_simultaneous_rows() -> None:
    assert health([event("stock_counted", 5, 1, event_id="a"), event("stock_sold", 2, 1, event_id="b")])["on_hand"] == 3


PRODUCTS = pl.DataFrame(
    {"product_id": ["P1", "P2"], "list_price": [Decimal("10.00"), Decimal("30000.55")], "currency": ["USD", "IDR"]},
    schema_overrides={"list_price": pl.Decimal(18, 2)},
)
RATES = pl.DataFrame(
    {
        "rate_date": [date(2026, 1, 1), date(2026, 1, 3)],
        "currency": ["IDR", "IDR"],
        "to_base": [Decimal("0.00006"), Decimal("0.00007")],
    },
    schema_overrides={"to_base": pl.Decimal(18, 8)},
)


def shrinkage(events: Sequence[dict[str, Any]]) -> pl.DataFrame:
    rows = ledger(events)
    frames = {"ledger": pl.concat([rows, rows]), "products": PRODUCTS, "rates": RATES}
    filled = inventory_shrinkage.transform(frames, BusinessSettings())
    assert filled.columns == inventory_shrinkage.INVENTORY_SHRINKAGE.schema.names
    filled.to_arrow().cast(inventory_shrinkage.INVENTORY_SHRINKAGE.schema)
    return filled.sort(inventory_shrinkage.INVENTORY_SHRINKAGE.key)


def test_counts_have_shrinkage_and_its_value() -> None:
    found = shrinkage(
        [
            event("stock_received", 10, 0),
            event("stock_counted", 9, 24),
            event("stock_counted", 10, 60),
            event("stock_received", 10, 0, event_id="x", product_id="P2"),
            event("stock_counted", 7, 24, event_id="y", product_id="P2"),
            event("stock_counted", 6, 48, event_id="z", product_id="P2"),
            event("stock_counted", 6, 48, event_id="q", product_id="P3"),
        ]
    )
    names = ["product_id", "expected_units", "counted_units", "shrinkage_units", "cumulative_shrinkage_units"]
    assert found.select(*names, "days_since_previous_count", "shrinkage_value_base").rows() == [
        ("P1", 10, 9, 1, 1, None, Decimal("10.0000")),
        ("P1", 9, 10, -1, 0, 1.5, Decimal("-10.0000")),
        ("P2", 10, 7, 3, 3, None, Decimal("5.4001")),
        ("P2", 7, 6, 1, 4, 1.0, Decimal("2.1000")),
        ("P3", 0, 6, -6, -6, None, None),
    ]


def test_changed_rates_and_prices_affect_the_counts_they_value() -> None:
    found = shrinkage(
        [
            event("stock_counted", 1, 0, product_id="P2"),
            event("stock_counted", 1, 72, product_id="P2"),
            event("stock_counted", 1, 99),
        ]
    )
    rates, products = inventory_shrinkage.STEP.reads["rates"].affects, inventory_shrinkage.STEP.reads["products"].affects
    assert found.filter(rates(RATES.tail(1)))["counted_at"].to_list() == [T0 + timedelta(hours=72)]
    assert found.filter(rates(RATES.head(0))).is_empty()
    assert found.filter(products(PRODUCTS.head(1)))["product_id"].to_list() == ["P1"]


def test_only_counts_affect_shrinkage() -> None:
    rows = ledger([event("stock_received", 10, 0), event("stock_counted", 9, 24)])
    (keys,) = inventory_shrinkage.STEP.reads["ledger"].keys
    assert rows.select(key.alias(name) for key, name in zip(keys, STORE_PRODUCT, strict=True)).rows() == [
        (None, None),
        ("S1", "P1"),
    ]


STEPS = (
    events_clean.STEP,
    inventory_snapshots.STEP,
    products.STEP,
    exchange_rates.STEP,
    inventory_health.STEP,
    inventory_shrinkage.STEP,
)


def lakehouse(home: str) -> Engine:
    return make_engine(Path(home))


def append(engine: Engine, table: Table, rows: list[dict[str, Any]]) -> None:
    """Append rows as a connector would."""
    handle = engine.lake.load(table)
    stored = [
        dict.fromkeys(table.schema.names)
        | {"_op": "c", "_source_time": T0, "_seq": handle.next_sequence, "_group_hash": 0, "_deleted": False}
        | row
        for row in rows
    ]
    if stored:
        frame = pl.DataFrame(pa.Table.from_pylist(stored, schema=handle.writer.schema))
        handle.commit(handle.writer.write(as_arrow(frame, handle.writer.schema)), positions={})


def run(engine: Engine) -> list[str]:
    return [engine.refresh(step).status for step in STEPS]


def digests(engine: Engine) -> dict[str, str]:
    return {step.target.name: digest(engine.lake.load(step.target)) for step in STEPS}


def message(offset: int, event_id: str, event_type: str, hour: int, **metadata: Any) -> dict[str, Any]:
    """Return a stock event as a row of the bronze table."""
    value = {"event_id": event_id, "event_type": event_type, "timestamp": (T0 + timedelta(hours=hour)).isoformat()}
    value["metadata"] = {"store_id": "S1", "product_id": "P1", "quantity": 5, **metadata}
    position = {"topic": "events", "partition": 0, "offset": offset, "_source_position": f"events/00000/{offset:019d}"}
    return position | {"value": json.dumps(value).encode()}


def price(product_id: str) -> dict[str, Any]:
    row = PRODUCTS.filter(product_id=product_id).row(0, named=True)
    return row | {"_source_position": f"{product_id}"}


def test_event_moved_to_an_earlier_time_recomputes_from_there() -> None:
    """A later copy of an event has an earlier time: the ledger's last row before the next event is a deleted one."""
    received, moved = message(1, "b", "stock_received", 300), message(2, "b", "stock_received", 100)
    batches = [[message(0, "a", "stock_received", 1), received], [moved], [message(3, "c", "stock_sold", 500)]]
    with tempfile.TemporaryDirectory() as home:
        engine = lakehouse(home)
        for batch in batches:
            append(engine, bronze.EVENTS, batch)
            run(engine)
        rows = engine.lake.load(INVENTORY_SNAPSHOTS).read(["event_id", "on_hand"])
        assert sorted(rows.rows()) == [("a", 5), ("b", 10), ("c", 5)]


def test_event_moved_to_another_store_leaves_the_first() -> None:
    with tempfile.TemporaryDirectory() as home:
        engine = lakehouse(home)
        for batch in ([message(0, "a", "stock_received", 9)], [message(1, "a", "stock_received", 8, store_id="S2")]):
            append(engine, bronze.EVENTS, batch)
            run(engine)
        assert engine.lake.load(inventory_health.INVENTORY_HEALTH).read(["store_id"]).rows() == [("S2",)]


copies = st.builds(
    message,
    offset=st.just(0),
    event_id=st.integers(0, 9).map(str),
    event_type=st.sampled_from([*STOCK_EVENTS, "view_product"]),
    hour=st.integers(0, 9).map(lambda tens: tens * 100),
    store_id=st.sampled_from(["S1", "S2"]),
    product_id=st.sampled_from(["P1", "P2"]),
    quantity=st.integers(0, 9),
    to_store_id=st.sampled_from(["S1", "S3"]),
    purchase_order=st.sampled_from(["A", "B", None]),
    reserved=st.booleans(),
    sign=st.sampled_from([1, -1]),
)


@property_test(
    *(st.lists(copies, min_size=1, max_size=14), st.randoms(use_true_random=False)),
    fast=3,
    slow=8,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
)
def test_any_order_duplication_and_split_into_runs_equals_one_run(events: list[dict[str, Any]], random: Any) -> None:
    events = [row | {"offset": n, "_source_position": f"events/00000/{n:019d}"} for n, row in enumerate(events)]
    rates = [row | {"_source_position": str(n)} for n, row in enumerate(RATES.rows(named=True))]
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as other:
        once, often = lakehouse(home), lakehouse(other)
        append(once, bronze.PRODUCTS, [price("P1"), price("P2")])
        append(once, bronze.EXCHANGE_RATES, rates)
        append(once, bronze.EVENTS, events)
        run(once)

        delivered = events + random.sample(events, random.randint(0, len(events)))
        random.shuffle(delivered)
        cut = random.randint(0, len(delivered))
        append(often, bronze.EVENTS, delivered[:cut])
        append(often, bronze.PRODUCTS, [price("P2")])
        append(often, bronze.EXCHANGE_RATES, rates[:1])
        run(often)
        append(often, bronze.EVENTS, delivered[cut:])
        run(often)
        append(often, bronze.EXCHANGE_RATES, rates[1:])
        append(often, bronze.PRODUCTS, [price("P1")])
        run(often)
        assert digests(often) == digests(once)
        assert run(often) == ["unchanged"] * len(STEPS)
