"""The Kafka connector against the sandbox's broker and librdkafka's own."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from hypothesis import given
from hypothesis import strategies as st
from support.bronze_reading import Reader
from support.raw_producer import produce_with_header

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Position, restart_position
from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings
from pipelines.sources.kafka import ranges, source
from pipelines.sources.kafka.clients import open_consumer
from pipelines.sources.kafka.deletion import delete_records_before
from pipelines.sources.kafka.ranges import OffsetRange, OffsetRangesTask, split_ranges
from pipelines.sources.kafka.records import UNREADABLE_HEADERS
from pipelines.sources.kafka.source import KafkaSource

TABLE = EVENTS.name


class Topic:
    """A separate topic and a reader of it."""

    def __init__(self, bootstrap: str, name: str, partitions: int = 3) -> None:
        self.bootstrap, self.name = bootstrap, name
        self.admin = AdminClient({"bootstrap.servers": bootstrap})
        self.admin.create_topics([NewTopic(name, partitions, 1)])[name].result(10)
        self.producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
        self.settings = KafkaSettings(bootstrap_servers=bootstrap, topics=(name,), batch_messages=400)  # type: ignore[call-arg]
        self.reader = Reader(KafkaSource(self.settings))

    def send(self, count: int, **options: Any) -> None:
        for number in range(count):
            self.producer.produce(self.name, value=f"v{number}".encode(), partition=number % 3, **options)
        assert self.producer.flush(20) == 0

    def offsets(self) -> set[tuple[int, int]]:
        return {(row["partition"], row["offset"]) for row in self.reader.rows.get(TABLE, [])}


@pytest.fixture
def topic(servers: Any) -> Iterator[Topic]:
    topic = Topic(servers.kafka_bootstrap, f"t{time.time_ns():x}")
    yield topic
    topic.admin.delete_topics([topic.name])[topic.name].result(10)


def offsets_of(position: Position) -> dict[str, int]:
    return {name: at for name, at in position.items() if ":" in name}


@contextmanager
def separate_broker(directory: Path, *, without_topic_ids: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a broker for one test. without_topic_ids: as before Kafka 2.8."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    start = "protocol.SUPPORTED_VERSIONS[protocol.METADATA] = (1, 8); " if without_topic_ids else ""
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); from app.kafka_broker import protocol, server; {start}server.main()"
    )
    broker = subprocess.Popen([sys.executable, "-c", program, "--directory", str(directory), "--port", str(port)])
    try:
        yield broker, f"127.0.0.1:{port}"
    finally:
        broker.kill()
        broker.wait()


def test_a_header_name_that_is_not_utf_8_holds_nothing_up(topic: Topic, servers: Any) -> None:
    for number in range(12):  # often enough for the interpreter to specialise the call
        topic.producer.produce(topic.name, value=f"before{number}".encode(), partition=0, headers=[("a", b"1")])
    topic.producer.flush(10)
    for number in range(12):
        produce_with_header(servers.kafka_bootstrap, topic.name, f"bad{number}".encode(), b"\xff\xfe")
    topic.producer.produce(topic.name, value=b"after", headers=[("b", b"2")])
    topic.producer.flush(10)
    rows = {row["value"]: row["headers"] for row in topic.reader.run()[TABLE]}
    assert len(rows) == 25
    assert {rows[f"bad{number}".encode()] for number in range(12)} == {UNREADABLE_HEADERS}
    assert json.loads(rows[b"after"]) == [["b", base64.b64encode(b"2").decode()]]
    assert json.loads(rows[b"before11"]) == [["a", base64.b64encode(b"1").decode()]]


def test_messages_are_stored_byte_for_byte(topic: Topic) -> None:
    headers = [("a", b"1"), ("a", b"\xff"), ("b", None)]
    topic.producer.produce(topic.name, value=b"\x00\xffx", key=b"k", partition=1, headers=headers, timestamp=1_700_000_000_123)
    topic.producer.produce(topic.name, value=None, key=None, partition=1)
    topic.producer.flush(10)
    first, second = topic.reader.run()[TABLE]
    assert (first["topic"], first["partition"], first["offset"], first["key"], first["value"]) == (
        topic.name,
        1,
        0,
        b"k",
        b"\x00\xffx",
    )
    assert json.loads(first["headers"]) == [
        ["a", base64.b64encode(b"1").decode()],
        ["a", base64.b64encode(b"\xff").decode()],
        ["b", None],
    ]
    assert first["timestamp"] == first["_source_time"] == datetime.fromtimestamp(1_700_000_000.123, UTC)
    assert (first["_op"], first["_source_position"]) == ("c", f"{topic.name}/00001/{0:019d}")
    assert (second["key"], second["value"], second["headers"]) == (None, None, None)


def test_ranges_are_exact_and_no_message_comes_twice(topic: Topic) -> None:
    topic.send(1000)
    plan = topic.reader.plan()
    topic.send(500)
    assert plan.rows == 1000
    assert len(plan.tasks) == 3
    rows, positions = topic.reader.read(plan)
    repeated, _ = topic.reader.read(plan)
    places = [(row["partition"], row["offset"]) for row in rows[TABLE]]
    assert len(places) == len(set(places)) == 1000
    assert {(row["partition"], row["offset"]) for row in repeated[TABLE]} == set(places)
    topic.reader.rows, topic.reader.positions = rows, positions
    assert offsets_of(positions[TABLE]) == {f"{topic.name}:0": 334, f"{topic.name}:1": 333, f"{topic.name}:2": 333}
    assert topic.reader.source.lag(positions) == {TABLE: "500 messages"}
    assert len(topic.reader.run()[TABLE]) == 500
    assert len(topic.offsets()) == len(topic.reader.rows[TABLE]) == 1500


def test_a_plan_without_messages_is_fast_and_has_no_tasks(topic: Topic) -> None:
    assert not topic.reader.plan().tasks
    topic.send(3)
    topic.reader.run()
    started = time.monotonic()
    plan = topic.reader.plan()
    assert time.monotonic() - started < 3
    assert not plan.tasks
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}


def test_new_partitions_and_topics_are_read_from_their_beginning(topic: Topic) -> None:
    topic.send(6)
    topic.reader.run()
    other = Topic(topic.bootstrap, f"{topic.name}-other", 1)
    other.producer.produce(other.name, b"there before", partition=0)
    other.producer.flush(10)
    # As if partition 2 did not exist in the previous run.
    topic.reader.positions = {TABLE: {name: at for name, at in topic.reader.positions[TABLE].items() if not name.endswith(":2")}}
    topic.reader.source = KafkaSource(topic.settings.model_copy(update={"topics": (topic.name, other.name)}))
    assert sorted(row["value"] for row in topic.reader.run()[TABLE]) == [b"there before", b"v2", b"v5"]
    other.admin.delete_topics([other.name])[other.name].result(10)
    with pytest.raises(OffsetExpired, match=f"'{other.name}' no longer exists"):
        topic.reader.plan()


def test_deleted_offsets_are_named_in_the_error(topic: Topic) -> None:
    topic.send(30)
    topic.reader.run()
    topic.send(30)
    deleted = topic.admin.delete_records([TopicPartition(topic.name, 1, 15)])
    next(iter(deleted.values())).result(10)
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 1: offsets 10 to 14 were deleted.*rebuild {TABLE}"):
        topic.reader.plan()
    topic.reader.positions = {}
    assert len(topic.reader.run()[TABLE]) == 60 - 15


def test_a_re_created_topic_is_an_error(topic: Topic) -> None:
    topic.send(30)
    topic.reader.run()
    topic.admin.delete_topics([topic.name])[topic.name].result(10)
    with pytest.raises(OffsetExpired, match="no longer exists"):
        topic.reader.plan()
    topic.admin.create_topics([NewTopic(topic.name, 3, 1)])[topic.name].result(10)
    with pytest.raises(
        OffsetExpired, match=rf"'{topic.name}' was deleted and re-created: its id was \S+ and is now \S+\. .*rebuild"
    ):
        topic.reader.plan()
    topic.reader.positions = {TABLE: offsets_of(topic.reader.positions[TABLE])}
    message = rf"'{topic.name}', partition 0: the next offset to read is 10, but the partition ends at 0"
    with pytest.raises(OffsetExpired, match=message):
        topic.reader.plan()
    topic.reader.positions = {TABLE: {f"{topic.name}:3": 0}}
    with pytest.raises(OffsetExpired, match="has lost partition 3"):
        topic.reader.plan()


def test_a_re_created_topic_refilled_past_the_position_is_detected(topic: Topic) -> None:
    topic.send(30)
    topic.reader.run()
    old = topic.reader.positions[TABLE]["ids"][topic.name]
    topic.admin.delete_topics([topic.name])[topic.name].result(10)
    topic.admin.create_topics([NewTopic(topic.name, 3, 1)])[topic.name].result(10)
    topic.producer = Producer({"bootstrap.servers": topic.bootstrap, "linger.ms": 5})
    topic.send(60)
    with pytest.raises(OffsetExpired) as error:
        topic.reader.plan()
    first = list(topic.reader.rows[TABLE])
    topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}
    assert len(topic.reader.run()[TABLE]) == 60
    position = topic.reader.positions[TABLE]
    new = position["ids"][topic.name]
    assert old != new
    assert f"'{topic.name}' was deleted and re-created: its id was {old} and is now {new}." in str(error.value)
    assert f"python -m app rebuild {TABLE}" in str(error.value)
    # the same offsets are other messages now: no position is used twice, and the later ones sort after
    assert max(row["_source_position"] for row in first) < min(row["_source_position"] for row in topic.reader.rows[TABLE][30:])
    topic.send(3)
    assert {row["_source_position"][:8] for row in topic.reader.run()[TABLE]} == {"~000001~"}


def test_resnapshot_of_the_same_topic_gives_the_same_rows(topic: Topic) -> None:
    topic.send(30)
    first = topic.reader.run()[TABLE]
    topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}
    by_position = {row["_source_position"]: row for row in topic.reader.run()[TABLE]}
    assert by_position == {row["_source_position"]: row for row in first}
    assert "again" not in topic.reader.positions[TABLE]
    assert not topic.reader.plan().tasks


def test_a_position_without_a_topic_id_stores_it(topic: Topic) -> None:
    topic.send(3)
    topic.reader.run()
    topic.reader.positions = {TABLE: offsets_of(topic.reader.positions[TABLE])}
    assert topic.reader.run() == {}
    assert not topic.reader.plan().tasks
    assert set(topic.reader.positions[TABLE]["ids"]) == {topic.name}


def test_a_broker_without_topic_ids_is_read(tmp_path: Path) -> None:
    with separate_broker(tmp_path, without_topic_ids=True) as (_, bootstrap):
        topic = Topic(bootstrap, "events")
        topic.send(30)
        assert len(topic.reader.run()[TABLE]) == 30
        assert topic.reader.positions[TABLE] == {f"events:{n}": 10 for n in range(3)}
        topic.send(3)
        topic.reader.positions = {TABLE: {**topic.reader.positions[TABLE], "ids": {"events": "from before"}}}
        assert len(topic.reader.run()[TABLE]) == 3
        assert topic.reader.positions[TABLE]["ids"] == {"events": "from before"}
        # it may be another topic, so the same offsets may be other messages
        topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}
        assert {row["_source_position"][:8] for row in topic.reader.run()[TABLE]} == {"~000001~"}


def test_topic_ids_survive_a_broker_restart(tmp_path: Path) -> None:
    with separate_broker(tmp_path) as (_, bootstrap):
        topic = Topic(bootstrap, "events")
        topic.send(3)
        topic.reader.run()
    with separate_broker(tmp_path) as (_, bootstrap):
        restarted = KafkaSource(topic.settings.model_copy(update={"bootstrap_servers": bootstrap}))
        assert not restarted.plan(topic.reader.positions, {}).tasks


def test_a_nonexistent_topic_is_an_error_that_lists_existing_topics(topic: Topic) -> None:
    misspelt = KafkaSource(topic.settings.model_copy(update={"topics": ("evnets",)}))
    with pytest.raises(SourceError, match=r"'evnets' does not exist\. Create it, or correct kafka\.topics.*Existing topics: "):
        misspelt.plan({}, {})


def test_offsets_deleted_during_a_read_are_an_error(topic: Topic) -> None:
    topic.send(30)
    plan = topic.reader.plan()
    next(iter(topic.admin.delete_records([TopicPartition(topic.name, 0, 5)]).values())).result(10)
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 0: offsets 0 to 9 were deleted"):
        topic.reader.read(plan)


def test_a_range_past_the_end_does_not_hang(topic: Topic) -> None:
    topic.send(30)
    task = OffsetRangesTask(topic.settings, (OffsetRange(topic.name, 0, 0, 99),), no_progress_seconds=0.5)
    with pytest.raises(SourceError, match=r"partition 0: expected offsets up to 99, but it still ends at offset 10 after 0 s"):
        list(task.read())


class ScriptedConsumer:
    """A consumer with scripted messages: gaps, markers and events in any order."""

    def __init__(self, batches: list[list[Any]]) -> None:
        self.batches = batches
        self.closed = False

    def assign(self, partitions: list[TopicPartition]) -> None: ...

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None: ...

    def consume(self, count: int, timeout: float) -> list[Any]:
        return self.batches.pop(0) if self.batches else []


class ScriptedMessage:
    """A message or an event of a partition."""

    def __init__(self, offset: int, error: KafkaError | None = None) -> None:
        self._offset, self._error = offset, error

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def error(self) -> KafkaError | None:
        return self._error

    def key(self) -> None: ...

    def value(self) -> bytes:
        return b"v"

    def headers(self) -> None: ...

    def timestamp(self) -> tuple[int, int]:
        return (0, 0)

    def __len__(self) -> int:
        return 1


def end_of_partition(offset: int) -> ScriptedMessage:
    return ScriptedMessage(offset, KafkaError(KafkaError._PARTITION_EOF))


@given(present=st.sets(st.integers(0, 40)), end=st.integers(1, 30), grown=st.booleans(), chunk=st.integers(1, 7))
def test_ranges_end_correctly_with_gaps_and_markers_anywhere(present: set[int], end: int, grown: bool, chunk: int) -> None:
    """Transaction markers, aborted messages and compacted messages are offsets without a message."""
    messages: list[Any] = [ScriptedMessage(offset) for offset in sorted(present) if grown or offset < end]
    messages.append(end_of_partition(41 if grown else end))
    script = ScriptedConsumer([messages[n : n + chunk] for n in range(0, len(messages), chunk)])
    task = OffsetRangesTask(KafkaSettings(), (OffsetRange("t", 0, 0, end),), no_progress_seconds=0.2)  # type: ignore[call-arg]
    with patch.object(ranges, "open_consumer", lambda settings: nullcontext(script)):
        offsets = [row["offset"] for rows in task.read() for row in rows.rows.to_pylist()]  # type: ignore[union-attr]
    assert offsets == [offset for offset in sorted(present) if offset < end]


def test_ranges_of_only_markers_still_move_the_position(topic: Topic) -> None:
    topic.send(3)
    (task,) = topic.reader.plan().tasks
    assert isinstance(task, OffsetRangesTask)
    assert task.reached is not None
    assert offsets_of(task.reached) == {f"{topic.name}:{n}": 1 for n in range(3)}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.integers(0, 2000)), max_size=6), st.integers(1, 700))
def test_tasks_cover_the_ranges_exactly(starts_and_counts: list[tuple[int, int, int]], limit: int) -> None:
    given_ranges = [OffsetRange("t", number, start, start + count) for number, (_, start, count) in enumerate(starts_and_counts)]
    groups = split_ranges(given_ranges, limit)
    covered = [(item.partition, offset) for group in groups for item in group for offset in range(item.start, item.end)]
    assert covered == [(item.partition, offset) for item in given_ranges for offset in range(item.start, item.end)]
    assert all(0 < sum(item.count for item in group) <= limit for group in groups)
    assert all(len({item.partition for item in group}) == len(group) for group in groups)


def test_an_unresponsive_broker_is_an_error(tmp_path: Path) -> None:
    with separate_broker(tmp_path) as (broker, bootstrap):
        topic = Topic(bootstrap, "events")
        topic.send(30_000)
        (task, *_) = KafkaSource(topic.settings.model_copy(update={"batch_messages": 100_000})).plan({}, {}).tasks
        assert isinstance(task, OffsetRangesTask)
        os.kill(broker.pid, signal.SIGSTOP)
        timer = threading.Timer(4, os.kill, (broker.pid, signal.SIGCONT))
        timer.start()
        with pytest.raises(SourceError, match=r"no message arrived within 1 s \(brokers: 127\.0\.0\.1"):
            list(replace(task, no_progress_seconds=1.0).read())
        timer.join()


def test_wrong_settings_are_errors_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "REQUEST_TIMEOUT_SECONDS", 1.5)
    secret = "s3cr3t-word"
    with pytest.raises(SourceError, match="SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS"):
        KafkaSource(KafkaSettings()).plan({}, {})  # type: ignore[call-arg]
    unreachable = KafkaSettings(bootstrap_servers="127.0.0.1:1", properties={"sasl.password": secret})  # type: ignore[call-arg]
    wrong = KafkaSettings(bootstrap_servers="127.0.0.1:1", properties={"sasl.pasword": secret})  # type: ignore[call-arg]
    for settings, text in (
        (unreachable, "request to 127.0.0.1:1 failed.*Check that the brokers are running"),
        (wrong, "sasl.pasword"),
    ):
        misconfigured = KafkaSource(settings)
        assert secret not in repr(misconfigured)
        with pytest.raises(SourceError, match=text) as error:
            misconfigured.plan({}, {})
        assert secret not in str(error.value)
        assert "\n" not in str(error.value)


def test_the_consumer_belongs_to_no_group(topic: Topic) -> None:
    topic.send(3)
    topic.reader.run()
    consumer = Consumer({"bootstrap.servers": topic.bootstrap, "group.id": "shopsphere"})
    committed = consumer.committed([TopicPartition(topic.name, 0)], timeout=10)
    consumer.close()
    assert committed[0].offset < 0


def test_messages_deleted_from_a_partition_that_was_empty_are_an_error(topic: Topic) -> None:
    for partition in (0, 1):
        topic.producer.produce(topic.name, value=b"v", partition=partition)
    assert topic.producer.flush(20) == 0
    topic.reader.run()
    # as if the third partition had been added since
    topic.reader.positions = {TABLE: {k: v for k, v in topic.reader.positions[TABLE].items() if k != f"{topic.name}:2"}}
    assert topic.reader.run() == {}
    assert not topic.reader.plan().tasks
    for number in range(10):
        topic.producer.produce(topic.name, value=f"n{number}".encode(), partition=2)
    assert topic.producer.flush(20) == 0
    gone = TopicPartition(topic.name, 2, 5)
    topic.admin.delete_records([gone])[gone].result(10)
    with pytest.raises(OffsetExpired, match="partition 2"):
        topic.reader.plan()


def test_only_read_messages_of_a_source_topic_can_be_deleted(topic: Topic) -> None:
    topic.send(30)
    topic.reader.run()
    topic.send(12)
    long_ago, now = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(seconds=1)
    position = topic.reader.positions[TABLE] or {}
    assert delete_records_before(topic.settings, topic.name, long_ago, position) == 0
    assert [low for low, _ in watermarks(topic)] == [0, 0, 0]
    assert delete_records_before(topic.settings, topic.name, now, position) == 12
    assert watermarks(topic) == [(10, 14)] * 3
    assert len(topic.reader.run()[TABLE]) == 12, "unread messages must not be deleted"
    assert delete_records_before(topic.settings, topic.name, now, topic.reader.positions[TABLE] or {}) == 0
    topic.send(3)
    assert len(topic.reader.run()[TABLE]) == 3


def test_all_messages_of_another_topic_can_be_deleted(topic: Topic) -> None:
    elsewhere = topic.settings.model_copy(update={"topics": ("other",)})
    topic.send(30)
    assert delete_records_before(elsewhere, topic.name, datetime.now(UTC) + timedelta(seconds=1), {}) == 0
    assert watermarks(topic) == [(10, 10)] * 3
    assert delete_records_before(elsewhere, "no-such-topic", datetime.now(UTC), {}) == 0


def watermarks(topic: Topic) -> list[tuple[int, int]]:
    """Return the first offset and the one after the last, by partition."""
    with open_consumer(topic.settings) as consumer:
        return [consumer.get_watermark_offsets(TopicPartition(topic.name, number), timeout=10) for number in range(3)]
