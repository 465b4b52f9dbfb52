"""Features use the past only, and are bit-identical however they are computed."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.shop_history import START, plain_history

from ml.features.compute import compute, compute_group, prepare, with_ratios
from ml.features.declarations import ENTITIES, MISSING, ORDER_COLUMNS, OTHER, Feature, FeatureError, OrderHistory, conform
from ml.features.groups import FEATURE_NAMES, FEATURES
from ml.features.groups.card import CARD
from ml.features.groups.entity import UNUSUAL_RATIO
from ml.features.windows import NEVER, Timeline, first_below, occurrences, range_max


def same(left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Assert bit equality, nulls included."""
    assert_frame_equal(left, right, check_exact=True)


def slice_of(order: pl.DataFrame, orders: pl.DataFrame, events: pl.DataFrame, categories: pl.DataFrame) -> OrderHistory:
    """Return the history that serving reads for one order: the rows that share an entity with it."""
    shared = pl.any_horizontal(*(pl.col(kind).is_in(order[kind].drop_nulls().implode()) for kind in ENTITIES)).fill_null(False)
    about = (
        pl.col("account").is_in(order["account"].drop_nulls().implode())
        | pl.col("device").is_in(order["device"].drop_nulls().implode())
    ).fill_null(False)
    return OrderHistory(orders.filter(shared), events.filter(about), categories)


@pytest.mark.parametrize("rows", [250, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_training_rows_equal_features_computed_alone(rows):
    orders, events, categories = plain_history(4000, seed=5)
    trained = compute(orders, OrderHistory(events=events, categories=categories))
    chosen = np.random.default_rng(3).choice(orders.height, rows, replace=False)
    for number in chosen:
        order = orders[int(number)]
        past = orders.filter((pl.col("placed_at") <= order["placed_at"][0]) & (pl.col("order_id") != order["order_id"][0]))
        served = compute(order, slice_of(order, past, events, categories))
        same(served, trained[int(number)])


def test_a_shuffled_future_changes_no_past_feature():
    orders, events, categories = plain_history(1500, seed=6)
    now = START + timedelta(days=70)
    past, future = orders.filter(pl.col("placed_at") < now), orders.filter(pl.col("placed_at") >= now)
    before = compute(past, OrderHistory(events=events.filter(pl.col("occurred_at") < now), categories=categories))
    generator = np.random.default_rng(1)
    mixed = future.with_columns(
        pl.Series(name, future[name].gather(generator.permutation(future.height)))
        for name in future.columns
        if name not in ("order_id", "placed_at")
    ).with_columns(known_at=pl.col("placed_at") + pl.duration(hours=1))
    everything = compute(
        with_ratios(pl.concat([mixed, past]).sample(fraction=1, shuffle=True, seed=4)),
        OrderHistory(events=events, categories=categories),
    )
    same(past.select("order_id").join(everything, on="order_id", maintain_order="left"), before)


def test_a_fraud_reported_tomorrow_changes_no_feature_today():
    orders, events, categories = plain_history(1500, seed=7)
    today = START + timedelta(days=60)
    requested = orders.filter(pl.col("placed_at") < today)
    known = pl.when(pl.col("known_at") < today).then("known_at")
    before = compute(requested.with_columns(known_at=known), OrderHistory(events=events, categories=categories))
    # every order that ever was is now reported, tomorrow
    injected = requested.with_columns(known_at=pl.coalesce(known, pl.lit(today)))
    same(compute(injected, OrderHistory(events=events, categories=categories)), before)
    # and from then on it shows
    later = orders.filter(pl.col("placed_at") > today)
    frauds = [name for name in FEATURE_NAMES if "frauds" in name]
    quiet = compute(later, OrderHistory(requested.with_columns(known_at=known), events, categories)).select(frauds)
    loud = compute(later, OrderHistory(injected, events, categories)).select(frauds)
    assert loud.sum().sum_horizontal()[0] > quiet.sum().sum_horizontal()[0]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000), st.data())
def test_rows_do_not_depend_on_batch_or_order(seed, data):
    orders, events, categories = plain_history(60, seed, days=40)
    history = OrderHistory(orders, events, categories)
    whole = compute(orders, history)
    numbers = data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=20, unique=True))
    again = compute(
        orders[numbers],
        OrderHistory(
            orders.sample(fraction=1, shuffle=True, seed=seed), events.sample(fraction=1, shuffle=True, seed=seed), categories
        ),
    )
    same(again, whole[numbers])


