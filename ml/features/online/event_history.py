"""The account events of one account or device in memory, and the features that they contribute to an order.

Counterpart of the account events in `ml/features/compute.py`: a feature of an event group that is computed there must be
computed in `EventHistory.append_features` too, and named, at the same position, in `event_feature_names`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from ml.features.declarations import WINDOWS, FeatureGroup
from ml.features.groups.events import ACCOUNT_EVENTS, COUNTED_KINDS, EVENT_WINDOWS, FAILURE_WINDOWS
from ml.features.online.arithmetic import NAN, Value
from ml.features.online.orders import rows_by_name
from ml.features.windows import MINUTE, Ints, microseconds

NOUNS = ("events", *COUNTED_KINDS)
NOUN_OF_KIND = {kind: noun for noun, kind in COUNTED_KINDS.items()}
FAILURES = ("failed_logins", "failed_payments")


@dataclass
class EventHistory:
    """The account events of one account or device: sorted times, of all events and of each counted kind."""

    times: dict[str, list[int]] = field(default_factory=lambda: {noun: [] for noun in NOUNS})

    def add(self, kind: str, at: int) -> None:
        """Add an event, in any order of time. kind: one of EVENT_KINDS; at: microseconds since 1970."""
        for noun in ("events", NOUN_OF_KIND.get(kind)):
            if noun is not None:
                times = self.times[noun]
                if times and times[-1] > at:
                    times.insert(bisect_left(times, at), at)
                else:
                    times.append(at)

    def remove(self, kind: str, at: int) -> None:
        """Remove an event, if it is present."""
        for noun in ("events", NOUN_OF_KIND.get(kind)):
            if noun is not None:
                times = self.times[noun]
                place = bisect_left(times, at)
                if place < len(times) and times[place] == at:
                    del times[place]

    def counts(self, noun: str, now: int, windows: tuple[str, ...]) -> Iterator[float]:
        """Yield the number of events in each window before now."""
        times = self.times[noun]
        stop = bisect_left(times, now)
        for window in windows:
            yield float(stop - bisect_left(times, now - WINDOWS[window]))

    def minutes_since(self, noun: str, now: int) -> float:
        """Return the minutes since the last event before now; NaN if there is none."""
        stop = bisect_left(self.times[noun], now)
        return (now - self.times[noun][stop - 1]) / MINUTE if stop else NAN

    def append_features(self, group: FeatureGroup, now: int, values: list[Value]) -> None:
        """Append the group's features of an order placed now, in the order of `event_feature_names`."""
        if group is ACCOUNT_EVENTS:
            values += self.counts("events", now, EVENT_WINDOWS)
        for noun in FAILURES:
            values += self.counts(noun, now, FAILURE_WINDOWS)
        if group is ACCOUNT_EVENTS:
            values.append(self.minutes_since("failed_logins", now))
            values.append(self.minutes_since("changes", now))


def event_feature_names(group: FeatureGroup) -> list[str]:
    """Return the names of the features that `EventHistory.append_features` appends for a group, in order."""
    of_account = group.key == ACCOUNT_EVENTS.key
    names = [f"account_events_{window}" for window in EVENT_WINDOWS] if of_account else []
    names += [f"{group.key}_{noun}_{window}" for noun in FAILURES for window in FAILURE_WINDOWS]
    return [*names, "account_minutes_since_failed_login", "account_minutes_since_change"] if of_account else names


@dataclass(frozen=True)
class EventIndex:
    """Account events as columns, sorted by time, with the rows of each account or device. Immutable."""

    at: Ints
    kind: pl.Series
    rows: Ints
    spans: Mapping[Any, tuple[int, int]]

    @staticmethod
    def of(events: pl.DataFrame, key: str) -> EventIndex:
        """Index a frame with EVENT_COLUMNS that is sorted by time. key: account or device."""
        return EventIndex(microseconds(events["occurred_at"]), events["kind"], *rows_by_name(events[key]))

    def of_name(self, name: int | str) -> EventHistory:
        """Return the events of an account or device."""
        start, stop = self.spans.get(name, (0, 0))
        rows, history = self.rows[start:stop], EventHistory()
        for kind, at in zip(self.kind.gather(rows).to_list(), self.at[rows].tolist(), strict=True):
            history.add(kind, at)
        return history
