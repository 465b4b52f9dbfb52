"""Plans an erasure: collects the values in the person's rows and decides where each of them is replaced."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from lakehouse.byte_search import SearchTerms
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import DOCUMENT_PATHS, EVENTS, MARKETPLACE_ORDERS, ORDERS, POSTGRES_KEYS, TABLES
from pipelines.identity.records import ORDER_RECORD_ID
from pipelines.parsing.contacts import phone_region
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.anonymise_rows import row_key
from pipelines.privacy.person import DataSubject, documents_of, orders_of
from pipelines.privacy.pseudonyms import Digest, Pseudonyms, normalise_value
from pipelines.privacy.shared_values import split_by_sharing
from pipelines.privacy.suppression import ACCOUNT, MENTION, RECORD, Suppression, erasures
from pipelines.privacy.value_replacer import PersonalValue
from pipelines.silver.identity_graph import IDENTITY_GRAPH

UNAMBIGUOUS_KINDS = ("email", "phone", "loyalty", "card", "device")
"""Kinds whose values do not coincide by chance: a text with one of the person's values mentions the person."""
MIN_TEXT_LENGTH = 6
"""Characters of the shortest value that is searched for in other text; shorter ones are part of too many words."""
NO_LIMIT = 2**63 - 1
"""A time after every record."""

Entry = tuple[str, Digest]
"""(kind, digest), as bronze.erasures stores it."""


@dataclass(frozen=True)
class ErasurePlan:
    """The work of an erasure: digests to suppress, and the clear texts to search for afterwards.

    until   by digest a later time limit than the request, where existing records claim to begin after it (microseconds
            since 1970)
    shared  by kind, how many values of the person other people show too (a namesake, the address of a large building):
            they are replaced in the person's rows and not searched for
    """

    entries: frozenset[Entry]
    texts: tuple[str, ...]
    until: Mapping[Digest, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)


def plan_erasure(lake: Lake, person: DataSubject, pseudonyms: Pseudonyms, erasure_id: str, moment: int) -> ErasurePlan:
    """Return the plan to erase a person. Reads all of bronze twice. moment: of the request, microseconds since 1970."""
    rows = {table.name: _read_bronze(lake, table) for table in TABLES if lake.exists(table)}
    collector = _Collector(lake=lake, person=person, pseudonyms=pseudonyms, erasure_id=erasure_id, moment=moment, rows=rows)
    collector.collect()
    # documents that were deleted or cannot be parsed are not in the graph: their contacts show whose they are
    while unlinked := _unlinked_documents(lake, rows, pseudonyms, collector.entries):
        collector.entries |= unlinked
        collector.collect()
    # a person who was erased before has a generated name: it is not searched for
    generated = {pseudonyms.name(erasure.id) for erasure in erasures(lake)}
    texts = _texts({value for value in collector.values if value.kind != "name" or value.raw not in generated}, collector.own)
    return _resolve_mentions(collector, texts)


@dataclass(kw_only=True)
class _Collector:
    """Collects the values in the person's rows.

    entries  what is to be suppressed
    values   all values in rows that belong to the person
    own      those that are replaced wherever they occur
    shared   by kind, how many values are not, because too many other people show them
    """

    lake: Lake
    person: DataSubject
    pseudonyms: Pseudonyms
    erasure_id: str
    moment: int
    rows: Mapping[str, pl.DataFrame]
    entries: set[Entry] = field(init=False)
    values: set[PersonalValue] = field(init=False)
    own: set[PersonalValue] = field(init=False, default_factory=set)
    shared: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = _key_entries(self.lake, self.person, self.pseudonyms)
        self.values = set(self.person.spelled)

    def collect(self) -> None:
        """Collect the values in rows that belong to the person by the present entries, and suppress their own values."""
        anonymiser = Anonymiser(self.suppression(self.moment), self.values)
        for table in TABLES:
            if table.name in self.rows:
                anonymiser(table, self.rows[table.name])
        self.own, self.shared = split_by_sharing(self.lake, self.person, self.values)
        self.entries |= {
            (value.kind, self.pseudonyms.digest(value.kind, value.normalised))
            for value in self.own
            if value.normalised is not None
        }

    def suppression(self, until: int) -> Suppression:
        """Return the entries as a suppression list with one time limit."""
        return Suppression(self.pseudonyms, {digest: (self.erasure_id, until) for _, digest in self.entries})


def _key_entries(lake: Lake, person: DataSubject, pseudonyms: Pseudonyms) -> set[Entry]:
    """Return the entries by which rows belong to the person: accounts, orders and documents."""
    keys = [(ACCOUNT, str(number)) for number in person.accounts]
    keys += [(RECORD, record) for record in person.orders]
    keys += [(RECORD, f"{ORDERS.name}|{order_id}") for order_id in orders_of(lake, person)]
    keys += [(RECORD, f"{MARKETPLACE_ORDERS.name}|{document_id}") for document_id in documents_of(lake, person)]
    return {(kind, pseudonyms.digest(kind, value)) for kind, value in keys}


