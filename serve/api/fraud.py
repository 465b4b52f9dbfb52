"""Fraud scores over HTTP: an order's features as training computes them, the champion's score, and why."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
from msgspec import Meta
from prometheus_client import Counter
from starlette.responses import Response

from ml.features.declarations import LABEL_DELAY, ORDER_COLUMNS, OrderHistory
from ml.features.groups import FEATURES
from ml.features.online.arithmetic import MICROSECOND, Value
from ml.features.online.online_features import OnlineFeatures
from ml.features.online.orders import FeatureRequest as Described
from ml.registry import CHAMPION
from ml.tables.order_features import EVENT_READS, account_events
from ml.training.training import TrainingError
from pipelines.settings import BusinessSettings
from serve.api.inventory import Inventory
from serve.http.edges import DECISIONS, ApiRequest, Endpoint, Gate, answer, unpanicked
from serve.http.problems import busy
from serve.settings import ServeSettings
from serve.state.models import Models, ModelWatch, Scorer
from serve.state.orders import Line, Order, ReferenceData, read_reference_data, row_of, snapshots_of
from serve.state.score_topic import Score, ScoreLog
from serve.state.table_cache import TableCache
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")

MOST = 1_000
"""Orders of a batch."""
SETTLE = timedelta(minutes=10)
"""How long an order may take from the checkout to the lakehouse beyond the lakehouse's own commit."""
Row = Mapping[str, Any]
"""An order as features take it (ORDER_COLUMNS)."""
MOMENTS = tuple(name for name, kind in ORDER_COLUMNS.items() if isinstance(kind, pl.Datetime))
Decision = Literal["approve", "review", "decline"]


class Reason(msgspec.Struct, frozen=True):
    """What speaks for fraud."""

    feature: str
    value: float | str | None
    contribution: Annotated[
        float, Meta(description="What it adds to the log-odds of fraud, by the splits on the order's way (Saabas).")
    ]
    text: str


class ModelName(msgspec.Struct, frozen=True):
    """The model that scored."""

    name: str
    version: int
    alias: str


class AsOf(msgspec.Struct, frozen=True):
    """What the score is based on."""

    snapshots: dict[str, int]
    offsets: Annotated[dict[str, int], Meta(description="By 'topic:partition' the last offset that is in it.")]


class FraudScore(msgspec.Struct, frozen=True):
    """A scored order."""

    order_id: str
    score: Annotated[float, Meta(ge=0, le=1, description="Probability of fraud.")]
    decision: Decision
    threshold: Annotated[float, Meta(description="Score from which on an order is reviewed.")]
    reasons: Annotated[list[Reason], Meta(description="Strongest first.")]
    model: ModelName
    as_of: AsOf
    staleness_ms: int


