"""Marketplace documents (canonical Extended JSON) as typed order and item rows, and those that cannot be read.

Only `_id`, `mp_order_id`, `platform` and `order_time` are always there. What is absent or null is null; what is there
but cannot be read makes the document unreadable, with a reason that names the field and the type met, never the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.step import Parsed
from pipelines.bronze.current_rows import since_truncate
from pipelines.parsing import contacts
from pipelines.parsing.amounts import AmountUnreadable, amount_of_digits, marked_currency, parse_amount

_TIME = pl.Datetime("us", "UTC")
_MONEY = pl.Decimal(20, 4)

ORDER_SCHEMA: dict[str, Any] = {
    "order_id": pl.String,
    "document_id": pl.String,
    "platform": pl.String,
    "mp_order_id": pl.String,
    "status": pl.String,
    "currency": pl.String,
    "total_amount": _MONEY,
    "payment_method": pl.String,
    "card_fingerprint": pl.String,
    "ip_address": pl.String,
    "device_id": pl.String,
    "loyalty_id": pl.String,
    "email_raw": pl.String,
    "phone_raw": pl.String,
    "buyer_name": pl.String,
    "shipping_address": pl.String,
    "placed_at": _TIME,
    "updated_at": _TIME,
    "email": pl.String,
    "phone": pl.String,
    "region": pl.String,
}
"""`email` and `phone` normalised; `region`: where its phone numbers are local, null when nothing tells."""

ITEM_SCHEMA: dict[str, Any] = {
    "order_id": pl.String,
    "line_no": pl.Int32,
    "product_id": pl.String,
    "product_name": pl.String,
    "quantity": pl.Int32,
    "unit_price": _MONEY,
    "variant": pl.String,
}
"""`line_no` from 1; `variant` is canonical JSON."""

REJECTED_SCHEMA: dict[str, Any] = {"reason": pl.String, "source_position": pl.String, "original": pl.Binary}

PLATFORM_CURRENCY = {
    "tokopedia": "IDR",
    "bukalapak": "IDR",
    "blibli": "IDR",
    "rakuten": "JPY",
    "mercari": "JPY",
    "coupang": "KRW",
}
"""What a document without `currency` is in, where the platform sells in one currency."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST = -62_135_596_800_000  # milliseconds: the years 1 to 9999, which is what a datetime holds
_LATEST = 253_402_300_799_999
_SMALL_WHOLE = re.compile(r"-?[0-9]{1,9}")
_TO_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), check_circular=False).encode
_NUMBERS = ("$numberInt", "$numberLong", "$numberDouble", "$numberDecimal")
_TYPE_NAMES = {
    "$numberInt": "int", "$numberLong": "long", "$numberDouble": "double", "$numberDecimal": "decimal", "$date": "date",
    "$oid": "objectId", "$binary": "binary", "$timestamp": "timestamp", "$regularExpression": "regex", "$undefined": "undefined",
    "$minKey": "minKey", "$maxKey": "maxKey", "$code": "code", "$symbol": "symbol", "$dbPointer": "dbPointer",
}  # fmt: skip


class DocumentUnreadable(ValueError):
    """A document that is no order; the message names the field and the type met."""


@dataclass(frozen=True)
class Documents:
    """What a set of bronze rows says.

    orders            one row per (platform, mp_order_id), columns of ORDER_SCHEMA
    items             their items, columns of ITEM_SCHEMA
    rejected          rows that cannot be read, columns of REJECTED_SCHEMA
    parsed_positions  the positions that could be read
    """

    orders: pl.DataFrame
    items: pl.DataFrame
    rejected: pl.DataFrame
    parsed_positions: pl.Series


_Item = tuple[int, str | None, str | None, int, Decimal | None, str | None]
"""In the order of ITEM_SCHEMA from `line_no`."""

_Order = tuple[tuple[Any, ...], tuple[_Item, ...]]
"""Values in the order of ORDER_SCHEMA from `platform` to `updated_at` (times in microseconds), and items. Plain tuples
of plain values: the garbage collector soon leaves those alone, which halves the time of a large reading."""


def find_unreadable_documents(bronze: pl.DataFrame) -> Parsed:
    """Which of these bronze rows can be read: every one is judged. `rows` is what was given."""
    judged = _Judgement()
    rows = _one_per_position(bronze)
    for position, document in rows.select("_source_position", "document").iter_rows():
        judged.read(position, document)
    return Parsed(rows=bronze, rejected=judged.rejected(), parsed_positions=judged.parsed_positions())


