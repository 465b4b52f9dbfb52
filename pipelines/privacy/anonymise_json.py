"""Anonymises bronze rows that contain JSON: marketplace documents and messages of events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import polars as pl

from pipelines.bronze.tables import DOCUMENT_PATHS, EVENT_PATHS, EVENTS, MARKETPLACE_ORDERS, ORDERS
from pipelines.identity.records import ORDER_PREFIX
from pipelines.parsing.contacts import phone_region
from pipelines.privacy.anonymise_rows import PLACEHOLDER, AnonymisedRows
from pipelines.privacy.personal_paths import PersonalPaths
from pipelines.privacy.record_begin import UNKNOWN, begin_of_document, begin_of_event, microseconds
from pipelines.privacy.suppression import ACCOUNT, MENTION, RECORD
from pipelines.privacy.value_replacer import ValueReplacer
from pipelines.silver.events_clean import whole_number

WORDING = "wording"
"""Kind of the product texts of a document: replaced only when the document mentions the person there."""
SCORED_VALUES = ("card", "device", "address", "ip")
"""Personal fields of an order in a served score; each name is also the kind of its value."""
_decode, _encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode


def anonymise_documents(replacer: ValueReplacer, rows: pl.DataFrame) -> AnonymisedRows:
    """Anonymise the documents of marketplace orders."""
    documents: list[str | None] = []
    changed, owned = [], []
    columns = rows.select("document_id", "platform", "mp_order_id", "document")
    for document_id, platform, mp_order_id, text in columns.iter_rows():
        key = f"{MARKETPLACE_ORDERS.name}|{document_id}"
        keys = (key, f"{ORDER_PREFIX}{platform}:{mp_order_id}")
        owner = next((found for one in keys if (found := replacer.owner(RECORD, one)) is not None), None)
        mentioned = replacer.owner(MENTION, key) is not None
        new = _anonymise_document(replacer, owner, mentioned, platform, text)
        documents.append(new)
        changed.append(new != text)
        owned.append(owner is not None)
    edited = rows.with_columns(pl.Series("document", documents, dtype=pl.String))
    return AnonymisedRows(edited, pl.Series(changed, dtype=pl.Boolean), pl.Series(owned, dtype=pl.Boolean))


def _anonymise_document(
    replacer: ValueReplacer, owner: str | None, mentioned: bool, platform: str | None, text: str | None
) -> str | None:
    """Return an anonymised document. mentioned: its undeclared fields or product texts mention the person."""
    if text is None:
        return None
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    concerned = owner is not None or mentioned
    if not isinstance(document, dict):
        return PLACEHOLDER if concerned else text
    currency = document.get("currency")
    region = phone_region(None, currency if isinstance(currency, str) else None, platform) or ""
    begin = begin_of_document(document.get("order_time"))

    def replace(kind: str, raw: str) -> str | None:
        if kind == WORDING:
            return PLACEHOLDER if mentioned else raw
        return replacer.replace(kind, raw, owner, begin, region)

    new = PersonalPaths(DOCUMENT_PATHS, replace, concerned).anonymise(document)
    return text if new == document else json.dumps(new, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class _Message:
    """An anonymised message. concerned: it belongs to the person, is about their order, or mentions them."""

    value: bytes | None
    event_id: str | None
    owned: bool
    concerned: bool


def anonymise_messages(replacer: ValueReplacer, rows: pl.DataFrame) -> AnonymisedRows:
    """Anonymise the messages of events; rows of the same event have the same key."""
    values, keys, headers, event_ids, changed, owned = [], [], [], [], [], []
    columns = rows.select("topic", "partition", "offset", "key", "value", "headers", "_source_time")
    for topic, partition, offset, key, value, header, source_time in columns.iter_rows():
        place = f"{EVENTS.name}|{topic}/{partition}/{offset}"
        message = _anonymise_message(replacer, place, value, source_time)
        value_changed = message.value != value
        # the key or a header may contain the value that was replaced
        clear = message.concerned or value_changed
        values.append(message.value)
        keys.append(None if clear else key)
        headers.append(None if clear else header)
        event_ids.append(message.event_id)
        changed.append(value_changed or (clear and (key is not None or header is not None)))
        owned.append(message.owned)
    edited = rows.with_columns(
        pl.Series("value", values, dtype=pl.Binary),
        pl.Series("key", keys, dtype=pl.Binary),
        pl.Series("headers", headers, dtype=pl.String),
    )
    return AnonymisedRows(
        edited,
        pl.Series(changed, dtype=pl.Boolean),
        pl.Series(owned, dtype=pl.Boolean),
        pl.Series(event_ids, dtype=pl.String),
    )


def _anonymise_message(replacer: ValueReplacer, place: str, value: bytes | None, source_time: datetime | None) -> _Message:
    try:
        event = _decode(value) if value else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        event = None
    mentioned = replacer.owner(MENTION, place) is not None
    if not isinstance(event, dict):
        owned = replacer.owner(RECORD, place) is not None
        unreadable = PLACEHOLDER.encode() if (owned or mentioned) and value is not None else value
        return _Message(unreadable, None, owned, owned or mentioned)
    event_id = event.get("event_id")
    owner = _event_owner(replacer, event, place)
    # an event about the person's order may come from staff: their device stays, undeclared fields go
    owned = owner is not None or _is_about_order(replacer, event)
    begin = begin_of_event(event.get("timestamp"), source_time)

    def replace(kind: str, raw: str) -> str | None:
        return replacer.replace(kind, raw, owner, begin)

    new = PersonalPaths(EVENT_PATHS, replace, owned or mentioned).anonymise(event)
    return _Message(
        value if new == event else _encode(new), event_id if isinstance(event_id, str) else None, owned, owned or mentioned
    )


def _event_owner(replacer: ValueReplacer, event: dict[str, Any], place: str) -> str | None:
    """Return the erasure of an event's account, or of the account of the order in a served score."""
    metadata = event.get("metadata")
    order = metadata.get("order") if isinstance(metadata, dict) else None
    for account in (event.get("user_id"), order.get("account") if isinstance(order, dict) else None):
        number = whole_number(account)
        if number is not None and (owner := replacer.cached_owner(ACCOUNT, str(number))) is not None:
            return owner
    return replacer.owner(RECORD, place)


def _is_about_order(replacer: ValueReplacer, event: dict[str, Any]) -> bool:
    """Return whether an event refers to an order of an erased person."""
    metadata = event.get("metadata")
    order_ref = metadata.get("order_ref") if isinstance(metadata, dict) else None
    if not isinstance(order_ref, str | int):
        return False
    prefixes = (f"{ORDERS.name}|", ORDER_PREFIX)
    return any(replacer.cached_owner(RECORD, f"{prefix}{order_ref}") is not None for prefix in prefixes)


def anonymise_scored_order(replacer: ValueReplacer, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Anonymise an order as a served score contains it: the inputs of the fraud features."""
    account, placed = row.get("account"), row.get("placed_at")
    owner = replacer.cached_owner(ACCOUNT, str(account)) if account is not None else None
    begin = microseconds(placed) if isinstance(placed, datetime) else UNKNOWN
    values = {name: value for name in SCORED_VALUES if (value := row.get(name)) is not None}
    new = {name: replacer.replace(name, value, owner, begin) for name, value in values.items()}
    return row if new == values else {**row, **new}
