"""Compare served scores and features with those that the lakehouse has for the same orders now.

A served score is an event of type `ORDER_SCORED` in silver.events_clean, provided that its topic is among `kafka.topics`. Its
metadata contains the order, the features and the response as they were served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import polars as pl

from lakehouse.iceberg.catalog import Lake
from ml.registry import LoadedModel
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES
from pipelines.silver.events_clean import EVENTS_CLEAN

ORDER_SCORED = "order_scored"
"""Type of the events of served scores."""
TOLERANCE = 1e-6
"""Maximum difference of equal values, relative to the larger of 1 and the value."""
ORDER_VALUES = (
    "amount",
    "customer",
    "card",
    "device",
    "address",
    "ip",
    "person",
    "account",
    "channel",
    "payment_method",
    "category",
)
"""Columns of the order itself; a change of them changes features."""
CAUSES: Mapping[str, str] = {
    "amount": "the order's amount changed: that day's exchange rate arrived later, or the order was placed with another amount",
    "person": "the identity graph now assigns the account to another person",
}
LATE = "the order itself is unchanged: earlier (marketplace) orders, events or fraud reports arrived later"


@dataclass(frozen=True)
class ScoreDifference:
    """A feature that was served with another value than the lakehouse has now.

    orders   number of orders with a difference
    largest  largest difference; None for a category, or if the value is unknown on one side
    cause    most frequent cause
    """

    name: str
    orders: int
    largest: float | None
    cause: str


@dataclass(frozen=True, kw_only=True)
class ServedScores:
    """Result of comparing served scores with offline ones.

    scored      orders with a served score
    unread      score events that cannot be read
    known       scored orders that the lakehouse has features of
    equal       of these, orders with all features equal
    rescored    known orders that were scored by the present champion, so that scores are comparable
    same_score  of these, orders with an equal score
    largest     largest difference of a score; None: no score is comparable
    features    features that differ, most frequent first
    """

    scored: int = 0
    unread: int = 0
    known: int = 0
    equal: int = 0
    rescored: int = 0
    same_score: int = 0
    largest: float | None = None
    features: tuple[ScoreDifference, ...] = ()

    @property
    def in_words(self) -> str:
        """The result as one or two sentences."""
        if not self.scored and not self.unread:
            return (
                "No served score is in the lakehouse: none was requested, or the topic fraud_scores is not among kafka.topics "
                "(SHOPSPHERE_KAFKA__TOPICS=events,fraud_scores)."
            )
        unread = f" {self.unread:,} score events cannot be read." if self.unread else ""
        scores = (
            f"; of {self.rescored:,} scored by this version {self.same_score:,} have an equal score "
            f"(largest difference {self.largest:.3g})"
            if self.largest is not None
            else "; none of them was scored by this version"
        )
        return (
            f"{self.scored:,} orders were scored live, {self.known:,} of them are in silver.order_features: "
            f"{self.equal:,} with all features equal to {TOLERANCE:g}{scores if self.known else ''}.{unread}"
        )


def served_scores(lake: Lake, champion: LoadedModel) -> ServedScores:
    """Compare all served scores in the lakehouse with its present features."""
    events = lake.load(EVENTS_CLEAN).read(["event_id", "occurred_at", "metadata"], pl.col("event_type") == ORDER_SCORED)
    if events.is_empty():
        return ServedScores()
    scores, unread = _read(events)
    ids = pl.col("order_id").is_in(list(scores))
    names = list(champion.model.features)
    offline = lake.load(ORDER_FEATURES).read(["order_id", *names], ids)
    entities = lake.load(ORDER_ENTITIES).read(["order_id", *ORDER_VALUES], ids)
    return compare_served(scores, unread, offline, entities, champion)


def compare_served(
    scores: Mapping[str, Mapping[str, Any]], unread: int, offline: pl.DataFrame, entities: pl.DataFrame, champion: LoadedModel
) -> ServedScores:
    """Compare served scores with offline features.

    scores: metadata of the newest score by order_id; unread: score events that cannot be read; offline: order_id and the
    champion's features; entities: order_id and ORDER_VALUES."""
    now = {row["order_id"]: row for row in entities.to_dicts()}
    known = offline.sort("order_id")
    differing: dict[str, list[tuple[float | None, str]]] = {}
    equal = rescored = same = 0
    largest: float | None = None
    rescores = champion.model.score(known) if known.height else ()
    for row, score in zip(known.to_dicts(), rescores, strict=True):
        served = scores[row["order_id"]]
        changed = {
            name: distance(value, row.get(name)) for name, value in served["features"].items() if not _equal(value, row.get(name))
        }
        equal += not changed
        cause = _cause(served["order"], now.get(row["order_id"]), bool(changed))
        for name, apart in changed.items():
            differing.setdefault(name, []).append((apart, cause))
        if served["answer"]["model"]["version"] == champion.version.number:
            apart = abs(float(score) - float(served["answer"]["score"]))
            rescored, same = rescored + 1, same + (apart <= TOLERANCE)
            largest = max(largest or 0.0, apart)
    found = [
        ScoreDifference(
            name,
            len(ones),
            max((apart for apart, _ in ones if apart is not None), default=None),
            Counter(cause for _, cause in ones).most_common(1)[0][0],
        )
        for name, ones in differing.items()
    ]
    found.sort(key=lambda one: (-one.orders, one.name))
    return ServedScores(
        scored=len(scores),
        unread=unread,
        known=known.height,
        equal=equal,
        rescored=rescored,
        same_score=same,
        largest=largest,
        features=tuple(found),
    )


def distance(one: Any, other: Any) -> float | None:
    """Return the difference between two values of a feature; None unless both are numbers."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(float(one) - float(other))
    return None


def _equal(one: Any, other: Any) -> bool:
    apart = distance(one, other)
    if apart is not None:
        return apart <= TOLERANCE * max(1.0, abs(float(other)))
    return bool(one == other)


def _cause(then: Mapping[str, Any], now: Mapping[str, Any] | None, changed: bool) -> str:
    if not changed or now is None:
        return LATE
    other = [name for name in ORDER_VALUES if then.get(name) != now.get(name)]
    if not other:
        return LATE
    return next((CAUSES[name] for name in CAUSES if name in other), f"the order was placed with another {other[0]}")


def _read(events: pl.DataFrame) -> tuple[dict[str, Mapping[str, Any]], int]:
    """Return the newest score by order_id, and the number of events that cannot be read."""
    found: dict[str, Mapping[str, Any]] = {}
    unread = 0
    for text in events.sort("occurred_at", "event_id")["metadata"]:
        try:
            payload = msgspec.json.decode(text or "")
            found[payload["order_ref"]] = {
                "order": dict(payload["order"]),
                "features": dict(payload["features"]),
                "answer": {
                    "score": float(payload["answer"]["score"]),
                    "model": {"version": int(payload["answer"]["model"]["version"])},
                },
            }
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            unread += 1
    return found, unread