class FraudScores(msgspec.Struct, frozen=True):
    """Scored orders, in the order given."""

    scores: list[FraudScore]


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Orders to score."""

    orders: Annotated[list[Order], Meta(min_length=1, max_length=MOST)]


class RecentScores:
    """Orders scored that the lakehouse may not have yet, and what was answered. Not for two threads at once.

    An order counts until the lakehouse has it; or until the lakehouse has read the orders of its time and it is not
    among them: it was never placed.

    scored  by order_id when it was scored, and the order
    """

    def __init__(self, same_answer: timedelta) -> None:
        self.same_answer = same_answer
        self.scored: dict[str, tuple[datetime, Row]] = {}
        self._answers: OrderedDict[str, tuple[datetime, FraudScore]] = OrderedDict()

    def answered(self, order_id: str, now: datetime) -> FraudScore | None:
        """What this order was told within the window."""
        found = self._answers.get(order_id)
        return found[1] if found is not None and now - found[0] <= self.same_answer else None

    def answers(self, now: datetime) -> list[tuple[datetime, FraudScore]]:
        """All that was told within the window, and when; oldest first."""
        return [found for found in self._answers.values() if now - found[0] <= self.same_answer]

    def add(self, row: Row, at: datetime, told: FraudScore) -> None:
        """An order was scored, here or by another replica; the first answer stands, the newer order counts."""
        order_id = row["order_id"]
        if self.answered(order_id, at) is None:
            self._answers[order_id] = (at, told)
            self._answers.move_to_end(order_id)
        self.scored[order_id] = (at, row)

    def forget(self, there: set[str], complete: datetime | None, now: datetime) -> list[str]:
        """Leave out what the lakehouse has, what was never placed, and answers whose window is over.

        there: orders that it has; complete: when its orders were last added to. Gives the orders left out."""
        never = complete - SETTLE if complete else None
        gone = [
            order_id
            for order_id, (at, _) in self.scored.items()
            if order_id in there or (never is not None and at < never and now - at > self.same_answer)
        ]
        for order_id in gone:
            del self.scored[order_id]
        while self._answers and now - next(iter(self._answers.values()))[0] > self.same_answer:
            self._answers.popitem(last=False)
        return gone


@dataclass
class ScoringState:
    """What orders are scored from: snapshots of the lakehouse, and what followed. Not for two threads at once.

    events  the account events of the line's snapshot
    online  the features of an order, with all that was scored and heard
    heard   how many of the line's later account events are in it
    """

    known: ReferenceData
    line: TopicFollower
    events: pl.DataFrame
    online: OnlineFeatures
    heard: int = 0

    @functools.cached_property
    def snapshots(self) -> dict[str, int]:
        """What it was read from."""
        return {**self.line.base.snapshots, **self.known.snapshots}

    def catch_up(self) -> None:
        """Take in the account events that the line has read since."""
        events = self.line.stock.account_events
        while self.heard < len(events):
            event = events[self.heard]
            take = self.online.forget_event if event.gone else self.online.observe_event
            take(event.account, event.device, event.kind, event.at)
            self.heard += 1


class Fraud:
    """The answers about fraud.

    One order is scored at a time: each sees all that were scored before it.
    """

    def __init__(
        self,
        serving: ServeSettings,
        context: BusinessSettings,
        snapshots: TableCache,
        inventory: Inventory,
        watch: ModelWatch,
        gate: Gate,
        log: Any = None,
    ) -> None:
        self.serving, self.context, self.snapshots = serving, context, snapshots
        self.inventory, self.watch, self.gate = inventory, watch, gate
        self.recent = RecentScores(timedelta(seconds=serving.same_answer_seconds))
        self.log: ScoreLog | None = log
        self.memory: ScoringState | None = None
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def refresh(self, line: TopicFollower | None = None) -> None:
        """Take over what the lakehouse says of orders, when that changed. line: a newer one, which is about to answer.

        The new memory is made beside the old one, which goes on scoring."""
        with self._reading:
            memory, now = self.memory, datetime.now(UTC)
            same = memory is not None and memory.known.snapshots == snapshots_of(self.snapshots)
            if memory is not None and same and line is None and memory.online.delay == self._delay // MICROSECOND:
                with self._lock:
                    for order_id in self.recent.forget(set(), memory.known.at, now):
                        memory.online.forget(order_id)
                return
            known = memory.known if memory is not None and same else read_reference_data(self.snapshots, self.context)
            if line is not None:
                events = account_events(line.base.events.read(EVENT_READS))
            elif memory is not None:
                line, events = memory.line, memory.events
            else:
                return
            self._remember(known, line, events)

    @property
    def _delay(self) -> timedelta:
        """The label delay that the champion's features assume."""
        champion = self.watch.current.champion
        return champion.loaded.label_delay if champion is not None else LABEL_DELAY

    def _remember(self, known: ReferenceData, line: TopicFollower, events: pl.DataFrame) -> None:
        with self._lock:
            if (anonymiser := line.anonymiser) is not None:
                scores = self.recent.scored
                scores.update({order_id: (at, anonymiser.order(row)) for order_id, (at, row) in scores.items()})
            scored = dict(self.recent.scored)
        ids = known.entities["order_id"]
        there = set(ids.filter(ids.is_in(list(scored))))
        rows = pl.DataFrame([row for order_id, (_, row) in scored.items() if order_id not in there], schema=ORDER_COLUMNS)
        history = OrderHistory(
            pl.concat([known.entities.select(list(ORDER_COLUMNS)), rows]), events, known.categories, self._delay
        )
        memory = ScoringState(known, line, events, OnlineFeatures(history))
        memory.catch_up()
        with self._lock:
            for order_id in self.recent.forget(there, known.at, datetime.now(UTC)):
                if order_id not in there:
                    memory.online.forget(order_id)
            for order_id, one in self.recent.scored.items():
                if scored.get(order_id) is not one:  # while the memory was made
                    memory.online.observe(Described.of(one[1]).order)
            self.memory = memory

    def heard(self, score: Score) -> None:
        """Another replica, or this one in an earlier life, scored an order."""
        row = {
            **score.entity,
            **{name: datetime.fromisoformat(score.entity[name]) for name in MOMENTS if score.entity[name] is not None},
        }
        told = msgspec.convert(score.answer, FraudScore)
        described = Described.of(row)
        with self._lock:
            self.recent.add(row, score.scored_at, told)
            if self.memory is not None:
                self.memory.online.observe(described.order)

    def answers(self) -> list[tuple[datetime, FraudScore]]:
        """All that was told within the window, by this replica or another, and when; oldest first."""
        with self._lock:
            return self.recent.answers(datetime.now(UTC))

    async def score(self, asked: ApiRequest) -> Response:
        """POST /v1/fraud/score"""
        # sooner done than handed to another thread; where it would have to wait, or asks XGBoost, another thread does
        if self.watch.current.fast and self._lock.acquire(blocking=False):
            try:
                return answer(unpanicked(self._scored, [asked.body], [""])[0])
            finally:
                self._lock.release()
        return answer((await self.gate.run(self.scored, [asked.body], [""]))[0])

    async def score_batch(self, asked: ApiRequest) -> Response:
        """POST /v1/fraud/score:batch"""
        places = [f"orders[{number}]." for number in range(len(asked.body.orders))]
        return answer(FraudScores(await self.gate.run(self.scored, asked.body.orders, places)))

    def scored(self, orders: Sequence[Order], places: Sequence[str]) -> list[FraudScore]:
        """Score orders, in the order given. places: what fields are told under. Raises Problem."""
        with self._lock:
            return self._scored(orders, places)

    def _scored(self, orders: Sequence[Order], places: Sequence[str]) -> list[FraudScore]:
        models, memory = self.watch.current, self.memory
        if models.champion is None:
            if self.watch.error is not None:
                raise busy(503, "No model could be loaded from the registry; the log says why.", 10)
            raise busy(503, "No model serves yet. Train one: python -m app train.", 10)
        if memory is None:
            raise busy(503, "The state is being read.", 2)
        now = datetime.now(UTC)
        told: dict[str, FraudScore] = {}
        rows: dict[str, Row] = {}
        for order, place in zip(orders, places, strict=True):
            if (found := self.recent.answered(order.order_id, now)) is not None:
                told[order.order_id] = found
            elif order.order_id not in rows:  # an order that is there twice is the same order
                rows[order.order_id] = row_of(order, memory.known, self.context, now, place)
        memory.catch_up()
        # each sees those before it, however they are sent
        for row in sorted(rows.values(), key=lambda row: (row["placed_at"], row["order_id"])):
            told[row["order_id"]] = self._score(row, models, models.champion, memory, now)
        return [told[order.order_id] for order in orders]

    def _score(self, row: Row, models: Models, champion: Scorer, memory: ScoringState, now: datetime) -> FraudScore:
        described = Described.of(row)
        before = memory.online.observe(described.order)
        try:
            values = memory.online.features(described)
            if self.serving.reasons:
                score, added = champion.explain(values)
                reasons = self._reasons(champion, values, added)
            else:
                score, reasons = champion.score(values), []
        except Exception as error:
            memory.online.forget(described.order.order_id)
            if before is not None:
                memory.online.observe(before)
            if not isinstance(error, TrainingError):
                raise
            logger.error("the champion cannot score: %s", error)
            raise busy(503, "The model does not fit the features; the log says more.", 10) from None
        decision = self.decision(score, champion.threshold)
        fresh = self.inventory.state.freshness(memory.line)
        answered = FraudScore(
            described.order.order_id,
            score,
            decision,
            champion.threshold,
            reasons,
            ModelName(self.watch.registry.name, champion.number, CHAMPION),
            AsOf(memory.snapshots, {name: offset - 1 for name, offset in fresh.offsets.items()}),
            fresh.staleness_ms,
        )
        _decided(CHAMPION, champion.number, decision).inc()
        self.recent.add(row, now, answered)
        shadow = self._shadow(models, values)
        if self.log is not None:
            self.log.write(Score(answered.order_id, now, row, champion.seen(values), answered, shadow))
        return answered

    def _shadow(self, models: Models, values: Sequence[Value]) -> dict[str, Any] | None:
        """What the challenger says; its troubles are nobody's but its own."""
        challenger = models.challenger
        if challenger is None:
            return None
        try:
            score = challenger.score(values)
        except Exception:
            logger.exception("the challenger cannot score")
            return None
        decision = self.decision(score, challenger.threshold)
        _decided("challenger", challenger.number, decision).inc()
        return {"version": challenger.number, "score": score, "decision": decision}

    def decision(self, score: float, threshold: float) -> Decision:
        """Review from the threshold on, decline from `review_share` of the way between it and 1 on."""
        if score < threshold:
            return "approve"
        share = self.serving.review_share
        return "decline" if share < 1 and score >= threshold + (1 - threshold) * share else "review"

    def _reasons(self, champion: Scorer, values: Sequence[Value], added: npt.NDArray[np.floating]) -> list[Reason]:
        found = []
        for at in np.argsort(-added)[: self.serving.reasons].tolist():
            contribution = float(added[at])
            if contribution <= 0:
                break
            feature = FEATURES[champion.places[at]]
            value = values[champion.places[at]]
            known = None if value != value else value  # NaN
            found.append(Reason(feature.name, known, contribution, feature.reason(known)))
        return found

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What can be asked."""
        order = Order(
            "184467",
            "USD",
            "249.90",
            [Line("P0001", 1, "249.90")],
            user_id=42,
            payment_method="card",
            card_fingerprint="c-77",
            ip_address="203.0.113.7",
            device_id="d-9",
            shipping_address="Jalan Ahmad Yani 87, Makassar",
        )
        told = FraudScore(
            "184467",
            0.8312,
            "review",
            0.71,
            [Reason("card_customers_ever", 4.0, 1.21, "4 customers seen with the card")],
            ModelName("fraud", 3, CHAMPION),
            AsOf({"gold.inventory_health": 4051}, {"events:0": 1041}),
            130,
        )
        return (
            Endpoint(
                "POST",
                "/v1/fraud/score",
                "score",
                "How likely an order is fraudulent, what to do, and why. The same order again: the same answer.",
                self.score,
                FraudScore,
                "score",
                body=Order,
                limit=self.serving.body_bytes,
                body_example=order,
                answer_example=told,
                statuses=(409, 429, 503),
            ),
            Endpoint(
                "POST",
                "/v1/fraud/score:batch",
                "score_batch",
                f"Up to {MOST} orders at once.",
                self.score_batch,
                FraudScores,
                "score",
                body=Batch,
                limit=self.serving.batch_body_bytes,
                body_example=Batch([order]),
                answer_example=FraudScores([told]),
                statuses=(409, 429, 503),
            ),
        )


@functools.lru_cache(maxsize=64)
def _decided(role: str, version: int, decision: str) -> Counter:
    return DECISIONS.labels(role, str(version), decision)
