"""Who is meant, which records and rows are theirs, and what these show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from lakehouse.byte_search import SearchTerms
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import DOCUMENT_PATHS, EVENTS, MARKETPLACE_ORDERS, ORDERS, TABLES
from pipelines.identity.records import ORDER_PREFIX, USER_PREFIX
from pipelines.parsing.contacts import normalise_addresses, normalise_email, normalise_phone, phone_region
from pipelines.privacy.anonymise import ALWAYS, KEYS, Anonymiser, Shown
from pipelines.privacy.pseudonyms import Digest, Pseudonyms, normalise_value
from pipelines.privacy.suppression import ACCOUNT, MENTION, RECORD, Suppression, erasures
from pipelines.settings import settings_of
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

SURE = ("email", "phone", "loyalty", "card", "device")
"""Kinds whose values nobody has by chance: where one is mentioned, the person is."""
OPAQUE = ("card", "device", "ip", "session")
SHORTEST = 6
"""Characters of the shortest value that is searched for within other text; shorter ones are in too many words."""


@dataclass(frozen=True)
class SubjectQuery:
    """By what a person is named; exactly one is given."""

    email: str | None = None
    phone: str | None = None
    loyalty_id: str | None = None
    user_id: int | None = None
    master_user_id: str | None = None


@dataclass(frozen=True)
class DataSubject:
    """A person of the lakehouse.

    masters   master users; none when all accounts are closed
    accounts  user ids
    orders    record ids of marketplace orders
    """

    masters: frozenset[str]
    accounts: frozenset[int]
    orders: frozenset[str]
    spelled: tuple[Shown, ...] = ()
    """What they were asked for by, where that is a value."""

    @property
    def records(self) -> frozenset[str]:
        """All their record ids, as silver.identity_graph has them."""
        return self.orders | {f"{USER_PREFIX}{number}" for number in self.accounts}


def find_person(lake: Lake, asked: SubjectQuery) -> DataSubject:
    """The person. Raises ShopSphereError when nobody is known, or several are."""
    region = settings_of(lake).default_region
    graph = lake.load(IDENTITY_GRAPH).read(["record_id", "node", "master_user_id"])
    users = lake.load(USERS_SCD).read(["user_id", "email", "phone_number", "loyalty_id", "name", "master_user_id"])
    records, accounts, spelled = _named(asked, graph, users, region)
    masters = set(graph.filter(pl.col("record_id").is_in(records))["master_user_id"].drop_nulls())
    masters |= set(users.filter(pl.col("user_id").is_in(accounts))["master_user_id"].drop_nulls())
    if asked.master_user_id is not None:
        masters &= {asked.master_user_id}
    if not masters and not accounts and not spelled:
        raise ShopSphereError("No customer matches this identifier. Try another one: e-mail, phone, account or loyalty card.")
    if len(masters) > 1:
        raise ShopSphereError(
            f"That is shown by {len(masters)} people: {', '.join(sorted(masters)[:10])}. Name one of them: --master-user-id."
        )
    members = set(graph.filter(pl.col("master_user_id").is_in(list(masters)))["record_id"]) | set(records if not masters else ())
    accounts |= {int(one.removeprefix(USER_PREFIX)) for one in members if one.startswith(USER_PREFIX)}
    # closed accounts are in no graph: they are the person's when they showed an e-mail that the others, or their orders, show
    orders = lake.load(ORDERS_UNIFIED).read(["email"], pl.col("customer_record").is_in(sorted(members)))
    emails = pl.concat([users.filter(pl.col("user_id").is_in(accounts))["email"], orders["email"]]).drop_nulls().unique()
    showing = users.filter(pl.col("email").is_in(emails.implode()))
    names = showing.group_by("email").agg(pl.col("name").str.to_lowercase().n_unique().alias("names"))
    crowds = names.filter(pl.col("names") > settings_of(lake).identifier_crowd)["email"]
    closed = showing.filter(~pl.col("email").is_in(crowds.implode()))["user_id"].unique().to_list()
    known = set(graph["record_id"])
    accounts |= {number for number in closed if f"{USER_PREFIX}{number}" not in known}
    return DataSubject(
        frozenset(masters), frozenset(accounts), frozenset(one for one in members if one.startswith(ORDER_PREFIX)), spelled
    )


def _named(
    asked: SubjectQuery, graph: pl.DataFrame, users: pl.DataFrame, region: str
) -> tuple[list[str], set[int], tuple[Shown, ...]]:
    """Records and accounts that show what was asked for, and that value."""
    if asked.master_user_id is not None:
        records = graph.filter(pl.col("master_user_id") == asked.master_user_id)["record_id"].unique().to_list()
        return records, set(users.filter(pl.col("master_user_id") == asked.master_user_id)["user_id"]), ()
    if asked.user_id is not None:
        known = users.filter(pl.col("user_id") == asked.user_id).height > 0
        return [f"{USER_PREFIX}{asked.user_id}"], {asked.user_id} if known else set(), ()
    kind, column, raw = next(
        (kind, column, raw)
        for kind, column, raw in (
            ("email", "email", asked.email),
            ("phone", "phone_number", asked.phone),
            ("loyalty", "loyalty_id", asked.loyalty_id),
        )
        if raw is not None
    )
    spelling = {"email": normalise_email(raw), "phone": normalise_phone(raw, region), "loyalty": raw.strip() or None}[kind]
    if spelling is None:
        raise ShopSphereError(f"That is no {kind} that could be told from others. Write it in full.")
    shown = graph.filter((pl.col("node") == f"{kind}:{spelling}") | pl.col("node").str.starts_with(f"{kind}:{spelling}|"))
    accounts = set(users.filter(pl.col(column) == spelling)["user_id"])
    return shown["record_id"].unique().to_list(), accounts, (Shown(kind, raw, spelling),)


@dataclass(frozen=True)
class ErasurePlan:
    """What an erasure is to do: hashes to suppress, and the clear texts to look for afterwards.

    until   by hash, up to when records of others are concerned, where rows are there that claim to begin after the erasure
    shared  by kind, how many values of the person others show too (a namesake, an address of many): these are replaced in
            the person's own rows, and not looked for in the rest
    """

    entries: frozenset[tuple[str, Digest]]
    texts: tuple[str, ...]
    until: Mapping[Digest, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)


def own_entries(
    person: DataSubject, pseudonyms: Pseudonyms, orders: Iterable[str], documents: Iterable[str]
) -> set[tuple[str, Digest]]:
    """What tells the person's rows from others'."""
    keys = [(ACCOUNT, str(number)) for number in person.accounts]
    keys += [(RECORD, one) for one in person.orders]
    keys += [(RECORD, f"{ORDERS.name}|{one}") for one in orders]
    keys += [(RECORD, f"{MARKETPLACE_ORDERS.name}|{one}") for one in documents]
    return {(kind, pseudonyms.digest(kind, value)) for kind, value in keys}


def orders_of(lake: Lake, person: DataSubject) -> list[str]:
    """The ids of the orders of the person's accounts, and of no other account at any time."""
    orders = lake.load(ORDERS).read(["order_id", "user_id"]).drop_nulls()
    theirs = orders.group_by("order_id").agg(pl.col("user_id").is_in(list(person.accounts)).all().alias("theirs"))
    return theirs.filter("theirs")["order_id"].cast(pl.String).sort().to_list()


