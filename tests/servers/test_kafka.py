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
from lakehouse.source import Reached, Rows, resnapshot
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
def test_what_was_committed_is_read_and_what_was_aborted_is_not(topic: Topic, batch: int) -> None:
    """`batch` cuts the range within transactions, at their markers and not at all."""
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
    # 24 messages and 6 markers: the last offset is a marker, after messages that nobody may see
    assert topic.position() == topic.ends()[1] == 30
    assert topic.reader.source.lag(topic.reader.positions) == {TABLE: "0 messages"}
    assert not topic.reader.plan().tasks


def test_nothing_but_aborted_messages_is_not_lag_forever(topic: Topic) -> None:
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


def test_an_open_transaction_holds_back_what_is_behind_it_and_loses_nothing(topic: Topic) -> None:
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
    wait_for(lambda: topic.ends()[1] == 3, "the transaction is not aborted")
    topic.reader.run()
    assert topic.values() == ["behind"]


def test_a_plan_is_exact_while_transactions_go_on(topic: Topic) -> None:
    """The end is that of the plan, whatever is appended while it is read; runs overlap no message and leave none out."""
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


# -- holes -----------------------------------------------------------------------------------------------------------


def test_compacted_topics_are_read_with_their_holes(topic: Topic) -> None:
    topic.delete()
    topic.make(1, cleanup_policy="compact", segment_ms="100", min_cleanable_dirty_ratio="0.01", max_compaction_lag_ms="100")
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
        # the segment that is written to is never compacted: what comes makes another one
        topic.send(producer, "more", key="more")
        return len(left()) < 60

    wait_for(compacted, "the topic is not compacted")
    # a plan of before, each of whose ranges of seven offsets may be one hole
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


# -- what the broker forgot ------------------------------------------------------------------------------------------