def parse_documents(bronze: pl.DataFrame, default_region: str) -> Documents:
    """The orders and items that bronze rows of `marketplace_orders` say now.

    Per document the newest version in source order that can be read; a deleted document says nothing. Of several
    documents of one order the one changed last (`updated_at`, else `order_time`; then by its text) speaks.
    default_region: where phone numbers are local when neither platform nor currency tells.
    """
    chosen, judged = _speaking(bronze)
    return Documents(
        orders=_order_frame(chosen, default_region),
        items=_item_frame(chosen),
        rejected=judged.rejected(),
        parsed_positions=judged.parsed_positions(),
    )


def parse_items(bronze: pl.DataFrame) -> pl.DataFrame:
    """Only the items of `parse_documents`, without the work on contacts."""
    return _item_frame(_speaking(bronze)[0])


def _speaking(bronze: pl.DataFrame) -> tuple[list[tuple[str, str, _Order]], _Judgement]:
    """For every order its id, the document that speaks for it, and what that says; and what could not be read."""
    judged = _Judgement()
    rows = _one_per_position(since_truncate(bronze, ("document_id",)))
    newest = rows.filter(pl.col("_source_position") == pl.col("_source_position").max().over("document_id"))
    speaking = newest.filter(pl.col("_op") != "d")
    unread = _read_all(speaking, judged)
    if unread:
        older = rows.join(newest.select("_source_position"), on="_source_position", how="anti")
        older = older.filter(pl.col("document_id").is_in(unread), pl.col("_op") != "d")
        # a deletion ends a document: what it said before is no fallback for what came after
        deleted = rows.filter(pl.col("_op") == "d").group_by("document_id")
        older = older.join(deleted.agg(pl.col("_source_position").max().alias("_deleted_at")), on="document_id", how="left")
        older = older.filter(pl.col("_deleted_at").is_null() | (pl.col("_source_position") > pl.col("_deleted_at")))
        for _, versions in older.sort("_source_position", descending=True).group_by("document_id", maintain_order=True):
            for document_id, position, document in versions.select("document_id", "_source_position", "document").iter_rows():
                if judged.read(position, document, document_id):
                    break
    winners: dict[str, tuple[tuple[int, str], str, _Order]] = {}
    for document_id, text, order in judged.orders:
        values = order[0]
        order_id, rank = f"{values[0]}:{values[1]}", (values[-1], text)
        if order_id not in winners or winners[order_id][0] < rank:
            winners[order_id] = (rank, document_id, order)
    return [(order_id, document_id, order) for order_id, (_, document_id, order) in winners.items()], judged


def _one_per_position(bronze: pl.DataFrame) -> pl.DataFrame:
    """One row per position: a correction before the original, a later correction before an earlier one."""
    columns = ["_source_position", "_op", "document_id", "document"]
    if (bronze["_op"] != "fix").all():
        return bronze.select(columns).unique(subset="_source_position", keep="any")
    later = pl.col("_ingested_at") if "_ingested_at" in bronze.columns else pl.lit(0)
    ranked = bronze.select(*columns, later.alias("_at"), pl.col("_op").eq("fix").alias("_fix"))
    ranked = ranked.sort("_fix", "_at", "document").unique(subset="_source_position", keep="last", maintain_order=True)
    return ranked.select(columns)


def _read_all(rows: pl.DataFrame, judged: _Judgement) -> list[str]:
    """Read every row; gives the ids of the documents that could not be read."""
    columns = rows.select("_source_position", "document", "document_id")
    return [row[2] for row in columns.iter_rows() if not judged.read(*row)]


@dataclass
class _Judgement:
    """What was read so far, and what could not be."""

    orders: list[tuple[str, str, _Order]] = field(default_factory=list)
    _parsed: list[str] = field(default_factory=list)
    _rejected: list[tuple[str, str, bytes]] = field(default_factory=list)

    def read(self, position: str, document: str | None, document_id: str = "") -> bool:
        """Whether the document says anything. One without text (a delete, or gone before it was looked up) does not."""
        if document is None:
            self._parsed.append(position)
            return False
        try:
            order = read_document(document)
        except DocumentUnreadable as error:
            self._rejected.append((str(error), position, document.encode()))
            return False
        self.orders.append((document_id, document, order))
        self._parsed.append(position)
        return True

    def rejected(self) -> pl.DataFrame:
        return pl.DataFrame(self._rejected, schema=REJECTED_SCHEMA, orient="row")

    def parsed_positions(self) -> pl.Series:
        return pl.Series("source_position", self._parsed, dtype=pl.String)


