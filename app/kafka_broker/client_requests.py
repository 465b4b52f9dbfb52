"""The requests about consumer groups' offsets and about producers' transactions."""

from __future__ import annotations

from app.kafka_broker.protocol import NONE, RequestReader, ResponseWriter
from app.kafka_broker.record_batch import ABORT, COMMIT
from app.kafka_broker.record_requests import NewRecords
from app.kafka_broker.topic_requests import NODE_ID
from app.kafka_broker.topics import CommittedOffsets, Transactions


class GroupRequests:
    """Answers FindCoordinator, OffsetCommit and OffsetFetch. There is no group membership."""

    def __init__(self, offsets: CommittedOffsets, host: str, port: int) -> None:
        self._offsets, self._host, self._port = offsets, host, port

    async def find_coordinator(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return this node."""
        if version >= 1:
            response.int32(0)
        response.int16(NONE)
        if version >= 1:
            response.text(None)
        response.int32(NODE_ID).text(self._host).int32(self._port)
        return True

    async def offset_commit(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Store a group's offsets."""
        group = request.text()
        request.int32()
        request.nullable_text()
        request.int64()

        def partition(topic: str) -> int:
            number, offset = request.int32(), request.int64()
            request.nullable_text()
            self._offsets.set(group, topic, number, offset)
            return number

        def topic() -> tuple[str, list[int]]:
            name = request.text()
            return name, request.items(lambda: partition(name))

        results = request.items(topic)
        self._offsets.save()
        if version >= 3:
            response.int32(0)
        response.items(
            results, lambda item: response.text(item[0]).items(item[1], lambda number: response.int32(number).int16(NONE))
        )
        return True

    async def offset_fetch(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return a group's offsets."""
        group = request.text()
        requested = request.items(lambda: (request.text(), request.items(request.int32)))
        if version >= 3:
            response.int32(0)

        def write(topic: str, number: int) -> None:
            response.int32(number).int64(self._offsets.get(group, topic, number)).text("").int16(NONE)

        response.items(requested, lambda item: response.text(item[0]).items(item[1], lambda number: write(item[0], number)))
        if version >= 2:
            response.int16(NONE)
        return True


class TransactionRequests:
    """Answers InitProducerId, AddPartitionsToTxn and EndTxn."""

    def __init__(self, transactions: Transactions, new_records: NewRecords) -> None:
        self._transactions, self._new_records = transactions, new_records

    async def init_producer_id(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return a producer id and epoch."""
        producer, epoch = self._transactions.init_producer(request.nullable_text())
        self._new_records.notify()
        response.int32(0).int16(NONE).int64(producer).int16(epoch)
        return True

    async def add_partitions_to_txn(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Add partitions to a transaction."""
        transactional_id, producer, epoch = request.text(), request.int64(), request.int16()
        error = self._transactions.check(transactional_id, producer, epoch)

        def write(topic: str, number: int) -> None:
            result = error if error != NONE else self._transactions.add_partition(producer, topic, number)
            response.int32(number).int16(result)

        requested = request.items(lambda: (request.text(), request.items(request.int32)))
        response.int32(0)
        response.items(requested, lambda item: response.text(item[0]).items(item[1], lambda number: write(item[0], number)))
        return True

    async def end_txn(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Commit or abort a transaction."""
        transactional_id, producer, epoch, commit = request.text(), request.int64(), request.int16(), request.int8()
        error = self._transactions.check(transactional_id, producer, epoch)
        if error == NONE:
            self._transactions.end(producer, epoch, COMMIT if commit else ABORT)
            self._new_records.notify()
        response.int32(0).int16(error)
        return True
