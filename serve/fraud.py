"""Fraud scores over HTTP: an order's features as training computes them, the champion's score, and why."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import polars as pl
from msgspec import Meta
from starlette.responses import Response

from lakehouse.step import Context
from ml.features import FEATURES, ORDER_COLUMNS, History, compute
from ml.order_features import EVENT_READS, account_events
from ml.registry import CHAMPION, Loaded
from ml.training import TrainingError
from serve.edges import DECISIONS, Asked, Endpoint, Gate, answer
from serve.inventory import Inventory
from serve.line import Line
from serve.models import Models, ModelWatch
from serve.orders import Known, Order, entities_of, neighbours, read_known, snapshots_of
from serve.orders import Line as OrderLine
from serve.problems import busy
from serve.scores import Score, ScoreLog
from serve.settings import ServeSettings
from serve.snapshots import Snapshots
from serve.stock import CHUNKS

logger = logging.getLogger("shopsphere.serve")

MOST = 1_000
"""Orders of a batch."""
SETTLE = timedelta(minutes=10)
"""How long an order may take from the checkout to the lakehouse beyond the lakehouse's own commit."""
DECLARED = {feature.name: feature for feature in FEATURES}
Decision = Literal["approve", "review", "decline"]


class Reason(msgspec.Struct, frozen=True):
    """What speaks for fraud."""

    feature: str
    value: float | str | None
    contribution: Annotated[float, Meta(description="What it adds to the log-odds of fraud (TreeSHAP).")]
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


class Recent:
    """Orders scored that the lakehouse may not have yet, and what was answered. Not for two threads at once.

    An order counts until the lakehouse has it; or until the lakehouse has read the orders of its time and it is not
    among them: it was never placed.
    """

    def __init__(self, same_answer: timedelta) -> None:
        self.same_answer = same_answer
        self._answers: OrderedDict[str, tuple[datetime, FraudScore]] = OrderedDict()
        self._scored: dict[str, datetime] = {}
        self._rows = pl.DataFrame(schema=ORDER_COLUMNS)
        self._fresh: list[pl.DataFrame] = []

    def answered(self, order_id: str, now: datetime) -> FraudScore | None:
        """What this order was told within the window."""
        found = self._answers.get(order_id)
        return found[1] if found is not None and now - found[0] <= self.same_answer else None

    def answers(self, now: datetime) -> list[tuple[datetime, FraudScore]]:
        """All that was told within the window, and when; oldest first."""
        return [found for found in self._answers.values() if now - found[0] <= self.same_answer]

    def add(self, order_id: str, at: datetime, entity: pl.DataFrame, told: FraudScore) -> None:
        """An order was scored, here or by another replica; the first answer stands."""
        if self.answered(order_id, at) is None:
            self._answers[order_id] = (at, told)
            self._answers.move_to_end(order_id)
        if order_id in self._scored:  # scored again after its window: the newer one counts
            self._rows = self.rows().filter(pl.col("order_id") != order_id)
        self._scored[order_id] = at
        self._fresh.append(entity)

    def rows(self) -> pl.DataFrame:
        """The orders (ORDER_COLUMNS)."""
        if self._fresh:
            self._rows = pl.concat([self._rows, *self._fresh], rechunk=self._rows.n_chunks() >= CHUNKS)
            self._fresh = []
        return self._rows

    def forget(self, known: Known, now: datetime) -> None:
        """Leave out what the lakehouse has, what was never placed, and answers whose window is over."""
        there = set(known.entities["order_id"].filter(known.entities["order_id"].is_in(list(self._scored))))
        never = known.at - SETTLE if known.at else None
        for order_id, at in list(self._scored.items()):
            if order_id in there or (never is not None and at < never and now - at > self.same_answer):
                del self._scored[order_id]
        if len(self._scored) < self.rows().height:
            self._rows = self.rows().filter(pl.col("order_id").is_in(list(self._scored)))
        while self._answers and now - next(iter(self._answers.values()))[0] > self.same_answer:
            self._answers.popitem(last=False)


