"""Serving with Apache Kafka: the topic follower, scores, and `rebuild` after lost messages."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import KafkaException, Producer
from servers.kafka_broker import Broker
from servers.kafka_topic import Topic
from support.serve_world import figures_of, figures_online, ingest
from support.waiting import wait_for

from app.project import PROJECT
from lakehouse.engine.engine import Engine
from lakehouse.errors import OffsetExpired
from lakehouse.iceberg.catalog import Lake
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings
from pipelines.bronze.tables import EVENTS
from pipelines.rebuild import rebuild_tables
from pipelines.settings import KafkaSettings, MongoSettings, PostgresSettings, Settings, business_settings
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS
from pipelines.silver.quarantine import QUARANTINE
from pipelines.sources.kafka.source import KafkaSource
from serve.settings import ServeSettings
from serve.state import topic_follower
from serve.state.online_state import OnlineState
from serve.state.score_topic import Score, ScoreTopic
from serve.state.topic_follower import TopicFollower

pytestmark = pytest.mark.servers


@dataclass
class Shop:
    """A lakehouse and its topic."""

    topic: Topic
    engine: Engine
    settings: Settings
    sent: int = 0

    def send(self, producer: Producer, quantity: int) -> None:
        self.sent += 1
        event = {
            "event_id": f"e{self.sent}",
            "event_type": "stock_received",
            "timestamp": datetime.now(UTC).isoformat(),
            "metadata": {"store_id": "S1", "product_id": "P1", "quantity": quantity},
        }
        self.topic.send(producer, json.dumps(event))

    def run(self) -> None:
        """Ingest the topic and refresh the tables, as `run` does."""
        self.engine.ingest(KafkaSource(self.settings.kafka), {EVENTS.name: EVENTS})
        ingest(self.engine, [])

    def state(self, followers: list[TopicFollower]) -> OnlineState:
        serving = ServeSettings(refresh_seconds=60, probe_seconds=0.05)
        return OnlineState(self.settings, serving, business_settings(self.settings), followers.append)

    def events(self) -> list[str]:
        frame = self.engine.lake.load(EVENTS_CLEAN)
        return sorted(frame.reader.read(frame.files(), ["event_id"])["event_id"].to_list(), key=lambda name: int(name[1:]))


@pytest.fixture
def shop(broker: Broker, tmp_path: Path) -> Iterator[Shop]:
    topic = Topic(broker)
    settings = Settings(
        home=tmp_path,
        kafka=topic.settings,
        postgres=PostgresSettings(enabled=False),  # type: ignore[call-arg]
        mongo=MongoSettings(enabled=False),  # type: ignore[call-arg]
    )
    inline = settings.model_copy(update={"ray": RaySettings(inline_rows=10**9)})  # type: ignore[call-arg]
    yield Shop(topic, Engine(Lake(inline), TaskPool(inline.ray), business_settings(inline), QUARANTINE), inline)
    with suppress(KafkaException):
        topic.admin.delete_topics([topic.name])[topic.name].result(10)


def on_hand(follower: TopicFollower) -> int:
    return int(figures_online(follower.stock)["S1", "P1"][0])


def test_serving_sees_only_committed_messages(shop: Shop) -> None:
    plain, writer = shop.topic.producer(), shop.topic.transactional()
    shop.send(plain, 1)
    writer.begin_transaction()
    shop.send(writer, 1000)
    writer.abort_transaction(30)
    shop.run()
    # the snapshot ends at a marker; so does the topic, more than once
    state = shop.state([])
    state.start()
    try:
        assert state.ready.wait(30), state.error
        follower = state.follower
        assert on_hand(follower) == 1
        for quantity, kept in ((10, True), (2000, False), (100, True), (3000, False)):
            writer.begin_transaction()
            shop.send(writer, quantity)
            writer.commit_transaction(30) if kept else writer.abort_transaction(30)
        end = shop.topic.watermarks()[1]
        wait_for(lambda: follower.has({f"{shop.topic.name}:0": end}), "the follower did not reach the end")
        assert on_hand(follower) == 111
        # nothing is missing although the last record is a marker, and the freshness shows that
        now = time.time()
        wait_for(lambda: follower.fresh_at > now, "serving reports that it is behind")
        writer.begin_transaction()
        shop.send(writer, 10_000)
        shop.send(plain, 1_000_000)
        now = time.time()
        wait_for(lambda: follower.fresh_at > now, "serving reports that it is behind")
        assert on_hand(follower) == 111
        writer.commit_transaction(30)
        wait_for(lambda: on_hand(follower) == 1_010_111, "messages held back by an open transaction did not arrive")
        shop.run()
        ledger = shop.engine.lake.load(INVENTORY_SNAPSHOTS)
        assert figures_of(ledger.reader.read(ledger.files(), ledger.reader.schema.names)) == figures_online(follower.stock)
        assert follower.error is None
    finally:
        state.stop()


def test_serving_continues_after_a_crash_of_the_broker(shop: Shop) -> None:
    shop.send(shop.topic.producer(), 1)
    shop.run()
    state = shop.state([])
    state.start()
    try:
        assert state.ready.wait(30), state.error
        follower = state.follower
        shop.topic.broker.kill()
        shop.topic.broker.start()
        shop.send(shop.topic.producer(), 10)
        wait_for(lambda: on_hand(follower) == 11, "serving did not continue")
        now = time.time()
        wait_for(lambda: follower.fresh_at > now, "serving reports that it is behind")
        assert follower.error is None
    finally:
        state.stop()


def test_messages_deleted_by_retention_are_an_error_and_a_rebuild_recovers(shop: Shop) -> None:
    producer = shop.topic.producer()
    for _ in range(5):
        shop.send(producer, 1)
    shop.run()
    for _ in range(5):
        shop.send(producer, 1)
    shop.topic.expire_messages()
    for _ in range(5):
        shop.send(producer, 1)
    with pytest.raises(OffsetExpired, match=r"offsets 5 to 9 were deleted .*python -m app rebuild bronze.bronze_k"):
        shop.run()
    assert shop.events() == [f"e{n}" for n in range(1, 6)]
    rebuild_tables(shop.engine, PROJECT, [EVENTS.name])
    shop.run()
    # messages that were read stay, although the topic no longer has them
    assert shop.events() == [f"e{n}" for n in (1, 2, 3, 4, 5, 11, 12, 13, 14, 15)]
    shop.send(producer, 1)
    shop.run()
    assert shop.events()[-1] == "e16"


def test_a_re_created_topic_is_not_followed_at_the_old_offsets(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_follower, "METADATA_SECONDS", 0.2)
    for _ in range(5):
        shop.send(shop.topic.producer(), 1)
    shop.run()
    serving = ServeSettings(refresh_seconds=0.3, probe_seconds=0.05)
    state = OnlineState(shop.settings, serving, business_settings(shop.settings), lambda follower: None)
    state.start()
    try:
        assert state.ready.wait(30), state.error
        shop.topic.delete()
        shop.topic.create(1)
        for _ in range(10):
            shop.send(shop.topic.producer(), 1)
        wait_for(lambda: state.error is not None, "serving continued with messages of another topic")
        assert re.search(
            rf"'{shop.topic.name}' was deleted and re-created.*python -m app rebuild {EVENTS.name}", state.error or ""
        )
        rebuild_tables(shop.engine, PROJECT, [EVENTS.name])
        shop.run()
        wait_for(lambda: state.error is None and on_hand(state.follower) == 15, "serving did not continue after the rebuild")
        assert len(shop.events()) == 15
    finally:
        state.stop()


def test_scores_are_received_from_a_start_time(broker: Broker) -> None:
    """Serving creates the topic; the first offset is looked up by time."""
    topic, kafka = f"scores{time.time_ns():x}", KafkaSettings(bootstrap_servers=broker.bootstrap)  # type: ignore[call-arg]
    received: list[Score] = []
    first = ScoreTopic(kafka, topic, lambda score: None)
    first.start(datetime.now(UTC))

    def score(name: str) -> Score:
        return Score(
            order_id=name,
            scored_at=datetime.now(UTC),
            entity={"order_id": name},
            features={"f": 1.0},
            answer={"score": 0.5},
            challenger=None,
        )

    try:
        assert first.caught_up.wait(30)
        first.write(score("early"))
        assert first.flush(20) == 0
        time.sleep(0.05)
        since = datetime.now(UTC)
        time.sleep(0.05)
        for number in range(20):
            first.write(score(f"o{number}"))
        assert first.flush(20) == 0
        second = ScoreTopic(kafka, topic, received.append)
        second.start(since)
        try:
            assert second.caught_up.wait(30)
            assert sorted(one.order_id for one in received) == sorted(f"o{number}" for number in range(20))
            broker.kill()
            broker.start()
            first.write(score("after"))
            wait_for(lambda: received[-1].order_id == "after", "no scores were received after a crash")
        finally:
            second.stop()
    finally:
        first.stop()