def slow_features(orders: pl.DataFrame, number: int) -> dict[str, float | None]:
    """Return some features of one order, computed from all other orders."""
    rows = orders.sort("placed_at", "order_id").to_dicts()
    place = next(n for n, row in enumerate(rows) if row["order_id"] == orders["order_id"][number])
    order, past = rows[place], rows[:place]
    now = order["placed_at"]
    found: dict[str, float | None] = {}
    for kind in ("customer", "card", "device", "address", "ip"):
        own = [row for row in past if order[kind] is not None and row[kind] == order[kind]]
        if order[kind] is None:
            found |= {
                f"{kind}_orders_24h": None,
                f"{kind}_amount_30d": None,
                f"{kind}_frauds_28d": None,
                f"{kind}_orders_ever": None,
            }
            continue
        found[f"{kind}_orders_ever"] = len(own)
        found[f"{kind}_orders_24h"] = sum(row["placed_at"] >= now - timedelta(days=1) for row in own)
        found[f"{kind}_amount_30d"] = sum(row["amount"] or 0 for row in own if row["placed_at"] >= now - timedelta(days=30)) / 100
        reports = [row["known_at"] for row in own if row["known_at"] is not None and row["known_at"] < now]
        found[f"{kind}_frauds_28d"] = sum(at >= now - timedelta(days=28) for at in reports)
        if kind == "customer":
            found["customer_cards_ever"] = len({row["card"] for row in own} - {None})
            used = {row["device"] for row in own}
            found["new_device"] = None if order["device"] is None else float(order["device"] not in used)
            priced = [row["amount"] for row in own if row["amount"] is not None]
            found["customer_mean"] = sum(priced) / len(priced) / 100 if priced else None
            found |= slow_outliers([*own, order])
        if kind == "device":
            due = [row for row in own if row["placed_at"] < now - timedelta(days=45)]
            frauds = [row["known_at"] is not None and row["known_at"] - row["placed_at"] <= timedelta(days=45) for row in due]
            found["device_frauds_of_last_3"] = sum(frauds[-3:])
            begun = [
                row["placed_at"]
                for row in own
                if row["known_at"] is not None
                and row["known_at"] < now
                and row["placed_at"] >= now - timedelta(days=73)
                and (row["ratio"] or 0) < UNUSUAL_RATIO
            ]
            found["device_minutes_since_unexplained_began"] = (now - begun[0]) / timedelta(minutes=1) if begun else None
            run = next((n for n, fraud in enumerate(reversed(frauds)) if not fraud), len(frauds))
            found["device_run_frauds"] = run
            genuine = [row["placed_at"] for row, fraud in zip(due, frauds, strict=True) if not fraud]
            found["device_minutes_since_genuine"] = (now - genuine[-1]) / timedelta(minutes=1) if genuine else None
            found["device_run_least"] = min(row["amount"] or 0 for row in due[-run:]) / 100 if run else None
    return found


