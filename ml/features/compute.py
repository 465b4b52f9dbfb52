"""The features of many orders at once, as a data frame.

Training computes all orders at once; an incremental run computes a few orders with the slice of history that affects them.
Both get the same values, bit for bit. So does a server, which computes one order from memory (`ml/features/online`).

The history must be complete for the entities of the requested orders: all earlier orders with the same customer, card,
device, address, ip or person, and all earlier events of the account and device. Additional rows, of other entities or of
the future, change nothing.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ml.features.declarations import (
    CATEGORY_COLUMNS,
    EVENT_COLUMNS,
    MISSING,
    ORDER_COLUMNS,
    OTHER,
    RISK_WINDOWS,
    WINDOWS,
    FeatureError,
    FeatureGroup,
    OrderHistory,
    conform,
)
from ml.features.groups import FEATURE_GROUPS, FEATURE_NAMES
from ml.features.groups.customer import (
    CUSTOMER,
    FIRST_USES,
    GREATEST_RATIO_WINDOWS,
    RECENT_MEAN_WINDOWS,
    UNUSUAL_WINDOWS,
)
from ml.features.groups.device import DEVICE
from ml.features.groups.entity import PLURAL, UNUSUAL_RATIO
from ml.features.groups.events import COUNTED_KINDS, EVENT_WINDOWS
from ml.features.groups.order import CHANNELS, ORDER, PAYMENT_METHODS, WEEKDAYS
from ml.features.windows import (
    MICROSECOND,
    MINUTE,
    NEVER,
    Floats,
    Ints,
    SortedTimes,
    Timeline,
    category_of,
    codes,
    microseconds,
    quotient,
    range_max,
    scattered,
    sums_before,
)

Columns = dict[str, npt.NDArray[Any]]


def compute(orders: pl.DataFrame, history: OrderHistory) -> pl.DataFrame:
    """Return order_id, placed_at and all features of `orders` (ORDER_COLUMNS), one row per order, in the given order.

    Each order is history to the later ones. Raises FeatureError when an order has no id or no time, or occurs twice.
    """
    orders, known = conform(orders, ORDER_COLUMNS), conform(history.orders, ORDER_COLUMNS)
    _check(orders)
    rows = prepare(orders, known)
    frames = [compute_group(group, rows, history) for group in FEATURE_GROUPS]
    features = pl.concat([rows.filter("requested").select("order_id", "placed_at"), *frames], how="horizontal")
    return (
        orders.select("order_id")
        .join(features, on="order_id", how="left", maintain_order="left")
        .select("order_id", "placed_at", *FEATURE_NAMES)
    )


def prepare(orders: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of both frames, each order once, sorted by (placed_at, order_id), with a flag `requested`.

    orders: the requested orders; known: their history. An order in both is taken from `orders`."""
    others = known.join(orders.select("order_id"), on="order_id", how="anti").unique("order_id") if known.height else known
    rows = pl.concat([orders.with_columns(requested=pl.lit(True)), others.with_columns(requested=pl.lit(False))])
    return rows.filter(pl.col("placed_at").is_not_null()).sort("placed_at", "order_id")


def _check(orders: pl.DataFrame) -> None:
    if orders["order_id"].null_count() or orders["placed_at"].null_count():
        raise FeatureError("An order without order_id or placed_at has no features. Give both.")
    if orders["order_id"].is_duplicated().any():
        duplicate = orders.filter(orders["order_id"].is_duplicated())["order_id"][0]
        raise FeatureError(f"Order {duplicate} was requested twice in one call. Request it once.")