def read_document(text: str) -> _Order:
    """One document. Raises DocumentUnreadable."""
    try:
        document = json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError):
        raise DocumentUnreadable("document is no JSON, expected an Extended JSON object") from None
    if not isinstance(document, dict):
        raise DocumentUnreadable(f"document is {_type_name(document)}, expected an object")
    platform, mp_order_id = _name(document, "platform"), _name(document, "mp_order_id")
    placed_at = _time(document.get("order_time"), "order_time")
    if placed_at is None:
        raise DocumentUnreadable("order_time is null or absent, expected a date")
    updated_at = _time(document.get("updated_at"), "updated_at")
    total, currency = _total_and_currency(document, platform)
    status = _text(document, "status")
    return (
        (
            platform,
            mp_order_id,
            _status(status),
            currency,
            total,
            _text(document, "payment_method"),
            _text(document, "card_fingerprint"),
            _text(document, "ip_address"),
            _text(document, "device_id"),
            _text(document, "loyalty_id"),
            _text(document, "user_email"),
            _text(document, "buyer_phone"),
            _text(document, "buyer_name", joined_by=" "),
            _text(document, "shipping_address", joined_by=", "),
            placed_at,
            placed_at if updated_at is None else updated_at,
        ),
        _items(document, total, currency),
    )


def _name(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value:
        met = "empty" if value == "" else _type_name(value)
        raise DocumentUnreadable(f"{key} is {met}, expected text")
    return value


def _status(status: str | None) -> str | None:
    name = status.lower() if status else None
    return "cancelled" if name == "canceled" else name


def _total_and_currency(document: dict[str, Any], platform: str) -> tuple[Decimal | None, str | None]:
    currency = _text(document, "currency")
    amount = document.get("amount")
    if currency is not None:
        currency = currency.upper()
        if len(currency) != 3 or not (currency.isascii() and currency.isalpha()):
            raise DocumentUnreadable("currency is other text, expected an ISO 4217 code of three letters")
    elif isinstance(amount, str):
        currency = marked_currency(amount)
    if currency is None:
        currency = PLATFORM_CURRENCY.get(platform.strip().lower())
    return _amount(amount, currency, "amount"), currency


def _items(document: dict[str, Any], total: Decimal | None, currency: str | None) -> tuple[_Item, ...]:
    items = document.get("items")
    if items is not None and not isinstance(items, list):
        raise DocumentUnreadable(f"items is {_type_name(items)}, expected an array")
    if not items:
        product_name = _text(document, "product_name")
        if product_name is None:
            return ()
        return ((1, _text(document, "product_id"), product_name, 1, total, _variant(document.get("variant"))),)
    return tuple(_item(item, line_no, total if len(items) == 1 else None, currency) for line_no, item in enumerate(items, 1))


def _item(item: Any, line_no: int, total: Decimal | None, currency: str | None) -> _Item:
    """One item. `total`: of the order when this is its only item, which tells the price of a single piece."""
    where = f"items[{line_no - 1}]"
    if not isinstance(item, dict) or _wrapped(item):
        raise DocumentUnreadable(f"{where} is {_type_name(item)}, expected an object")
    quantity = _quantity(item.get("quantity"), f"{where}.quantity")
    price = _amount(item.get("price"), currency, f"{where}.price")
    return (
        line_no,
        _text(item, "product_id", where),
        _text(item, "product_name", where),
        quantity,
        total if price is None and quantity == 1 else price,
        _variant(item.get("variant")),
    )


def _wrapped(value: dict[str, Any]) -> str | None:
    """The Extended JSON type of an object that is a value ('$numberInt'), else None."""
    first = next(iter(value), "")
    return first if first in _TYPE_NAMES else None


def _type_name(value: Any) -> str:
    """The BSON type of an Extended JSON value, as people call it."""
    if isinstance(value, dict):
        return _TYPE_NAMES.get(_wrapped(value) or "", "an object")
    if isinstance(value, list):
        return "an array"
    if value is None:
        return "null or absent"
    return {bool: "boolean", str: "text", int: "int", Decimal: "double"}.get(type(value), "unknown")


def _number(value: Any) -> str | None:
    """The digits of an Extended JSON number (a double: the shortest that read back as the same), else None."""
    if isinstance(value, dict):
        if len(value) == 1:
            ((kind, digits),) = value.items()
            if kind in _NUMBERS and isinstance(digits, str):
                return digits
        return None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return str(value)
    return None


def _amount(value: Any, currency: str | None, where: str) -> Decimal | None:
    if value is None:
        return None
    digits = _number(value)
    try:
        if digits is not None:
            return amount_of_digits(digits)
        if isinstance(value, str):
            return parse_amount(value, currency)
    except AmountUnreadable as error:
        raise DocumentUnreadable(f"{where} is {_type_name(value)} and {error}") from None
    raise DocumentUnreadable(f"{where} is {_type_name(value)}, expected a number or its spelling")


def _quantity(value: Any, where: str) -> int:
    if value is None:
        return 1
    digits = value.strip() if isinstance(value, str) else _number(value)
    if digits is not None and _SMALL_WHOLE.fullmatch(digits):
        return int(digits)
    try:
        number = amount_of_digits(digits or "")
        if abs(number) < 2**31 and number == number.to_integral_value():
            return int(number)
    except AmountUnreadable:
        pass
    raise DocumentUnreadable(f"{where} is {_type_name(value)}, expected a whole number of 32 bits")


def _text(source: dict[str, Any], key: str, where: str = "", joined_by: str = "") -> str | None:
    """Text, trimmed; '' is null. A number is its digits. joined_by: an object or array of texts is joined so."""
    value = source.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    digits = _number(value)
    if digits is not None:
        return digits.removesuffix(".0")
    if joined_by and isinstance(value, (dict, list)) and not (isinstance(value, dict) and _wrapped(value)):
        parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
        texts = [part.strip() if isinstance(part, str) else _number(part) for part in parts if part is not None]
        if all(text is not None for text in texts):
            return joined_by.join(text for text in texts if text) or None
    raise DocumentUnreadable(f"{where}{'.' if where else ''}{key} is {_type_name(value)}, expected text")


def _time(value: Any, where: str) -> int | None:
    """Microseconds since 1970 in UTC; a text without an offset is UTC."""
    if value is None:
        return None
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "$date":
            digits = inner if isinstance(inner, str) else None if isinstance(inner, bool) else _number(inner)
            if digits is not None and digits.lstrip("-").isdigit():
                milliseconds = int(digits)
                if not _EARLIEST <= milliseconds <= _LATEST:
                    raise DocumentUnreadable(f"{where} is a date outside the years 1 to 9999")
                return milliseconds * 1000
            value = inner
        elif kind == "$timestamp" and isinstance(inner, dict) and isinstance(inner.get("t"), int):
            return int(inner["t"]) * 1_000_000
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
            return (moment - _EPOCH) // _MICROSECOND
        except (ValueError, OverflowError):
            raise DocumentUnreadable(f"{where} is text, expected a date or its ISO 8601 spelling") from None
    raise DocumentUnreadable(f"{where} is {_type_name(value)}, expected a date")


def _variant(value: Any) -> str | None:
    """Canonical plain JSON: sorted keys, compact, numbers and dates without their Extended JSON wrapping."""
    if value is None:
        return None
    return _TO_JSON(_unwrapped(value))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrapped(part) for part in value]
    if isinstance(value, Decimal):
        return str(value)
    if not isinstance(value, dict):
        return value
    kind = _wrapped(value)
    if kind is None or len(value) != 1:
        return {key: _unwrapped(part) for key, part in value.items()}
    inner = value[kind]
    if kind in ("$numberInt", "$numberLong") and isinstance(inner, str) and inner.lstrip("-").isdigit():
        return int(inner)
    return inner if isinstance(inner, str) else _unwrapped(inner)