def _unlinked_documents(lake: Lake, rows: Mapping[str, pl.DataFrame], pseudonyms: Pseudonyms, entries: set[Entry]) -> set[Entry]:
    """Return new entries for marketplace documents without a live record that contain a contact of the person."""
    if MARKETPLACE_ORDERS.name not in rows:
        return set()
    documents = rows[MARKETPLACE_ORDERS.name].drop_nulls("document")
    live = lake.load(IDENTITY_GRAPH).read(["record_id"])["record_id"].unique()
    dead = documents.filter(~ORDER_RECORD_ID.is_in(live.implode()).fill_null(False))
    found: set[Entry] = set()
    for document_id, platform, text in dead.select("document_id", "platform", "document").iter_rows():
        if _contacts(text, platform, pseudonyms) & entries:
            found.add((RECORD, pseudonyms.digest(RECORD, f"{MARKETPLACE_ORDERS.name}|{document_id}")))
    return found - entries


def _contacts(document: str, platform: str | None, pseudonyms: Pseudonyms) -> set[Entry]:
    """Return the entries of the e-mail, phone and loyalty id in a document."""
    region = phone_region(None, None, platform) or pseudonyms.region
    return {
        (kind, pseudonyms.digest(kind, normalised))
        for path, kind in DOCUMENT_PATHS
        if kind in ("email", "phone", "loyalty")
        if (raw := _text_field(document, path)) is not None
        if (normalised := normalise_value(kind, raw, region)) is not None
    }


def _text_field(document: str, name: str) -> str | None:
    try:
        fields = json.loads(document)
    except ValueError:
        return None
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, str) else None


def _resolve_mentions(collector: _Collector, texts: list[tuple[str, str]]) -> ErasurePlan:
    """Anonymise all rows as the erasure will, and handle the texts that remain in rows of other people.

    A row with an unambiguous value becomes a mention. Other values that remain are shared and not searched for. The limit of
    time is left out, so that records that claim to begin later (by a wrong clock) are included.
    """
    anonymiser = Anonymiser(collector.suppression(NO_LIMIT), latest_begins={})
    unambiguous = SearchTerms(tuple(sorted({text for kind, text in texts if kind in UNAMBIGUOUS_KINDS})))
    every = SearchTerms(tuple(sorted({text for _, text in texts})))
    entries, remaining = set(collector.entries), set[str]()
    for table in TABLES:
        if table.name not in collector.rows:
            continue
        edited = anonymiser(table, collector.rows[table.name])
        if table.name not in (EVENTS.name, MARKETPLACE_ORDERS.name, *POSTGRES_KEYS):
            continue
        columns = _text_columns(edited.rows)
        hits = _any(unambiguous.hits(column) for column in columns)
        hits |= edited.owned & _any(every.hits(column) for column in columns)
        mentions = edited.rows.filter(hits).select(row_key(table)).to_series().drop_nulls().unique()
        entries |= {(MENTION, collector.pseudonyms.digest(MENTION, key)) for key in mentions}
        remaining |= set().union(*(every.found_in(column.filter(~edited.owned)) for column in columns))
    ambiguous = {text for kind, text in texts if kind not in UNAMBIGUOUS_KINDS and text in remaining}
    shared = dict(collector.shared)
    for kind, text in texts:
        if text in ambiguous:
            shared[kind] = shared.get(kind, 0) + 1
    until = {digest: at for digest, at in (anonymiser.latest_begins or {}).items() if at > collector.moment}
    return ErasurePlan(frozenset(entries), tuple(sorted({text for _, text in texts} - ambiguous)), until, shared)


def _texts(values: set[PersonalValue], own: set[PersonalValue]) -> list[tuple[str, str]]:
    """Return (kind, text) pairs to search for: names, and the raw and normalised values that are replaced everywhere."""
    result: set[tuple[str, str]] = set()
    for value in values:
        if value in own or value.kind == "name" or (value.kind == "address" and value.normalised is None):
            for text in (value.raw, value.normalised):
                if text and len(text.strip()) >= MIN_TEXT_LENGTH and (value.kind != "name" or " " in text.strip()):
                    result.add((value.kind, text.strip()))
    return sorted(result)


def _read_bronze(lake: Lake, table: Table) -> pl.DataFrame:
    handle = lake.load(table)
    return handle.read([name for name in handle.reader.schema.names if name not in BOOKKEEPING])


def _text_columns(rows: pl.DataFrame) -> list[pl.Series]:
    """Return the string and binary columns, as text."""
    columns = []
    for name, dtype in rows.schema.items():
        if dtype == pl.String:
            columns.append(rows[name])
        elif dtype == pl.Binary:
            texts = [None if value is None else value.decode("utf-8", "replace") for value in rows[name].to_list()]
            columns.append(pl.Series(name, texts, dtype=pl.String))
    return columns


def _any(masks: Iterable[pl.Series]) -> pl.Series:
    return functools.reduce(operator.or_, masks)
