"""The Kafka connector against Apache Kafka."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    NewPartitions,
)
from servers.kafka_broker import Broker
from servers.kafka_topic import Topic
from support.bronze_reading import Reader
from support.waiting import wait_for

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Reached, Rows, restart_position
from pipelines.bronze.tables import EVENTS
from pipelines.sources.kafka.deletion import delete_records_before
from pipelines.sources.kafka.ranges import OffsetRange, OffsetRangesTask
from pipelines.sources.kafka.source import KafkaSource

pytestmark = pytest.mark.servers
TABLE = EVENTS.name


@pytest.fixture
def topic(broker: Broker) -> Iterator[Topic]:
    topic = Topic(broker)
    yield topic
    with suppress(KafkaException):
        topic.admin.delete_topics([topic.name])[topic.name].result(10)


# -- transactions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 400])
def test_committed_messages_are_read_and_aborted_messages_are_not(topic: Topic, batch: int) -> None:
    """`batch` cuts ranges within transactions, at their markers, or not at all."""
    topic.reader = Reader(KafkaSource(topic.settings.model_copy(update={"batch_messages": batch})))
    writer, expected = topic.transactional(), []
    for number, kept in enumerate([True, False, True, True, False, False]):
        writer.begin_transaction()
        values = [f"{number}.{n}" for n in range(4)]
        topic.send(writer, *values)
        writer.commit_transaction(30) if kept else writer.abort_transaction(30)
        expected += values if kept else []
    topic.reader.run()
    assert topic.values() == expected
    # 24 messages and 6 markers: the last offset is a marker after aborted messages
    assert topic.position() == topic.watermarks()[1] == 30
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}
    assert not topic.reader.plan().tasks


def test_only_aborted_messages_are_no_permanent_lag(topic: Topic) -> None:
    writer = topic.transactional()
    topic.send(topic.producer(), "a")
    topic.reader.run()
    writer.begin_transaction()
    topic.send(writer, "never")
    writer.abort_transaction(30)
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "2 messages"}
    started = time.monotonic()
    assert topic.reader.run() == {}
    assert time.monotonic() - started < 10
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}
    assert not topic.reader.plan().tasks
    topic.send(topic.producer(), "b")
    topic.reader.run()
    assert topic.values() == ["a", "b"]


def test_an_open_transaction_holds_back_later_messages_and_loses_none(topic: Topic) -> None:
    writer, other = topic.transactional(), topic.producer()
    topic.send(other, "before")
    writer.begin_transaction()
    topic.send(writer, "open")
    topic.send(other, "behind")
    topic.reader.run()
    assert topic.values() == ["before"]
    assert topic.position() == 1
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages, 2 held back by an open transaction"}
    topic.reader.run()
    assert topic.position() == 1
    topic.send(writer, "open too")
    writer.commit_transaction(30)
    topic.reader.run()
    assert topic.values() == ["before", "open", "behind", "open too"]
    assert topic.position() == 5
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}


def test_a_transaction_whose_producer_died_is_aborted_by_the_broker(topic: Topic) -> None:
    writer = topic.transactional(**{"transaction.timeout.ms": 1000})
    writer.begin_transaction()
    topic.send(writer, "never")
    topic.send(topic.producer(), "behind")
    assert topic.reader.run() == {}
    wait_for(lambda: topic.watermarks()[1] == 3, "the transaction was not aborted")
    topic.reader.run()
    assert topic.values() == ["behind"]


def test_a_plan_is_exact_during_transactions(topic: Topic) -> None:
    """A plan has a fixed end, whatever is appended during the read; runs neither repeat nor miss a message."""
    writer = topic.transactional()
    expected = []
    for number in range(60):
        writer.begin_transaction()
        topic.send(writer, f"{number}")
        if number % 3 == 0:
            writer.abort_transaction(30)
        else:
            writer.commit_transaction(30)
            expected.append(f"{number}")
        if number % 7 == 0:
            plan = topic.reader.plan()
            writer.begin_transaction()
            topic.send(writer, f"{number}+")
            writer.commit_transaction(30)
            expected.append(f"{number}+")
            rows, positions = topic.reader.read(plan)
            topic.reader.rows.setdefault(TABLE, []).extend(rows.get(TABLE, []))
            topic.reader.positions |= positions
    topic.reader.run()
    assert topic.values() == expected


# -- gaps ------------------------------------------------------------------------------------------------------------


def test_compacted_topics_are_read_with_their_gaps(topic: Topic) -> None:
    topic.delete()
    topic.create(1, cleanup_policy="compact", segment_ms="100", min_cleanable_dirty_ratio="0.01", max_compaction_lag_ms="100")
    topic.reader = Reader(KafkaSource(topic.settings.model_copy(update={"batch_messages": 7})))
    producer = topic.producer()
    for number in range(100):
        topic.send(producer, f"{number}", key=f"k{number % 5}")
    plan = topic.reader.plan()
    assert plan.rows == 100

    def left() -> list[str]:
        whole = Reader(KafkaSource(topic.settings))
        whole.run()
        return [row["value"].decode() for row in whole.rows[TABLE]]

    def compacted() -> bool:
        # the active segment is never compacted: more messages roll it
        topic.send(producer, "more", key="more")
        return len(left()) < 60

    wait_for(compacted, "the topic was not compacted")
    # a plan from before, of which each range of seven offsets may be one gap
    rows, positions = topic.reader.read(plan)
    topic.reader.rows, topic.reader.positions = rows, positions
    assert topic.position() == 100
    read = [row["offset"] for row in rows.get(TABLE, [])]
    assert read == sorted(set(read))
    assert len(read) < 60
    assert {row["value"].decode() for row in rows.get(TABLE, [])} <= {str(number) for number in range(100)}
    topic.reader.run()
    assert set(topic.values()) >= {*left()} - {"more"}
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}


# -- deleted messages ------------------------------------------------------------------------------------------------


def test_retention_that_overtakes_the_reader_is_an_error_that_names_the_gap(topic: Topic) -> None:
    producer = topic.producer()
    topic.send(producer, *(f"a{n}" for n in range(10)))
    topic.reader.run()
    topic.expire_messages()
    # the deleted messages were read: nothing is lost
    assert not topic.reader.plan().tasks
    topic.send(producer, *(f"b{n}" for n in range(10)))
    topic.expire_messages()
    topic.send(producer, *(f"c{n}" for n in range(10)))
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 0: offsets 10 to 19 were deleted.*rebuild {TABLE}"):
        topic.reader.plan()
    topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    assert topic.values() == [f"a{n}" for n in range(10)] + [f"c{n}" for n in range(10)]
    assert not topic.reader.plan().tasks


def test_retention_that_overtakes_a_task_is_an_error(topic: Topic) -> None:
    topic.send(topic.producer(), *(f"a{n}" for n in range(10)))
    plan = topic.reader.plan()
    topic.expire_messages()
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 0: .* were deleted before they were read.*rebuild"):
        topic.reader.read(plan)


def test_retention_within_a_partition_that_was_added_is_an_error(topic: Topic) -> None:
    """A new partition of a topic that was read before begins at offset 0: missing messages were never read."""
    producer = topic.producer(**{"topic.metadata.refresh.interval.ms": 100})
    topic.send(producer, "a")
    topic.reader.run()
    topic.admin.create_partitions([NewPartitions(topic.name, 2)])[topic.name].result(10)
    wait_for(lambda: len(topic.admin.list_topics(timeout=10).topics[topic.name].partitions) == 2, "no partition was added")
    later = topic.producer()
    topic.send(later, "lost 0", "lost 1", partition=1)
    topic.configure(retention_ms="1")
    wait_for(lambda: topic.watermarks(1)[0] == 2, "retention deleted nothing")
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 1: offsets 0 to 1 were deleted.*rebuild {TABLE}"):
        topic.reader.plan()
    topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    assert not topic.reader.plan().tasks


def test_a_re_created_topic_is_another_topic(topic: Topic) -> None:
    topic.send(topic.producer(), *(f"a{n}" for n in range(10)))
    topic.reader.run()
    old = topic.reader.positions[TABLE]["ids"][topic.name]
    topic.delete()
    with pytest.raises(OffsetExpired, match=f"'{topic.name}' no longer exists"):
        topic.reader.plan()
    topic.create(1)
    topic.send(topic.producer(), *(f"b{n}" for n in range(20)))
    with pytest.raises(OffsetExpired, match=f"'{topic.name}' was deleted and re-created: its id was ") as raised:
        topic.reader.plan()
    # the ids are Base64: compared as text, since "+" and "/" may occur in them
    before, after = str(raised.value).split("its id was ")[1].split(". ")[0].split(" and is now ")
    assert before == old != after
    topic.reader.positions = {TABLE: restart_position(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    # messages of another topic at the same offsets come later and replace nothing
    assert topic.values() == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(20)]
    assert not topic.reader.plan().tasks


# -- timestamps ------------------------------------------------------------------------------------------------------


def test_read_messages_can_be_deleted_and_reading_continues(topic: Topic) -> None:
    writer = topic.transactional()
    topic.send(topic.producer(), "a", "b")
    writer.begin_transaction()
    topic.send(writer, "c")
    writer.commit_transaction(30)
    topic.reader.run()
    topic.send(topic.producer(), "d")
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert delete_records_before(topic.settings, topic.name, later, topic.reader.positions[TABLE] or {}) == 1
    assert topic.watermarks() == (4, 5)
    topic.reader.run()
    assert topic.values() == ["a", "b", "c", "d"]
    assert delete_records_before(topic.settings, topic.name, later, topic.reader.positions[TABLE] or {}) == 0
    assert topic.watermarks() == (5, 5)


def test_timestamps_of_every_kind_are_stored_or_null(topic: Topic) -> None:
    topic.delete()
    topic.create(1, message_timestamp_after_max_ms=str(2**63 - 1), retention_ms="-1")
    producer = topic.producer()
    given = [1, 1_700_000_000_123, 253_402_300_799_999, 253_402_300_800_000, 1_700_000_000_123_456, 2**62]
    for stamp in given:
        topic.send(producer, str(stamp), timestamp=stamp)
    rows = topic.reader.run()[TABLE]
    found = [None if row["timestamp"] is None else round(row["timestamp"].timestamp() * 1000) for row in rows]
    # producers that send microseconds are not rare; times out of range are null and stop nothing
    assert found == [1, 1_700_000_000_123, 253_402_300_799_999, None, None, None]
    assert [row["_source_time"] for row in rows] == [row["timestamp"] for row in rows]


def test_log_append_timestamps_are_stored(topic: Topic) -> None:
    topic.configure(message_timestamp_type="LogAppendTime")
    before = time.time()
    topic.send(topic.producer(), "a", timestamp=1)
    (row,) = topic.reader.run()[TABLE]
    assert before - 1 < row["timestamp"].timestamp() < time.time() + 1


# -- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_read_survives_a_broker_restart(broker: Broker, way: str) -> None:
    topic = Topic(broker, 3)
    producer = topic.producer(**{"queue.buffering.max.messages": 1_000_000})
    writer = topic.transactional()
    writer.begin_transaction()
    topic.send(writer, "never")
    writer.abort_transaction(30)
    for number in range(120_000):
        producer.produce(topic.name, f"{number:0400}".encode(), partition=number % 3)
        if number % 5000 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    source = KafkaSource(topic.settings.model_copy(update={"batch_messages": 1_000_000}))
    plan = source.plan({}, {})
    (task,) = plan.tasks
    reading = task.read()
    first = next(reading)
    assert isinstance(first, Rows)
    assert first.rows.num_rows < 120_000
    with ThreadPoolExecutor() as pool:
        rest = pool.submit(lambda: list(reading))
        getattr(broker, way)()
        broker.start()
        found = [first, *rest.result(120)]
    values = [value.as_py().decode() for item in found if isinstance(item, Rows) for value in item.rows["value"]]
    assert len(values) == 120_000
    assert set(values) == {f"{number:0400}" for number in range(120_000)}
    assert [item for item in found if isinstance(item, Reached)]
    # nothing looks deleted while the broker is starting, and the next plan is empty
    assert not source.plan({TABLE: plan.positions[TABLE]}, {}).tasks


def test_a_plan_right_after_a_crash_never_reports_deleted_offsets(topic: Topic) -> None:
    writer = topic.transactional(**{"transaction.timeout.ms": 2000})
    topic.send(topic.producer(), *(f"a{n}" for n in range(50)))
    topic.reader.run()
    writer.begin_transaction()
    topic.send(writer, "never")
    topic.broker.kill()
    with pytest.raises(SourceError, match=r"request to .* failed.*Check that the brokers are running") as error:
        topic.reader.plan()
    assert not isinstance(error.value, OffsetExpired)
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(topic.broker.start)
        while not starting.done():
            try:
                topic.reader.plan()
            except OffsetExpired:
                raise
            except SourceError:
                continue
        starting.result()
    topic.send(topic.producer(), "b")
    wait_for(lambda: topic.watermarks()[1] == 53, "the transaction from before the crash was not aborted")
    topic.reader.run()
    assert topic.values() == [f"a{n}" for n in range(50)] + ["b"]


def test_a_read_from_an_unresponsive_broker_is_an_error(topic: Topic) -> None:
    topic.send(topic.producer(), *(f"a{n}" for n in range(50)))
    (task,) = topic.reader.plan().tasks
    assert isinstance(task, OffsetRangesTask)
    topic.broker.pause()
    try:
        with pytest.raises(SourceError, match=r"no message arrived within 2 s \(brokers: 127\.0\.0\.1:\d+\)\. Check"):
            list(OffsetRangesTask(task.settings, (OffsetRange(topic.name, 0, 0, 50),), no_progress_seconds=2.0).read())
    finally:
        topic.broker.resume()
    topic.reader.run()
    assert len(topic.values()) == 50


def test_a_topic_of_another_cluster_is_detected(broker: Broker, tmp_path: Path) -> None:
    """bootstrap_servers points to a new cluster whose topic is past the position."""
    topic = Topic(broker)
    topic.send(topic.producer(), "a")
    topic.reader.run()
    with Broker(tmp_path / "other") as other:
        copy = Topic(other)
        copy.name = topic.name
        copy.create(1)
        copy.send(copy.producer(), "b", "c")
        moved = topic.settings.model_copy(update={"bootstrap_servers": other.bootstrap})
        with pytest.raises(OffsetExpired, match="was deleted and re-created"):
            KafkaSource(moved).plan(topic.reader.positions, {})
