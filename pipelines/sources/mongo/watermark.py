"""Changes of the collection by watermark, for servers without change streams.

Reads documents whose `updated_at` is later than the latest one read, or equal to it with a greater `_id`. Documents without a
date in `updated_at` are read by `_id` alone, so their later changes are not seen; neither are deletes. A document of a writer
whose clock is slow, or of a transaction that commits late, can be below the watermark.

Rows have positions that begin with '1', with the number of the read: a document that is read later is newer, dated or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from bson import json_util
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.json_util import JSONOptions
from bson.objectid import ObjectId
from pymongo.collection import Collection

from lakehouse.errors import SourceError
from lakehouse.source import EPOCH, Position, Reached, Rows, epoch
from pipelines.bronze.tables import MILLISECONDS
from pipelines.settings import MongoSettings
from pipelines.sources.epochs import epoch_prefix
from pipelines.sources.mongo.change_stream import MAX_COUNTED_CHANGES
from pipelines.sources.mongo.collection_id import COLLECTION_ID, collection_entry
from pipelines.sources.mongo.connection import CODEC, Document, open_collection
from pipelines.sources.mongo.documents import (
    BATCH_DOCUMENTS,
    JSON_OPTIONS,
    TABLE,
    DocumentRow,
    bronze_table,
    document_row,
    id_text,
    initial_row,
    row_batches,
)

WATERMARK, READS = "watermark", "reads"
"""Keys of a position: the watermark, and the number of reads after the first one."""
EARLIEST = datetime(1, 1, 1)


@dataclass(frozen=True)
class WatermarkTask:
    """Reads the documents past the watermark in `position`; all documents when it has none."""

    settings: MongoSettings = field(repr=False)
    position: Position

    def read(self) -> Iterator[Rows | Reached]:
        """Give the documents in batches, then the watermark reached."""
        reads = int(self.position.get(READS, 0)) + 1 if WATERMARK in self.position else 0
        epoch_number = epoch(self.position)
        moment = int(time.time() * 1_000_000)
        reached = Watermark.from_position(self.position)
        with open_collection(self.settings) as collection:
            query = Watermark.from_position(self.position).query()
            documents = collection.find(query, batch_size=BATCH_DOCUMENTS)
            for batch in row_batches(self._rows(documents, reached, reads, moment)):
                yield Rows(TABLE, bronze_table(batch))
        kept = {EPOCH: epoch_number} if epoch_number else {}
        yield Reached(TABLE, reached.to_position() | {READS: reads} | kept | collection_entry(self.position.get(COLLECTION_ID)))

    def _rows(self, documents: Iterable[Document], reached: Watermark, reads: int, moment: int) -> Iterator[DocumentRow]:
        """Give the rows of new documents and advance `reached` past them.

        reads: number of the read, 0 for the first. moment: when it began, in microseconds since 1970.
        """
        start = Watermark.from_position(self.position)
        epoch_number = epoch(self.position)
        for document in documents:
            if start.is_new(document):
                reached.advance(document)
                if reads:
                    yield _reread_row(document, moment, epoch_number, reads)
                else:
                    yield initial_row(document, moment, epoch_number)


@dataclass
class Watermark:
    """How far a collection was read.

    at       the latest `updated_at`
    ids      the greatest _ids at that moment, by BSON type
    undated  the greatest _ids of documents without a date, by BSON type
    """

    at: DatetimeMS | None
    ids: dict[str, Any]
    undated: dict[str, Any]

    @staticmethod
    def from_position(position: Position) -> Watermark:
        """Return the watermark that a position stores; without one, nothing was read."""
        if WATERMARK not in position:
            return Watermark(None, {}, {})
        stored = json_util.loads(position[WATERMARK], json_options=JSONOptions(datetime_conversion=CODEC.datetime_conversion))
        return Watermark(stored["at"], stored["ids"], stored["undated"])

    def to_position(self) -> dict[str, Any]:
        """Return the position that stores the watermark."""
        stored = {"at": self.at, "ids": self.ids, "undated": self.undated}
        return {"mode": "watermark", WATERMARK: json_util.dumps(stored, json_options=JSON_OPTIONS, sort_keys=True)}

    def query(self) -> Document:
        """Return the query for new documents.

        `$nor` of `$lte` selects _ids of every type, each beyond the greatest of its own type.
        """
        if self.at is None and not self.undated:
            return {}
        seen: list[Document] = [{"_id": {"$lte": value}} for value in self.undated.values()]
        undated = {"$nor": [{"updated_at": {"$gte": EARLIEST}}, *seen]}
        # selected explicitly too: some emulations of MongoDB treat a missing date as one that compares
        missing: Document = {"updated_at": None} | ({"$nor": seen} if seen else {})
        if self.at is None:
            return {"$or": [{"updated_at": {"$gte": EARLIEST}}, undated, missing]}
        same_moment = {"updated_at": self.at, "$nor": [{"_id": {"$lte": value}} for value in self.ids.values()]}
        return {"$or": [{"updated_at": {"$gt": self.at}}, same_moment, undated, missing]}

    def is_new(self, document: Document) -> bool:
        """Return whether a document is past the watermark. Exact, while servers differ in how they compare across types."""
        kind, key = id_order(document["_id"])
        moment = document.get("updated_at")
        if not isinstance(moment, DatetimeMS):
            return kind not in self.undated or key > id_order(self.undated[kind])[1]
        if self.at is None or moment != self.at:
            return self.at is None or moment > self.at
        return kind not in self.ids or key > id_order(self.ids[kind])[1]

    def advance(self, document: Document) -> None:
        """Move past a document."""
        document_id, moment = document["_id"], document.get("updated_at")
        kind, key = id_order(document_id)
        greatest = self.undated
        if isinstance(moment, DatetimeMS):
            if self.at is None or moment > self.at:
                self.at, self.ids = moment, {}
            elif moment < self.at:
                return
            greatest = self.ids
        if kind not in greatest or key > id_order(greatest[kind])[1]:
            greatest[kind] = document_id


def count_after_watermark(collection: Collection[Document], position: Position) -> int:
    """Return the number of documents past the watermark, counted up to MAX_COUNTED_CHANGES."""
    mark = Watermark.from_position(position)
    count = 0
    for document in collection.find(mark.query(), {"_id": 1, "updated_at": 1}):
        count += mark.is_new(document)
        if count == MAX_COUNTED_CHANGES:
            break
    return count


def id_order(document_id: Any) -> tuple[str, Any]:
    """Return the BSON type of an _id, numbers being one type, and a value that orders _ids within it. Raises SourceError."""
    if isinstance(document_id, ObjectId):
        return "objectId", document_id
    if isinstance(document_id, str):
        return "string", document_id.encode()
    if isinstance(document_id, Decimal128):
        return "number", document_id.to_decimal()
    if isinstance(document_id, (int, float)) and not isinstance(document_id, bool):
        return "number", Decimal(document_id)
    raise SourceError(
        f"MongoDB: an _id has type {type(document_id).__name__}, but watermark mode supports only ObjectIds, strings and "
        'numbers. Use a server with change streams (mongo.mode = "change_stream").'
    )


def _reread_row(document: Document, moment: int, epoch_number: int, reads: int) -> DocumentRow:
    """Return the row of a changed or new document that the read with this number found past the watermark.

    The position begins with '19' because positions of earlier versions of this program begin with '10' (1, then the date).
    """
    document_id, updated_at = id_text(document["_id"]), document.get("updated_at")
    prefix = f"{epoch_prefix(epoch_number)}19{reads:010d}"
    if not isinstance(updated_at, DatetimeMS):
        position = f"{prefix}/{0:020d}/{document_id}"
        return document_row(op="u", position=position, moment=moment, document_id=document_id, document=document)
    milliseconds = int(updated_at)
    is_storable = MILLISECONDS[0] <= milliseconds <= MILLISECONDS[1]
    return document_row(
        op="u",
        position=f"{prefix}/{milliseconds + (1 << 63):020d}/{document_id}",
        moment=milliseconds * 1000 if is_storable else None,
        document_id=document_id,
        document=document,
    )
