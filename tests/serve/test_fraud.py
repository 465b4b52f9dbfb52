"""Fraud scores over HTTP on a lakehouse filled by `run`, a real broker and a real registry."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from support.scoring_desk import TOPIC, Desk, order_body, replica, running, train_model
from support.waiting import wait_for

from app import sandbox
from app.project import PROJECT
from ml.evaluation.served_scores import served_scores
from ml.features.compute import compute
from ml.features.declarations import LABEL_DELAY, ORDER_COLUMNS, OrderHistory
from ml.features.groups import FEATURES
from ml.features.windows import MICROSECOND
from ml.registry import Registry
from ml.tables.feature_tables import refresh
from ml.tables.order_features import EVENT_READS, ORDER_FEATURES, account_events
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings
from pipelines.silver.events_clean import EVENTS_CLEAN
from serve.api.fraud import CHUNK
from serve.state.score_topic import Score
from serve.state.scoring_state import RecentScores


@pytest.fixture(scope="module")
def desk(filled: Settings) -> Iterator[Desk]:
    application = replica(filled)
    with running(application) as client:
        desk = Desk(filled, application, client)
        write = application.scores.write

        def keep(score: Score) -> None:
            desk.written.append(score)
            write(score)

        application.scores.write = keep  # type: ignore[method-assign]
        check_without_model(desk)
        registry = Registry(home=filled.home)
        registry.promote(registry.record(train_model(filled, 1)).number)
        wait_for(lambda: application.models.current.champion is not None)
        yield desk


def check_without_model(desk: Desk) -> None:
    """Check the answer without a model, which is only possible before the first training."""
    response = desk.client.post("/v1/fraud/score", json=order_body())
    assert response.status_code == 503
    assert "python -m app train" in response.json()["detail"]
    assert response.headers["retry-after"]


def test_score_and_reasons_are_those_of_the_model(desk: Desk) -> None:
    answer = desk.score(order_id="first", user_id=3, total_amount="900.00", card_fingerprint="c-new", device_id="d-new")
    model = desk.application.models.current.champion
    assert model is not None
    seen = pl.DataFrame([desk.features("first")], schema={one.name: one.dtype for one in FEATURES})
    assert answer["score"] == pytest.approx(float(model.model.score(seen)[0]), abs=1e-6)
    assert answer["threshold"] == model.threshold
    assert answer["model"] == {"name": "fraud", "version": model.number, "alias": "champion"}
    contributions = [one["contribution"] for one in answer["reasons"]]
    assert contributions == sorted(contributions, reverse=True)
    assert min(contributions) > 0
    added = model.model.contributions_matrix(model.model.matrix(seen), approximate=True)[0]
    assert contributions == pytest.approx(sorted(added[:-1], reverse=True)[: len(contributions)], abs=1e-5)
    assert all(one["text"] and one["feature"] in seen.columns for one in answer["reasons"])
    assert answer["as_of"]["snapshots"].keys() >= {"silver.orders_unified", "gold.inventory_health"}
    assert answer["as_of"]["offsets"]


def test_repeated_order_gets_the_same_answer_and_counts_once(desk: Desk) -> None:
    fields = {"card_fingerprint": f"card{time.time_ns()}", "user_id": 5}
    first = desk.score(order_id="same", **fields)
    assert desk.score(order_id="same", **fields) == first
    changed = desk.client.post("/v1/fraud/score", json=order_body(order_id="same", **fields, total_amount="1.00"))
    assert (changed.status_code, changed.json()["errors"][0]["field"]) == (409, "order_id")
    assert "was scored with other content" in changed.json()["detail"]
    assert [one.order_id for one in desk.written].count("same") == 1
    desk.score(order_id="next", **fields)
    assert desk.features("next")["card_orders_1h"] == 1
    assert desk.features("next")["card_amount_1h"] == 120


def test_batch_scores_orders_in_time_order(desk: Desk) -> None:
    card = f"card{time.time_ns()}"
    moment = datetime(2026, 1, 20, 12, tzinfo=UTC)
    orders = [
        order_body(order_id=f"batch{n}", card_fingerprint=card, created_at=(moment + timedelta(minutes=n)).isoformat())
        for n in range(5)
    ]
    response = desk.client.post("/v1/fraud/score:batch", json={"orders": orders})
    assert [one["order_id"] for one in response.json()["scores"]] == [order["order_id"] for order in orders]
    assert [desk.features(f"batch{n}")["card_orders_1h"] for n in range(5)] == [0, 1, 2, 3, 4]


def test_identifiers_find_the_account(desk: Desk) -> None:
    scoring = desk.application.fraud.scoring
    assert scoring is not None
    nodes = scoring.reference.accounts_by_node
    node = min(node for node, account in nodes.items() if node.startswith("email:") and account is not None)
    desk.score(order_id="by-email", email=node.removeprefix("email:").upper())
    desk.score(order_id="by-id", user_id=nodes[node])
    entities = {one.order_id: one.entity for one in desk.written}
    assert entities["by-email"]["customer"] == entities["by-id"]["customer"] == f"user:{nodes[node]}"


def test_replicas_share_orders_and_answers(desk: Desk) -> None:
    card = f"card{time.time_ns()}"
    first = desk.score(order_id="shared", card_fingerprint=card)
    other = replica(desk.settings)
    with running(other) as client:
        wait_for(lambda: other.models.current.champion is not None)
        assert client.post("/v1/fraud/score", json=order_body(order_id="shared", card_fingerprint=card)).json() == first
        assert client.post("/v1/fraud/score", json=order_body(order_id="shared", card_fingerprint="x")).status_code == 409
        desk.score(order_id="shared2", card_fingerprint=card)
        wait_for(lambda: other.fraud.recent.answer_of("shared2", datetime.now(UTC)) is not None)
        written_by_other: list[Score] = []
        other.scores.write = written_by_other.append  # type: ignore[method-assign]
        assert client.post("/v1/fraud/score", json=order_body(card_fingerprint=card)).status_code == 200
        assert written_by_other[0].features["card_orders_1h"] == 2


def test_new_champion_takes_over_while_orders_are_scored(desk: Desk) -> None:
    registry = Registry(home=desk.settings.home)
    before = registry.champion_number()
    challenger = registry.record(train_model(desk.settings, 2)).number
    wait_for(lambda: desk.application.models.current.challenger is not None)
    desk.score(order_id="shadowed")
    shadow = next(one.challenger for one in desk.written if one.order_id == "shadowed")
    assert shadow is not None
    assert shadow["version"] == challenger
    assert 0 <= shadow["score"] <= 1
    versions: list[int] = []
    stop = threading.Event()

    def score_continuously() -> None:
        while not stop.is_set():
            versions.append(desk.score()["model"]["version"])

    thread = threading.Thread(target=score_continuously)
    thread.start()
    try:
        wait_for(lambda: len(versions) > 3)
        registry.promote(challenger)
        promoted = time.monotonic()
        wait_for(lambda: versions[-1] == challenger, seconds=10)
        assert time.monotonic() - promoted < 10
    finally:
        stop.set()
        thread.join()
    assert versions == sorted(versions)
    assert set(versions) == {before, challenger}


def test_account_events_after_the_snapshot_count(desk: Desk) -> None:
    scoring = desk.application.fraud.scoring
    assert scoring is not None
    moment = datetime.now(UTC) - timedelta(minutes=3)
    event = {
        "event_id": f"late{time.time_ns()}",
        "event_type": "login_failed",
        "timestamp": moment.isoformat(),
        "user_id": 7,
        "metadata": {"device_id": "d-tail"},
    }
    producer = Producer({"bootstrap.servers": desk.settings.kafka.bootstrap_servers})
    before = len(scoring.follower.stock.account_events)
    for outcome in range(3):  # repeated unchanged, then corrected
        repeated = event if outcome < 2 else event | {"timestamp": (moment - timedelta(days=2)).isoformat()}
        producer.produce("events", json.dumps(repeated).encode())
        producer.flush(10)
        if outcome == 0:
            wait_for(lambda: len(scoring.follower.stock.account_events) == before + 1)
            desk.score(order_id="after-login", user_id=7)
    wait_for(lambda: len(scoring.follower.stock.account_events) == before + 3)
    desk.score(order_id="after-correction", user_id=7)
    assert desk.features("after-login")["account_failed_logins_1h"] == 1
    assert desk.features("after-correction")["account_failed_logins_1h"] == 0
    assert desk.features("after-correction")["account_minutes_since_failed_login"] == pytest.approx(2 * 24 * 60 + 3, abs=1)


def test_rebuilt_scoring_state_contains_recent_orders(desk: Desk) -> None:
    """Also orders scored during the rebuild; removed orders no longer count."""
    card = f"card{time.time_ns()}"
    fraud = desk.application.fraud
    before = fraud.scoring
    assert before is not None
    desk.score(order_id="old", card_fingerprint=card)
    rebuilding = threading.Thread(
        target=lambda: [fraud._rebuild(before.reference, before.follower, before.events) for _ in range(3)]
    )
    rebuilding.start()
    count = 1
    while rebuilding.is_alive() or count < 5:
        desk.score(order_id=f"while{count}", card_fingerprint=card)
        assert desk.features(f"while{count}")["card_orders_1h"] == count
        count += 1
    rebuilding.join()
    assert fraud.scoring is not before
    with fraud._lock:
        scoring = fraud.scoring
        assert scoring is not None
        scoring.online.forget("old")
        history = [row for _, row in fraud.recent.scored.values() if row["order_id"] != "old"]
    desk.score(order_id="last", card_fingerprint=card, user_id=3, device_id="d-last")
    assert desk.features("last")["card_orders_1h"] == count - 1
    entity = pl.DataFrame([next(one.entity for one in desk.written if one.order_id == "last")], schema=ORDER_COLUMNS)
    orders = pl.concat([scoring.reference.entities, pl.DataFrame(history, schema=ORDER_COLUMNS)])
    later = account_events(scoring.follower.stock.later.select(EVENT_READS))
    events = pl.concat([scoring.events, later])
    (offline,) = (
        compute(entity, OrderHistory(orders, events, scoring.reference.categories)).drop("order_id", "placed_at").to_dicts()
    )
    online = desk.features("last")
    different = {name: (online[name], offline[name]) for name in online if online[name] != offline[name]}
    assert different == {}


def test_model_that_forest_does_not_support_is_scored_by_xgboost(desk: Desk) -> None:
    champion = desk.application.models.current.champion
    assert champion is not None
    desk.score(order_id="both-ways", user_id=5)
    values = [desk.features("both-ways")[feature.name] for feature in FEATURES]
    features = [math.nan if value is None else value for value in values]
    score, added = champion.explain(features)
    slow_score, slow_added = replace(champion, forest=None).explain(features)
    assert slow_score == pytest.approx(score, abs=1e-6)
    assert replace(champion, forest=None).score(features) == slow_score
    assert slow_added == pytest.approx(added, abs=1e-4)


def test_waiting_score_does_not_block_other_requests(desk: Desk) -> None:
    with desk.application.fraud._lock, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(desk.score, order_id="waits")
        assert desk.client.get("/-/healthz").status_code == 200
        time.sleep(0.2)
        assert desk.client.get("/-/healthz").status_code == 200
        assert not waiting.done()
        desk.application.fraud._lock.release()
        try:
            assert waiting.result(10)["order_id"] == "waits"
        finally:
            desk.application.fraud._lock.acquire()


def test_scores_are_written_as_events_without_an_account(desk: Desk) -> None:
    desk.score(order_id="kept", user_id=4)
    assert desk.application.scores.flush(10) == 0
    properties = {"bootstrap.servers": desk.settings.kafka.bootstrap_servers, "group.id": "test", "enable.partition.eof": True}
    consumer = Consumer(properties)
    consumer.assign([TopicPartition(TOPIC, number, 0) for number in range(3)])
    found: list[Any] = []
    ends = 0
    while ends < 3:
        message = consumer.poll(10)
        assert message is not None
        if message.error():
            ends += 1
        else:
            found.append(json.loads(message.value()))
    consumer.close()
    (event,) = [one for one in found if one["metadata"]["order_ref"] == "kept"]
    assert event["event_type"] == "order_scored"
    assert event.keys() == {"event_id", "event_type", "timestamp", "metadata"}
    assert event["metadata"]["features"] == desk.features("kept")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"order_id": ""}, "order_id"),
        ({"total_amount": "much"}, "total_amount"),
        ({"total_amount": 1.5}, "total_amount"),
        ({"items": [{"product_id": "P1", "quantity": 1, "unit_price": "1e3"}]}, "items[0].unit_price"),
        ({"currency": "dollars"}, "currency"),
        ({"items": [{"product_id": "P1", "quantity": 0, "unit_price": "1"}]}, "items[0].quantity"),
        ({"source": "fax"}, "source"),
        ({"created_at": "2026-01-01T00:00:00"}, "created_at"),
        ({"created_at": "2999-01-01T00:00:00Z"}, "created_at"),
        ({"created_at": "0001-01-01T00:00:00Z"}, "created_at"),
        ({"user_id": -1}, "user_id"),
        ({"device": "d"}, "device"),
    ],
)
def test_invalid_order_names_the_field(desk: Desk, change: dict[str, Any], field: str) -> None:
    response = desk.client.post("/v1/fraud/score", json=order_body(**change))
    assert response.status_code == (409 if change.get("created_at", "").endswith("Z") else 400)
    assert response.json()["errors"][0]["field"] == field


def test_repeated_order_in_a_batch_is_one_order(desk: Desk) -> None:
    orders = [order_body(order_id="twice"), order_body(order_id="other"), order_body(order_id="twice")]
    scores = desk.client.post("/v1/fraud/score:batch", json={"orders": orders}).json()["scores"]
    assert [one["order_id"] for one in scores] == ["twice", "other", "twice"]
    assert scores[0] == scores[2]
    assert desk.features("twice")["amount"] == 120
    assert [one.order_id for one in desk.written].count("twice") == 1
    changed = {"orders": [order_body(order_id="third"), order_body(order_id="third", total_amount="9.00")]}
    response = desk.client.post("/v1/fraud/score:batch", json=changed)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (409, "orders[1].order_id")


def test_a_batch_lets_other_orders_through_between_its_chunks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    fraud = desk.application.fraud
    waiting, held, order = threading.Event(), threading.Event(), list[str]()
    score = fraud._score

    def recorded(request: Any, *more: Any) -> Any:
        order.append(request.row["order_id"])
        if len(order) == 1:
            waiting.set()
            held.wait(10)
        return score(request, *more)

    monkeypatch.setattr(fraud, "_score", recorded)
    started = f"{time.time_ns()}"
    orders = [order_body(order_id=f"{started}-{number:04}") for number in range(10 * CHUNK)]
    with ThreadPoolExecutor(2) as senders:
        batch = senders.submit(desk.client.post, "/v1/fraud/score:batch", json={"orders": orders})
        assert waiting.wait(10)
        single = senders.submit(desk.score, order_id=f"{started}-single")
        wait_for(lambda: fraud.pool._pending == 2)
        held.set()
        assert single.result(30)["order_id"] == f"{started}-single"
        assert batch.result(30).status_code == 200
    assert order.index(f"{started}-single") <= 2 * CHUNK
    assert len(order) == 10 * CHUNK + 1


def test_remembered_orders_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    fraud = desk.application.fraud
    desk.score(order_id="remembered")
    full = fraud.serving.model_copy(update={"remembered_scores": len(fraud.recent)})
    monkeypatch.setattr(fraud, "serving", full)
    response = desk.client.post("/v1/fraud/score", json=order_body())
    assert response.status_code == 429
    assert response.headers["retry-after"]
    assert desk.score(order_id="remembered")["order_id"] == "remembered"


def test_integers_may_be_written_as_floats(desk: Desk) -> None:
    desk.score(order_id="point", user_id=3.0, items=[{"product_id": "P0001", "quantity": 2.0, "unit_price": "60"}])
    assert desk.written[-1].entity["account"] == 3


def test_any_amount_is_scored_or_rejected(desk: Desk) -> None:
    for amount in ("-5", "0", "0.00000001", "99999999999999.99", "1e30", "NaN", "Infinity"):
        response = desk.client.post("/v1/fraud/score", json=order_body(total_amount=amount))
        assert response.status_code in (200, 400), (amount, response.text)


def test_order_is_removed_once_the_lakehouse_has_it_or_should_have_it() -> None:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    recent: RecentScores[Any] = RecentScores(timedelta(hours=1))
    for name, age in (("placed", 2), ("dropped", 2), ("young", 0.1)):
        recent.add({"order_id": name}, now - timedelta(hours=age), name)  # type: ignore[arg-type]
    assert recent.remove_settled({"placed"}, now, now) == ["placed", "dropped"]
    assert list(recent.scored) == ["young"]
    recent.add({"order_id": "young", "amount": 1}, now, "again")  # type: ignore[arg-type]
    assert recent.scored["young"] == (now, {"order_id": "young", "amount": 1})
    assert recent.answer_of("young", now) == "young"
    assert recent.answer_of("placed", now) is None
    assert recent.remove_settled(set(), now - timedelta(hours=3), now + timedelta(hours=2)) == []
    assert list(recent.scored) == ["young"]


def new_order_bodies(desk: Desk) -> list[dict[str, Any]]:
    """Simulate 60 more orders in the sandbox and return the scoring requests of the new orders, oldest first."""
    dsn = desk.settings.postgres.dsn.get_secret_value()
    with psycopg.connect(dsn, autocommit=True) as connection:
        (last_order,) = connection.execute("SELECT max(order_id) FROM orders").fetchone() or (0,)
        (last_user,) = connection.execute("SELECT max(user_id) FROM users").fetchone() or (0,)
        sandbox.step(desk.settings.home, 60)
        names = (
            "order_id, user_id, source, store_id, currency, total_amount, payment_method, card_fingerprint, ip_address, "
            "device_id, shipping_address, created_at"
        )
        rows = connection.execute(f"SELECT {names} FROM orders WHERE order_id > %s ORDER BY created_at, order_id", (last_order,))
        columns = [one.name for one in rows.description or ()]
        orders = [dict(zip(columns, row, strict=True)) for row in rows]
        lines = connection.execute(
            "SELECT order_id, product_id, quantity, unit_price FROM order_items WHERE order_id > %s", (last_order,)
        )
        items: dict[int, list[dict[str, Any]]] = {}
        for order_id, product, quantity, price in lines:
            if quantity > 0:
                items.setdefault(order_id, []).append({"product_id": product, "quantity": quantity, "unit_price": str(price)})
        opened = dict(connection.execute("SELECT user_id, created_at FROM users WHERE user_id > %s", (last_user,)).fetchall())
    bodies = []
    for order in orders:
        body = {name: str(value) if isinstance(value, Decimal) else value for name, value in order.items() if value is not None}
        body |= {"order_id": str(order["order_id"]), "created_at": order["created_at"].astimezone(UTC).isoformat()}
        body["items"] = items.get(order["order_id"], [])
        if (moment := opened.get(order["user_id"])) is not None:
            body["account_created_at"] = moment.astimezone(UTC).isoformat()
        bodies.append(body)
    return bodies


@pytest.mark.slow
def test_served_scores_are_reproduced_from_the_lakehouse(desk: Desk) -> None:
    """New orders are scored one by one, `run` ingests them, and their features are computed offline."""
    bodies = new_order_bodies(desk)
    wait_for(lambda: caught_up(desk))
    served: dict[str, float] = {}
    for body in bodies:
        response = desk.client.post("/v1/fraud/score", json=body)
        assert response.status_code == 200, response.text
        served[body["order_id"]] = response.json()["score"]
    assert desk.application.scores.flush(10) == 0
    kafka = desk.settings.kafka.model_copy(update={"topics": ("events", TOPIC)})
    settings = desk.settings.model_copy(update={"kafka": kafka})
    with open_engine(settings) as engine:
        assert not run_once(engine, PROJECT, lambda name, report: None).errors
        refresh(engine)
        offline = engine.lake.load(ORDER_FEATURES).read(ORDER_FEATURES.schema.names, pl.col("order_id").is_in(list(served)))
        scored = pl.col("event_type") == "order_scored"
        kept = engine.lake.load(EVENTS_CLEAN).read(["metadata", "user_id", "device_id"], scored)
        seen_by_monitor = served_scores(engine.lake, Registry(home=settings.home).load())
    model = desk.application.models.current.champion
    assert model is not None
    assert offline.height == len(served) > 20
    # every score from the features stored with it
    metadata = [json.loads(text) for text in kept["metadata"]]
    mine = [one for one in metadata if one["order_ref"] in served]
    assert {one["order_ref"] for one in mine} == served.keys()
    seen = pl.DataFrame([one["features"] for one in mine], schema={one.name: one.dtype for one in FEATURES})
    rescored = model.model.score(seen)
    assert [served[one["order_ref"]] for one in mine] == pytest.approx(rescored.tolist(), abs=1e-6)
    assert kept["user_id"].null_count() == kept["device_id"].null_count() == kept.height
    # monitor counts the same orders and explains the differences
    assert seen_by_monitor.known == len(served)
    assert seen_by_monitor.unread == 0
    assert seen_by_monitor.scored >= seen_by_monitor.known
    assert 0 < seen_by_monitor.equal <= len(served)
    assert seen_by_monitor.rescored == len(served)
    matching = sum(abs(score - served[order_id]) <= 1e-6 for order_id, score in offline_scores(offline, model.model).items())
    assert seen_by_monitor.same_score == matching
    # served from the updated lakehouse, scores equal those of the features computed for training
    expected = dict(zip(offline["order_id"], model.model.score(offline).tolist(), strict=True))
    with running(replica(settings, scores_topic="")) as client:
        wait_for(lambda: client.post("/v1/fraud/score", json=order_body()).status_code == 200)
        now = client.post("/v1/fraud/score:batch", json={"orders": bodies}).json()["scores"]
    assert {one["order_id"]: one["score"] for one in now} == pytest.approx(expected, abs=1e-6)


def offline_scores(offline: pl.DataFrame, model: Any) -> dict[str, float]:
    return dict(zip(offline["order_id"], model.score(offline).tolist(), strict=True))


def test_features_use_the_champions_label_delay(desk: Desk) -> None:
    registry = Registry(home=desk.settings.home)
    fraud, before = desk.application.fraud, registry.champion_number()
    assert before is not None
    registry.promote(registry.record(replace(train_model(desk.settings, 31), label_delay=timedelta(days=20))).number)
    try:
        wait_for(lambda: fraud.scoring is not None and fraud.scoring.online.delay == timedelta(days=20) // MICROSECOND)
        assert desk.score()["model"]["version"] != before
    finally:
        registry.rollback()
    wait_for(lambda: fraud.scoring is not None and fraud.scoring.online.delay == LABEL_DELAY // MICROSECOND)


def caught_up(desk: Desk) -> bool:
    return desk.application.state.freshness(desk.application.state.follower).staleness_ms < 1_000
