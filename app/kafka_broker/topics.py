"""Topics in a directory, committed offsets, and producers with their transactions."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from app.kafka_broker.partition_log import PartitionLog
from app.kafka_broker.protocol import (
    INVALID_PARTITIONS,
    INVALID_PRODUCER_EPOCH,
    INVALID_TOPIC,
    INVALID_TXN_STATE,
    NONE,
    TOPIC_ALREADY_EXISTS,
    UNKNOWN_TOPIC_OR_PARTITION,
)
from app.kafka_broker.record_batch import ABORT


class Topics:
    """Topics below a directory, one folder each, with the topic's id in the file `id`. default_partitions: of a new topic."""

    def __init__(self, directory: Path, default_partitions: int) -> None:
        self._directory, self._default_partitions = directory, default_partitions
        self._partitions: dict[str, list[PartitionLog]] = {}
        self.ids: dict[str, bytes] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
            files = sorted(folder.glob("*.log"), key=lambda path: int(path.stem))
            self._partitions[unquote(folder.name)] = [PartitionLog(path) for path in files]
            self.ids[unquote(folder.name)] = _topic_id(folder)

    def __contains__(self, topic: str) -> bool:
        return topic in self._partitions

    def names(self) -> list[str]:
        return sorted(self._partitions)

    def partitions(self, topic: str) -> list[PartitionLog]:
        return self._partitions.get(topic, [])

    def partition(self, topic: str, number: int) -> PartitionLog | None:
        partitions = self.partitions(topic)
        return partitions[number] if 0 <= number < len(partitions) else None

    def logs(self) -> Iterator[PartitionLog]:
        """Yield the log of every partition of every topic."""
        for partitions in self._partitions.values():
            yield from partitions

    def create(self, topic: str, partitions: int) -> int:
        """Create a topic and return an error code. partitions: -1 for the default."""
        if not topic or len(topic) > 200 or topic in (".", ".."):
            return INVALID_TOPIC
        if topic in self._partitions:
            return TOPIC_ALREADY_EXISTS
        count = self._default_partitions if partitions == -1 else partitions
        if not 1 <= count <= 1000:
            return INVALID_PARTITIONS
        folder = self._directory / quote(topic, safe="").replace(".", "%2E")
        folder.mkdir(parents=True, exist_ok=True)
        self._partitions[topic] = [PartitionLog(folder / f"{number}.log") for number in range(count)]
        self.ids[topic] = _topic_id(folder)
        return NONE

    def delete(self, topic: str) -> int:
        """Delete a topic and its files, and return an error code."""
        partitions = self._partitions.pop(topic, None)
        if partitions is None:
            return UNKNOWN_TOPIC_OR_PARTITION
        del self.ids[topic]
        for partition in partitions:
            partition.close()
        shutil.rmtree(partitions[0].path.parent)
        return NONE

    def close(self) -> None:
        for partition in self.logs():
            partition.close()


def _topic_id(folder: Path) -> bytes:
    """Return the id of the topic in this folder; a new one when it has none yet."""
    file = folder / "id"
    if not file.exists():
        file.write_bytes(uuid.uuid4().bytes)
    return file.read_bytes()


class CommittedOffsets:
    """The offsets that consumer groups have committed, in one file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offsets: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}

    def set(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Set an offset; `save` writes it."""
        self._offsets[json.dumps([group, topic, partition])] = offset

    def get(self, group: str, topic: str, partition: int) -> int:
        """Return an offset, or -1 when none was committed."""
        return self._offsets.get(json.dumps([group, topic, partition]), -1)

    def save(self) -> None:
        temporary = self._file.with_suffix(".json.new")
        temporary.write_text(json.dumps(self._offsets))
        temporary.replace(self._file)


class Transactions:
    """Producer ids and epochs, and the partitions of open transactions. Those left open when the broker stopped are aborted."""

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._producers: dict[str, tuple[int, int]] = {}
        self._partitions: dict[int, set[tuple[str, int]]] = {}
        self._last_producer = 1 + max((producer for log in topics.logs() for producer in log.producers), default=0)
        for log in topics.logs():
            for producer, (epoch, _) in list(log.open.items()):
                log.end_transaction(producer, epoch, ABORT, _now())

    def init_producer(self, transactional_id: str | None) -> tuple[int, int]:
        """Return (producer id, epoch). An earlier producer with the same id is fenced and its transaction aborted."""
        producer, epoch = self._producers.get(transactional_id, (0, -1)) if transactional_id else (0, -1)
        if epoch < 0:
            self._last_producer += 1
            producer = self._last_producer
        else:
            self.end(producer, epoch, ABORT)
        if transactional_id:
            self._producers[transactional_id] = (producer, epoch + 1)
        return producer, epoch + 1

    def check(self, transactional_id: str, producer: int, epoch: int) -> int:
        """Return an error code unless this is the newest producer of the transactional id."""
        known = self._producers.get(transactional_id)
        if known is None or known[0] != producer:
            return INVALID_TXN_STATE
        return NONE if known[1] == epoch else INVALID_PRODUCER_EPOCH

    def add_partition(self, producer: int, topic: str, number: int) -> int:
        """Add a partition to a producer's transaction, and return an error code."""
        if self._topics.partition(topic, number) is None:
            return UNKNOWN_TOPIC_OR_PARTITION
        self._partitions.setdefault(producer, set()).add((topic, number))
        return NONE

    def end(self, producer: int, epoch: int, marker: int) -> None:
        """Write the marker to every partition of a producer's transaction."""
        for topic, number in sorted(self._partitions.pop(producer, set())):
            log = self._topics.partition(topic, number)
            if log is not None:
                log.end_transaction(producer, epoch, marker, _now())


def _now() -> int:
    return int(time.time() * 1000)
