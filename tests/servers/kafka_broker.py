"""A real Apache Kafka broker on loopback: one node in KRaft mode, with data that survive stop, kill and restart.

    with Broker(directory) as broker:
        Producer({"bootstrap.servers": broker.bootstrap})
        broker.kill()       # SIGKILL, like a crash
        broker.start()      # the same data, the same port

Needs Java and Maven; a test without them is skipped (see `programs`).
"""

from __future__ import annotations

import base64
import signal
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from servers.programs import is_listening, jars, stop_process, wait_until_ready
from support.waiting import free_port

JAVA = ("-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
LOG_LEVEL = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "num.network.threads": "2",
    "num.io.threads": "2",
    "num.recovery.threads.per.data.dir": "2",
    "auto.create.topics.enable": "false",
    "delete.topic.enable": "true",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "200",
    "group.initial.rebalance.delay.ms": "0",
    # so that retention and compaction happen within a test
    "log.retention.check.interval.ms": "500",
    "log.cleaner.backoff.ms": "200",
    "log.initial.task.delay.ms": "500",
    "log.segment.delete.delay.ms": "100",
    "log.cleaner.dedupe.buffer.size": str(8 << 20),
    # so that it answers soon after a crash: by default its session must expire and another election time out first
    "broker.heartbeat.interval.ms": "250",
    "broker.session.timeout.ms": "1500",
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1000",
    "auto.leader.rebalance.enable": "false",
}


class Broker:
    """A broker. As a context manager it is started and finally stopped.

    directory   for data, `server.properties` and `kafka.log`
    properties  additions to server.properties
    """

    def __init__(self, directory: Path, properties: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.port, self._controller = free_port(), free_port()
        self._properties = {**PROPERTIES, **(properties or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """The address, host:port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start on existing data, if any, and wait until it answers."""
        directory, classes = self.directory.absolute(), f"{jars()}/*"
        configuration, log = directory / "server.properties", directory / "kafka.log"
        if not configuration.exists():
            self._format(directory, configuration, classes)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["java", *JAVA, LOG_LEVEL, "-cp", classes, "kafka.Kafka", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
            )
        try:
            wait_until_ready(self._answers, "Kafka", self.process, log)
        except BaseException:
            stop_process(self.process, signal.SIGKILL)
            raise
        return self

    def stop(self) -> None:
        """Stop it as an operator does (SIGTERM)."""
        if self.process is not None:
            stop_process(self.process)

    def kill(self) -> None:
        """Stop it as a crash does (SIGKILL)."""
        if self.process is not None:
            stop_process(self.process, signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it (SIGSTOP) until `resume`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Unfreeze it and wait until it answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        wait_until_ready(self._answers, "Kafka", self.process, self.directory / "kafka.log")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            # the data are deleted with the test, and a frozen broker would not handle a SIGTERM
            self.kill()

    def _format(self, directory: Path, configuration: Path, classes: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        listeners = f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self._controller}"
        content = self._properties | {
            "listeners": listeners,
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{self._controller}",
            "log.dirs": str(directory / "data"),
        }
        draft = configuration.with_suffix(".draft")
        draft.write_text("".join(f"{name}={value}\n" for name, value in content.items()))
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = ["java", *JAVA, LOG_LEVEL, "-cp", classes, "kafka.tools.StorageTool", "format", "--standalone"]
        done = subprocess.run(
            [*command, f"--cluster-id={cluster}", "--config", str(draft)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=directory,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # renamed only when the storage is formatted
        draft.rename(configuration)

    def _answers(self) -> bool:
        if not is_listening(self.port):
            return False
        try:
            found = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0}).list_topics(timeout=5)
            # a broker that has not joined yet reports no controller
            return bool(found.brokers) and found.controller_id >= 0
        except KafkaException:
            return False
