"""MongoDB to bronze: an initial pass, then the change stream; a watermark where the server has no change streams.

change_stream   The resume token is taken before the initial pass, so that a change made meanwhile is read twice rather
                than never. Later runs read from the token until the stream is quiet. An update carries the document
                as it is when the stream is read (updateLookup); when it is gone by then, the row is a delete.
watermark       Documents with `updated_at` > the greatest one read, or equal to it and with a greater `_id`; documents
                without a date in `updated_at` by `_id` alone, so later changes of those are not seen, nor deletes.
                A writer whose clock is behind, or a transaction that commits late, can slip below the watermark.
                Reads are numbered, because what a document says when it is read later is newer, dated or not.

Documents are stored as canonical Extended JSON v2, which loses nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pymongo
from bson import CodecOptions, json_util
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.errors import InvalidBSON
from bson.json_util import JSONOptions
from bson.objectid import ObjectId
from bson.timestamp import Timestamp
from pymongo.change_stream import CollectionChangeStream
from pymongo.collection import Collection
from pymongo.errors import (
    ConfigurationError,
    ConnectionFailure,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.uri_parser import parse_uri

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import EPOCH, Plan, Position, Reached, Rows, Task, epoch, is_resnapshot
from lakehouse.table import TIMESTAMP
from pipelines.bronze.tables import MARKETPLACE_ORDERS, MILLISECONDS, row_schema
from pipelines.settings import MongoSettings
from pipelines.sources.epochs import EpochMarkerTask, epoch_prefix

TABLE = MARKETPLACE_ORDERS.name
SCHEMA = row_schema(MARKETPLACE_ORDERS)
BATCH_DOCUMENTS = 10_000
BATCH_BYTES = 32 << 20
DOCUMENTS_PER_TASK = 50_000
MOST_TASKS = 64
QUIET_MILLISECONDS = 200
"""How long the server may wait for a change before it says that there is none."""
COUNTED_CHANGES = 1000
"""A plan counts the changes that wait up to so many."""
TOKEN_SECONDS = 3600
"""A quiet collection's resume token is renewed when it is older, lest the server forget it."""
SERVER_SECONDS = 10
NO_CHANGE_STREAMS = frozenset({40573, 40324, 59, 115, 303, 238})
"""Not a replica set; unknown stage; no such command; not supported; unsupported; not implemented."""
TOKEN_GONE = frozenset({286, 280, 260, 222})
"""ChangeStreamHistoryLost, ChangeStreamFatalError, InvalidResumeToken, CloseChangeStream."""
OPERATIONS = {"insert": "c", "update": "u", "replace": "u", "delete": "d", "drop": "t", "rename": "t", "dropDatabase": "t"}
WATERMARK, READS = "watermark", "reads"
"""Of a position: the watermark, and how many reads there were after the first one."""
EARLIEST = datetime(1, 1, 1)
JSON_OPTIONS = json_util.CANONICAL_JSON_OPTIONS
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="backslashreplace"
)

Document = dict[str, Any]


