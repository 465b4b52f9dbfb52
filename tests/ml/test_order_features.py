"""silver.order_features: incremental runs equal a rebuild, and write only affected rows."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support import shop_history
from support.engines import make_engine
from support.shop_history import made_event, made_order, put_shop

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from ml.features.compute import compute, with_ratios
from ml.features.declarations import OrderHistory
from ml.features.groups import FEATURE_NAMES
from ml.tables import category_amounts, order_entities
from ml.tables.feature_tables import STEPS, refresh
from ml.tables.order_entities import ORDER_ENTITIES, cents
from ml.tables.order_features import ORDER_FEATURES, STEP, account_events
from pipelines.silver.events_clean import EVENTS_CLEAN

few = st.integers(0, 2)
moments = st.integers(0, 70).map(lambda n: n * 1440 + (n * 37) % 1440 // 400 * 400)
order_values = st.fixed_dictionaries(
    {
        "minute": moments,
        "user": st.one_of(st.none(), few),
        "card": st.one_of(st.none(), few),
        "device": st.one_of(st.none(), few),
        "amount": st.sampled_from(["10.00", "20.005", "99.99", "250.00", None]),
        "person": few,
        "reported": st.one_of(st.none(), st.none(), st.integers(1, 60)),
    }
)
event_values = st.tuples(
    moments, st.sampled_from(["login_failed", "account_changed", "view_product", "payment_attempted", "stock_sold"]), few, few
)
shops = st.tuples(
    st.dictionaries(st.integers(1, 9), order_values, min_size=1, max_size=9),
    st.dictionaries(st.integers(1, 9), event_values, max_size=6),
)


def write(engine: Engine, orders: dict[int, dict[str, Any]], events: dict[int, tuple[Any, ...]]) -> None:
    put_shop(
        engine,
        [made_order(n, **values) for n, values in orders.items()],
        [made_event(n, *values) for n, values in events.items()],
    )


def digests(engine: Engine) -> list[str]:
    return [digest(engine.lake.load(step.target)) for step in STEPS]


# a failing example takes minutes to shrink, each of its steps being dozens of commits
ON_TABLES = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),
}


@settings(max_examples=2, **ON_TABLES)
@given(st.lists(shops, min_size=2, max_size=2))
@pytest.mark.slow
def test_an_incremental_change_equals_a_single_build(versions):
    check_changes(versions)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=15, **ON_TABLES)
@given(st.lists(shops, min_size=1, max_size=3))
def test_any_history_of_changes_equals_a_single_build(versions):
    check_changes(versions)


def check_changes(versions: list[Any]) -> None:
    """Late orders, changed entities, persons, amounts and times, deleted orders, late and withdrawn reports, events."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        whole, changing = make_engine(Path(one)), make_engine(Path(many))
        write(whole, *versions[-1])
        refresh(whole)
        for version in versions:
            write(changing, *version)
            refresh(changing)
        assert digests(changing) == digests(whole)
        assert {report.status for report in refresh(changing)} == {"unchanged"}
        refresh(changing, rebuild=True)
        assert digests(changing) == digests(whole)
        # the engine's own rebuild does not use the full build
        changing.refresh(STEP, rebuild=True)
        assert digests(changing) == digests(whole)