def test_retention_that_overtakes_the_reader_is_an_error_that_names_the_gap(topic: Topic) -> None:
    producer = topic.producer()
    topic.send(producer, *(f"a{n}" for n in range(10)))
    topic.reader.run()
    topic.forget()
    # what is gone was read: nothing is lost
    assert not topic.reader.plan().tasks
    topic.send(producer, *(f"b{n}" for n in range(10)))
    topic.forget()
    topic.send(producer, *(f"c{n}" for n in range(10)))
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 0: offsets 10 to 19 were deleted.*rebuild {TABLE}"):
        topic.reader.plan()
    topic.reader.positions = {TABLE: resnapshot(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    assert topic.values() == [f"a{n}" for n in range(10)] + [f"c{n}" for n in range(10)]
    assert not topic.reader.plan().tasks


def test_retention_that_overtakes_a_task_is_an_error(topic: Topic) -> None:
    topic.send(topic.producer(), *(f"a{n}" for n in range(10)))
    plan = topic.reader.plan()
    topic.forget()
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 0: .* were deleted before they were read.*rebuild"):
        topic.reader.read(plan)


def test_retention_within_a_partition_that_was_added_is_an_error(topic: Topic) -> None:
    """Of a topic that was read before, a new partition begins at 0: what is missing there was never read."""
    producer = topic.producer(**{"topic.metadata.refresh.interval.ms": 100})
    topic.send(producer, "a")
    topic.reader.run()
    topic.admin.create_partitions([NewPartitions(topic.name, 2)])[topic.name].result(10)
    wait_for(lambda: len(topic.admin.list_topics(timeout=10).topics[topic.name].partitions) == 2, "no partition is added")
    later = topic.producer()
    topic.send(later, "lost 0", "lost 1", partition=1)
    topic.configure(retention_ms="1")
    wait_for(lambda: topic.ends(1)[0] == 2, "retention deletes nothing")
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}', partition 1: offsets 0 to 1 were deleted.*rebuild {TABLE}"):
        topic.reader.plan()
    topic.reader.positions = {TABLE: resnapshot(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    assert not topic.reader.plan().tasks


def test_a_topic_deleted_and_created_anew_is_another(topic: Topic) -> None:
    topic.send(topic.producer(), *(f"a{n}" for n in range(10)))
    topic.reader.run()
    old = topic.reader.positions[TABLE]["ids"][topic.name]
    topic.delete()
    with pytest.raises(OffsetExpired, match=f"'{topic.name}' no longer exists"):
        topic.reader.plan()
    topic.make(1)
    topic.send(topic.producer(), *(f"b{n}" for n in range(20)))
    with pytest.raises(OffsetExpired, match=rf"'{topic.name}' was deleted and re-created: its id was {old} and is now (?!{old})"):
        topic.reader.plan()
    topic.reader.positions = {TABLE: resnapshot(topic.reader.positions[TABLE])}  # type: ignore[dict-item]
    topic.reader.run()
    # another topic's messages at the same offsets: they come after, and replace nothing
    assert topic.values() == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(20)]
    assert not topic.reader.plan().tasks


# -- timestamps ------------------------------------------------------------------------------------------------------


def test_what_was_read_can_be_deleted_and_reading_goes_on(topic: Topic) -> None:
    writer = topic.transactional()
    topic.send(topic.producer(), "a", "b")
    writer.begin_transaction()
    topic.send(writer, "c")
    writer.commit_transaction(30)
    topic.reader.run()
    topic.send(topic.producer(), "d")
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert delete_records_before(topic.settings, topic.name, later, topic.reader.positions[TABLE] or {}) == 1
    assert topic.ends() == (4, 5)
    topic.reader.run()
    assert topic.values() == ["a", "b", "c", "d"]
    assert delete_records_before(topic.settings, topic.name, later, topic.reader.positions[TABLE] or {}) == 0
    assert topic.ends() == (5, 5)


def test_timestamps_of_every_kind_are_stored_or_null(topic: Topic) -> None:
    topic.delete()
    topic.make(1, message_timestamp_after_max_ms=str(2**63 - 1), retention_ms="-1")
    producer = topic.producer()
    given = [1, 1_700_000_000_123, 253_402_300_799_999, 253_402_300_800_000, 1_700_000_000_123_456, 2**62]
    for stamp in given:
        topic.send(producer, str(stamp), timestamp=stamp)
    rows = topic.reader.run()[TABLE]
    found = [None if row["timestamp"] is None else round(row["timestamp"].timestamp() * 1000) for row in rows]
    # producers that send microseconds are not rare; what no date can say is null, and stops nothing
    assert found == [1, 1_700_000_000_123, 253_402_300_799_999, None, None, None]
    assert [row["_source_time"] for row in rows] == [row["timestamp"] for row in rows]


def test_the_brokers_own_timestamps_are_taken(topic: Topic) -> None:
    topic.configure(message_timestamp_type="LogAppendTime")
    before = time.time()
    topic.send(topic.producer(), "a", timestamp=1)
    (row,) = topic.reader.run()[TABLE]
    assert before - 1 < row["timestamp"].timestamp() < time.time() + 1


# -- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_broker_that_starts_again_within_a_read_is_read_to_the_end(broker: Broker, way: str) -> None:
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
    # whatever the broker says while it is starting, nothing looks deleted, and the next plan has nothing to do
    assert not source.plan({TABLE: plan.positions[TABLE]}, {}).tasks


def test_a_plan_right_after_a_crash_never_takes_offsets_for_gone(topic: Topic) -> None:
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
    wait_for(lambda: topic.ends()[1] == 53, "the transaction of before the crash is not aborted")
    topic.reader.run()
    assert topic.values() == [f"a{n}" for n in range(50)] + ["b"]


def test_a_broker_that_stays_away_ends_a_read_with_an_error(topic: Topic) -> None:
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


def test_two_brokers_data_are_not_taken_for_the_same(broker: Broker, tmp_path: Path) -> None:
    """bootstrap_servers moved to a new cluster, whose topic goes on past our offset."""
    topic = Topic(broker)
    topic.send(topic.producer(), "a")
    topic.reader.run()
    with Broker(tmp_path / "other") as other:
        copy = Topic(other)
        copy.name = topic.name
        copy.make(1)
        copy.send(copy.producer(), "b", "c")
        moved = topic.settings.model_copy(update={"bootstrap_servers": other.bootstrap})
        with pytest.raises(OffsetExpired, match="was deleted and re-created"):
            KafkaSource(moved).plan(topic.reader.positions, {})
