"""The features of one order from memory, within microseconds, equal to those of `compute`, bit for bit.

A server cannot afford a data frame per request. Here the history of every entity is a few sorted lists of integers, and a
window is two binary searches. A test generates random datasets and compares every value with `compute`.

Histories are stored as columns (`OrderIndex`, `EventIndex`); the lists of an entity are built when it is first requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta

import polars as pl

from ml.features.declarations import ENTITIES, EVENT_COLUMNS, MISSING, OTHER, FeatureError, FeatureGroup, OrderHistory, conform
from ml.features.groups import FEATURE_GROUPS
from ml.features.groups.events import ACCOUNT_EVENTS
from ml.features.groups.order import CHANNELS, ORDER, PAYMENT_METHODS, WEEKDAYS
from ml.features.online.arithmetic import EPOCH, NAN, Value, quotient
from ml.features.online.entity_history import EntityHistory, entity_feature_names
from ml.features.online.event_history import EventHistory, EventIndex, event_feature_names
from ml.features.online.orders import FeatureRequest, OrderIndex, PlacedOrder
from ml.features.windows import MICROSECOND, MINUTE

ENTITY_GROUPS: Mapping[str, FeatureGroup] = {
    group.key: group for group in FEATURE_GROUPS if group.key in ENTITIES and not group.events
}
ORDER_FEATURE_NAMES = ("amount", "channel", "payment_method", "hour", "weekday", "account_minutes", "category_ratio")
"""Names of the features that `OnlineFeatures` computes for ORDER, in order."""


def check_online(groups: Sequence[FeatureGroup]) -> None:
    """Raise FeatureError when the declared features are not those that are computed online, in the same order."""
    for group in groups:
        if group.name == ORDER.name:
            file, names = "online_features.py", list(ORDER_FEATURE_NAMES)
        elif group.events:
            file, names = "event_history.py", event_feature_names(group)
        else:
            file, names = "entity_history.py", entity_feature_names(group)
        declared = [feature.name for feature in group.features]
        path = f"ml/features/online/{file}"
        if missing := [name for name in declared if name not in names]:
            raise FeatureError(
                f"Feature '{missing[0]}' of group '{group.name}' has no online counterpart. Compute it in {path}, "
                "with the same result as in ml/features/compute.py."
            )
        if extra := [name for name in names if name not in declared]:
            raise FeatureError(f"{path} computes '{extra[0]}', which group '{group.name}' does not declare.")
        if names != declared:
            raise FeatureError(f"{path} computes the features of group '{group.name}' in another order than declared.")


class OnlineFeatures:
    """Everything that features need, in memory: a history as of some time, and the orders and events observed since.

    Not thread-safe."""

    def __init__(self, history: OrderHistory) -> None:
        """Index a history that is complete in the sense of `compute`. Raises FeatureError for features without counterpart."""
        check_online(FEATURE_GROUPS)
        self.delay = history.delay // MICROSECOND
        self.orders = OrderIndex.of(history.orders)
        self.category_means: dict[tuple[str, date], float] = {
            (category, month): quotient(float(amount or 0), float(orders or 0))
            for category, month, orders, amount in history.categories.select("category", "month", "orders", "amount").iter_rows()
        }
        self._entities: dict[str, dict[str, EntityHistory]] = {kind: {} for kind in ENTITIES}
        self._observed: dict[str, PlacedOrder] = {}
        self._excluded: set[str] = set()
        """Orders of the index that were replaced or forgotten."""
        self._of_account: dict[int | str, EventHistory] = {}
        self._of_device: dict[int | str, EventHistory] = {}
        events = conform(history.events, EVENT_COLUMNS).drop_nulls("occurred_at").sort("occurred_at")
        self._account_events = EventIndex.of(events, "account")
        self._device_events = EventIndex.of(events.filter(pl.col("kind") != "visit"), "device")

    def observe_event(self, account: int | None, device: str | None, kind: str, at: int) -> None:
        """Add an account event. kind: one of EVENT_KINDS; at: microseconds since 1970."""
        for history in self._event_histories(account, device, kind):
            history.add(kind, at)

    def forget_event(self, account: int | None, device: str | None, kind: str, at: int) -> None:
        """Remove an account event that was observed or is in the history."""
        for history in self._event_histories(account, device, kind):
            history.remove(kind, at)

    def _event_histories(self, account: int | None, device: str | None, kind: str) -> Iterator[EventHistory]:
        if account is not None:
            yield _events_of(account, self._of_account, self._account_events)
        if device is not None and kind != "visit":
            yield _events_of(device, self._of_device, self._device_events)

    def observe(self, order: PlacedOrder) -> PlacedOrder | None:
        """Add an order to the history of later ones. Return the order with the same id that it replaces, if there is one."""
        replaced = self.forget(order.order_id)
        for kind, name in order.entities.items():
            if name is not None:
                self._history(kind, name).add(order)
        self._observed[order.order_id] = order
        return replaced

    def forget(self, order_id: str) -> PlacedOrder | None:
        """Remove an order from the history. Return it, if it was there."""
        known = self._observed.pop(order_id, None)
        if known is None and order_id not in self._excluded:
            known = self.orders.of_id(order_id)
            if known is not None:
                self._excluded.add(order_id)
        if known is not None:
            for kind, name in known.entities.items():
                if name is not None:
                    self._history(kind, name).remove(order_id)
        return known

    def features(self, request: FeatureRequest) -> list[Value]:
        """Return the features of an order, in the order of FEATURES; NaN where `compute` has null.

        The order itself may have been observed: no order is part of its own history."""
        order, values = request.order, self._of_order(request)
        for group in FEATURE_GROUPS[1:]:
            expected = len(values) + len(group.features)
            if group.events:
                self._append_events(group, request, values)
            elif (name := order.entities[group.key]) is None:
                values += [NAN] * len(group.features)
            else:
                self._history(group.key, name).append_features(order, values)
            if len(values) != expected:
                raise FeatureError(
                    f"{len(values) - expected + len(group.features)} values were computed online for the "
                    f"{len(group.features)} features of group '{group.name}'. Correct ml/features/online."
                )
        return values

    def _history(self, kind: str, name: str) -> EntityHistory:
        history = self._entities[kind].get(name)
        if history is None:
            rows = (row for row in self.orders.of_entity(kind, name) if row.order_id not in self._excluded)
            history = EntityHistory(ENTITY_GROUPS[kind], self.delay, rows)
            self._entities[kind][name] = history
        return history

    def _of_order(self, request: FeatureRequest) -> list[Value]:
        """Return the features of ORDER, in the order of ORDER_FEATURE_NAMES."""
        order, now = request.order, request.order.placed
        placed = EPOCH + now * MICROSECOND
        cents = NAN if order.amount is None else float(order.amount)
        month_before = (placed.date().replace(day=1) - timedelta(days=1)).replace(day=1)
        mean = self.category_means.get((request.category, month_before), NAN) if request.category is not None else NAN
        return [
            cents / 100.0,
            _category_of(request.channel, CHANNELS),
            _category_of(request.payment_method, PAYMENT_METHODS),
            float(placed.hour),
            WEEKDAYS[placed.weekday()],
            (now - request.account_created) / MINUTE if request.account_created <= now else NAN,
            quotient(cents, mean),
        ]

    def _append_events(self, group: FeatureGroup, request: FeatureRequest, values: list[Value]) -> None:
        of_account = group is ACCOUNT_EVENTS
        name = request.account if of_account else request.order.entities["device"]
        if name is None:
            values += [NAN] * len(group.features)
        elif of_account:
            _events_of(name, self._of_account, self._account_events).append_features(group, request.order.placed, values)
        else:
            _events_of(name, self._of_device, self._device_events).append_features(group, request.order.placed, values)


def _events_of(name: int | str, histories: dict[int | str, EventHistory], events: EventIndex) -> EventHistory:
    """Return the events of an account or device; they are read from the index on the first request."""
    history = histories.get(name)
    if history is None:
        history = histories[name] = events.of_name(name)
    return history


def _category_of(value: str | None, names: tuple[str, ...]) -> str:
    return MISSING if value is None else value if value in names else OTHER