def slow_outliers(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the features of unusual amounts of the last of a customer's orders."""
    seen: list[int] = []
    usual: list[int] = []
    unusual: list[datetime] = []
    for row in rows:
        amount, now = row["amount"], row["placed_at"]
        mean = sum(usual) / len(usual) if usual else None
        against = amount / mean if mean and amount is not None else None
        found = {
            "customer_usual_mean": None if mean is None else mean / 100,
            "customer_usual_ratio": against,
            "customer_unusual_7d": float(sum(at >= now - timedelta(days=7) for at in unusual)),
            "customer_minutes_since_unusual_began": next(
                ((now - at) / timedelta(minutes=1) for at in unusual if at >= now - timedelta(days=14)), None
            ),
            "customer_minutes_since_unusual": (now - unusual[-1]) / timedelta(minutes=1) if unusual else None,
        }
        if against is not None and against >= UNUSUAL_RATIO:
            unusual.append(now)
        if amount is not None:
            if not seen or amount / (sum(seen) / len(seen)) < UNUSUAL_RATIO:
                usual.append(amount)
            seen.append(amount)
    return found


def filled(values: dict[str, float | None]) -> dict[str, float]:
    return {name: np.nan if value is None else value for name, value in values.items()}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_features_equal_a_naive_loop(seed):
    orders, events, categories = plain_history(120, seed, days=150)
    features = compute(orders, OrderHistory(events=events, categories=categories)).to_dicts()
    for number in range(0, 120, 7):
        expected = slow_features(orders, number)
        got = {name: features[number][name] for name in expected}
        assert filled(got) == pytest.approx(filled(expected), rel=1e-12, nan_ok=True), orders["order_id"][number]


def test_only_events_before_the_order_count():
    orders, _, _ = plain_history(1, seed=1)
    at = orders["placed_at"][0]
    moments = {"login_failed": [1, 20, 70], "account_changed": [180], "visit": [0, 5, 600], "payment_failed": [2]}
    events = pl.DataFrame(
        [
            {"account": orders["account"][0], "device": None, "occurred_at": at - timedelta(minutes=minutes), "kind": kind}
            for kind, all_minutes in moments.items()
            for minutes in all_minutes
        ]
    )
    row = compute(orders, OrderHistory(events=events)).row(0, named=True)
    names = (
        "account_events_10m",
        "account_events_1h",
        "account_events_24h",
        "account_failed_logins_1h",
        "account_failed_payments_1h",
    )
    assert [row[name] for name in names] == [3, 4, 7, 2, 1]
    assert (row["account_minutes_since_failed_login"], row["account_minutes_since_change"]) == (1, 180)


def test_unknown_categories_become_declared_categories():
    orders, _, _ = plain_history(400, seed=2)
    row = compute(orders, OrderHistory())
    assert set(row["channel"]) == {"web", "pos", "marketplace", OTHER, MISSING}
    declared = {feature.name: set(feature.categories) for feature in FEATURES if feature.type == "category"}
    assert all(set(row[name].unique()) <= names for name, names in declared.items())
    assert all(not feature.categories for feature in FEATURES if feature.type != "category")


def test_every_feature_is_declared_once_with_doc_and_reason():
    assert len(set(FEATURE_NAMES)) == len(FEATURES)
    for feature in FEATURES:
        assert feature.doc.endswith(".")
        assert feature.window
        assert "{value}" in feature.reason_text
        assert "None" not in feature.reason(None)
        assert feature.reason("web" if feature.type == "category" else 2.0)
    empty = compute(pl.DataFrame(schema={"order_id": pl.String, "placed_at": pl.Datetime("us", "UTC")}), OrderHistory())
    assert empty.columns == ["order_id", "placed_at", *FEATURE_NAMES]
    assert {name: empty.schema[name] for name in FEATURE_NAMES} == {feature.name: feature.dtype for feature in FEATURES}


def test_orders_without_time_and_duplicates_are_rejected():
    orders, _, _ = plain_history(2, seed=1)
    with pytest.raises(FeatureError, match="twice"):
        compute(pl.concat([orders, orders]), OrderHistory())
    with pytest.raises(FeatureError, match="placed_at"):
        compute(orders.with_columns(placed_at=pl.lit(None)), OrderHistory())


@given(st.lists(st.integers(0, 5), max_size=40), st.data())
def test_first_below(values, data):
    numbers = np.array(values, dtype=np.int64)
    places = st.integers(0, len(values))
    cases = data.draw(st.lists(st.tuples(places, places, st.integers(0, 6)).map(lambda a: (*sorted(a[:2]), a[2])), max_size=10))
    columns = [np.array([row[n] for row in cases], dtype=np.int64) for n in range(3)]
    expected = [next((n for n in range(start, stop) if values[n] < limit), stop) for start, stop, limit in cases]
    assert first_below(numbers, *columns).tolist() == expected


@given(st.lists(st.integers(0, 5), max_size=40), st.data())
def test_range_max_and_occurrences(values, data):
    numbers = np.array(values, dtype=np.float64)
    bounds = data.draw(st.lists(st.tuples(st.integers(0, len(values)), st.integers(0, len(values))), max_size=10))
    starts, stops = (np.array([b[n] for b in bounds], dtype=np.int64) for n in (0, 1))
    expected = [max(values[a:b], default=np.nan) for a, b in bounds]
    np.testing.assert_array_equal(range_max(numbers, starts, stops), expected)
    assert occurrences(np.array(values, dtype=np.int64)).tolist() == [values[:n].count(v) for n, v in enumerate(values)]


def test_a_fraud_counts_only_after_its_order_even_when_reported_earlier():
    line = Timeline(
        code=np.array([0, 0]),
        placed=np.array([10, 20]),
        amount=np.array([1, 1]),
        priced=np.array([True, True]),
        reported=np.array([5, NEVER]),
        requested=np.array([True, True]),
    )
    assert line.reported_frauds().tolist() == [0, 1]


def test_a_declared_feature_that_is_not_computed_is_named_with_its_file():
    orders, _, _ = plain_history(3, seed=1)
    extra = Feature(name="card_mean", type="amount", window="ever", doc="Mean.", reason_text="{value}")
    group = replace(CARD, features=(*CARD.features, extra))
    with pytest.raises(FeatureError, match=r"'card_mean' is declared in group 'card' but not computed.*ml/features/compute\.py"):
        compute_group(group, prepare(conform(orders, ORDER_COLUMNS), conform(orders.clear(), ORDER_COLUMNS)), OrderHistory())
