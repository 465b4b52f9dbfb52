"""Bronze rows without what is suppressed: pure, and the same whether a row is stored already or arrives.

A row is the person's when it is of one of their accounts or records: then every personal value in it is replaced, and what
no declaration knows is left out. In the rows of others only suppressed values are, of records that began before the erasure.
A row that mentions an erased value where no declaration knows of one loses what no declaration knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa

from lakehouse.iceberg.schema import as_arrow
from lakehouse.table import Table
from pipelines.bronze.tables import (
    CHARGEBACKS,
    DOCUMENT_PATHS,
    EVENT_PATHS,
    EVENTS,
    MARKETPLACE_ORDERS,
    ORDER_ITEMS,
    ORDERS,
    POSTGRES_TABLES,
    TABLES,
)
from pipelines.identity.records import ORDER_PREFIX
from pipelines.parsing.contacts import phone_region
from pipelines.privacy.pseudonyms import Digest, is_pseudonym, normalise_value
from pipelines.privacy.suppression import ACCOUNT, MENTION, RECORD, Suppression
from pipelines.silver.events_clean import whole_number

TABLES_BY_NAME = {table.name: table for table in TABLES}
KEYS: Mapping[str, tuple[str, ...]] = {table.name: key for table, key in POSTGRES_TABLES.values()}
OF_ORDERS: Mapping[str, str] = {ORDER_ITEMS.name: "order_id", CHARGEBACKS.name: "order_ref"}
"""Tables whose rows are the person's by the order that a column names."""
ALWAYS = 2**63 - 1
UNREADABLE = "erased"
"""What stands for a document or message that cannot be read, and is the person's; and for wording that names them."""
WORDING = "wording"
"""Kind of what is left alone, unless the document names the person there or where no declaration knows of it."""
_decode, _encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Edited:
    """Rows as they must be.

    changed  which of them are not as they were
    mine     which of them are of an erased person
    keys     by which rows speak of the same thing (event ids); null: of themselves only
    """

    rows: pl.DataFrame
    changed: pl.Series
    mine: pl.Series
    keys: pl.Series | None = None


@dataclass(frozen=True)
class Shown:
    """A value that a row of the person shows. spelling: its one spelling, None when it says nothing."""

    kind: str
    raw: str
    spelling: str | None


