"""Changes of the collection by change stream.

Rows of changes have positions that begin with '2': they sort after the initial read ('0') and watermark reads ('1') of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from bson.datetime_ms import DatetimeMS
from bson.timestamp import Timestamp
from pymongo.change_stream import CollectionChangeStream
from pymongo.collection import Collection

from lakehouse.source import Reached, Rows
from pipelines.bronze.tables import MILLISECONDS
from pipelines.settings import MongoSettings
from pipelines.sources.epochs import epoch_prefix
from pipelines.sources.mongo.connection import Document, is_standalone, open_collection
from pipelines.sources.mongo.documents import TABLE, DocumentRow, bronze_table, document_row, id_text, row_batches
from pipelines.sources.mongo.errors import resume_token_expired
from pipelines.sources.mongo.resume_tokens import (
    MAX_AWAIT_MILLISECONDS,
    ResumeToken,
    current_token,
    sortable_token,
    stream_position,
    token_number,
)

OPERATIONS = {"insert": "c", "update": "u", "replace": "u", "delete": "d", "drop": "t", "rename": "t", "dropDatabase": "t"}
MAX_COUNTED_CHANGES = 1000
"""Pending changes are counted up to this many. Emulated change streams keep as many."""
CHANGES_PER_BATCH = 1000


@dataclass(frozen=True)
class ChangeStreamTask:
    """Reads the change stream from a resume token until it is quiet, or past `upto`, its end when the task was planned.

    collection  UUID of the collection that was read so far, if the server reports it
    """

    settings: MongoSettings = field(repr=False)
    token: ResumeToken
    upto: str
    epoch: int = 0
    collection: str | None = None

    def read(self) -> Iterator[Rows | Reached]:
        """Give the changes in batches, then the position reached."""
        with open_collection(self.settings) as collection, open_change_stream(collection, self.token) as opened:
            reached: list[ResumeToken] = [self.token]
            changes = self._changes(opened.stream, reached)
            rows = _looked_up_rows(collection, changes, self.epoch) if opened.emulated else _change_rows(changes, self.epoch)
            for batch in row_batches(rows):
                yield Rows(TABLE, bronze_table(batch))
        yield Reached(TABLE, stream_position(reached[0], self.epoch, self.collection))

    def _changes(self, stream: CollectionChangeStream[Document], reached: list[ResumeToken]) -> Iterator[Document]:
        """Give the changes; the only item of `reached` is kept at the token of the last one."""
        empty_answers = 0
        while stream.alive:
            change = stream.try_next()
            if change is None:
                empty_answers += 1
                if stream.resume_token is not None:
                    reached[0] = stream.resume_token
                if empty_answers == 2 or sortable_token(reached[0]) >= self.upto:
                    return
                continue
            empty_answers = 0
            if sortable_token(change["_id"]) > self.upto:
                return
            reached[0] = change["_id"]
            yield change


@dataclass(frozen=True)
class OpenChangeStream:
    """An open change stream. emulated: the server is not a replica set, so it only emulates change streams."""

    stream: CollectionChangeStream[Document]
    emulated: bool


@contextmanager
def open_change_stream(collection: Collection[Document], token: ResumeToken) -> Iterator[OpenChangeStream]:
    """Open the change stream after a token.

    An emulation drops changes that its slowest open stream has passed, although they are not committed here yet. A second stream
    that stays at the token prevents that.
    """
    emulated = is_standalone(collection)
    options: dict[str, Any] = {
        "full_document": "updateLookup",
        "max_await_time_ms": MAX_AWAIT_MILLISECONDS,
        "batch_size": CHANGES_PER_BATCH,
    }
    with ExitStack() as stack:
        if emulated:
            stack.callback(collection.watch(start_after=token, **options).close)
        stream = collection.watch(start_after=token, **options)
        stack.callback(stream.close)
        yield OpenChangeStream(stream, emulated)


def pending_changes(collection: Collection[Document], token: ResumeToken) -> tuple[int, str]:
    """Return how many changes come after the token (counted up to MAX_COUNTED_CHANGES), and where the stream ends now.

    Raises OffsetExpired when changes after the token may be missing.
    """
    end = current_token(collection, required=True)
    assert end is not None
    upto = sortable_token(end)
    with open_change_stream(collection, token) as opened:
        if opened.emulated and sortable_token(token) > upto:
            raise resume_token_expired("the stream ends before it: the server was re-created")
        count, first = 0, None
        while count < MAX_COUNTED_CHANGES and opened.stream.alive and (change := opened.stream.try_next()) is not None:
            count += 1
            first = first or change["_id"]
            upto = max(upto, sortable_token(change["_id"]))
        # MongoDB refuses an expired token; an emulation starts at the oldest of the 1000 changes that it keeps
        full = opened.emulated and count == MAX_COUNTED_CHANGES
        if full and first is not None and token_number(first) > token_number(token) + 1:
            raise resume_token_expired("the server has discarded the changes after it")
    return count, upto


def _change_rows(changes: Iterable[Document], epoch: int) -> Iterator[DocumentRow]:
    """Give the rows of changes with the documents that the server looked up."""
    for change in changes:
        if change["operationType"] in OPERATIONS:
            yield _change_row(change, change.get("fullDocument"), epoch)


def _looked_up_rows(collection: Collection[Document], changes: Iterable[Document], epoch: int) -> Iterator[DocumentRow]:
    """Give the rows of changes with documents that are looked up here: those of an emulation are not reliable."""
    for group in _groups(changes, CHANGES_PER_BATCH):
        group = [change for change in group if change["operationType"] in OPERATIONS]
        wanted = {id_text(candidate): candidate for change in group for candidate in _candidate_ids(change)}
        found = {id_text(document["_id"]): document for document in collection.find({"_id": {"$in": list(wanted.values())}})}
        for change in group:
            candidates = _candidate_ids(change)
            document = next((found[text] for text in map(id_text, candidates) if text in found), None)
            if document is not None:
                change["documentKey"]["_id"] = document["_id"]
            elif candidates:
                change["documentKey"]["_id"] = candidates[-1]
            yield _change_row(change, document, epoch)


def _candidate_ids(change: Document) -> list[Any]:
    """Return the values that an emulated change may mean by the _id: it prints numbers as text in the key."""
    full = (change.get("fullDocument") or {}).get("_id")
    key = (change.get("documentKey") or {}).get("_id")
    return [item for item in (key, *([full] if not isinstance(full, dict) else [])) if item is not None]


def _change_row(change: Document, document: Document | None, epoch: int) -> DocumentRow:
    """Return the row of a change; a delete when the document no longer exists."""
    op = OPERATIONS[change["operationType"]]
    if op in "cu" and document is None:
        op = "d"
    key = change.get("documentKey")
    return document_row(
        op=op,
        position=f"{epoch_prefix(epoch)}2{sortable_token(change['_id'])}",
        moment=_microseconds(change.get("wallTime", change.get("clusterTime"))),
        document_id=id_text(key["_id"]) if key else None,
        document=document if op in "cu" else None,
    )


def _microseconds(moment: Any) -> int | None:
    if isinstance(moment, DatetimeMS):
        return int(moment) * 1000 if MILLISECONDS[0] <= int(moment) <= MILLISECONDS[1] else None
    return moment.time * 1_000_000 if isinstance(moment, Timestamp) else None


def _groups(changes: Iterable[Document], count: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for change in changes:
        group.append(change)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group