def compute_group(group: FeatureGroup, rows: pl.DataFrame, history: OrderHistory) -> pl.DataFrame:
    """Return the features of one group for the `requested` rows, in their order. rows: as returned by `prepare`.

    Raises FeatureError for a feature that is declared but not computed here."""
    if group.name == ORDER.name:
        computed = _order(rows.filter("requested"), history.categories)
        _require_computed(group, computed.columns)
        return computed.select(
            pl.col(feature.name).fill_nan(None) if feature.dtype == pl.Float64 else feature.name for feature in group.features
        )
    if group.events:
        chosen, columns = _of_events(group, rows, history.events)
    else:
        chosen, columns = _of_orders(group, rows, history.delay // MICROSECOND)
    _require_computed(group, columns)
    requested = rows["requested"].to_numpy()
    height = int(requested.sum())
    at = (np.cumsum(requested) - 1)[chosen]
    return pl.DataFrame({feature.name: scattered(columns[feature.name], at, height) for feature in group.features}).fill_nan(None)


def _require_computed(group: FeatureGroup, computed: Container[str]) -> None:
    for feature in group.features:
        if feature.name not in computed:
            raise FeatureError(
                f"Feature '{feature.name}' is declared in group '{group.name}' but not computed. "
                "Compute it in ml/features/compute.py."
            )


def timeline(rows: pl.DataFrame, kind: str, reported_at: pl.Series | None = None) -> Timeline:
    """Return the orders of the entities of a kind. rows: as returned by `prepare`; reported_at: replaces `known_at`."""
    return Timeline(
        code=codes(rows[kind])[0],
        placed=microseconds(rows["placed_at"]),
        amount=rows["amount"].fill_null(0).to_numpy(),
        priced=rows["amount"].is_not_null().to_numpy(),
        reported=microseconds(rows["known_at"] if reported_at is None else reported_at),
        requested=rows["requested"].to_numpy(),
    )


def with_ratios(orders: pl.DataFrame) -> pl.DataFrame:
    """Return the orders (ORDER_COLUMNS) with `ratio`: the amount relative to the mean of the customer's earlier amounts.

    The histories of the customers must be complete.
    """
    rows = prepare(conform(orders, ORDER_COLUMNS), conform(orders.clear(), ORDER_COLUMNS))
    line = timeline(rows, "customer")
    ratios = scattered(_own_ratio(line)[line.at], line.chosen, rows.height)
    found = rows.select("order_id", ratio=pl.Series(ratios).fill_nan(None))
    return orders.drop("ratio", strict=False).join(found, on="order_id", how="left", maintain_order="left")


# --- the order itself ----------------------------------------------------------------------------------------------


def _order(rows: pl.DataFrame, categories: pl.DataFrame) -> pl.DataFrame:
    placed = rows["placed_at"]
    now = microseconds(placed)
    created = microseconds(rows["account_created_at"])
    usual = rows.select("category", placed.dt.month_start().dt.date().dt.offset_by("-1mo").alias("month")).join(
        conform(categories, CATEGORY_COLUMNS).rename({"amount": "cents"}),
        on=["category", "month"],
        how="left",
        maintain_order="left",
    )
    mean = quotient(usual["cents"].fill_null(0).to_numpy(), usual["orders"].fill_null(0).to_numpy())
    cents = rows["amount"].to_numpy().astype(np.float64)
    age = np.where(created <= now, (now - created).astype(np.float64) / float(MINUTE), np.nan)
    return pl.DataFrame(
        {
            "amount": cents / 100.0,
            "channel": category_of(rows["channel"], CHANNELS, OTHER, MISSING),
            "payment_method": category_of(rows["payment_method"], PAYMENT_METHODS, OTHER, MISSING),
            "hour": placed.dt.hour().cast(pl.Float64),
            "weekday": pl.Series([*WEEKDAYS], dtype=pl.String).gather(placed.dt.weekday().cast(pl.UInt32) - 1),
            "account_minutes": age,
            "category_ratio": quotient(cents, np.nan_to_num(mean)),
        }
    )


# --- histories of orders -------------------------------------------------------------------------------------------


def _of_orders(group: FeatureGroup, rows: pl.DataFrame, delay: int) -> tuple[Ints, Columns]:
    """Return the requested rows that have an entity of the group's kind, and their features by name."""
    kind = group.key
    line = timeline(rows, kind)
    others = {name: codes(rows[name])[0] for name in group.needs}
    columns: Columns = {
        f"{kind}_orders_ever": line.earlier,
        f"{kind}_minutes_since_first": line.minutes_since_first(),
        f"{kind}_minutes_since_last": line.minutes_since_last(),
        **{f"{kind}_{PLURAL[other]}_ever": line.distinct(others[other]) for other in group.seen_with},
    }
    for window in group.windows:
        start, stop = line.since(WINDOWS[window])
        columns[f"{kind}_orders_{window}"] = stop - start
        columns[f"{kind}_amount_{window}"] = line.amounts(start, stop) / 100.0
    columns |= _reported_frauds(group, line)
    if group.risk_windows or group.last_labels:
        columns |= _mature_labels(group, line, columns, delay)
    if group.unexplained_windows:
        columns |= _unexplained_frauds(group, rows, delay)
    if group.name == CUSTOMER.name:
        columns |= _own_history(line, others)
    if group.name == DEVICE.name:
        columns["device_mean"] = line.means[0][line.at] / 100.0
    return line.chosen, columns


def _own_ratio(line: Timeline) -> Floats:
    """Return each row's amount relative to the mean of the entity's earlier amounts; NaN when there is none."""
    cents = np.where(line.priced, line.amount.astype(np.float64), np.nan)
    return quotient(cents, np.nan_to_num(line.means[0]))


def _reported_frauds(group: FeatureGroup, line: Timeline) -> Columns:
    kind = group.key
    columns: Columns = {f"{kind}_frauds_ever": line.reported_frauds(), f"{kind}_minutes_since_fraud": line.minutes_since_fraud()}
    for window in group.fraud_windows:
        columns[f"{kind}_frauds_{window}"] = line.reported_frauds(RISK_WINDOWS[window])
    return columns


def _unexplained_frauds(group: FeatureGroup, rows: pl.DataFrame, delay: int) -> Columns:
    """Return the features of reported frauds whose amount was not unusual for the customer."""
    kind = group.key
    explained = pl.col("ratio").fill_null(0.0) >= UNUSUAL_RATIO
    line = timeline(rows, kind, rows.select(pl.when(~explained).then("known_at")).to_series())
    return {
        **{f"{kind}_unexplained_{window}": line.reported_frauds(RISK_WINDOWS[window]) for window in group.unexplained_windows},
        f"{kind}_minutes_since_unexplained": line.minutes_since_fraud(),
        f"{kind}_minutes_since_unexplained_began": line.minutes_since_first_fraud(delay + RISK_WINDOWS["28d"]),
    }


def _mature_labels(group: FeatureGroup, line: Timeline, reported: Columns, delay: int) -> Columns:
    """Return the features of orders older than the label delay. reported: columns with the group's reported frauds."""
    kind, labels = group.key, line.mature_labels(delay)
    columns: Columns = {}
    for window in group.risk_windows:
        orders = labels.orders(RISK_WINDOWS[window])
        columns[f"{kind}_settled_{window}"] = orders
        columns[f"{kind}_risk_{window}"] = quotient(reported[f"{kind}_frauds_{window}"], orders)
    for last in group.last_labels:
        columns[f"{kind}_frauds_of_last_{last}"] = labels.frauds_of_last(last)
    if group.last_labels:
        columns[f"{kind}_minutes_since_genuine"] = labels.minutes_since_genuine()
        length, minutes, min_amount = labels.fraud_streak()
        columns |= {f"{kind}_run_frauds": length, f"{kind}_run_minutes": minutes, f"{kind}_run_least": min_amount}
    return columns


def _own_history(line: Timeline, others: dict[str, Ints]) -> Columns:
    """Return the amount relative to the customer's own history, and flags for first uses."""
    mean, deviation = line.means
    cents = np.where(line.priced, line.amount.astype(np.float64), np.nan)
    ratio = _own_ratio(line)
    at = line.at
    over = cents[at] - mean[at]
    # without any deviation there is no z-score
    spread = np.nan_to_num(deviation[at])
    columns: Columns = {
        "customer_mean": mean[at] / 100.0,
        "customer_deviation": deviation[at] / 100.0,
        "customer_ratio": ratio[at],
        "customer_z": np.where(np.isnan(over), np.nan, quotient(over, spread)),
    }
    for window in RECENT_MEAN_WINDOWS:
        start, stop = line.since(WINDOWS[window])
        recent = quotient(line.amounts(start, stop), line.prices(start, stop))
        columns[f"customer_ratio_{window}"] = quotient(cents[at], np.nan_to_num(recent))
    for window in GREATEST_RATIO_WINDOWS:
        columns[f"customer_greatest_ratio_{window}"] = range_max(ratio, *line.since(WINDOWS[window]))
    columns |= _outliers(line, cents, ratio)
    return columns | {f"new_{other}": line.is_new(others[other]) for other in FIRST_USES}


def _outliers(line: Timeline, cents: Floats, ratio: Floats) -> Columns:
    """Return the amount relative to the customer's mean without outliers, and the counts of unusual amounts."""
    usual = line.mean_where(line.priced & ~(ratio >= UNUSUAL_RATIO))
    usual_ratio = quotient(cents, np.nan_to_num(usual))
    unusual = usual_ratio >= UNUSUAL_RATIO
    counts = sums_before(unusual)
    columns: Columns = {"customer_usual_mean": usual[line.at] / 100.0, "customer_usual_ratio": usual_ratio[line.at]}
    for window in UNUSUAL_WINDOWS:
        start, stop = line.since(WINDOWS[window])
        columns[f"customer_unusual_{window}"] = counts[stop] - counts[start]
    columns["customer_minutes_since_unusual"] = line.minutes_since_marked(unusual, line.at)
    columns["customer_minutes_since_unusual_began"] = line.minutes_since_first_marked(unusual, WINDOWS["14d"])
    return columns


# --- account events ------------------------------------------------------------------------------------------------


def _of_events(group: FeatureGroup, rows: pl.DataFrame, events: pl.DataFrame) -> tuple[Ints, Columns]:
    """Return the requested rows that have an account (or device), and the features of its events by name."""
    events = conform(events, EVENT_COLUMNS).filter(pl.col(group.key).is_not_null() & pl.col("occurred_at").is_not_null())
    code, entity = codes(events[group.key], rows[group.key])
    chosen = np.flatnonzero((entity >= 0) & rows["requested"].to_numpy())
    entity, now = entity[chosen], microseconds(rows["placed_at"])[chosen]
    occurred = microseconds(events["occurred_at"])
    names = {feature.name for feature in group.features}
    columns: Columns = {}
    for noun, kind in {"events": None, **COUNTED_KINDS}.items():
        of_kind = np.arange(len(code)) if kind is None else np.flatnonzero((events["kind"] == kind).to_numpy())
        times, _ = SortedTimes.of(code[of_kind], occurred[of_kind])
        stop = times.before(entity, now)
        for window in EVENT_WINDOWS:
            if (name := f"{group.key}_{noun}_{window}") in names:
                columns[name] = stop - times.before(entity, now - WINDOWS[window])
        since = {"failed_logins": "minutes_since_failed_login", "changes": "minutes_since_change"}.get(noun, "")
        if (name := f"{group.key}_{since}") in names:
            exists = stop > times.before(entity, np.full(len(entity), -NEVER))
            last = times.time[np.maximum(stop - 1, 0)] if len(times.time) else now
            columns[name] = np.where(exists, (now - last).astype(np.float64) / float(MINUTE), np.nan)
    return chosen, columns