@dataclass
class MongoSource:
    """The collection of marketplace orders as a source of bronze rows."""

    settings: MongoSettings = field(repr=False)
    name: str = "mongo"
    tables: tuple[str, ...] = (TABLE,)
    documents_per_task: int = DOCUMENTS_PER_TASK

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        position = positions.get(TABLE)
        with _collection(self.settings) as collection:
            if not position or is_resnapshot(position):
                return self._plan_initial(collection, epoch(position))
            mode = position["mode"]
            if self.settings.mode not in ("auto", mode):
                raise SourceError(
                    f"MongoDB: {TABLE} was read by {mode}, but mongo.mode is '{self.settings.mode}'. Set mongo.mode back to "
                    f"'{mode}' or 'auto', or read it anew: python -m app rebuild {TABLE}"
                )
            if mode == "watermark":
                waiting = _count_after_watermark(collection, position)
                task: Task = WatermarkTask(self.settings, position)
            else:
                waiting, upto = _waiting(collection, _token(position))
                task = ChangeStreamTask(self.settings, _token(position), upto, epoch(position))
        if waiting == 0 and (mode == "watermark" or time.time() - float(position.get("at", 0)) < TOKEN_SECONDS):
            return Plan()
        return Plan(tasks=(task,), schemas={TABLE: SCHEMA}, rows=None if waiting >= COUNTED_CHANGES else waiting)

    def _plan_initial(self, collection: Collection[Document], number: int) -> Plan:
        """Read everything, as generation `number`."""
        token = None
        if self.settings.mode != "watermark":
            token = _first_token(collection, required=self.settings.mode == "change_stream")
        count = collection.estimated_document_count()
        moment = int(time.time() * 1_000_000)
        if not number and collection.find_one({}, {"_id": 1}) is None:
            return Plan()
        marker = (EpochMarkerTask(TABLE, SCHEMA, number, moment),) if number else ()
        if token is None:
            task = WatermarkTask(self.settings, {EPOCH: number})
            return Plan(tasks=(*marker, task), schemas={TABLE: SCHEMA}, rows=count)
        edges = _edges(collection, count, self.documents_per_task)
        documents = tuple(InitialTask(self.settings, first, last, moment, number) for first, last in pairwise(edges))
        return Plan(
            tasks=(*marker, *documents),
            schemas={TABLE: SCHEMA},
            positions={TABLE: _stream_position(token, number)},
            rows=count,
        )

    def acknowledge(self, plan: Plan) -> None:
        """Nothing to say: MongoDB forgets by age alone."""

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """How many changes wait, counted up to 1000."""
        position = positions.get(TABLE)
        if not position:
            return {TABLE: "never read"}
        with _collection(self.settings) as collection:
            if position["mode"] == "watermark":
                waiting = _count_after_watermark(collection, position)
            else:
                waiting, _ = _waiting(collection, _token(position))
        return {TABLE: f"{waiting}{' or more' if waiting >= COUNTED_CHANGES else ''} change{'' if waiting == 1 else 's'}"}


@dataclass(frozen=True)
class InitialTask:
    """Documents with first <= _id < last; None: no bound. `moment`: microseconds since 1970, when the pass was planned."""

    settings: MongoSettings = field(repr=False)
    first: Any
    last: Any
    moment: int
    epoch: int = 0

    def read(self) -> Iterator[Rows]:
        """Give the documents in batches."""
        bounds = {"$gte": self.first, "$lt": self.last}
        bounds = {name: value for name, value in bounds.items() if value is not None}
        with _collection(self.settings) as collection:
            cursor = collection.find({"_id": bounds} if bounds else {}, batch_size=BATCH_DOCUMENTS)
            for batch in _batches(_initial_row(document, self.moment, self.epoch) for document in cursor):
                yield Rows(TABLE, _rows(batch))


@dataclass(frozen=True)
class ChangeStreamTask:
    """The change stream from a resume token until it is quiet, or past `upto` (the stream's end when this was planned)."""

    settings: MongoSettings = field(repr=False)
    token: Mapping[str, Any]
    upto: str
    epoch: int = 0

    def read(self) -> Iterator[Rows | Reached]:
        """Give the changes in batches, then the position reached."""
        with _collection(self.settings) as collection, _watching(collection, self.token) as watch:
            reached: list[Mapping[str, Any]] = [self.token]
            changes = self._changes(watch.stream, reached)
            for batch in _batches(_change_rows(collection, changes, self.epoch, looked_up=watch.emulated)):
                yield Rows(TABLE, _rows(batch))
        yield Reached(TABLE, _stream_position(reached[0], self.epoch))

    def _changes(self, stream: CollectionChangeStream[Document], reached: list[Mapping[str, Any]]) -> Iterator[Document]:
        quiet = 0
        while stream.alive:
            change = stream.try_next()
            if change is None:
                quiet += 1
                if stream.resume_token is not None:
                    reached[0] = stream.resume_token
                if quiet == 2 or _sortable(reached[0]) >= self.upto:
                    return
                continue
            quiet = 0
            if _sortable(change["_id"]) > self.upto:
                return
            reached[0] = change["_id"]
            yield change


