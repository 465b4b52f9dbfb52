"""The requests about topics: Metadata, CreateTopics, DeleteTopics."""

from __future__ import annotations

from app.kafka_broker.protocol import (
    NONE,
    OPERATIONS_NOT_REQUESTED,
    TOPIC_ALREADY_EXISTS,
    UNKNOWN_TOPIC_OR_PARTITION,
    RequestReader,
    ResponseWriter,
)
from app.kafka_broker.topics import Topics

NODE_ID = 1
CLUSTER_ID = "shopsphere-sandbox"


class TopicRequests:
    """Answers the requests about topics. host, port: the address that clients are referred to."""

    def __init__(self, topics: Topics, host: str, port: int) -> None:
        self._topics, self._host, self._port = topics, host, port

    async def metadata(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Return this node, and topics with their partitions. Requested topics are created when the client allows it."""
        by_id = {identity: topic for topic, identity in self._topics.ids.items()}

        def requested_name() -> str:
            identity = request.uuid() if version >= 10 else bytes(16)
            name = request.nullable_text()
            request.skip_tags()
            return name if name is not None else by_id.get(identity, "")

        requested = request.nullable_items(requested_name)
        names = self._topics.names() if requested is None else requested
        create = bool(request.int8()) if version >= 4 else True
        if version >= 3:
            response.int32(0)
        response.items([NODE_ID], lambda node: self._write_node(response, node))
        if version >= 2:
            response.text(CLUSTER_ID)
        response.int32(NODE_ID)
        response.items(names, lambda topic: self._write_topic(response, version, topic, create))
        if 8 <= version <= 10:
            response.int32(OPERATIONS_NOT_REQUESTED)
        response.no_tags()
        return True

    def _write_node(self, response: ResponseWriter, node: int) -> None:
        response.int32(node).text(self._host).int32(self._port).text(None).no_tags()

    def _write_topic(self, response: ResponseWriter, version: int, topic: str, create: bool) -> None:
        error = NONE
        if topic not in self._topics:
            error = self._topics.create(topic, -1) if create else UNKNOWN_TOPIC_OR_PARTITION
        response.int16(error).text(topic)
        if version >= 10:
            response.raw(self._topics.ids.get(topic, bytes(16)))
        response.int8(0)
        partitions = range(len(self._topics.partitions(topic)))
        response.items(partitions, lambda number: self._write_partition(response, version, number))
        if version >= 8:
            response.int32(OPERATIONS_NOT_REQUESTED)
        response.no_tags()

    def _write_partition(self, response: ResponseWriter, version: int, number: int) -> None:
        response.int16(NONE).int32(number).int32(NODE_ID)
        if version >= 7:
            response.int32(-1)
        response.items([NODE_ID], response.int32).items([NODE_ID], response.int32)
        if version >= 5:
            response.items([], response.int32)
        response.no_tags()

    async def create_topics(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Create topics, or only check that they can be created."""

        def topic() -> tuple[str, int]:
            name, partitions = request.text(), request.int32()
            request.int16()
            assigned = request.items(lambda: (request.int32(), request.items(request.int32)))
            request.items(lambda: (request.nullable_text(), request.nullable_text()))
            return name, len(assigned) or partitions

        requested = request.items(topic)
        request.int32()
        validate_only = bool(request.int8()) if version >= 1 else False
        if version >= 2:
            response.int32(0)

        def write(item: tuple[str, int]) -> None:
            name, partitions = item
            if validate_only:
                error = TOPIC_ALREADY_EXISTS if name in self._topics else NONE
            else:
                error = self._topics.create(name, partitions)
            response.text(name).int16(error)
            if version >= 1:
                response.text(None)

        response.items(requested, write)
        return True

    async def delete_topics(self, version: int, request: RequestReader, response: ResponseWriter) -> bool:
        """Delete topics."""
        requested = request.items(request.text)
        if version >= 1:
            response.int32(0)
        response.items(requested, lambda topic: response.text(topic).int16(self._topics.delete(topic)))
        return True
