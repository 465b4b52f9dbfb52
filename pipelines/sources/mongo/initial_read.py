"""The initial read of the collection, and its re-snapshots: ranges of _id in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pymongo.collection import Collection

from lakehouse.source import Rows
from pipelines.settings import MongoSettings
from pipelines.sources.mongo.connection import Document, is_standalone, open_collection
from pipelines.sources.mongo.documents import BATCH_DOCUMENTS, TABLE, bronze_table, initial_row, row_batches

MAX_TASKS = 64


@dataclass(frozen=True, kw_only=True)
class IdRangeTask:
    """Reads the documents with first <= _id < last; None: without a bound.

    moment  when the read was planned, in microseconds since 1970
    """

    settings: MongoSettings = field(repr=False)
    first: Any
    last: Any
    moment: int
    epoch: int = 0

    def read(self) -> Iterator[Rows]:
        """Give the documents in batches."""
        bounds = {"$gte": self.first, "$lt": self.last}
        bounds = {name: value for name, value in bounds.items() if value is not None}
        with open_collection(self.settings) as collection:
            cursor = collection.find({"_id": bounds} if bounds else {}, batch_size=BATCH_DOCUMENTS)
            for batch in row_batches(initial_row(document, self.moment, self.epoch) for document in cursor):
                yield Rows(TABLE, bronze_table(batch))


def id_range_bounds(collection: Collection[Document], count: int, per_task: int) -> list[Any]:
    """Return bounds of _id that split a collection of `count` documents; None at both ends.

    A comparison matches only values of the bound's own type, so a collection with _ids of several types is not split.
    """
    tasks = min(count // per_task + 1, MAX_TASKS)
    if tasks == 1 or is_standalone(collection):
        return [None, None]
    ends = [next(iter(collection.find({}, {"_id": 1}).sort("_id", order).limit(1)), None) for order in (1, -1)]
    if any(end is None for end in ends) or len({type(end["_id"]) for end in ends if end}) > 1:
        return [None, None]
    bounds: list[Any] = []
    for number in range(1, tasks):
        found = collection.find({}, {"_id": 1}).sort("_id", 1).skip(number * count // tasks).limit(1)
        bounds.extend(document["_id"] for document in found)
    return [None, *bounds, None]
