"""Documents as bronze rows: canonical Extended JSON v2, which loses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from bson import json_util
from bson.objectid import ObjectId

from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import COPIED_FIELDS, MARKETPLACE_ORDERS, row_schema
from pipelines.sources.epochs import epoch_prefix
from pipelines.sources.mongo.connection import Document

TABLE = MARKETPLACE_ORDERS.name
SCHEMA = row_schema(MARKETPLACE_ORDERS)
JSON_OPTIONS = json_util.CANONICAL_JSON_OPTIONS
BATCH_DOCUMENTS = 10_000
BATCH_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """A bronze row before it is part of a batch.

    moment  microseconds since 1970
    text    the document as Extended JSON
    """

    op: str
    position: str
    moment: int | None
    document_id: str | None
    document: Document | None
    text: str | None


def document_row(
    *, op: str, position: str, moment: int | None, document_id: str | None, document: Document | None
) -> DocumentRow:
    """Return the row of a document; of a delete, when there is none."""
    text = None if document is None else json_util.dumps(document, json_options=JSON_OPTIONS, ensure_ascii=False)
    return DocumentRow(op=op, position=position, moment=moment, document_id=document_id, document=document, text=text)


def initial_row(document: Document, moment: int, epoch: int) -> DocumentRow:
    """Return the row of a document that the initial read of an epoch found."""
    document_id = id_text(document["_id"])
    position = f"{epoch_prefix(epoch)}0{document_id}"
    return document_row(op="r", position=position, moment=moment, document_id=document_id, document=document)


def id_text(document_id: Any) -> str:
    """Return an _id as text: the hex digits of an ObjectId, otherwise Extended JSON."""
    if isinstance(document_id, ObjectId):
        return str(document_id)
    return json_util.dumps(document_id, json_options=JSON_OPTIONS, ensure_ascii=False)


def bronze_table(batch: Sequence[DocumentRow]) -> pa.Table:
    """Return rows as an Arrow table with the columns of bronze."""

    def copied(name: str) -> pa.Array:
        values = ((row.document or {}).get(name) for row in batch)
        return pa.array([value if isinstance(value, str) else None for value in values], pa.string())

    columns = {
        "document_id": pa.array([row.document_id for row in batch], pa.string()),
        **{name: copied(name) for name in COPIED_FIELDS},
        "document": pa.array([row.text for row in batch], pa.string()),
        "_op": pa.array([row.op for row in batch], pa.string()),
        "_source_position": pa.array([row.position for row in batch], pa.string()),
        "_source_time": pa.array([row.moment for row in batch], pa.int64()).cast(TIMESTAMP),
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def row_batches(rows: Iterable[DocumentRow]) -> Iterator[list[DocumentRow]]:
    """Group rows into lists of bounded size."""
    batch: list[DocumentRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text or "")
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