@dataclass(frozen=True)
class WatermarkTask:
    """Documents past the watermark in `position`; all documents when it has none."""

    settings: MongoSettings = field(repr=False)
    position: Position

    def read(self) -> Iterator[Rows | Reached]:
        """Give the documents in batches, then the watermark reached."""
        mark = Watermark.of(self.position)
        initial = WATERMARK not in self.position
        number, reads = epoch(self.position), 0 if initial else int(self.position.get(READS, 0)) + 1
        moment = int(time.time() * 1_000_000)

        def rows(cursor: Iterable[Document]) -> Iterator[Row]:
            for document in cursor:
                if mark.is_new(document):
                    reached.see(document)
                    yield _initial_row(document, moment, number) if initial else _watermark_row(document, moment, number, reads)

        reached = Watermark.of(self.position)
        with _collection(self.settings) as collection:
            for batch in _batches(rows(collection.find(mark.query(), batch_size=BATCH_DOCUMENTS))):
                yield Rows(TABLE, _rows(batch))
        yield Reached(TABLE, reached.position() | {READS: reads} | ({EPOCH: number} if number else {}))


@dataclass
class Watermark:
    """How far a collection was read: `at`, with the greatest _ids of that moment and of undated documents, by BSON type."""

    at: DatetimeMS | None
    ids: dict[str, Any]
    undated: dict[str, Any]

    @staticmethod
    def of(position: Position) -> Watermark:
        """From a position; without a watermark nothing was read."""
        if WATERMARK not in position:
            return Watermark(None, {}, {})
        kept = json_util.loads(position[WATERMARK], json_options=JSONOptions(datetime_conversion=CODEC.datetime_conversion))
        return Watermark(kept["at"], kept["ids"], kept["undated"])

    def position(self) -> dict[str, Any]:
        """As it is stored."""
        kept = {"at": self.at, "ids": self.ids, "undated": self.undated}
        return {"mode": "watermark", WATERMARK: json_util.dumps(kept, json_options=JSON_OPTIONS, sort_keys=True)}

    def query(self) -> Document:
        """Which documents to ask for. `$nor` of `$lte` takes _ids of every type, each beyond the greatest of its own type."""
        if self.at is None and not self.undated:
            return {}
        seen: list[Document] = [{"_id": {"$lte": value}} for value in self.undated.values()]
        undated = {"$nor": [{"updated_at": {"$gte": EARLIEST}}, *seen]}
        # asked for by name too: imitations of MongoDB may take a missing date for one that compares
        missing: Document = {"updated_at": None} | ({"$nor": seen} if seen else {})
        if self.at is None:
            return {"$or": [{"updated_at": {"$gte": EARLIEST}}, undated, missing]}
        now = {"updated_at": self.at, "$nor": [{"_id": {"$lte": value}} for value in self.ids.values()]}
        return {"$or": [{"updated_at": {"$gt": self.at}}, now, undated, missing]}

    def is_new(self, document: Document) -> bool:
        """The same in Python, exactly: servers differ in how they compare values of different types."""
        kind, key = _bracket(document["_id"])
        moment = document.get("updated_at")
        if not isinstance(moment, DatetimeMS):
            return kind not in self.undated or key > _bracket(self.undated[kind])[1]
        if self.at is None or moment != self.at:
            return self.at is None or moment > self.at
        return kind not in self.ids or key > _bracket(self.ids[kind])[1]

    def see(self, document: Document) -> None:
        """Move past a document."""
        identity, moment = document["_id"], document.get("updated_at")
        kind, key = _bracket(identity)
        greatest = self.undated
        if isinstance(moment, DatetimeMS):
            if self.at is None or moment > self.at:
                self.at, self.ids = moment, {}
            elif moment < self.at:
                return
            greatest = self.ids
        if kind not in greatest or key > _bracket(greatest[kind])[1]:
            greatest[kind] = identity


def _bracket(identity: Any) -> tuple[str, Any]:
    """The BSON type of an _id, as far as the server compares values across types, and how to compare within it."""
    if isinstance(identity, ObjectId):
        return "objectId", identity
    if isinstance(identity, str):
        return "string", identity.encode()
    if isinstance(identity, Decimal128):
        return "number", identity.to_decimal()
    if isinstance(identity, (int, float)) and not isinstance(identity, bool):
        return "number", Decimal(identity)
    raise SourceError(
        f"MongoDB: watermark mode needs _ids that are ObjectIds, texts or numbers, but there is a {type(identity).__name__}. "
        'Use a server with change streams (mongo.mode = "change_stream").'
    )


@dataclass(frozen=True)
class Row:
    """A bronze row that is being made. `moment`: microseconds since 1970."""

    op: str
    position: str
    moment: int | None
    document_id: str | None
    document: Document | None
    text: str | None