def test_table_equals_compute(tmp_path):
    engine = make_engine(tmp_path)
    orders = {
        n: {
            "minute": n * 1400,
            "user": n % 3,
            "card": n % 2,
            "device": n % 4,
            "amount": "12.34",
            "person": n % 3,
            "reported": 3 if n % 5 == 0 else None,
        }
        for n in range(1, 60)
    }
    write(engine, orders, {n: (n * 1390, "login_failed", n % 3, n % 4) for n in range(1, 60)})
    refresh(engine)
    entities = engine.lake.load(ORDER_ENTITIES).read(ORDER_ENTITIES.schema.names)
    events = account_events(engine.lake.load(EVENTS_CLEAN).read(EVENTS_CLEAN.schema.names))
    categories = engine.lake.load(category_amounts.CATEGORY_AMOUNTS).read(category_amounts.CATEGORY_AMOUNTS.schema.names)
    expected = compute(with_ratios(entities), OrderHistory(events=events, categories=categories)).sort("order_id")
    stored = engine.lake.load(ORDER_FEATURES).read(["order_id", "placed_at", *FEATURE_NAMES]).sort("order_id")
    assert_frame_equal(stored, expected, check_exact=True)
    assert expected["device_frauds_ever"].max() > 1
    assert expected["account_failed_logins_24h"].max() > 0
    assert expected["category_ratio"].null_count() < 59


def test_only_affected_rows_are_written(tmp_path):
    engine = make_engine(tmp_path)
    orders = {
        n: {
            "minute": n * 60,
            "user": n % 50,
            "card": n % 50,
            "device": n % 50,
            "amount": "10.00",
            "person": n % 50,
            "reported": None,
        }
        for n in range(1, 500)
    }
    kept = [
        made_order(n, **values) | {"shipping_address": f"street {n % 50}", "ip_address": f"ip {n % 50}"}
        for n, values in orders.items()
    ]
    put_shop(engine, kept)
    refresh(engine)
    # a chargeback of an order in the middle: its customer's later orders, one in fifty
    changed = [order | {"reported_at": shop_history.START} if order["number"] == 250 else order for order in kept]
    put_shop(engine, changed)
    reports = {report.table: report for report in refresh(engine)}
    assert reports["silver.order_entities"].rows_written == 2  # the row, and the tombstone of its old version
    assert 0 < reports["silver.order_features"].rows_written <= 5
    # a new order at the end affects no other
    put_shop(engine, [*changed, made_order(600, 40_000, user=3, card=3, device=3, amount="5.00", person=3, reported=None)])
    assert {report.table: report.rows_written for report in refresh(engine)}["silver.order_features"] == 1


def test_cents_are_rounded_half_even():
    amounts = pl.DataFrame({"a": ["1.0050", "1.0150", "1.0051", "-1.0050", "-1.0149", "12345678901.2399", None]})
    got = amounts.select(cents(pl.col("a").cast(pl.Decimal(20, 4)))).to_series().to_list()
    assert got == [100, 102, 101, -100, -101, 1234567890124, None]


def test_return_lines_do_not_affect_the_category():
    items = pl.DataFrame(
        {
            "order_id": ["1"] * 3,
            "line_no": [1, 2, 3],
            "product_id": ["a", "b", "b"],
            "quantity": [1, 1, -1],
            "line_amount": [5, 9, -9],
        }
    )
    products = pl.DataFrame({"product_id": ["a", "b"], "category": ["shoes", "hats"]})
    assert order_entities.main_categories(items, products).rows() == [("1", "hats")]


@pytest.mark.slow
def test_build_on_ray_equals_the_inline_build(tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    orders = {
        n: {
            "minute": n * 90,
            "user": n % 40,
            "card": n % 30,
            "device": n % 23,
            "amount": "12.34",
            "person": n % 20,
            "reported": 3 if n % 9 == 0 else None,
        }
        for n in range(1, 900)
    }
    events = {n: (n * 80, "login_failed", n % 40, n % 23) for n in range(1, 900)}
    inline, spread = make_engine(tmp_path / "a"), make_engine(tmp_path / "b", inline_rows=0, rows_per_task=300, cpus=2)
    try:
        for engine in (inline, spread):
            for part in (range(1, 400), range(1, 900)):
                write(engine, {n: orders[n] for n in part}, {n: events[n] for n in part})
                for step in STEPS[:2]:
                    engine.refresh(step)
        found = []
        for engine in (inline, spread):
            refresh(engine)
            found.append(digests(engine))
        assert found[0] == found[1]
    finally:
        spread.pool.close()
