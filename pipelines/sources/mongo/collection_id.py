"""The UUID of the collection, by which a collection that replaced the one that was read is recognised.

`$out` and `renameCollection` with `dropTarget` replace a collection by another of its name. Its change stream does not show that,
and its documents may all be older than a watermark.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from bson.binary import Binary, UuidRepresentation
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from lakehouse.errors import OffsetExpired
from lakehouse.source import Position
from pipelines.bronze.tables import MARKETPLACE_ORDERS
from pipelines.sources.mongo.connection import Document

COLLECTION_ID = "collection"
"""Key of a position. Positions of servers that report no UUID lack it, and those that earlier versions stored."""
NOT_LISTED_ERRORS = frozenset({13, 59, 115})
"""Unauthorized; no such command; not supported."""


def collection_id(collection: Collection[Document]) -> str | None:
    """Return the UUID of a collection; None if it does not exist, or the server does not report it to this user."""
    try:
        found = list(collection.database.list_collections(filter={"name": collection.name}))
    except OperationFailure as error:
        if error.code not in NOT_LISTED_ERRORS:
            raise
        return None
    return next((_uuid_text(item.get("info", {}).get("uuid")) for item in found if item["name"] == collection.name), None)


def _uuid_text(value: Any) -> str | None:
    """Return a UUID as text. Anything else is that of an emulation, which may report one text for all collections."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Binary) and value.subtype == 4:
        return str(value.as_uuid(UuidRepresentation.STANDARD))
    return None


def check_collection_id(collection: Collection[Document], position: Position, found: str | None) -> None:
    """Raise OffsetExpired when the collection is not the one that was read up to this position."""
    if found is not None and position.get(COLLECTION_ID, found) != found:
        raise OffsetExpired(
            f"MongoDB: collection '{collection.full_name}' is not the one that was read: its UUID was {position[COLLECTION_ID]} "
            f"and is now {found}. It was replaced ($out, renameCollection) or re-created, so changes are missing. "
            f"Re-snapshot the collection: python -m app rebuild {MARKETPLACE_ORDERS.name}"
        )


def collection_entry(found: str | None) -> dict[str, str]:
    """Return the UUID as a part of a position."""
    return {} if found is None else {COLLECTION_ID: found}