def documents_of(lake: Lake, person: DataSubject) -> list[str]:
    """The ids of the person's marketplace documents."""
    wanted = pl.col("platform") + pl.lit(":") + pl.col("mp_order_id")
    names = [one.removeprefix(ORDER_PREFIX) for one in person.orders]
    found = lake.load(MARKETPLACE_ORDERS).read(["document_id"], wanted.is_in(names))
    return found["document_id"].drop_nulls().unique().sort().to_list()


def plan_erasure(lake: Lake, person: DataSubject, pseudonyms: Pseudonyms, erasure: str, moment: int) -> ErasurePlan:
    """Everything that the person's rows show, and what of it is theirs alone. Reads all of bronze twice."""
    entries = own_entries(person, pseudonyms, orders_of(lake, person), documents_of(lake, person))
    seen: set[Shown] = set(person.spelled)
    rows = {table.name: _bronze(lake, table) for table in TABLES if lake.exists(table)}
    wide, shared = _own_values(lake, person, pseudonyms, rows, entries, seen, erasure, moment)
    # documents that were deleted, or cannot be read, are in no graph: they are the person's when they show their contact
    while unlinked := _unlinked(lake, rows, pseudonyms, entries):
        entries |= unlinked
        wide, shared = _own_values(lake, person, pseudonyms, rows, entries, seen, erasure, moment)
    # then the rows of others as they will be: whoever still mentions the person there is mentioned as well
    # (all that are there: also one that claims to begin later, by a clock that is wrong)
    after = Anonymiser(_suppression(pseudonyms, entries, erasure, ALWAYS), latest={})
    # who was erased before shows a name that was made
    made = {pseudonyms.name(one.id) for one in erasures(lake)}
    texts = _texts_of({one for one in seen if one.kind != "name" or one.raw not in made}, wide)
    left: set[str] = set()
    sure = SearchTerms(tuple(sorted({text for kind, text in texts if kind in SURE})))
    every = SearchTerms(tuple(sorted({text for _, text in texts})))
    for table in TABLES:
        if table.name not in rows:
            continue
        edited = after(table, rows[table.name])
        columns = _as_text(edited.rows)
        if table.name in (EVENTS.name, MARKETPLACE_ORDERS.name, *KEYS):
            hit = _any(sure.hits(column) for column in columns)
            hit |= edited.mine & _any(every.hits(column) for column in columns)
            entries |= {(MENTION, pseudonyms.digest(MENTION, key)) for key in keys_of(table, edited.rows.filter(hit))}
            # what the person's own rows show is not others'
            left |= set().union(*(every.found_in(column.filter(~edited.mine)) for column in columns))
    unsure = {text for kind, text in texts if kind not in SURE and text in left}
    for kind, text in texts:
        if text in unsure:
            shared[kind] = shared.get(kind, 0) + 1
    until = {digest: at for digest, at in (after.latest or {}).items() if at > moment}
    return ErasurePlan(frozenset(entries), tuple(sorted({text for _, text in texts} - unsure)), until, shared)


