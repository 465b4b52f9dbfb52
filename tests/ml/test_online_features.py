"""Online features equal those of `compute`, bit for bit, whatever the order of arrival."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shop_history import START, plain_history

from ml.features.compute import compute, with_ratios
from ml.features.declarations import Feature, FeatureError, FeatureGroup, OrderHistory
from ml.features.groups import FEATURE_GROUPS, FEATURES
from ml.features.groups.device import DEVICE
from ml.features.groups.events import DEVICE_EVENTS
from ml.features.groups.order import ORDER
from ml.features.online.arithmetic import Value, to_microseconds
from ml.features.online.event_history import EventHistory
from ml.features.online.online_features import OnlineFeatures, check_online
from ml.features.online.orders import FeatureRequest
from ml.features.windows import microseconds


def bits(values: list[Value]) -> list[bytes | str]:
    """Return the bits of values; all NaNs are equal."""
    return [
        value if isinstance(value, str) else b"nan" if value is None or math.isnan(value) else struct.pack("<d", value)
        for value in values
    ]


def expected(orders: pl.DataFrame, history: OrderHistory) -> list[list[bytes | str]]:
    names = [feature.name for feature in FEATURES]
    return [bits(list(row)) for row in compute(orders, history).select(names).iter_rows()]


def named(row: list[bytes | str], other: list[bytes | str]) -> dict[str, tuple[bytes | str, bytes | str]]:
    return {f.name: (a, b) for f, a, b in zip(FEATURES, row, other, strict=True) if a != b}


def test_online_features_of_a_long_history():
    orders, events, categories = plain_history(3000, seed=11)
    history = OrderHistory(orders, events, categories)
    online = OnlineFeatures(history)
    wanted = expected(orders, OrderHistory(events=events, categories=categories))
    for row, want in zip(orders.iter_rows(named=True), wanted, strict=True):
        assert named(bits(online.features(FeatureRequest.of(row))), want) == {}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000), st.data())
def test_online_features_do_not_depend_on_the_order_of_arrival(seed, data):
    orders, events, categories = plain_history(80, seed, days=60)
    orders = orders.sort("placed_at", "order_id")
    cut = data.draw(st.integers(0, orders.height))
    seen_events = data.draw(st.integers(0, events.height))
    online = OnlineFeatures(OrderHistory(orders[:cut], events[:seen_events], categories))
    for row in events[seen_events:].sample(fraction=1, shuffle=True, seed=seed).iter_rows(named=True):
        online.observe_event(row["account"], row["device"], row["kind"], to_microseconds(row["occurred_at"]))
    rest = orders[cut:].sample(fraction=1, shuffle=True, seed=seed)
    for row in rest.iter_rows(named=True):
        if data.draw(st.booleans()):
            online.features(FeatureRequest.of(row))  # reading changes nothing
        online.observe(FeatureRequest.of(row).order)
    for row in rest.head(5).iter_rows(named=True):
        online.observe(FeatureRequest.of(row).order)  # observing twice has no effect
    wanted = expected(orders, OrderHistory(events=events, categories=categories))
    for row, want in zip(orders.iter_rows(named=True), wanted, strict=True):
        assert named(bits(online.features(FeatureRequest.of(row))), want) == {}


def test_a_later_version_of_an_order_replaces_it():
    orders, events, categories = plain_history(200, seed=3)
    online = OnlineFeatures(OrderHistory(orders, events, categories))
    changed = orders.with_columns(amount=pl.col("amount") + 500, known_at=pl.col("placed_at") + timedelta(days=2))
    changed = with_ratios(changed)
    for row in changed.sample(fraction=1, shuffle=True, seed=1).iter_rows(named=True):
        online.observe(FeatureRequest.of(row).order)
    wanted = expected(changed, OrderHistory(events=events, categories=categories))
    for row, want in zip(changed.iter_rows(named=True), wanted, strict=True):
        assert named(bits(online.features(FeatureRequest.of(row))), want) == {}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000), st.data())
def test_forgotten_orders_and_events_have_no_effect(seed, data):
    """Orders of the history and observed ones, versions with other entities, and events."""
    orders, events, categories = plain_history(80, seed, days=60)
    events = events.unique(maintain_order=True)
    cut = data.draw(st.integers(0, orders.height))
    online = OnlineFeatures(OrderHistory(orders[:cut], events, categories))
    if data.draw(st.booleans()):
        for row in orders.iter_rows(named=True):
            online.features(FeatureRequest.of(row))  # build the lists first
    for row in orders[cut:].iter_rows(named=True):
        online.observe(FeatureRequest.of(row).order)
    other = dict(zip(orders["order_id"], orders.sample(fraction=1, shuffle=True, seed=seed).iter_rows(named=True), strict=True))
    moved = orders["order_id"].sample(20, seed=seed + 1).to_list()
    gone = orders["order_id"].sample(20, seed=seed + 2).to_list()
    for order_id in moved:
        online.observe(FeatureRequest.of({**other[order_id], "order_id": order_id}).order)
    for order_id in gone:
        assert online.forget(order_id) is not None
        assert online.forget(order_id) is None
    late = events.sample(min(10, events.height), seed=seed)
    for row in late.iter_rows(named=True):
        online.forget_event(row["account"], row["device"], row["kind"], to_microseconds(row["occurred_at"]))
    rows = [
        {**(other if row["order_id"] in moved else {}).get(row["order_id"], row), "order_id": row["order_id"]}
        for row in orders.iter_rows(named=True)
    ]
    left = pl.DataFrame([row for row in rows if row["order_id"] not in gone], schema=orders.schema)
    stayed = events.join(late, on=events.columns, how="anti", nulls_equal=True)
    wanted = expected(left, OrderHistory(events=stayed, categories=categories))
    for row, want in zip(left.iter_rows(named=True), wanted, strict=True):
        assert named(bits(online.features(FeatureRequest.of(row))), want) == {}


def test_a_customer_with_a_thousand_orders():
    """Greatest ratios over long ranges, also after orders that arrived late or were forgotten."""
    rows = [
        {"order_id": f"{n}", "placed_at": START + timedelta(minutes=7 * n), "amount": (n * 7919) % 5000, "customer": "user:1"}
        for n in range(1000)
    ]
    online = OnlineFeatures(OrderHistory())
    for row in [*rows[::2], *rows[1::2][::-1]]:
        online.observe(FeatureRequest.of(row).order)
    for row in rows[300:600:3]:
        online.forget(row["order_id"])
    kept = [row for row in rows if row not in rows[300:600:3]]
    frame = pl.DataFrame(kept).with_columns(pl.col("placed_at").cast(pl.Datetime("us", "UTC")))
    for row, want in zip(kept, expected(frame, OrderHistory()), strict=True):
        assert named(bits(online.features(FeatureRequest.of(row))), want) == {}


def test_an_order_without_id_or_time_is_rejected():
    with pytest.raises(FeatureError, match="order_id"):
        FeatureRequest.of({"placed_at": START})
    with pytest.raises(FeatureError, match="placed_at"):
        FeatureRequest.of({"order_id": "1"})


def test_times_are_integer_microseconds():
    late = START + timedelta(days=9000, microseconds=123_457)
    assert to_microseconds(late) == microseconds(pl.Series([late]))[0]
    row = FeatureRequest.of({"order_id": "1", "placed_at": late})
    assert replace(row.order, placed=0).entities["card"] is None
    assert np.isnan([v for v in OnlineFeatures(OrderHistory()).features(row) if isinstance(v, float)]).sum() > 0


def appended(group: FeatureGroup) -> FeatureGroup:
    extra = Feature(name=f"{group.name}_extra", type="count", window="ever", doc="Extra.", reason_text="{value}")
    return replace(group, features=(*group.features, extra))


@pytest.mark.parametrize(
    ("group", "file"),
    [(ORDER, "online_features"), (DEVICE, "entity_history"), (DEVICE_EVENTS, "event_history")],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_feature_without_online_counterpart_is_named_with_its_file(
    group: FeatureGroup, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tuple(appended(group) if group is one else one for one in FEATURE_GROUPS)
    monkeypatch.setattr("ml.features.online.online_features.FEATURE_GROUPS", groups)
    message = rf"'{group.name}_extra' of group '{group.name}' has no online counterpart.*ml/features/online/{file}\.py"
    with pytest.raises(FeatureError, match=message):
        OnlineFeatures(OrderHistory())


def test_online_features_must_be_declared_in_the_same_order():
    with pytest.raises(FeatureError, match=r"computes 'device_mean', which group 'device' does not declare"):
        check_online([replace(DEVICE, features=tuple(one for one in DEVICE.features if one.name != "device_mean"))])
    with pytest.raises(FeatureError, match="in another order"):
        check_online([replace(DEVICE, features=DEVICE.features[::-1])])


def test_a_feature_that_is_named_but_not_computed_online_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventHistory, "append_features", lambda self, group, now, values: values.append(0.0))
    online = OnlineFeatures(OrderHistory())
    with pytest.raises(FeatureError, match="1 values were computed online for the 9 features of group 'account_events'"):
        online.features(FeatureRequest.of({"order_id": "1", "placed_at": START, "account": 1}))
