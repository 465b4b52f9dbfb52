"""A small Kafka-protocol broker for the sandbox: one node, record batches stored on disk. Standard library only.

It supports what librdkafka needs to produce, fetch exact offsets, look up watermarks and timestamps, and create or empty
topics: ApiVersions, Metadata, Produce, Fetch, ListOffsets, CreateTopics, DeleteTopics, DeleteRecords, FindCoordinator,
OffsetCommit and OffsetFetch; and InitProducerId, AddPartitionsToTxn and EndTxn for idempotent and transactional producers
(with markers, aborted transactions and the last stable offset; transactions left open when the broker stops are aborted).
It has no consumer group membership, no retention and no TLS.

Why not one of the two brokers that are available as wheels: librdkafka's mock cluster keeps only the newest 5 MiB of a
partition, and tansu (in memory, so empty after a stop) returned a high watermark below the acknowledged messages: 189,664 of
200,000 right after a clean flush. A reader that relies on watermarks, as ShopSphere does, cannot work with that.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from app.kafka_broker import protocol
from app.kafka_broker.client_requests import GroupRequests, TransactionRequests
from app.kafka_broker.protocol import NONE, SUPPORTED_VERSIONS, UNSUPPORTED_VERSION, RequestReader, ResponseWriter
from app.kafka_broker.record_requests import NewRecords, RecordRequests
from app.kafka_broker.topic_requests import TopicRequests
from app.kafka_broker.topics import CommittedOffsets, Topics, Transactions

MAX_REQUEST_BYTES = 128 << 20
BUFFER_BYTES = 4 << 20

Handler = Callable[[int, RequestReader, ResponseWriter], Awaitable[bool]]
"""handler(version, request, response) -> whether a response is sent."""


class BrokerServer:
    """Answers requests about the topics below `directory`. partitions: of a topic that is created on first use."""

    def __init__(self, directory: Path, host: str, port: int, partitions: int) -> None:
        self._topics = Topics(directory, partitions)
        new_records = NewRecords()
        records = RecordRequests(self._topics, new_records)
        topics = TopicRequests(self._topics, host, port)
        groups = GroupRequests(CommittedOffsets(directory / "committed.json"), host, port)
        transactions = TransactionRequests(Transactions(self._topics), new_records)
        self._handlers: dict[int, Handler] = {
            protocol.PRODUCE: records.produce,
            protocol.FETCH: records.fetch,
            protocol.LIST_OFFSETS: records.list_offsets,
            protocol.DELETE_RECORDS: records.delete_records,
            protocol.METADATA: topics.metadata,
            protocol.CREATE_TOPICS: topics.create_topics,
            protocol.DELETE_TOPICS: topics.delete_topics,
            protocol.FIND_COORDINATOR: groups.find_coordinator,
            protocol.OFFSET_COMMIT: groups.offset_commit,
            protocol.OFFSET_FETCH: groups.offset_fetch,
            protocol.INIT_PRODUCER_ID: transactions.init_producer_id,
            protocol.ADD_PARTITIONS_TO_TXN: transactions.add_partitions_to_txn,
            protocol.END_TXN: transactions.end_txn,
            protocol.API_VERSIONS: _api_versions,
        }

    def close(self) -> None:
        self._topics.close()

    async def respond(self, data: bytes) -> list[bytes] | None:
        """Return the response to one request, as parts to send, or None when none is wanted. Raises ValueError."""
        request, response = RequestReader(data), ResponseWriter()
        key, version, correlation = request.int16(), request.int16(), request.int32()
        request.nullable_text()
        response.int32(correlation)
        lowest, highest = SUPPORTED_VERSIONS.get(key, (0, -1))
        if not lowest <= version <= highest:
            if key != protocol.API_VERSIONS:
                raise ValueError(f"request {key} version {version} is not supported")
            response.int16(UNSUPPORTED_VERSION)
            _write_versions(response)
            return response.parts
        request.compact = response.compact = version >= protocol.FLEXIBLE_FROM.get(key, version + 1)
        request.skip_tags()
        response.no_tags()
        return response.parts if await self._handlers[key](version, request, response) else None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, in their order."""
        try:
            while True:
                (length,) = struct.unpack(">i", await reader.readexactly(4))
                if not 8 <= length <= MAX_REQUEST_BYTES:
                    raise ValueError(f"request of {length} bytes")
                parts = await self.respond(await reader.readexactly(length))
                if parts is not None:
                    writer.write(struct.pack(">i", sum(map(len, parts))) + b"".join(parts))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            print(f"connection closed: {error}", flush=True)
        finally:
            writer.close()


async def _api_versions(version: int, request: RequestReader, response: ResponseWriter) -> bool:
    """Write the supported requests and their versions."""
    response.int16(NONE)
    if version <= 2:
        _write_versions(response)
        if version >= 1:
            response.int32(0)
        return True
    # from version 3 on the body is flexible although the header is not
    response.raw(bytes([len(SUPPORTED_VERSIONS) + 1]))
    for key, (lowest, highest) in sorted(SUPPORTED_VERSIONS.items()):
        response.int16(key).int16(lowest).int16(highest).raw(b"\0")
    response.int32(0).raw(b"\0")
    return True


def _write_versions(response: ResponseWriter) -> None:
    listed = sorted(SUPPORTED_VERSIONS.items())
    response.items(listed, lambda item: response.int16(item[0]).int16(item[1][0]).int16(item[1][1]))


async def run(directory: Path, host: str, port: int, partitions: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    broker = BrokerServer(directory, host, port, partitions)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await asyncio.start_server(broker.serve, host, port, limit=BUFFER_BYTES)
    try:
        await stopped.wait()
    finally:
        server.close()
        broker.close()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="A small Kafka-protocol broker")
    parser.add_argument("--directory", type=Path, required=True, help="directory of the topics")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--partitions", type=int, default=4, help="partitions of a topic created on first use")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.directory, arguments.host, arguments.port, arguments.partitions))
