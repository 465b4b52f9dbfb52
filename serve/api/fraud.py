"""Fraud scores over HTTP: an order's features as in training, the champion's score, and the reasons for it."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
from msgspec import Meta
from prometheus_client import Counter
from starlette.responses import Response

from ml.features.declarations import LABEL_DELAY, ORDER_COLUMNS, OrderHistory
from ml.features.groups import FEATURES
from ml.features.online.arithmetic import Value
from ml.features.online.online_features import OnlineFeatures
from ml.features.online.orders import FeatureRequest
from ml.features.windows import MICROSECOND
from ml.registry import CHALLENGER, CHAMPION
from ml.tables.order_features import EVENT_READS, account_events
from ml.training.settings import TrainingError
from pipelines.settings import BusinessSettings
from serve.http.bounded_pool import BoundedThreadPool, call_catching_panic
from serve.http.endpoints import ApiRequest, Endpoint, json_response
from serve.http.metrics import DECISIONS
from serve.http.problems import bad_field, retry_later
from serve.settings import ServeSettings
from serve.state.models import ModelWatcher, Scorer, ServedModels
from serve.state.online_state import OnlineState
from serve.state.orders import Line, Order, order_row
from serve.state.reference_data import ReferenceData, current_snapshots, read_reference_data
from serve.state.score_topic import Score, ScoreTopic
from serve.state.scoring_state import RecentScores, Row, ScoringState
from serve.state.table_cache import TableCache
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")

T = TypeVar("T")

MAX_BATCH = 1_000
CHUNK = 20
"""Orders of a batch that are scored before other requests get their turn: about 10 ms."""
ORDER_ENCODER = msgspec.json.Encoder()
OTHER_CONTENT = "was scored with other content; repeat the request as it was, or give the changed order another id"
DATETIME_COLUMNS = tuple(name for name, kind in ORDER_COLUMNS.items() if isinstance(kind, pl.Datetime))
Decision = Literal["approve", "review", "decline"]


class Reason(msgspec.Struct, frozen=True):
    """A risk factor of the order."""

    feature: str
    value: float | str | None
    contribution: Annotated[
        float, Meta(description="Contribution to the log-odds of fraud, from the splits on the order's path (Saabas).")
    ]
    text: str


class ModelName(msgspec.Struct, frozen=True):
    """The model that scored the order."""

    name: str
    version: int
    alias: str


class AsOf(msgspec.Struct, frozen=True):
    """The data behind the score."""

    snapshots: dict[str, int]
    offsets: Annotated[dict[str, int], Meta(description="Last offset in the score by 'topic:partition'.")]


class FraudScore(msgspec.Struct, frozen=True):
    """A scored order."""

    order_id: str
    score: Annotated[float, Meta(ge=0, le=1, description="Probability of fraud.")]
    decision: Decision
    threshold: Annotated[float, Meta(description="Score from which an order is reviewed.")]
    reasons: Annotated[list[Reason], Meta(description="Strongest first.")]
    model: ModelName
    as_of: AsOf
    staleness_ms: int


class FraudScores(msgspec.Struct, frozen=True):
    """Scored orders, in the order of the request."""

    scores: list[FraudScore]


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Orders to score."""

    orders: Annotated[list[Order], Meta(min_length=1, max_length=MAX_BATCH)]