def _row(op: str, position: str, moment: int | None, document_id: str | None, document: Document | None) -> Row:
    text = None if document is None else json_util.dumps(document, json_options=JSON_OPTIONS, ensure_ascii=False)
    return Row(op, position, moment, document_id, document, text)


def _initial_row(document: Document, moment: int, number: int = 0) -> Row:
    identity = _identity_text(document["_id"])
    return _row("r", f"{epoch_prefix(number)}0{identity}", moment, identity, document)


def _watermark_row(document: Document, moment: int, number: int, reads: int) -> Row:
    """A document read again (or a new one: nobody can tell) past the watermark, by the read of that number.

    The position begins with '19' because those of earlier versions of this program begin with '10' (1, then the date).
    """
    identity, updated_at = _identity_text(document["_id"]), document.get("updated_at")
    place = f"{epoch_prefix(number)}19{reads:010d}"
    if not isinstance(updated_at, DatetimeMS):
        return _row("u", f"{place}/{0:020d}/{identity}", moment, identity, document)
    milliseconds = int(updated_at)
    storable = MILLISECONDS[0] <= milliseconds <= MILLISECONDS[1]
    position = f"{place}/{milliseconds + (1 << 63):020d}/{identity}"
    return _row("u", position, milliseconds * 1000 if storable else None, identity, document)


def _change_rows(collection: Collection[Document], changes: Iterable[Document], number: int, *, looked_up: bool) -> Iterator[Row]:
    """Rows of changes; `looked_up`: the server's own full documents are not to be trusted, so ask for the documents."""
    if not looked_up:
        for change in changes:
            if change["operationType"] in OPERATIONS:
                yield _change_row(change, change.get("fullDocument"), number)
        return
    for group in _groups(changes, 1000):
        group = [change for change in group if change["operationType"] in OPERATIONS]
        wanted = {_identity_text(identity): identity for change in group for identity in _identities(change)}
        found = {
            _identity_text(document["_id"]): document for document in collection.find({"_id": {"$in": list(wanted.values())}})
        }
        for change in group:
            names = [_identity_text(identity) for identity in _identities(change)]
            known = next((name for name in names if name in found), None)
            if known is not None:
                change["documentKey"]["_id"] = found[known]["_id"]
            elif names:
                change["documentKey"]["_id"] = _identities(change)[-1]
            yield _change_row(change, found[known] if known is not None else None, number)


def _identities(change: Document) -> list[Any]:
    """What an emulated change stream may mean by the _id: it prints numbers as text in the key."""
    full = (change.get("fullDocument") or {}).get("_id")
    key = (change.get("documentKey") or {}).get("_id")
    return [item for item in (key, *([full] if not isinstance(full, dict) else [])) if item is not None]


def _change_row(change: Document, document: Document | None, number: int) -> Row:
    op = OPERATIONS[change["operationType"]]
    if op in "cu" and document is None:
        op = "d"
    key = change.get("documentKey")
    return _row(
        op,
        f"{epoch_prefix(number)}2{_sortable(change['_id'])}",
        _microseconds(change.get("wallTime", change.get("clusterTime"))),
        _identity_text(key["_id"]) if key else None,
        document if op in "cu" else None,
    )


def _microseconds(moment: Any) -> int | None:
    if isinstance(moment, DatetimeMS):
        return int(moment) * 1000 if MILLISECONDS[0] <= int(moment) <= MILLISECONDS[1] else None
    return moment.time * 1_000_000 if isinstance(moment, Timestamp) else None


def _identity_text(identity: Any) -> str:
    if isinstance(identity, ObjectId):
        return str(identity)
    return json_util.dumps(identity, json_options=JSON_OPTIONS, ensure_ascii=False)