def _own_values(
    lake: Lake,
    person: DataSubject,
    pseudonyms: Pseudonyms,
    rows: Mapping[str, pl.DataFrame],
    entries: set[tuple[str, Digest]],
    seen: set[Shown],
    erasure: str,
    moment: int,
) -> tuple[set[Shown], dict[str, int]]:
    """Add to `seen` what the rows show that are theirs by account or record, and to `entries` what of it is theirs alone;
    gives that, and how many values of each kind are not."""
    theirs = Anonymiser(_suppression(pseudonyms, entries, erasure, moment), seen)
    for table in TABLES:
        if table.name in rows:
            theirs(table, rows[table.name])
    wide, shared = _theirs_alone(lake, person, seen)
    entries |= {(one.kind, pseudonyms.digest(one.kind, one.spelling)) for one in wide if one.spelling is not None}
    return wide, shared


def _unlinked(
    lake: Lake, rows: Mapping[str, pl.DataFrame], pseudonyms: Pseudonyms, entries: set[tuple[str, Digest]]
) -> set[tuple[str, Digest]]:
    """Marketplace documents that no living record stands for and that show a contact of the person; those not known yet."""
    if MARKETPLACE_ORDERS.name not in rows:
        return set()
    documents = rows[MARKETPLACE_ORDERS.name].drop_nulls("document")
    record = pl.lit(ORDER_PREFIX) + pl.col("platform") + pl.lit(":") + pl.col("mp_order_id")
    living = lake.load(IDENTITY_GRAPH).read(["record_id"])["record_id"].unique()
    dead = documents.filter(~record.is_in(living.implode()).fill_null(False))
    found: set[tuple[str, Digest]] = set()
    for document_id, platform, text in dead.select("document_id", "platform", "document").iter_rows():
        contacts = {
            (kind, pseudonyms.digest(kind, spelling))
            for path, kind in DOCUMENT_PATHS
            if kind in ("email", "phone", "loyalty")
            for raw in _at(text, path)
            if (spelling := normalise_value(kind, raw, phone_region(None, None, platform) or pseudonyms.region)) is not None
        }
        if contacts & entries:
            found.add((RECORD, pseudonyms.digest(RECORD, f"{MARKETPLACE_ORDERS.name}|{document_id}")))
    return found - entries


def _at(document: str, name: str) -> list[str]:
    try:
        told = json.loads(document)
    except ValueError:
        return []
    value = told.get(name) if isinstance(told, dict) else None
    return [value] if isinstance(value, str) else []


def _suppression(pseudonyms: Pseudonyms, entries: Iterable[tuple[str, Digest]], erasure: str, moment: int) -> Suppression:
    return Suppression(pseudonyms, {digest: (erasure, moment) for _, digest in entries})


def _bronze(lake: Lake, table: Table) -> pl.DataFrame:
    handle = lake.load(table)
    return handle.read([name for name in handle.reader.schema.names if name not in BOOKKEEPING])


def keys_of(table: Table, rows: pl.DataFrame) -> list[str]:
    """By what the rows of a bronze table are named in `mention` entries."""
    if table.name == EVENTS.name:
        parts = [pl.concat_str(pl.col("topic"), pl.col("partition"), pl.col("offset"), separator="/")]
    elif table.name == MARKETPLACE_ORDERS.name:
        parts = [pl.col("document_id")]
    else:
        parts = [pl.col(name).cast(pl.String) for name in KEYS[table.name]]
    key = pl.concat_str([pl.lit(table.name), *parts], separator="|")
    return rows.select(key).to_series().drop_nulls().unique().to_list()


def _as_text(rows: pl.DataFrame) -> list[pl.Series]:
    """The columns that may hold text, as text."""
    columns = []
    for name, dtype in rows.schema.items():
        if dtype == pl.String:
            columns.append(rows[name])
        elif dtype == pl.Binary:
            texts = [None if value is None else value.decode("utf-8", "replace") for value in rows[name].to_list()]
            columns.append(pl.Series(name, texts, dtype=pl.String))
    return columns