EXAMPLE_ORDER = Order(
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
EXAMPLE_SCORE = FraudScore(
    order_id="184467",
    score=0.8312,
    decision="review",
    threshold=0.71,
    reasons=[Reason("card_customers_ever", 4.0, 1.21, "4 customers seen with the card")],
    model=ModelName("fraud", 3, CHAMPION),
    as_of=AsOf({"gold.inventory_health": 4051}, {"events:0": 1041}),
    staleness_ms=130,
)


class RequestRow(NamedTuple):
    """An order in the form of the features, and the digest of its request."""

    row: Row
    digest: str


def request_digest(order: Order) -> str:
    """Return the digest of an order's content, which tells a repeated request from another one with the same order_id."""
    return hashlib.blake2b(ORDER_ENCODER.encode(order), digest_size=16).hexdigest()


class Fraud:
    """The fraud endpoints. Orders are scored one at a time, so that each sees all orders scored before it."""

    def __init__(
        self,
        *,
        serving: ServeSettings,
        context: BusinessSettings,
        tables: TableCache,
        state: OnlineState,
        models: ModelWatcher,
        pool: BoundedThreadPool,
        topic: ScoreTopic | None = None,
    ) -> None:
        """topic: where scores are written to; None: nowhere."""
        self.serving, self.context, self.tables = serving, context, tables
        self.state, self.models, self.pool = state, models, pool
        self.topic = topic
        self.recent: RecentScores[FraudScore] = RecentScores(timedelta(seconds=serving.same_answer_seconds))
        self.scoring: ScoringState | None = None
        self._lock = threading.Lock()
        self._refresh_lock = threading.Lock()

    def refresh(self, follower: TopicFollower | None = None) -> None:
        """Rebuild the scoring state if the lakehouse has changed. follower: one that is about to answer.

        The previous state keeps scoring while the new one is built."""
        with self._refresh_lock:
            scoring, now = self.scoring, datetime.now(UTC)
            unchanged = scoring is not None and scoring.reference.snapshots == current_snapshots(self.tables)
            same_delay = scoring is not None and scoring.online.delay == self._label_delay // MICROSECOND
            if scoring is not None and unchanged and follower is None and same_delay:
                with self._lock:
                    for order_id in self.recent.remove_settled(set(), scoring.reference.committed_at, now):
                        scoring.online.forget(order_id)
                return
            reference = scoring.reference if scoring is not None and unchanged else read_reference_data(self.tables, self.context)
            if follower is not None:
                events = account_events(follower.snapshot.events.read(EVENT_READS))
            elif scoring is not None:
                follower, events = scoring.follower, scoring.events
            else:
                return
            self._rebuild(reference, follower, events)

    @property
    def _label_delay(self) -> timedelta:
        """The label delay that the champion's features assume."""
        champion = self.models.current.champion
        return champion.loaded.label_delay if champion is not None else LABEL_DELAY

    def _rebuild(self, reference: ReferenceData, follower: TopicFollower, events: pl.DataFrame) -> None:
        """Build a scoring state with all recent orders and replace the current one."""
        with self._lock:
            if (anonymiser := follower.anonymiser) is not None:
                scored = self.recent.scored
                scored.update({order_id: (at, anonymiser.scored_order(row)) for order_id, (at, row) in scored.items()})
            included = dict(self.recent.scored)
        ids = reference.entities["order_id"]
        in_lakehouse = set(ids.filter(ids.is_in(list(included))))
        rows = pl.DataFrame(
            [row for order_id, (_, row) in included.items() if order_id not in in_lakehouse], schema=ORDER_COLUMNS
        )
        orders = pl.concat([reference.entities.select(list(ORDER_COLUMNS)), rows])
        history = OrderHistory(orders, events, reference.categories, self._label_delay)
        scoring = ScoringState(reference, follower, events, OnlineFeatures(history))
        scoring.catch_up()
        with self._lock:
            for order_id in self.recent.remove_settled(in_lakehouse, reference.committed_at, datetime.now(UTC)):
                if order_id not in in_lakehouse:
                    scoring.online.forget(order_id)
            for order_id, entry in self.recent.scored.items():
                if included.get(order_id) is not entry:  # scored while the state was being built
                    scoring.online.observe(FeatureRequest.of(entry[1]).order)
            self.scoring = scoring

    def add_score(self, score: Score) -> None:
        """Add an order scored by another replica, or by this one before a restart."""
        row = {
            **score.entity,
            **{name: datetime.fromisoformat(score.entity[name]) for name in DATETIME_COLUMNS if score.entity[name] is not None},
        }
        answer = msgspec.convert(score.answer, FraudScore)
        features = FeatureRequest.of(row)
        with self._lock:
            self.recent.add(row, score.scored_at, answer, score.digest)
            if self.scoring is not None:
                self.scoring.online.observe(features.order)

    def answers(self) -> list[tuple[datetime, FraudScore]]:
        """Return all answers of any replica within the window with their times, oldest first."""
        with self._lock:
            return self.recent.answers(datetime.now(UTC))

    async def score(self, request: ApiRequest) -> Response:
        """Answer POST /v1/fraud/score."""
        # scoring takes less time than a change of threads, unless it waits for the lock or for XGBoost
        if self.models.current.fast and self._lock.acquire(blocking=False):
            try:
                return json_response(call_catching_panic(self._score_orders, [request.body], [""])[0])
            finally:
                self._lock.release()
        return json_response((await self.pool.run(self.score_orders, [request.body], [""]))[0])

    async def score_batch(self, request: ApiRequest) -> Response:
        """Answer POST /v1/fraud/score:batch. Other orders are scored between the chunks of a batch."""
        orders = request.body.orders
        locations = [f"orders[{number}]." for number in range(len(orders))]
        answers, rows = await self.pool.run(self._with_lock, self._prepare, orders, locations)
        for start in range(0, len(rows), CHUNK):
            answers |= await self.pool.run(self._with_lock, self._score_rows, rows[start : start + CHUNK])
        return json_response(FraudScores([answers[order.order_id] for order in orders]))

    def score_orders(self, orders: Sequence[Order], locations: Sequence[str]) -> list[FraudScore]:
        """Return the scores of the orders. locations: prefix of field names in problems, by order. Raises Problem."""
        return self._with_lock(self._score_orders, orders, locations)

    def _with_lock(self, function: Callable[..., T], *arguments: Any) -> T:
        with self._lock:
            return function(*arguments)

    def _score_orders(self, orders: Sequence[Order], locations: Sequence[str]) -> list[FraudScore]:
        answers, rows = self._prepare(orders, locations)
        answers |= self._score_rows(rows)
        return [answers[order.order_id] for order in orders]

    def _prepare(self, orders: Sequence[Order], locations: Sequence[str]) -> tuple[dict[str, FraudScore], list[RequestRow]]:
        """Return the answers that are repeated, and the rows to score. Each order sees those placed before it, in whatever order
        they are sent. Raises Problem."""
        _, scoring = self._ready()
        now = datetime.now(UTC)
        answers: dict[str, FraudScore] = {}
        rows: dict[str, RequestRow] = {}
        for order, location in zip(orders, locations, strict=True):
            digest = request_digest(order)
            answer, known = self.recent.answer_of(order.order_id, now), rows.get(order.order_id)
            if (answer is not None and self.recent.differs(order.order_id, digest)) or (known and known.digest != digest):
                raise bad_field(f"{location}order_id", OTHER_CONTENT, 409)
            if answer is not None:
                answers[order.order_id] = answer
            elif known is None:
                row = order_row(order, scoring.reference, self.context, now, location)
                rows[order.order_id] = RequestRow(row, digest)
        self._check_space(len(rows), now)
        return answers, sorted(rows.values(), key=lambda one: (one.row["placed_at"], one.row["order_id"]))

    def _check_space(self, added: int, now: datetime) -> None:
        """Raise Problem 429 when more orders would be remembered than the settings allow."""
        if len(self.recent) + added > self.serving.remembered_scores:
            self.recent.remove_expired_answers(now)
        if len(self.recent) + added > self.serving.remembered_scores:
            raise retry_later(429, "As many orders as this server can remember were scored lately. Try again later.", 10)

    def _ready(self) -> tuple[Scorer, ScoringState]:
        """Return the champion and the scoring state. Raises Problem 503."""
        models, scoring = self.models.current, self.scoring
        if models.champion is None:
            if self.models.error is not None:
                raise retry_later(503, "No model could be loaded from the registry. The server's log has the reason.", 10)
            raise retry_later(503, "There is no champion model yet. Train one: python -m app train.", 10)
        if scoring is None:
            raise retry_later(503, "The online state is being loaded.", 2)
        return models.champion, scoring

    def _score_rows(self, rows: Sequence[RequestRow]) -> dict[str, FraudScore]:
        """Return the answers to requests by order_id; one that was answered meanwhile gets that answer. Raises Problem."""
        champion, scoring = self._ready()
        now = datetime.now(UTC)
        scoring.catch_up()
        answers: dict[str, FraudScore] = {}
        for request in rows:
            order_id = request.row["order_id"]
            answers[order_id] = self.recent.answer_of(order_id, now) or self._score(request, champion, scoring, now)
        return answers

    def _score(self, request: RequestRow, champion: Scorer, scoring: ScoringState, now: datetime) -> FraudScore:
        row, models = request.row, self.models.current
        order_id = row["order_id"]
        values, score, reasons = self._evaluate(row, champion, scoring)
        decision = self.decision(score, champion.threshold)
        fresh = self.state.freshness(scoring.follower)
        answer = FraudScore(
            order_id=order_id,
            score=score,
            decision=decision,
            threshold=champion.threshold,
            reasons=reasons,
            model=ModelName(self.models.registry.name, champion.number, CHAMPION),
            as_of=AsOf(scoring.snapshots, {name: offset - 1 for name, offset in fresh.offsets.items()}),
            staleness_ms=fresh.staleness_ms,
        )
        _decision_counter(CHAMPION, champion.number, decision).inc()
        self.recent.add(row, now, answer, request.digest)
        challenger = self._challenger_score(models, values)
        if self.topic is not None:
            features = champion.model_features(values)
            self.topic.write(
                Score(
                    order_id=order_id,
                    scored_at=now,
                    entity=row,
                    features=features,
                    answer=answer,
                    challenger=challenger,
                    digest=request.digest,
                )
            )
        return answer

    def _evaluate(self, row: Row, champion: Scorer, scoring: ScoringState) -> tuple[Sequence[Value], float, list[Reason]]:
        """Add the order to the online features; return its features, score and reasons. Undone on an error. Raises Problem."""
        request = FeatureRequest.of(row)
        before = scoring.online.observe(request.order)
        try:
            values = scoring.online.features(request)
            if not self.serving.reasons:
                return values, champion.score(values), []
            score, contributions = champion.explain(values)
            return values, score, self._reasons(champion, values, contributions)
        except Exception as error:
            scoring.online.forget(request.order.order_id)
            if before is not None:
                scoring.online.observe(before)
            if not isinstance(error, TrainingError):
                raise
            logger.error("The champion cannot score: %s", error)
            raise retry_later(503, "The champion does not fit the features. The server's log has the reason.", 10) from None

    def _challenger_score(self, models: ServedModels, values: Sequence[Value]) -> dict[str, Any] | None:
        """Return the challenger's score in shadow mode; its errors are only logged."""
        challenger = models.challenger
        if challenger is None:
            return None
        try:
            score = challenger.score(values)
        except Exception:
            logger.exception("The challenger cannot score")
            return None
        decision = self.decision(score, challenger.threshold)
        _decision_counter(CHALLENGER, challenger.number, decision).inc()
        return {"version": challenger.number, "score": score, "decision": decision}

    def decision(self, score: float, threshold: float) -> Decision:
        """Return 'review' from the threshold, and 'decline' from `review_share` of the range between it and 1."""
        if score < threshold:
            return "approve"
        share = self.serving.review_share
        return "decline" if share < 1 and score >= threshold + (1 - threshold) * share else "review"

    def _reasons(self, champion: Scorer, values: Sequence[Value], contributions: npt.NDArray[np.floating]) -> list[Reason]:
        reasons = []
        for at in np.argsort(-contributions)[: self.serving.reasons].tolist():
            contribution = float(contributions[at])
            if contribution <= 0:
                break
            feature = FEATURES[champion.indices[at]]
            value = values[champion.indices[at]]
            known = None if value != value else value  # NaN
            reasons.append(Reason(feature.name, known, contribution, feature.reason(known)))
        return reasons

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The fraud endpoints."""
        return (
            Endpoint(
                method="POST",
                path="/v1/fraud/score",
                name="score",
                doc="Probability of fraud of an order, a decision, and reasons. A repeated order gets the same answer.",
                handler=self.score,
                answer=FraudScore,
                scope="score",
                body=Order,
                body_limit=self.serving.body_bytes,
                body_example=EXAMPLE_ORDER,
                answer_example=EXAMPLE_SCORE,
                statuses=(409, 429, 503),
            ),
            Endpoint(
                method="POST",
                path="/v1/fraud/score:batch",
                name="score_batch",
                doc=f"Scores of up to {MAX_BATCH} orders.",
                handler=self.score_batch,
                answer=FraudScores,
                scope="score",
                body=Batch,
                body_limit=self.serving.batch_body_bytes,
                body_example=Batch([EXAMPLE_ORDER]),
                answer_example=FraudScores([EXAMPLE_SCORE]),
                statuses=(409, 429, 503),
            ),
        )


@functools.lru_cache(maxsize=64)
def _decision_counter(role: str, version: int, decision: str) -> Counter:
    return DECISIONS.labels(role, str(version), decision)