def _rows(batch: Sequence[Row]) -> pa.Table:
    """Rows as an Arrow table."""

    def copied(name: str) -> pa.Array:
        values = ((row.document or {}).get(name) for row in batch)
        return pa.array([value if isinstance(value, str) else None for value in values], pa.string())

    columns = {
        "document_id": pa.array([row.document_id for row in batch], pa.string()),
        "platform": copied("platform"),
        "mp_order_id": copied("mp_order_id"),
        "document": pa.array([row.text for row in batch], pa.string()),
        "_op": pa.array([row.op for row in batch], pa.string()),
        "_source_position": pa.array([row.position for row in batch], pa.string()),
        "_source_time": pa.array([row.moment for row in batch], pa.int64()).cast(TIMESTAMP),
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of bounded size."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text or "")
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _groups(changes: Iterable[Document], count: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for change in changes:
        group.append(change)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


# -- positions -------------------------------------------------------------------------------------------------------


def _stream_position(token: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A resume token as it is stored; `at`: when it was taken, in seconds since 1970; number: of the generation."""
    text = json_util.dumps(token, json_options=JSON_OPTIONS)
    position = {"mode": "change_stream", "token": text, "at": int(time.time())}
    return position | ({EPOCH: number} if number else {})


def _token(position: Position) -> dict[str, Any]:
    token: dict[str, Any] = json_util.loads(position["token"])
    return token


def _sortable(token: Mapping[str, Any]) -> str:
    """A resume token as text that sorts in the order of the stream: MongoDB's hex does; a number at the end is padded."""
    data = str(token.get("_data", json_util.dumps(token, json_options=JSON_OPTIONS)))
    if re.fullmatch("[0-9A-Fa-f]{12,}", data):
        return data.upper()
    return re.sub(r"\d+$", lambda digits: digits.group().zfill(20), data)


# -- the server ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """An open change stream. `emulated`: the server is no replica set, so it only imitates change streams."""

    stream: CollectionChangeStream[Document]
    emulated: bool


@contextmanager
def _watching(collection: Collection[Document], token: Mapping[str, Any]) -> Iterator[Watch]:
    """The change stream from a token on.

    An imitation drops what its slowest open stream has passed, even though we have not committed it yet: a second
    stream that stays at the token prevents that.
    """
    emulated = _is_emulated(collection)
    options: dict[str, Any] = {"full_document": "updateLookup", "max_await_time_ms": QUIET_MILLISECONDS, "batch_size": 1000}
    with ExitStack() as stack:
        if emulated:
            stack.callback(collection.watch(start_after=token, **options).close)
        stream = collection.watch(start_after=token, **options)
        stack.callback(stream.close)
        yield Watch(stream, emulated)


def _is_emulated(collection: Collection[Document]) -> bool:
    """Whether the server is neither of a replica set nor in front of some; what the driver has learnt of it, as not every
    server knows the command `hello`."""
    client = collection.database.client
    client.admin.command("ping")
    return all(server.server_type_name == "Standalone" for server in client.topology_description.server_descriptions().values())


def _waiting(collection: Collection[Document], token: Mapping[str, Any]) -> tuple[int, str]:
    """How many changes wait after the token (counted up to 1000), and where the stream ends now."""
    end = _first_token(collection, required=True)
    assert end is not None
    upto = _sortable(end)
    with _watching(collection, token) as watch:
        if watch.emulated and _sortable(token) > upto:
            raise _token_gone("the stream ends before it: the server was created anew")
        count, first = 0, None
        while count < COUNTED_CHANGES and watch.stream.alive and (change := watch.stream.try_next()) is not None:
            count += 1
            first = first or change["_id"]
            upto = max(upto, _sortable(change["_id"]))
        # MongoDB refuses a token that it has forgotten; an imitation begins with the oldest of the 1000 changes it keeps
        if watch.emulated and first is not None and count == COUNTED_CHANGES and _number(first) > _number(token) + 1:
            raise _token_gone("the server has forgotten the changes after it")
    return count, upto


def _number(token: Mapping[str, Any]) -> int:
    """The number at the end of an imitation's resume token."""
    found = re.search(r"\d+$", _sortable(token))
    return int(found.group()) if found else 0


def _first_token(collection: Collection[Document], *, required: bool) -> Mapping[str, Any] | None:
    """The resume token of this moment; None: the server has no change streams. Raises SourceError when they are required."""
    try:
        with collection.watch(max_await_time_ms=QUIET_MILLISECONDS) as stream:
            if stream.resume_token is None:
                stream.try_next()
            if stream.resume_token is not None:
                return stream.resume_token
    except OperationFailure as error:
        # without a code it is the driver that finds the answer useless: nothing in it to resume from
        if error.code is not None and error.code not in NO_CHANGE_STREAMS:
            raise
    if required:
        raise SourceError(
            "MongoDB: the server gives no change streams (they need a replica set). "
            'Start it with --replSet, or set mongo.mode = "watermark" (SHOPSPHERE_MONGO__MODE).'
        )
    return None


def _token_gone(why: str) -> OffsetExpired:
    return OffsetExpired(
        f"MongoDB: the resume token of {TABLE} is no longer valid ({why}), so changes may be missing. "
        f"Read the collection anew: python -m app rebuild {TABLE}; and run more often, or keep a longer oplog."
    )


def _edges(collection: Collection[Document], count: int, per_task: int) -> list[Any]:
    """Bounds of _id that split the collection; None at both ends.

    Comparisons see only values of the bound's own type, so a collection whose _ids are of several types is not split.
    """
    tasks = min(count // per_task + 1, MOST_TASKS)
    if tasks == 1 or _is_emulated(collection):
        return [None, None]
    ends = [next(iter(collection.find({}, {"_id": 1}).sort("_id", way).limit(1)), None) for way in (1, -1)]
    if any(end is None for end in ends) or len({type(end["_id"]) for end in ends if end}) > 1:
        return [None, None]
    edges: list[Any] = []
    for number in range(1, tasks):
        found = collection.find({}, {"_id": 1}).sort("_id", 1).skip(number * count // tasks).limit(1)
        edges.extend(document["_id"] for document in found)
    return [None, *edges, None]


def _count_after_watermark(collection: Collection[Document], position: Position) -> int:
    """How many documents are past the watermark, counted up to 1000."""
    mark = Watermark.of(position)
    count = 0
    for document in collection.find(mark.query(), {"_id": 1, "updated_at": 1}):
        count += mark.is_new(document)
        if count == COUNTED_CHANGES:
            break
    return count


@contextmanager
def _collection(settings: MongoSettings) -> Iterator[Collection[Document]]:
    """The collection on a connection of its own; pymongo's errors as SourceError: one line, no secret, with a way out."""
    uri = settings.uri.get_secret_value()
    if not uri:
        raise SourceError(
            "MongoDB: mongo.uri is not set. Set it (SHOPSPHERE_MONGO__URI), or switch the source off "
            "(SHOPSPHERE_MONGO__ENABLED=false)."
        )
    try:
        hosts = ", ".join(f"{host}:{port}" for host, port in parse_uri(uri)["nodelist"])
        client: pymongo.MongoClient[Document] = pymongo.MongoClient(
            uri,
            serverSelectionTimeoutMS=SERVER_SECONDS * 1000,
            connectTimeoutMS=SERVER_SECONDS * 1000,
            maxPoolSize=1,
            appname="shopsphere",
        )
    except (InvalidURI, ConfigurationError, ValueError, TypeError):
        raise SourceError(
            "MongoDB: mongo.uri is no MongoDB URI. Write it like mongodb://user:password@host:27017/?replicaSet=rs0 "
            "(special characters in the password as %XX)."
        ) from None
    except PyMongoError as error:
        raise SourceError(
            f"MongoDB: mongo.uri cannot be resolved ({type(error).__name__}). Correct it (SHOPSPHERE_MONGO__URI)."
        ) from None
    where = f"{hosts}, collection '{settings.database}.{settings.collection}'"
    try:
        yield client[settings.database].get_collection(settings.collection, codec_options=CODEC)
    except ServerSelectionTimeoutError:
        raise SourceError(
            f"MongoDB: no server answered at {hosts} within {SERVER_SECONDS} s. See that it runs and that mongo.uri "
            "(SHOPSPHERE_MONGO__URI) is right."
        ) from None
    except OperationFailure as error:
        if error.code in TOKEN_GONE:
            raise _token_gone(f"code {error.code}") from None
        way_out = {18: "Correct user and password in mongo.uri.", 13: "Let the user read the collection and its change stream."}
        raise SourceError(
            f"MongoDB: {where}: {_clean(str((error.details or {}).get('errmsg', error)), uri)}. "
            f"{way_out.get(error.code or 0, 'Run again.')}"
        ) from None
    except ConnectionFailure as error:
        raise SourceError(f"MongoDB: the connection to {hosts} broke ({type(error).__name__}). Run again.") from None
    except (PyMongoError, InvalidBSON) as error:
        raise SourceError(f"MongoDB: {where}: {_clean(str(error), uri)}. Run again.") from None
    finally:
        client.close()


def _clean(text: str, uri: str) -> str:
    """One line without the password."""
    password = parse_uri(uri).get("password")
    if password:
        text = text.replace(str(password), "***")
    return " ".join(text.split())[:500].rstrip(".")
