"""The sandbox's servers: started, stopped, restarted, and never confused with another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pymongo
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from app.sandbox import servers as sandbox_servers
from app.sandbox.servers import Addresses, any_running, running, start_servers, stop_servers
from lakehouse.errors import SandboxError


def test_data_and_ports_survive_a_stop(tmp_path: Path) -> None:
    addresses = start_servers(tmp_path)
    try:
        assert running(tmp_path) == addresses
        with psycopg.connect(addresses.postgres_dsn) as connection:
            assert connection.execute("SHOW wal_level").fetchone() == ("logical",)
            connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        with pymongo.MongoClient[dict[str, object]](addresses.mongo_uri) as client:
            client.shopsphere.kept.insert_one({"_id": 1})
        _produce(addresses, "kept", ["a", "b"])
    finally:
        assert len(stop_servers(tmp_path)) == 3
    assert running(tmp_path) is None
    assert stop_servers(tmp_path) == []
    again = start_servers(tmp_path)
    try:
        assert again == addresses
        with psycopg.connect(again.postgres_dsn) as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
        with pymongo.MongoClient[dict[str, object]](again.mongo_uri) as client:
            assert client.shopsphere.kept.count_documents({}) == 1
        _produce(again, "kept", ["c"])
        assert _consume(again, "kept", 0) == ["a", "b", "c"]
    finally:
        stop_servers(tmp_path)


def test_servers_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from app.sandbox.servers import start_servers; start_servers(Path(sys.argv[1]))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=root, timeout=120)
    try:
        addresses = running(tmp_path)
        assert addresses is not None
        with psycopg.connect(addresses.postgres_dsn) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        assert len(stop_servers(tmp_path)) == 3


def test_a_recycled_process_id_is_not_signalled(tmp_path: Path) -> None:
    directory = tmp_path / "sandbox"
    directory.mkdir()
    # this process has the id, but another start time
    mine = {"pid": os.getpid(), "started": "long ago", "port": 1}
    state = {"password": "x", "ports": {}, "processes": dict.fromkeys(("postgres", "mongo", "kafka"), mine)}
    (directory / "servers.json").write_text(json.dumps(state))
    assert any_running(tmp_path) == []
    assert stop_servers(tmp_path) == []


def test_a_server_that_does_not_start_is_named_and_the_others_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no broker today')"]
    monkeypatch.setattr(sandbox_servers, "_kafka_command", lambda _directory, _host, _port: command)
    with pytest.raises(SandboxError, match="Kafka broker did not start: no broker today"):
        start_servers(tmp_path)
    assert any_running(tmp_path) == []


def test_servers_listen_on_the_given_host_and_keep_it(tmp_path: Path) -> None:
    host = "127.0.0.2"
    try:
        start_servers(tmp_path)
        stop_servers(tmp_path)
        addresses = start_servers(tmp_path, host=host)
        assert all(host in address for address in (addresses.postgres_dsn, addresses.mongo_uri, addresses.kafka_bootstrap))
        with psycopg.connect(addresses.postgres_dsn) as connection:
            assert connection.execute("SELECT inet_server_addr()").fetchone()
        metadata = AdminClient({"bootstrap.servers": addresses.kafka_bootstrap}).list_topics(timeout=10)
        assert {broker.host for broker in metadata.brokers.values()} == {host}
        assert running(tmp_path) == addresses
    finally:
        stop_servers(tmp_path)
    with pytest.raises(SandboxError, match=r"198\.51\.100\.1 is not an address of this machine"):
        start_servers(tmp_path, host="198.51.100.1")


def test_the_broker_returns_exact_offsets(servers: Addresses) -> None:
    topic = "exact"
    admin = AdminClient({"bootstrap.servers": servers.kafka_bootstrap})
    for made in admin.create_topics([NewTopic(topic, 2, 1)]).values():
        made.result(10)
    _produce(servers, topic, [str(number) for number in range(5000)], compression="zstd")
    assert _consume(servers, topic, 0) == [str(number) for number in range(5000)]
    assert _consume(servers, topic, 4321)[:2] == ["4321", "4322"]
    # What is deleted is out of range, not silently skipped.
    for deleted in admin.delete_records([TopicPartition(topic, 0, 100)]).values():
        assert deleted.result(10).low_watermark == 100
    consumer = _consumer(servers)
    assert consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=10) == (100, 5000)
    consumer.assign([TopicPartition(topic, 0, 50)])
    (message,) = consumer.consume(1, timeout=10)
    assert message.error().code() == KafkaError._AUTO_OFFSET_RESET
    consumer.close()
    for gone in admin.delete_topics([topic]).values():
        gone.result(10)


def test_the_broker_finds_offsets_by_time_and_stores_commits(servers: Addresses) -> None:
    topic = "timed"
    for time in (1_000, 2_000, 3_000):
        _produce(servers, topic, [str(time)], timestamp=time)
    consumer = _consumer(servers)
    (found,) = consumer.offsets_for_times([TopicPartition(topic, 0, 1_500)], timeout=10)
    assert found.offset == 1
    consumer.commit(offsets=[TopicPartition(topic, 0, 2)], asynchronous=False)
    (committed,) = consumer.committed([TopicPartition(topic, 0)], timeout=10)
    assert committed.offset == 2
    consumer.close()


@pytest.mark.slow
def test_transactions_are_visible_when_committed_and_never_when_aborted(servers: Addresses) -> None:
    topic = "transactions"
    producer = Producer({"bootstrap.servers": servers.kafka_bootstrap, "transactional.id": "t", "log_level": 0})
    producer.init_transactions(10)
    for number in range(4):
        producer.begin_transaction()
        producer.produce(topic, str(number), partition=0)
        producer.flush(10)
        if number % 2:
            producer.abort_transaction(10)
        else:
            producer.commit_transaction(10)
    producer.begin_transaction()
    producer.produce(topic, "open", partition=0)
    producer.flush(10)
    plain = _consumer(servers)
    # Every message and every marker has an offset of its own; what is open is not stable yet.
    assert plain.get_watermark_offsets(TopicPartition(topic, 0), timeout=10) == (0, 8)
    plain.assign([TopicPartition(topic, 0, 0)])
    assert [message.value() for message in plain.consume(3, timeout=3)] == [b"0", b"2"]
    plain.close()
    # A second producer of that name fences the first one off and aborts what it left.
    second = Producer({"bootstrap.servers": servers.kafka_bootstrap, "transactional.id": "t", "log_level": 0})
    second.init_transactions(10)
    second.begin_transaction()
    second.produce(topic, "last", partition=0)
    second.commit_transaction(10)
    plain = _consumer(servers)
    plain.assign([TopicPartition(topic, 0, 0)])
    found = [(message.offset(), message.value()) for message in plain.consume(4, timeout=3)]
    assert found == [(0, b"0"), (4, b"2"), (10, b"last")]
    plain.close()
    with pytest.raises(KafkaException):
        producer.commit_transaction(10)


def test_a_torn_batch_is_cut_off(tmp_path: Path) -> None:
    addresses = start_servers(tmp_path)
    _produce(addresses, "torn", ["whole"])
    stop_servers(tmp_path)
    log = tmp_path / "sandbox" / "kafka" / "torn" / "0.log"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[: len(whole) // 2])
    addresses = start_servers(tmp_path)
    try:
        _produce(addresses, "torn", ["next"])
        assert _consume(addresses, "torn", 0) == ["whole", "next"]
    finally:
        stop_servers(tmp_path)


def _produce(addresses: Addresses, topic: str, values: list[str], *, compression: str = "none", timestamp: int = 0) -> None:
    producer = Producer(
        {
            "bootstrap.servers": addresses.kafka_bootstrap,
            "enable.idempotence": True,
            "compression.type": compression,
            "log_level": 0,
        }
    )
    for value in values:
        producer.produce(topic, value, partition=0, timestamp=timestamp)
    assert producer.flush(30) == 0


def _consumer(addresses: Addresses) -> Consumer:
    settings = {"bootstrap.servers": addresses.kafka_bootstrap, "group.id": "test", "log_level": 0}
    return Consumer(settings | {"auto.offset.reset": "error", "enable.auto.commit": False})


def _consume(addresses: Addresses, topic: str, start: int) -> list[str]:
    consumer = _consumer(addresses)
    _, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=10)
    consumer.assign([TopicPartition(topic, 0, start)])
    found: list[str] = []
    while start + len(found) < high:
        for message in consumer.consume(high - start - len(found), timeout=5):
            assert message.error() is None
            assert message.offset() == start + len(found)
            found.append((message.value() or b"").decode())
    consumer.close()
    return found
