"""MongoDB to bronze: an initial read, then the change stream, or a watermark where the server has no change streams.

With a change stream, the resume token is taken before the initial read, so that a change made during the read is read twice
rather than never. Later runs read from the token until the stream is quiet. An update has the document as it is when the stream
is read (updateLookup); if the document is deleted by then, the row is a delete. For the watermark, see `watermark`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pyarrow as pa
from pymongo.collection import Collection

from lakehouse.errors import SourceError
from lakehouse.source import EPOCH, Plan, Position, Task, epoch, is_resnapshot
from pipelines.settings import MongoSettings
from pipelines.sources.epochs import EpochMarkerTask
from pipelines.sources.mongo.change_stream import MAX_COUNTED_CHANGES, ChangeStreamTask, pending_changes
from pipelines.sources.mongo.collection_id import COLLECTION_ID, check_collection_id, collection_entry, collection_id
from pipelines.sources.mongo.connection import Document, open_collection
from pipelines.sources.mongo.documents import SCHEMA, TABLE
from pipelines.sources.mongo.initial_read import IdRangeTask, id_range_bounds
from pipelines.sources.mongo.resume_tokens import current_token, position_token, stream_position
from pipelines.sources.mongo.watermark import WatermarkTask, count_after_watermark

DOCUMENTS_PER_TASK = 50_000
TOKEN_SECONDS = 3600
"""Age at which the resume token of a quiet collection is renewed, before it can expire on the server."""


@dataclass
class MongoSource:
    """A MongoDB collection as a source of bronze rows."""

    settings: MongoSettings = field(repr=False)
    name: str = "mongo"
    tables: tuple[str, ...] = (TABLE,)
    documents_per_task: int = DOCUMENTS_PER_TASK

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        position = positions.get(TABLE)
        with open_collection(self.settings) as collection:
            if not position or is_resnapshot(position):
                return self._plan_initial_read(collection, epoch(position))
            mode = position["mode"]
            if self.settings.mode not in ("auto", mode):
                raise SourceError(
                    f"MongoDB: {TABLE} was read in mode '{mode}', but mongo.mode is '{self.settings.mode}'. Set mongo.mode back "
                    f"to '{mode}' or 'auto', or re-snapshot the table: python -m app rebuild {TABLE}"
                )
            found = collection_id(collection)
            check_collection_id(collection, position, found)
            identity = position.get(COLLECTION_ID, found)
            if mode == "watermark":
                pending = count_after_watermark(collection, position)
                task: Task = WatermarkTask(self.settings, {**position, **collection_entry(identity)})
            else:
                pending, upto = pending_changes(collection, position_token(position))
                task = ChangeStreamTask(self.settings, position_token(position), upto, epoch(position), identity)
        is_current = mode == "watermark" or time.time() - float(position.get("at", 0)) < TOKEN_SECONDS
        if pending == 0 and is_current and identity == position.get(COLLECTION_ID):
            return Plan()
        return Plan(tasks=(task,), schemas={TABLE: SCHEMA}, rows=None if pending >= MAX_COUNTED_CHANGES else pending)

    def _plan_initial_read(self, collection: Collection[Document], epoch_number: int) -> Plan:
        """Plan to read the whole collection in the given epoch."""
        # asked first, so that a collection that is replaced meanwhile is noticed by the next plan
        token, identity = None, collection_id(collection)
        if self.settings.mode != "watermark":
            token = current_token(collection, required=self.settings.mode == "change_stream")
        count = collection.estimated_document_count()
        moment = int(time.time() * 1_000_000)
        if not epoch_number and collection.find_one({}, {"_id": 1}) is None:
            return Plan()
        marker = (EpochMarkerTask(TABLE, SCHEMA, epoch_number, moment),) if epoch_number else ()
        if token is None:
            task = WatermarkTask(self.settings, {EPOCH: epoch_number, **collection_entry(identity)})
            return Plan(tasks=(*marker, task), schemas={TABLE: SCHEMA}, rows=count)
        bounds = id_range_bounds(collection, count, self.documents_per_task)
        documents = tuple(
            IdRangeTask(settings=self.settings, first=first, last=last, moment=moment, epoch=epoch_number)
            for first, last in pairwise(bounds)
        )
        return Plan(
            tasks=(*marker, *documents),
            schemas={TABLE: SCHEMA},
            positions={TABLE: stream_position(token, epoch_number, identity)},
            rows=count,
        )

    def acknowledge(self, plan: Plan) -> None:
        """Do nothing: MongoDB removes changes by age alone."""

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """Return the number of pending changes, counted up to MAX_COUNTED_CHANGES."""
        position = positions.get(TABLE)
        if not position:
            return {TABLE: "never read"}
        with open_collection(self.settings) as collection:
            if position["mode"] == "watermark":
                pending = count_after_watermark(collection, position)
            else:
                pending, _ = pending_changes(collection, position_token(position))
        or_more = " or more" if pending >= MAX_COUNTED_CHANGES else ""
        return {TABLE: f"{pending}{or_more} change{'' if pending == 1 else 's'}"}
