"""Scores as they were served beside what the lakehouse says of the same orders now.

A served score is an event of type `ORDER_SCORED` in silver.events_clean, once its topic is among `kafka.topics`. Its metadata
holds the order, the features and the answer as they were.
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
"""Type of the events."""
TOLERANCE = 1e-6
"""Of what counts as equal: relative to the larger of 1 and the value."""
TOLD = ("amount", "customer", "card", "device", "address", "ip", "person", "account", "channel", "payment_method", "category")
"""What an order itself says; where that changed, features follow."""
CAUSES: Mapping[str, str] = {
    "amount": "the order's amount is another: that day's exchange rate came later, or the order was placed otherwise",
    "person": "the identity graph counts the account to another person now",
}
LATE = "the order itself is the same: others (of marketplaces), events or frauds before it were told later"


@dataclass(frozen=True)
class ScoreDifference:
    """A feature that was served otherwise than the lakehouse has it now.

    orders   how many
    largest  the largest difference; None: of a category, or only unknown on one side
    cause    what most of these orders have in common
    """

    name: str
    orders: int
    largest: float | None
    cause: str


@dataclass(frozen=True)
class ServedScores:
    """ServedScores scores against offline ones.

    scored      orders scored
    unread      events of scores that cannot be read
    known       of the scored, those that the lakehouse has features of
    equal       of these, with all features equal
    rescored    of the known, scored by the model that is asked now, so that scores compare
    same_score  of these, with an equal score
    largest     the largest difference of a score; None: nothing to compare
    features    those that differ, most often first
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
        """In a line or two."""
        if not self.scored and not self.unread:
            return (
                "No served score is in the lakehouse: none was asked for, or the topic fraud_scores is not among kafka.topics "
                "(SHOPSPHERE_KAFKA__TOPICS=events,fraud_scores)."
            )
        unread = f" {self.unread:,} events of scores cannot be read." if self.unread else ""
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
    """What was served, compared with what the lakehouse has now."""
    events = lake.load(EVENTS_CLEAN).read(["event_id", "occurred_at", "metadata"], pl.col("event_type") == ORDER_SCORED)
    if events.is_empty():
        return ServedScores()
    scores, unread = _read(events)
    ids = pl.col("order_id").is_in(list(scores))
    names = list(champion.model.features)
    offline = lake.load(ORDER_FEATURES).read(["order_id", *names], ids)
    entities = lake.load(ORDER_ENTITIES).read(["order_id", *TOLD], ids)
    return compare_served(scores, unread, offline, entities, champion)


def compare_served(
    scores: Mapping[str, Mapping[str, Any]], unread: int, offline: pl.DataFrame, entities: pl.DataFrame, champion: LoadedModel
) -> ServedScores:
    """scores: by order_id the metadata of its newest score; offline: order_id and the champion's features."""
    now = {row["order_id"]: row for row in entities.to_dicts()}
    known = offline.sort("order_id")
    differing: dict[str, list[tuple[float | None, str]]] = {}
    equal = rescored = same = 0
    largest: float | None = None
    again = champion.model.score(known) if known.height else ()
    for row, score in zip(known.to_dicts(), again, strict=True):
        told = scores[row["order_id"]]
        changed = {
            name: distance(value, row.get(name)) for name, value in told["features"].items() if not _same(value, row.get(name))
        }
        equal += not changed
        cause = _cause(told["order"], now.get(row["order_id"]), bool(changed))
        for name, apart in changed.items():
            differing.setdefault(name, []).append((apart, cause))
        if told["answer"]["model"]["version"] == champion.version.number:
            apart = abs(float(score) - float(told["answer"]["score"]))
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
    return ServedScores(len(scores), unread, known.height, equal, rescored, same, largest, tuple(found))


def distance(one: Any, other: Any) -> float | None:
    """How far two values of a feature are apart; None where that is no number."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(float(one) - float(other))
    return None


def _same(one: Any, other: Any) -> bool:
    apart = distance(one, other)
    if apart is not None:
        return apart <= TOLERANCE * max(1.0, abs(float(other)))
    return bool(one == other)


def _cause(then: Mapping[str, Any], now: Mapping[str, Any] | None, changed: bool) -> str:
    if not changed or now is None:
        return LATE
    other = [name for name in TOLD if then.get(name) != now.get(name)]
    if not other:
        return LATE
    return next((CAUSES[name] for name in CAUSES if name in other), f"the order was placed with another {other[0]}")


def _read(events: pl.DataFrame) -> tuple[dict[str, Mapping[str, Any]], int]:
    """By order_id the newest score, and how many cannot be read."""
    found: dict[str, Mapping[str, Any]] = {}
    unread = 0
    for text in events.sort("occurred_at", "event_id")["metadata"]:
        try:
            told = msgspec.json.decode(text or "")
            found[told["order_ref"]] = {
                "order": dict(told["order"]),
                "features": dict(told["features"]),
                "answer": {
                    "score": float(told["answer"]["score"]),
                    "model": {"version": int(told["answer"]["model"]["version"])},
                },
            }
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            unread += 1
    return found, unread