def _order_frame(chosen: list[tuple[str, str, _Order]], default_region: str) -> pl.DataFrame:
    names = list(ORDER_SCHEMA)[2:18]
    columns = list(zip(*(order[0] for _, _, order in chosen), strict=True)) if chosen else [()] * len(names)
    data: dict[str, pl.Series] = {
        "order_id": pl.Series([order_id for order_id, _, _ in chosen], dtype=pl.String),
        "document_id": pl.Series([document_id for _, document_id, _ in chosen], dtype=pl.String),
    }
    for name, values in zip(names, columns, strict=True):
        data[name] = _series(values, ORDER_SCHEMA[name])
    region = contacts.phone_regions(_nulls(len(chosen)), data["currency"], data["platform"])
    data["email"] = contacts.normalise_emails(data["email_raw"])
    data["phone"] = contacts.normalise_phones(data["phone_raw"], region.fill_null(default_region))
    data["region"] = region
    return pl.DataFrame(data, schema=ORDER_SCHEMA).sort("order_id")


def _item_frame(chosen: list[tuple[str, str, _Order]]) -> pl.DataFrame:
    names = list(ITEM_SCHEMA)
    rows = [(order_id, *item) for order_id, _, order in chosen for item in order[1]]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    data = {name: _series(values, ITEM_SCHEMA[name]) for name, values in zip(names, columns, strict=True)}
    return pl.DataFrame(data, schema=ITEM_SCHEMA).sort("order_id", "line_no")


def _series(values: Iterable[Any], dtype: Any) -> pl.Series:
    if dtype == _MONEY:
        return pl.Series(pa.array(values, pa.decimal128(20, 4)), dtype=_MONEY)
    if dtype == _TIME:
        return pl.Series(values, dtype=pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return pl.Series(values, dtype=dtype)


def _nulls(length: int) -> pl.Series:
    return pl.Series([None] * length, dtype=pl.String)