@dataclass
class Anonymiser:
    """Applies a suppression to bronze rows.

    seen    what was replaced in rows that are the person's, where wanted
    latest  where wanted: when the last record of others began in which a value was replaced
    """

    suppression: Suppression
    seen: set[Shown] | None = None
    latest: dict[Digest, int] | None = None
    _kept: dict[tuple[str, str, str, str], tuple[str, int | None]] = field(default_factory=dict)
    _accounts: dict[str, str | None] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"suppression": self.suppression, "seen": None, "latest": None, "_kept": {}, "_accounts": {}}

    def __call__(self, table: Table, rows: pl.DataFrame) -> Edited:
        """The rows of a bronze table."""
        if rows.is_empty():
            return _untouched(rows)
        if table.name == EVENTS.name:
            return self._messages(rows)
        if table.name == MARKETPLACE_ORDERS.name:
            return self._documents(rows)
        return self._rows(table, rows) if table.name in KEYS else _untouched(rows)

    # --- values

    def _value(self, kind: str, raw: str, region: str = "", city: str = "") -> tuple[str, int | None]:
        """What stands for a value, and until which moment it is suppressed in rows of others (None: it is not)."""
        place = (kind, raw, region, city)
        if (found := self._kept.get(place)) is None:
            found = self._kept[place] = self._new_value(*place)
        return found

    def _new_value(self, kind: str, raw: str, region: str, city: str) -> tuple[str, int | None]:
        pseudonyms = self.suppression.pseudonyms
        if is_pseudonym(kind, raw):
            return raw, None
        spelling = normalise_value(kind, raw, region or pseudonyms.region, city)
        entry = self.suppression.find(kind, spelling) if spelling is not None else None
        instead = pseudonyms.pseudonym(kind, spelling) if spelling is not None else pseudonyms.pseudonym("text", raw)
        return instead, entry[1] if entry is not None else None

    def _note(self, kind: str, raw: str, region: str = "", city: str = "") -> None:
        if self.seen is not None and not is_pseudonym(kind, raw):
            spelling = normalise_value(kind, raw, region or self.suppression.pseudonyms.region, city)
            self.seen.add(Shown(kind, raw, spelling))

    def _replaced(self, kind: str, raw: str, owner: str | None, begun: int, region: str = "", city: str = "") -> str | None:
        """What a row has instead of a value. owner: the erasure whose row it is."""
        if owner is None:
            if kind in ("name", "city", "text"):
                return raw
            instead, until = self._value(kind, raw, region, city)
            if until is None or begun > until:
                return raw
            if self.latest is not None:
                spelling = normalise_value(kind, raw, region or self.suppression.pseudonyms.region, city) or ""
                digest = self.suppression.pseudonyms.digest(kind, spelling)
                self.latest[digest] = max(begun, self.latest.get(digest, begun))
            return instead
        self._note(kind, raw, region, city)
        if kind == "name":
            return self.suppression.pseudonyms.name(owner)
        if kind in ("city", "text"):
            return None
        return self._value(kind, raw, region, city)[0]

    def _owner(self, kind: str, value: str) -> str | None:
        entry = self.suppression.find(kind, value)
        return entry[0] if entry is not None else None

    # --- PostgreSQL

    def _rows(self, table: Table, rows: pl.DataFrame) -> Edited:
        names = {column.name for column in table.columns}
        marks = {
            c.name: str(c.personal) for c in table.columns if c.personal and c.personal != ACCOUNT and c.name in rows.columns
        }
        undeclared = [name for name in rows.columns if name not in names and not name.startswith("_")]
        if marks.keys() <= {"_unreadable"} and not undeclared and not _any_unreadable(rows):
            return _untouched(rows)
        accounts = [c.name for c in table.columns if c.personal == ACCOUNT]
        key = pl.concat_str([pl.lit(table.name), *(pl.col(name).cast(pl.String) for name in KEYS[table.name])], separator="|")
        owners = self._owners(RECORD, rows.select(key).to_series())
        for name in accounts:
            of_account = self._owners(ACCOUNT, rows[name].cast(pl.String))
            owners = [one if one is not None else other for one, other in zip(owners, of_account, strict=True)]
        if table.name in OF_ORDERS:
            owners = self._owners_of_orders(rows[OF_ORDERS[table.name]].cast(pl.String))
        mentions = self._owners(MENTION, rows.select(key).to_series())
        begun = _microseconds(rows, "created_at")
        result: dict[str, list[Any]] = {}
        cities = rows["city"].to_list() if "city" in marks else None
        regions = [phone_region(text) for text in rows["country"].to_list()] if "country" in names else None
        for name, kind in marks.items():
            if name == "_unreadable":
                continue
            values = rows[name].to_list()
            new = list(values)
            for at, raw in enumerate(values):
                if raw is None:
                    continue
                region = (regions[at] or "") if regions is not None and kind == "phone" else ""
                city = (cities[at] or "") if cities is not None and kind == "address" else ""
                new[at] = self._replaced(kind, raw, owners[at], begun[at], region, city)
                if kind == "address" and cities is not None and owners[at] is None and new[at] != raw:
                    # the city is part of the address that is told by one word now
                    result.setdefault("city", list(cities))[at] = None
            if name in result:
                result[name] = [None if gone is None else one for gone, one in zip(result[name], new, strict=True)]
            else:
                result[name] = new
        bare = [
            n for n, (owner, named) in enumerate(zip(owners, mentions, strict=True)) if owner is not None or named is not None
        ]
        edited = rows.with_columns(pl.Series(name, values, dtype=rows.schema[name]) for name, values in result.items())
        if bare:
            mine = pl.Series(range(rows.height)).is_in(bare)
            edited = edited.with_columns(pl.when(mine).then(None).otherwise(pl.col(name)).alias(name) for name in undeclared)
            if "_unreadable" in rows.columns:
                known = names - marks.keys()
                texts = [
                    _known_only(text, known) if at in set(bare) else text for at, text in enumerate(rows["_unreadable"].to_list())
                ]
                edited = edited.with_columns(pl.Series("_unreadable", texts, dtype=pl.String))
        return Edited(edited, _differs(rows, edited), pl.Series([owner is not None for owner in owners], dtype=pl.Boolean))

    def _owners_of_orders(self, orders: pl.Series) -> list[str | None]:
        """The erasure of each order, of the shop or of a marketplace."""
        ours = self._owners(RECORD, pl.select(pl.lit(f"{ORDERS.name}|") + orders).to_series())
        theirs = self._owners(RECORD, pl.select(pl.lit(ORDER_PREFIX) + orders).to_series())
        return [one if one is not None else other for one, other in zip(ours, theirs, strict=True)]

    def _owners(self, kind: str, values: pl.Series) -> list[str | None]:
        """The erasure of each value; looked up once for each distinct one."""
        distinct = values.drop_nulls().unique().to_list()
        found = {value: self._owner(kind, value) for value in distinct}
        if not any(found.values()):
            return [None] * len(values)
        return [found.get(value) for value in values.to_list()]

    # --- MongoDB

    def _documents(self, rows: pl.DataFrame) -> Edited:
        documents: list[str | None] = []
        changed, mine = [], []
        columns = rows.select("document_id", "platform", "mp_order_id", "document")
        for document_id, platform, mp_order_id, text in columns.iter_rows():
            key = f"{MARKETPLACE_ORDERS.name}|{document_id}"
            keys = (key, f"{ORDER_PREFIX}{platform}:{mp_order_id}")
            owner = next((found for one in keys if (found := self._owner(RECORD, one)) is not None), None)
            new = self._document(owner, self._owner(MENTION, key) is not None, platform, text)
            documents.append(new)
            changed.append(new != text)
            mine.append(owner is not None)
        edited = rows.with_columns(pl.Series("document", documents, dtype=pl.String))
        return Edited(edited, pl.Series(changed, dtype=pl.Boolean), pl.Series(mine, dtype=pl.Boolean))

    def _document(self, owner: str | None, mentioned: bool, platform: str | None, text: str | None) -> str | None:
        """A document as it must be. mentioned: what tells of the product names the person."""
        if text is None:
            return None
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            return UNREADABLE if owner is not None or mentioned else text
        told = document.get("currency")
        region = phone_region(None, told if isinstance(told, str) else None, platform) or ""
        begun = _moment_of_document(document.get("order_time"))
        bare = owner is not None or mentioned

        def replaced(kind: str, raw: str) -> str | None:
            if kind == WORDING:
                return UNREADABLE if mentioned else raw
            return self._replaced(kind, raw, owner, begun, region)

        new = _PersonalPaths(DOCUMENT_PATHS, replaced, bare).without(document)
        return text if new == document else json.dumps(new, ensure_ascii=False, separators=(",", ":"))

    # --- Kafka

    def _messages(self, rows: pl.DataFrame) -> Edited:
        values, keys, headers, ids, changed, owned = [], [], [], [], [], []
        columns = rows.select("topic", "partition", "offset", "key", "value", "headers", "_source_time")
        for topic, partition, offset, key, value, header, at in columns.iter_rows():
            place = f"{EVENTS.name}|{topic}/{partition}/{offset}"
            new, event_id, mine, mentioned = self._message(place, value, at)
            other = new != value
            bare = mine or mentioned or other  # a key or header may be what was replaced
            values.append(new)
            keys.append(None if bare else key)
            headers.append(None if bare else header)
            ids.append(event_id)
            changed.append(other or (bare and (key is not None or header is not None)))
            owned.append(mine)
        edited = rows.with_columns(
            pl.Series("value", values, dtype=pl.Binary),
            pl.Series("key", keys, dtype=pl.Binary),
            pl.Series("headers", headers, dtype=pl.String),
        )
        mine_of_all = pl.Series(owned, dtype=pl.Boolean)
        return Edited(edited, pl.Series(changed, dtype=pl.Boolean), mine_of_all, pl.Series(ids, dtype=pl.String))

    def _message(self, place: str, value: bytes | None, at: datetime | None) -> tuple[bytes | None, str | None, bool, bool]:
        """A message as it must be, its event id, whether it is the person's, and whether it mentions them."""
        try:
            message = _decode(value) if value else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = None
        mentioned = self._owner(MENTION, place) is not None
        if not isinstance(message, dict):
            mine = self._owner(RECORD, place) is not None
            return (UNREADABLE.encode() if (mine or mentioned) and value is not None else value), None, mine, mentioned
        event_id = message.get("event_id")
        event_id = event_id if isinstance(event_id, str) else None
        owner = self._owner_of_message(message, place)
        # whoever packs or ships the order tells of it too: their device is theirs, what no declaration knows is not
        mine = owner is not None or self._of_order(message)
        begun = _moment_of_event(message.get("timestamp"), at)
        tree = _PersonalPaths(EVENT_PATHS, lambda kind, raw: self._replaced(kind, raw, owner, begun), mine or mentioned)
        new = tree.without(message)
        return (value if new == message else _encode(new)), event_id, mine, mentioned

    def order(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """An order as the fraud features take it, as a served score tells of it."""
        account, placed = row.get("account"), row.get("placed_at")
        owner = self._owner_kept(ACCOUNT, str(account)) if account is not None else None
        begun = int(placed.timestamp() * 1_000_000) if isinstance(placed, datetime) else 0
        kinds = {name: value for name in ("card", "device", "address", "ip") if (value := row.get(name)) is not None}
        new = {name: self._replaced(name, value, owner, begun) for name, value in kinds.items()}
        return row if new == kinds else {**row, **new}

    def _of_order(self, message: dict[str, Any]) -> bool:
        metadata = message.get("metadata")
        told = metadata.get("order_ref") if isinstance(metadata, dict) else None
        if not isinstance(told, str | int):
            return False
        return any(self._owner_kept(RECORD, f"{before}{told}") is not None for before in (f"{ORDERS.name}|", ORDER_PREFIX))

    def _owner_of_message(self, message: dict[str, Any], place: str) -> str | None:
        metadata = message.get("metadata")
        order = metadata.get("order") if isinstance(metadata, dict) else None
        for account in (message.get("user_id"), order.get("account") if isinstance(order, dict) else None):
            number = whole_number(account)
            if number is not None and (owner := self._owner_kept(ACCOUNT, str(number))) is not None:
                return owner
        return self._owner(RECORD, place)

    def _owner_kept(self, kind: str, value: str) -> str | None:
        kept = self._accounts
        if value not in kept:
            kept[value] = self._owner(kind, value)
        return kept[value]


@dataclass(frozen=True)
class _PersonalPaths:
    """A JSON object by declared paths. replaced(kind, text); bare: what no path names is left out."""

    paths: tuple[tuple[str, str], ...]
    replaced: Callable[[str, str], str | None]
    bare: bool

    def without(self, document: dict[str, Any]) -> dict[str, Any]:
        """The object as it must be."""
        return self._object(document, _nested(self.paths))

    def _object(self, document: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in document.items():
            what = known.get(name)
            if what is None:
                if not self.bare:
                    result[name] = value
            elif isinstance(what, str):
                result[name] = value if what in ("", ACCOUNT) else self._leaf(what, value)
            elif isinstance(value, dict):
                result[name] = self._object(value, what)
            elif isinstance(value, list):
                result[name] = [self._element(one, what) for one in value]
            elif value is None or not self.bare:
                result[name] = value
        return result

    def _element(self, value: Any, known: Mapping[str, Any]) -> Any:
        if isinstance(value, dict):
            return self._object(value, known)
        return None if self.bare else value

    def _leaf(self, kind: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.replaced(kind, value)
        if value is None or isinstance(value, bool):
            return value
        text = (" " if kind == "name" else ", ").join(_texts(value))
        new = self.replaced(kind, text)
        return value if new == text else new


_NESTED: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}


def _nested(paths: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Paths as nested objects, with the kinds at their ends."""
    if (found := _NESTED.get(paths)) is None:
        found = {}
        for path, kind in paths:
            *above, last = path.split(".")
            at = found
            for name in above:
                at = at.setdefault(name, {})
            at[last] = kind
        _NESTED[paths] = found
    return found


def _untouched(rows: pl.DataFrame) -> Edited:
    nothing = pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True)
    return Edited(rows, nothing, nothing)


def _any_unreadable(rows: pl.DataFrame) -> bool:
    return "_unreadable" in rows.columns and rows["_unreadable"].null_count() < rows.height


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value is not None:
        yield str(value).strip()


def _known_only(text: str | None, known: set[str]) -> str | None:
    """`_unreadable` with the texts of columns that are known to be harmless; of others only the name."""
    if not text:
        return text
    values = {name: value if name in known else UNREADABLE for name, value in json.loads(text).items()}
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


def _microseconds(rows: pl.DataFrame, name: str) -> list[int]:
    """When the record of each row began; where that is not told: long ago."""
    if name not in rows.columns:
        return [0] * rows.height
    return rows[name].dt.epoch("us").fill_null(0).to_list()


def _moment_of_document(value: Any) -> int:
    inner = value.get("$date") if isinstance(value, dict) else value
    if isinstance(inner, dict):
        digits = inner.get("$numberLong")
        return int(digits) * 1000 if isinstance(digits, str) and digits.lstrip("-").isdigit() else 0
    return _moment(inner) or 0


def _moment_of_event(value: Any, at: datetime | None) -> int:
    told = _moment(value)
    if told is not None:
        return told
    return int(at.timestamp() * 1_000_000) if at is not None else 0


def _moment(value: Any) -> int | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value.strip())
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError):
        return None


def _differs(before: pl.DataFrame, after: pl.DataFrame) -> pl.Series:
    unlike = [~pl.col(name).eq_missing(pl.col(f"__{name}")) for name in before.columns]
    both = pl.concat([before, after.rename({name: f"__{name}" for name in after.columns})], how="horizontal")
    return both.select(pl.any_horizontal(unlike).alias("changed")).to_series()


@dataclass(frozen=True)
class OnArrival:
    """What an ingest does with the rows that it is about to store: picklable."""

    anonymiser: Anonymiser

    def __call__(self, table: str, rows: pa.Table) -> pa.Table:
        """Rows of a bronze table, as a connector gave them."""
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        edited = self.anonymiser(TABLES_BY_NAME[table], frame)
        return as_arrow(edited.rows, rows.schema) if edited.changed.any() else rows
