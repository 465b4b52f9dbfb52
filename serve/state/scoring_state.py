"""The state behind fraud scores: recent orders and answers, and online features over the lakehouse's orders and events."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import polars as pl

from ml.features.online.online_features import OnlineFeatures
from serve.state.reference_data import ReferenceData
from serve.state.topic_follower import TopicFollower

LAKE_DELAY = timedelta(minutes=10)
"""How long an order may take from the checkout to the lakehouse, beyond the lakehouse's own commit."""
Row = Mapping[str, Any]
"""An order in the form of the features (ORDER_COLUMNS)."""
Answer = TypeVar("Answer")


class RecentScores(Generic[Answer]):
    """Scored orders that the lakehouse may not have yet, and their answers. Not thread-safe.

    An order counts in the features until the lakehouse has it, or until the lakehouse has read the orders of that time without
    it: then it was never placed.

    scored  when each order was scored, and its row, by order_id
    """

    def __init__(self, same_answer: timedelta) -> None:
        self.same_answer = same_answer
        self.scored: dict[str, tuple[datetime, Row]] = {}
        self._answers: OrderedDict[str, tuple[datetime, Answer, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def answer_of(self, order_id: str, now: datetime) -> Answer | None:
        """Return the answer that this order got within the window."""
        found = self._answers.get(order_id)
        return found[1] if found is not None and now - found[0] <= self.same_answer else None

    def differs(self, order_id: str, digest: str) -> bool:
        """Return whether the order was scored with other content, by the digest of its request."""
        found = self._answers.get(order_id)
        return found is not None and found[2] not in ("", digest)

    def answers(self, now: datetime) -> list[tuple[datetime, Answer]]:
        """Return all answers within the window with their times, oldest first."""
        return [(at, answer) for at, answer, _ in self._answers.values() if now - at <= self.same_answer]

    def add(self, row: Row, at: datetime, answer: Answer, digest: str = "") -> None:
        """Add an order scored by any replica. Of several answers the first is kept, of several rows the last.

        digest: of the request, '' if unknown
        """
        order_id = row["order_id"]
        if self.answer_of(order_id, at) is None:
            self._answers[order_id] = (at, answer, digest)
            self._answers.move_to_end(order_id)
        self.scored[order_id] = (at, row)

    def remove_settled(self, in_lakehouse: set[str], committed_at: datetime | None, now: datetime) -> list[str]:
        """Remove orders that the lakehouse has or that were never placed, and expired answers.

        in_lakehouse: ids of orders that it has; committed_at: when its orders were last committed. Return the removed orders.
        """
        complete_until = committed_at - LAKE_DELAY if committed_at else None
        settled = [
            order_id
            for order_id, (at, _) in self.scored.items()
            if order_id in in_lakehouse or (complete_until is not None and at < complete_until and now - at > self.same_answer)
        ]
        for order_id in settled:
            del self.scored[order_id]
        self.remove_expired_answers(now)
        return settled

    def remove_expired_answers(self, now: datetime) -> None:
        """Remove the answers that are no longer repeated."""
        while self._answers and now - next(iter(self._answers.values()))[0] > self.same_answer:
            self._answers.popitem(last=False)


@dataclass
class ScoringState:
    """The features of orders as of a lakehouse snapshot and the messages after it. Not thread-safe.

    events        account events of the follower's snapshot
    online        online features, including recently scored orders
    events_taken  number of the follower's later account events that are in `online`
    """

    reference: ReferenceData
    follower: TopicFollower
    events: pl.DataFrame
    online: OnlineFeatures
    events_taken: int = 0

    @functools.cached_property
    def snapshots(self) -> dict[str, int]:
        """The Iceberg snapshots behind the features."""
        return {**self.follower.snapshot.snapshots, **self.reference.snapshots}

    def catch_up(self) -> None:
        """Take in the account events that the follower has read since the last call."""
        events = self.follower.stock.account_events
        while self.events_taken < len(events):
            event = events[self.events_taken]
            take = self.online.forget_event if event.retracted else self.online.observe_event
            take(event.account, event.device, event.kind, event.at)
            self.events_taken += 1