def _any(masks: Iterable[pl.Series]) -> pl.Series:
    result: pl.Series | None = None
    for mask in masks:
        result = mask if result is None else result | mask
    assert result is not None
    return result


def _theirs_alone(lake: Lake, person: DataSubject, seen: set[Shown]) -> tuple[set[Shown], dict[str, int]]:
    """The values that are replaced wherever they stand, and how many of each kind are not: too many others show them.

    An e-mail, phone, card or device counts as a person's as long as no crowd shares it, by the same limits as in the identity
    graph; an address where they live too; one that they only ship to, when nobody else does.
    """
    settings = settings_of(lake)
    holders = _holders(lake, person, {(one.kind, one.spelling) for one in seen if one.spelling is not None})
    homes = {(one.kind, one.spelling) for one in _homes(lake, person)}
    wide: set[Shown] = set()
    shared: dict[str, int] = {}
    counted: set[tuple[str, str]] = set()
    for one in seen:
        if one.spelling is None or one.kind in ("name", "city", "text"):
            continue
        value = (one.kind, one.spelling)
        limit = settings.identifier_crowd
        if one.kind == "address":
            limit = settings.address_crowd if value in homes else 0
        if holders.get(value, 0) <= limit:
            wide.add(one)
        elif value not in counted:
            counted.add(value)
            shared[one.kind] = shared.get(one.kind, 0) + 1
    return wide, shared


def _homes(lake: Lake, person: DataSubject) -> set[Shown]:
    users = lake.load(USERS_SCD).read(["address", "city"], pl.col("user_id").is_in(list(person.accounts)))
    result = set()
    for address, city in users.unique().iter_rows():
        if address is not None:
            result.add(Shown("address", address, normalise_value("address", address, "", city or "")))
    return result


def _holders(lake: Lake, person: DataSubject, values: set[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How many others show each value now, as silver has it."""
    users = lake.load(USERS_SCD).read(
        ["user_id", "master_user_id", "email", "phone_number", "address", "city", "loyalty_id"],
        ~pl.col("user_id").is_in(list(person.accounts)),
    )
    orders = lake.load(ORDERS_UNIFIED).read(
        ["master_user_id", "email", "phone", "card_fingerprint", "device_id", "ip_address", "shipping_address"],
        ~pl.col("master_user_id").is_in(list(person.masters)).fill_null(False) & pl.col("master_user_id").is_not_null(),
    )
    whose = pl.coalesce("master_user_id", pl.lit(USER_PREFIX) + pl.col("user_id").cast(pl.String))
    where = pl.concat_str("address", "city", separator=", ", ignore_nulls=True)
    users = users.with_columns(whose.alias("who"), pl.when(pl.col("address").is_not_null()).then(where).alias("address"))
    users = users.with_columns(normalise_addresses(users["address"]))
    orders = orders.with_columns(normalise_addresses(orders["shipping_address"]), pl.col("master_user_id").alias("who"))
    told = [
        *((kind, users.select("who", value=name)) for kind, name in (("email", "email"), ("phone", "phone_number"))),
        *((kind, users.select("who", value=name)) for kind, name in (("address", "address"), ("loyalty", "loyalty_id"))),
        *((kind, orders.select("who", value=name)) for kind, name in (("email", "email"), ("phone", "phone"))),
        *((kind, orders.select("who", value=name)) for kind, name in (("card", "card_fingerprint"), ("device", "device_id"))),
        *((kind, orders.select("who", value=name)) for kind, name in (("ip", "ip_address"), ("address", "shipping_address"))),
    ]
    every = pl.concat([frame.with_columns(pl.lit(kind).alias("kind")) for kind, frame in told])
    wanted = pl.DataFrame(sorted(values), schema={"kind": pl.String, "value": pl.String}, orient="row")
    counts = every.join(wanted, on=["kind", "value"], how="semi").group_by("kind", "value").agg(pl.col("who").n_unique())
    return {(kind, value): number for kind, value, number in counts.iter_rows()}


def _texts_of(seen: set[Shown], wide: set[Shown]) -> list[tuple[str, str]]:
    """(kind, text) to look for: what is replaced everywhere, raw and in its one spelling; and names."""
    result: set[tuple[str, str]] = set()
    for one in seen:
        if one in wide or one.kind == "name" or (one.kind == "address" and one.spelling is None):
            for text in (one.raw, one.spelling):
                if text and len(text.strip()) >= SHORTEST and (one.kind != "name" or " " in text.strip()):
                    result.add((one.kind, text.strip()))
    return sorted(result)
