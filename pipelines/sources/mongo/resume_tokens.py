"""Resume tokens of change streams, and the positions that store them.

    {"mode": "change_stream", "token": '{"_data": "8265..."}', "at": 1764115200, "collection": "0b1e...", "generation": 1}

token       the token as Extended JSON text
at          when the token was taken, in seconds since 1970
collection  see `collection_id`
generation  the epoch, see `pipelines.sources.epochs`; missing in epoch 0
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from bson import json_util
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from lakehouse.errors import SourceError
from lakehouse.source import EPOCH, Position
from pipelines.sources.mongo.collection_id import collection_entry
from pipelines.sources.mongo.connection import Document
from pipelines.sources.mongo.documents import JSON_OPTIONS

MAX_AWAIT_MILLISECONDS = 200
"""How long the server may wait for a change before it answers that there is none."""
UNSUPPORTED_ERRORS = frozenset({40573, 40324, 59, 115, 303, 238})
"""Not a replica set; unknown stage; no such command; not supported; unsupported; not implemented."""

ResumeToken = Mapping[str, Any]


def stream_position(token: ResumeToken, epoch: int, collection: str | None) -> dict[str, Any]:
    """Return a resume token as a stored position. collection: its UUID, if the server reports it."""
    text = json_util.dumps(token, json_options=JSON_OPTIONS)
    position = {"mode": "change_stream", "token": text, "at": int(time.time()), **collection_entry(collection)}
    return position | ({EPOCH: epoch} if epoch else {})


def position_token(position: Position) -> dict[str, Any]:
    """Return the resume token of a position."""
    token: dict[str, Any] = json_util.loads(position["token"])
    return token


def sortable_token(token: ResumeToken) -> str:
    """Return a resume token as text that sorts in stream order: MongoDB's hex does; a number at the end is zero-padded."""
    data = str(token.get("_data", json_util.dumps(token, json_options=JSON_OPTIONS)))
    if re.fullmatch("[0-9A-Fa-f]{12,}", data):
        return data.upper()
    return re.sub(r"\d+$", lambda digits: digits.group().zfill(20), data)


def token_number(token: ResumeToken) -> int:
    """Return the number at the end of an emulated resume token."""
    found = re.search(r"\d+$", sortable_token(token))
    return int(found.group()) if found else 0


def current_token(collection: Collection[Document], *, required: bool) -> ResumeToken | None:
    """Return the resume token of this moment; None when the server has no change streams.

    Raises SourceError when they are required.
    """
    try:
        with collection.watch(max_await_time_ms=MAX_AWAIT_MILLISECONDS) as stream:
            if stream.resume_token is None:
                stream.try_next()
            if stream.resume_token is not None:
                return stream.resume_token
    except OperationFailure as error:
        # without a code the driver raised it: the answer has nothing to resume from
        if error.code is not None and error.code not in UNSUPPORTED_ERRORS:
            raise
    if required:
        raise SourceError(
            "MongoDB: the server does not support change streams, which need a replica set. "
            'Start it with --replSet, or set mongo.mode = "watermark" (SHOPSPHERE_MONGO__MODE).'
        )
    return None
