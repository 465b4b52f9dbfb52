"""silver.events_clean: every event once, with typed columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa

from lakehouse.expectations import fresh, row_count_drift
from lakehouse.step import Delta, Parsed, Step
from lakehouse.table import TIMESTAMP, Table, column, year
from pipelines.bronze.tables import EVENTS
from pipelines.settings import BusinessSettings

EVENTS_CLEAN = Table(
    "silver.events_clean",
    doc="Behaviour and stock events, each once. Fields of the metadata that other tables read are columns.",
    columns=(
        column("event_id", pa.string(), "Event id.", required=True),
        column("event_type", pa.string(), "Kind of event; unknown kinds are kept.", required=True),
        column("occurred_at", TIMESTAMP, "When the event happened (UTC), as stated by its sender.", required=True),
        column("user_id", pa.int64(), "User id of the account; null when no user is signed in."),
        column("session_id", pa.string(), "Session id; null when unknown.", personal="session"),
        column("device_id", pa.string(), "Device id; null when unknown.", personal="device"),
        column("ip_address", pa.string(), "IP address of the client, as stated by the sender; null when unknown.", personal="ip"),
        column("channel", pa.string(), "Channel of the event: web, app, pos, ..."),
        column("store_id", pa.string(), "metadata.store_id: store or warehouse whose stock changes."),
        column("product_id", pa.string(), "metadata.product_id: product id."),
        column(
            "quantity",
            pa.int32(),
            "metadata.quantity, in units; positive for stock events, 0 allowed where the event sets a level.",
        ),
        column("to_store_id", pa.string(), "metadata.to_store_id: store that receives a transfer."),
        column("purchase_order", pa.string(), "metadata.purchase_order: purchase order of incoming or received units."),
        column("reserved", pa.bool_(), "metadata.reserved: whether the sale consumes reserved units."),
        column("sign", pa.int32(), "metadata.sign: direction of an adjustment, +1 or -1."),
        column("reason", pa.string(), "metadata.reason of an adjustment: damage, theft, found or correction."),
        column("order_ref", pa.string(), "metadata.order_ref: order id, as orders_unified.order_id."),
        column("outcome", pa.string(), "metadata.outcome of a payment attempt."),
        column(
            "card_fingerprint",
            pa.string(),
            "metadata.card_fingerprint: fingerprint (hash) of the payment card.",
            personal="card",
        ),
        column("changed_field", pa.string(), "metadata.field of account_changed: the changed field."),
        column("metadata", pa.string(), "The whole metadata as canonical JSON (sorted names, no spaces).", personal="text"),
        column("topic", pa.string(), "Kafka topic of the message."),
    ),
    key=("event_id",),
    tracked=("event_type", "occurred_at", "user_id", "store_id", "product_id", "to_store_id"),
    partition_by=(year("occurred_at"),),
    sort_by=("occurred_at",),
    owner="data platform",
    expectations=(
        fresh("occurred_at", hours=24),
        row_count_drift(0.5),
    ),
)

TEXTS = ("event_id", "event_type", "timestamp", "session_id", "device_id", "ip_address", "channel")
METADATA_TEXTS = {
    "store_id": "store_id",
    "product_id": "product_id",
    "to_store_id": "to_store_id",
    "purchase_order": "purchase_order",
    "reason": "reason",
    "order_ref": "order_ref",
    "outcome": "outcome",
    "card_fingerprint": "card_fingerprint",
    "field": "changed_field",
}
METADATA_INTEGERS = ("quantity", "sign")
TOP_LEVEL = frozenset((*TEXTS, "user_id", "metadata"))

STOCK_EVENTS = (
    "stock_received",
    "stock_incoming",
    "stock_reserved",
    "reservation_released",
    "stock_sold",
    "stock_returned",
    "stock_adjusted",
    "stock_transferred",
    "stock_counted",
    "safety_stock_set",
)
LEVEL_EVENTS = ("stock_counted", "safety_stock_set")
"""Stock events that set a level instead of moving units. Their quantity may be 0: an empty shelf is a valid count."""

EXTRA = "_extra"
"""Name within `metadata` for values without a column: unknown top-level fields, and known fields with a value of another type."""

CHUNK = 20_000
"""Number of messages that are decoded at a time."""

Document = dict[str, Any]

_decode = msgspec.json.Decoder().decode
_encode_lines = msgspec.json.Encoder(order="sorted").encode_lines
_WHOLE_NUMBER = re.compile(r"\s*[+-]?\d{1,19}(\.0*)?\s*")
_COMMON_TIMESTAMP = r"^[12]\d{3}-\d\d-\d\dT\d\d:\d\d:[0-5]\d(\.\d{1,9})?Z$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_events(bronze: pl.DataFrame) -> Parsed:
    """Return rows of silver.events_clean, and the messages that are not events, each with a reason.

    A message must be a UTF-8 JSON object with `event_id`, `event_type` and an ISO 8601 `timestamp` (in UTC without an
    offset; truncated to microseconds). A stock event must also have `store_id`, `product_id` and a positive whole `quantity`
    (0 is allowed where it sets a level), a transfer `to_store_id`, an adjustment `sign`. A value of another type is converted
    if nothing is lost ('1' and 1.0 are 1); otherwise it stays, like every unknown field, in `metadata` under `_extra`.
    Reasons contain no values of the message.
    """
    chunks = [_read_chunk(bronze["value"].slice(start, CHUNK)) for start in range(0, max(bronze.height, 1), CHUNK)]
    read = pl.concat(chunks).with_columns(occurred_at=_instants(pl.concat(chunks)["timestamp"]))
    read = read.with_columns(reason_rejected=_reason(), quantity=pl.col("quantity").cast(pl.Int32, strict=False))
    read = read.with_columns(topic=bronze["topic"])
    positions = bronze["_source_position"]
    is_event = read["reason_rejected"].is_null()
    rows = read.filter(is_event).select(EVENTS_CLEAN.schema.names)
    parsed_positions = positions.filter(is_event)
    rejected = bronze.select(
        pl.Series("reason", read["reason_rejected"]),
        source_position="_source_position",
        original="value",
        fixed=pl.col("_op") == "fix" if "_op" in bronze.columns else pl.lit(False),
    ).filter(~is_event)
    return Parsed(rows, _open_rejections(rejected, parsed_positions), parsed_positions)


def _open_rejections(rejected: pl.DataFrame, parsed_positions: pl.Series) -> pl.DataFrame:
    """Return one row per position without a readable message: the correction if there is one, else the original."""
    return (
        rejected.filter(~pl.col("source_position").is_in(parsed_positions.implode()))
        .sort("source_position", "fixed", "original", descending=[False, True, False], nulls_last=True)
        .unique("source_position", keep="first", maintain_order=True)
        .select("reason", "source_position", "original")
    )


def _reason() -> pl.Expr:
    """Return the reason why a decoded message is not an event; null for an event."""
    stock = pl.col("event_type").is_in(STOCK_EVENTS)
    min_quantity = pl.when(pl.col("event_type").is_in(LEVEL_EVENTS)).then(0).otherwise(1)

    def absent(name: str) -> pl.Expr:
        return pl.col(name).is_null() | (pl.col(name).str.strip_chars() == "")

    return (
        pl.when(pl.col("undecoded").is_not_null())
        .then("undecoded")
        .when(absent("event_id"))
        .then(pl.lit("event_id is missing"))
        .when(absent("event_type"))
        .then(pl.lit("event_type is missing"))
        .when(absent("timestamp"))
        .then(pl.lit("timestamp is missing"))
        .when(pl.col("occurred_at").is_null())
        .then(pl.lit("timestamp is not ISO 8601"))
        .when(stock & absent("store_id"))
        .then(pl.lit("metadata.store_id of a stock event is missing"))
        .when(stock & absent("product_id"))
        .then(pl.lit("metadata.product_id of a stock event is missing"))
        .when(stock & ~pl.col("quantity").is_between(min_quantity, 2**31 - 1).fill_null(False))
        .then(pl.lit("metadata.quantity of a stock event is not a positive whole number"))
        .when((pl.col("event_type") == "stock_transferred") & absent("to_store_id"))
        .then(pl.lit("metadata.to_store_id of a transfer is missing"))
        .when((pl.col("event_type") == "stock_adjusted") & ~pl.col("sign").is_in([1, -1]).fill_null(False))
        .then(pl.lit("metadata.sign of an adjustment is neither 1 nor -1"))
    )


def _read_chunk(values: pl.Series) -> pl.DataFrame:
    """Return the fields of messages as columns, in the same order; `undecoded` is the reason for a message without fields."""
    decoded = [_document(value) for value in values.to_list()]
    undecoded = [None if type(item) is dict else item for item in decoded]
    documents: list[Document] = [item if type(item) is dict else {} for item in decoded]
    extras: dict[int, Document] = {
        row: {name: value for name, value in document.items() if name not in TOP_LEVEL}
        for row, document in enumerate(documents)
        if not TOP_LEVEL.issuperset(document)
    }

    def top_level(name: str, read: Callable[[list[Any]], pl.Series]) -> pl.Series:
        found = [document.get(name) for document in documents]
        series = read(found)
        if series.null_count() != found.count(None):
            for row in (series.is_null()).arg_true().to_list():
                if found[row] is not None:
                    extras.setdefault(row, {})[name] = found[row]
        return series.alias(name)

    columns = [top_level(name, _texts) for name in TEXTS]
    columns.append(top_level("user_id", _integers))
    metadata = [_metadata(document, extras, row) for row, document in enumerate(documents)]
    columns += [_texts([item.get(name) for item in metadata]).alias(column_name) for name, column_name in METADATA_TEXTS.items()]
    columns += [_integers([item.get(name) for item in metadata]).alias(name) for name in METADATA_INTEGERS]
    columns.append(_flags([item.get("reserved") for item in metadata]).alias("reserved"))
    columns.append(pl.Series("metadata", _canonical(metadata, extras), dtype=pl.String))
    columns.append(pl.Series("undecoded", undecoded, dtype=pl.String))
    frame = pl.DataFrame(columns)
    return frame.with_columns(pl.col("sign").cast(pl.Int32, strict=False))


def _document(value: bytes | None) -> Document | str:
    """Return the object in a message, or the reason why there is none."""
    if not value or value.isspace():
        return "empty message"
    try:
        document = _decode(value)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (msgspec.DecodeError, RecursionError):
        return "not JSON" if _is_utf8(value) else "not UTF-8"
    return document if type(document) is dict else "not a JSON object"


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _metadata(document: Document, extras: dict[int, Document], row: int) -> Document:
    """Return the metadata of a document; a value that is no object is moved to the extras of the row."""
    metadata = document.get("metadata")
    if type(metadata) is dict:
        return metadata
    if metadata is not None:
        extras.setdefault(row, {})["metadata"] = metadata
    return {}


def _canonical(metadata: list[Document], extras: dict[int, Document]) -> list[str]:
    """Return the metadata with the extras as canonical JSON."""
    if extras:
        metadata = list(metadata)
    for row, extra in extras.items():
        own = metadata[row]
        metadata[row] = {**own, EXTRA: extra | {EXTRA: own[EXTRA]} if EXTRA in own else extra}
    return _encode_lines(metadata).decode().split("\n")[: len(metadata)]


def _texts(values: list[Any]) -> pl.Series:
    """Return a column of texts; an integer becomes its digits, other values null."""
    if not set(map(type, values)) <= {str, NoneType}:
        values = [value if type(value) is str else str(value) if type(value) is int else None for value in values]
    return pl.Series(values, dtype=pl.String)


def _integers(values: list[Any]) -> pl.Series:
    """Return a column of 64-bit integers, whether written 2, 2.0, '2' or '2.0'; other values are null."""
    return pl.Series([value if value is None else whole_number(value) for value in values], dtype=pl.Int64)


def whole_number(value: Any) -> int | None:
    """Return a 64-bit integer, whether written 2, 2.0, '2' or '2.0'; None for other values."""
    kind = type(value)
    if kind is str and _WHOLE_NUMBER.fullmatch(value):
        value = int(value.split(".")[0])
    elif kind is float and value.is_integer():
        value = int(value)
    elif kind is not int:
        return None
    return value if -(2**63) <= value < 2**63 else None


def _flags(values: list[Any]) -> pl.Series:
    """Return a column of booleans, whether written true, 1, 'true' or 'TRUE'; other values are null."""
    if not set(map(type, values)) <= {bool, NoneType}:
        values = [_flag(value) for value in values]
    return pl.Series(values, dtype=pl.Boolean)


def _flag(value: Any) -> bool | None:
    if type(value) not in (bool, int, str):
        return None
    return {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())


def _instants(texts: pl.Series) -> pl.Series:
    """Return ISO 8601 texts as timestamps in UTC; null for other texts."""
    is_common = texts.str.contains(_COMMON_TIMESTAMP).fill_null(False)
    instants = (
        pl.select(pl.when(is_common).then(texts))
        .to_series()
        .str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="us", strict=False)
        .dt.replace_time_zone("UTC")
    )
    rest = (instants.is_null() & texts.is_not_null()).arg_true()
    if rest.is_empty():
        return instants
    others = pl.Series([_instant(text) for text in texts.gather(rest).to_list()], dtype=pl.Int64)
    return instants.to_physical().scatter(rest, others).cast(pl.Datetime("us", "UTC"))


def _instant(text: str) -> int | None:
    """Return microseconds since 1970 UTC of an ISO 8601 text; None for other texts and outside the years 1 to 9999."""
    try:
        instant = datetime.fromisoformat(text.strip().upper())
        instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
        return (instant - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return each event once. Of several with the same event_id the first by occurred_at, then by all other columns, is kept.

    The choice depends on content alone, not on the order of arrival.
    """
    names = EVENTS_CLEAN.schema.names
    found = [frames[name].select(names) for name in ("events", "old") if name in frames and frames[name].width]
    events = pl.concat(found)
    is_repeated = events["event_id"].is_duplicated()
    order = ["event_id", "occurred_at", *(name for name in names if name not in ("event_id", "occurred_at"))]
    first = events.filter(is_repeated).sort(order).unique("event_id", keep="first", maintain_order=True)
    return pl.concat([events.filter(~is_repeated), first])


def replace_erased(rows: pl.DataFrame, context: BusinessSettings) -> pl.DataFrame:
    """Return the events of rewritten messages; they replace the stored events with the same ids."""
    return transform({"events": rows}, context)


STEP = Step(
    target=EVENTS_CLEAN,
    reads={
        "events": Delta(
            EVENTS,
            parse=parse_events,
            columns=("topic", "value", "_op", "_source_position", "_source_time"),
            erase=replace_erased,
        )
    },
    transform=transform,
)