class Fraud:
    """The answers about fraud.

    One order is scored at a time: each sees all that were scored before it.
    """

    def __init__(
        self,
        serving: ServeSettings,
        context: Context,
        snapshots: Snapshots,
        inventory: Inventory,
        watch: ModelWatch,
        gate: Gate,
        log: Any = None,
    ) -> None:
        self.serving, self.context, self.snapshots = serving, context, snapshots
        self.inventory, self.watch, self.gate = inventory, watch, gate
        self.recent = Recent(timedelta(seconds=serving.same_answer_seconds))
        self.log: ScoreLog | None = log
        self.known: Known | None = None
        self._events: tuple[Line, pl.DataFrame] | None = None
        self._lock = threading.Lock()

    def on_line(self, line: Line) -> None:
        """A newer snapshot is about to answer: its account events, those after it follow from the line."""
        self._events = (line, account_events(line.base.events.read(EVENT_READS)))

    def refresh(self) -> None:
        """Take over what the lakehouse says of orders, when that changed."""
        known = self.known
        if known is None or known.snapshots != snapshots_of(self.snapshots):
            known = read_known(self.snapshots, self.context)
        with self._lock:
            self.recent.forget(known, datetime.now(UTC))
            self.known = known

    def heard(self, score: Score) -> None:
        """Another replica, or this one in an earlier life, scored an order."""
        entity = entity_frame([score.entity])
        told = msgspec.convert(score.answer, FraudScore)
        with self._lock:
            self.recent.add(score.order_id, score.scored_at, entity, told)

    def answers(self) -> list[tuple[datetime, FraudScore]]:
        """All that was told within the window, by this replica or another, and when; oldest first."""
        with self._lock:
            return self.recent.answers(datetime.now(UTC))

    async def score(self, asked: Asked) -> Response:
        """POST /v1/fraud/score"""
        return answer((await self.gate.run(self.scored, [asked.body]))[0])

    async def score_batch(self, asked: Asked) -> Response:
        """POST /v1/fraud/score:batch"""
        return answer(FraudScores(await self.gate.run(self.scored, asked.body.orders)))

    def scored(self, orders: Sequence[Order]) -> list[FraudScore]:
        """Score orders, in the order given. Raises Problem."""
        models = self.watch.current
        if models.champion is None:
            if self.watch.error is not None:
                raise busy(503, "No model could be loaded from the registry; the log says why.", 10)
            raise busy(503, "No model serves yet. Train one: python -m app train.", 10)
        with self._lock:
            known = self.known
            if known is None or self._events is None:
                raise busy(503, "The state is being read.", 2)
            now = datetime.now(UTC)
            told = {order.order_id: found for order in orders if (found := self.recent.answered(order.order_id, now))}
            # an order that is there twice is the same order
            fresh = list({order.order_id: order for order in reversed(orders) if order.order_id not in told}.values())[::-1]
            if fresh:
                for score, entity in self._scored(fresh, models, models.champion, known, now):
                    told[score.order_id] = msgspec.convert(score.answer, FraudScore)
                    self.recent.add(score.order_id, now, entity, told[score.order_id])
                    if self.log is not None:
                        self.log.write(score)
        return [told[order.order_id] for order in orders]

    def _scored(
        self, orders: Sequence[Order], models: Models, champion: Loaded, known: Known, now: datetime
    ) -> list[tuple[Score, pl.DataFrame]]:
        assert self._events is not None
        line, events = self._events
        entities = entities_of(orders, known, self.context, now)
        recent = self.recent.rows()
        later = account_events(line.stock.later.select(EVENT_READS))
        accounts, devices = (entities[name].drop_nulls().unique().implode() for name in ("account", "device"))
        concerned = pl.col("account").is_in(accounts) | pl.col("device").is_in(devices)
        history = History(
            pl.concat([neighbours(known.entities, entities), neighbours(recent, entities)]),
            pl.concat([events.filter(concerned), later.filter(concerned)]),
            known.categories,
        )
        features = compute(entities, history)
        try:
            scores = champion.model.score(features)
            reasons = champion.model.contributions(features) if self.serving.reasons else None
        except TrainingError as error:
            logger.error("the champion cannot score: %s", error)
            raise busy(503, "The model does not fit the features; the log says more.", 10) from None
        shadow = self._shadow(models, features)
        basis = self.inventory.basis(line)
        as_of = AsOf({**basis["snapshots"], **known.snapshots}, basis["source_offset"])
        model = ModelName(self.watch.registry.name, champion.version.number, CHAMPION)
        found = []
        for number, (row, entity) in enumerate(zip(features.to_dicts(), entities.to_dicts(), strict=True)):
            score = float(scores[number])
            decision = self.decision(score, champion.threshold)
            answered = FraudScore(
                entity["order_id"],
                score,
                decision,
                champion.threshold,
                self._reasons(champion, row, reasons[number]) if reasons is not None else [],
                model,
                as_of,
                basis["staleness_ms"],
            )
            DECISIONS.labels(CHAMPION, str(model.version), decision).inc()
            if shadow is not None:
                second = float(shadow[1][number])
                other = {"version": shadow[0], "score": second, "decision": self.decision(second, shadow[2])}
                DECISIONS.labels("challenger", str(shadow[0]), other["decision"]).inc()
            else:
                other = None
            kept = {name: row[name] for name in champion.model.features}
            found.append((Score(entity["order_id"], now, entity, kept, msgspec.to_builtins(answered), other), entities[number]))
        return found

    def _shadow(self, models: Models, features: pl.DataFrame) -> tuple[int, np.ndarray, float] | None:
        """What the challenger says; its troubles are nobody's but its own."""
        challenger = models.challenger
        if challenger is None:
            return None
        try:
            return challenger.version.number, challenger.model.score(features), challenger.threshold
        except Exception:
            logger.exception("the challenger cannot score")
            return None

    def decision(self, score: float, threshold: float) -> Decision:
        """Review from the threshold on, decline from `review_share` of the way between it and 1 on."""
        if score < threshold:
            return "approve"
        share = self.serving.review_share
        return "decline" if share < 1 and score >= threshold + (1 - threshold) * share else "review"

    def _reasons(self, champion: Loaded, row: Mapping[str, Any], contributions: np.ndarray) -> list[Reason]:
        weights = contributions[:-1]  # the last one is the model's own level
        strongest = np.argsort(-weights)[: self.serving.reasons]
        found = []
        for at in strongest:
            if weights[at] <= 0:
                break
            name = champion.model.features[at]
            found.append(Reason(name, row[name], float(weights[at]), DECLARED[name].reason(row[name])))
        return found

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What can be asked."""
        order = Order(
            "184467",
            "USD",
            "249.90",
            [OrderLine("P0001", 1, "249.90")],
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


def entity_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Entities as JSON tells them -> ORDER_COLUMNS."""
    columns: dict[str, pl.Series] = {}
    for name, kind in ORDER_COLUMNS.items():
        values = [row[name] for row in rows]
        if isinstance(kind, pl.Datetime):
            values = [datetime.fromisoformat(value) if isinstance(value, str) else value for value in values]
        columns[name] = pl.Series(name, values, dtype=kind)
    return pl.DataFrame(columns)
