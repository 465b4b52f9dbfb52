"""Evidence: the identifiers of each record, from its own rows in the sources alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import polars as pl

from pipelines.bronze.current_rows import current_rows, row_versions, since_truncate
from pipelines.identity.names import signature
from pipelines.identity.records import ORDER_PREFIX, USER_RECORD_ID
from pipelines.parsing import contacts
from pipelines.parsing.marketplace_documents import parse_documents
from pipelines.parsing.text import trimmed

LOYALTY, VERIFIED_EMAIL, VERIFIED_PHONE, CONTACT, DEVICE, ADDRESS = 1, 2, 3, 4, 5, 6
"""Trust in an identifier, strongest first."""

NAMELESS = "?"
"""First letter of the `holder` of a record without a name; otherwise it is the first letter of the name."""

IDENTIFIER_SCHEMA = {
    "record_id": pl.String,
    "node": pl.String,
    "kind": pl.String,
    "trust": pl.Int32,
    "place": pl.String,
    "reason": pl.String,
}
RECORD_SCHEMA = {
    "record_id": pl.String,
    "first_seen": pl.Datetime("us", "UTC"),
    "name": pl.String,
    "email": pl.String,
    "phone": pl.String,
    "address": pl.String,
    "city": pl.String,
}


@dataclass(frozen=True)
class Evidence:
    """Evidence of a set of records.

    records      one row per live record: RECORD_SCHEMA, `holder` (see `names.signature`) and `evidence` (a digest)
    identifiers  one row per record and node: IDENTIFIER_SCHEMA
    """

    records: pl.DataFrame
    identifiers: pl.DataFrame


def read_evidence(frames: Mapping[str, pl.DataFrame], region: str) -> Evidence:
    """Return the evidence of the records in bronze rows.

    frames: 'users', 'orders' and 'marketplace', rows of the bronze tables. region: of phone numbers without a country.
    """
    users, user_identifiers = _user_evidence(frames["users"], frames["orders"], region)
    orders, order_identifiers = _marketplace_evidence(frames["marketplace"], region)
    records = pl.concat([users, orders])
    identifiers = pl.concat([user_identifiers, order_identifiers])
    identifiers = pl.concat([identifiers, _places(identifiers), _blocking_keys(records, identifiers)]).unique(
        ["record_id", "node"], keep="first", maintain_order=True
    )
    return Evidence(_with_holder(records, identifiers), identifiers)


def _user_evidence(users: pl.DataFrame, orders: pl.DataFrame, region: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return records and identifiers of the live accounts.

    Identifiers of earlier versions are included: a former address may still receive mail. Versions before a truncate, or
    before the account was found missing, are not: user ids may be reused. An order contributes the identifiers of its current
    row to the account that it names.
    """
    users = since_truncate(users, ("user_id",))
    versions = row_versions(users.filter(pl.col("user_id").is_not_null()), ("user_id",))
    newest = versions.unique("user_id", keep="last", maintain_order=True).filter(pl.col("_op") != "d")
    history = _normalised(versions.filter(pl.col("_op") != "d").join(newest, on="user_id", how="semi"), region)
    current = history.join(newest, on=["user_id", "_source_position"], how="semi")
    records = current.with_columns(pl.coalesce("created_at", "updated_at", "_source_time").alias("first_seen"))
    identifiers = [
        _contacts(history, current, "email", "email_verified", VERIFIED_EMAIL),
        _contacts(history, current, "phone", "phone_verified", VERIFIED_PHONE),
        _nodes(history, "loyalty", pl.col("loyalty_id"), LOYALTY, pl.lit("Loyalty id ") + pl.col("loyalty_id")),
        _addresses(history, "Name and address of the account"),
    ]
    used = current_rows(orders, ("order_id",)).filter(pl.col("user_id").is_not_null())
    used = used.select("user_id", "device_id", "shipping_address").unique()
    used = used.with_columns(trimmed("device_id"), contacts.normalise_addresses(used["shipping_address"]).alias("address"))
    used = used.join(current.select("user_id", "record_id", "name", "city"), on="user_id")
    identifiers += [
        _nodes(used, "device", pl.col("device_id"), DEVICE, pl.lit("Ordered from device ") + pl.col("device_id")),
        _addresses(used, "Ordered to this address under this name"),
    ]
    return records.select(_cast_to(RECORD_SCHEMA)), pl.concat(identifiers)


def _normalised(users: pl.DataFrame, region: str) -> pl.DataFrame:
    """Return versions of accounts with record id and normalised contacts."""
    country = contacts.phone_regions(users["country"]).fill_null(region)
    where = users.select(
        pl.when(pl.col("address").is_not_null())
        .then(pl.concat_str("address", "city", separator=", ", ignore_nulls=True))
        .alias("address")
    )
    return users.with_columns(
        USER_RECORD_ID.alias("record_id"),
        contacts.normalise_emails(users["email"]).alias("email"),
        contacts.normalise_phones(users["phone_number"], country).alias("phone"),
        contacts.normalise_names(users["name"]).alias("name"),
        contacts.normalise_addresses(where["address"]).alias("address"),
        contacts.normalise_addresses(users["city"]).alias("city"),
        trimmed("loyalty_id"),
    )


def _contacts(history: pl.DataFrame, current: pl.DataFrame, kind: str, verified: str, trust: int) -> pl.DataFrame:
    """Return the e-mails or phones of accounts: trusted if verified in any version; the reason says if it was replaced."""
    found = (
        history.filter(pl.col(kind).is_not_null())
        .group_by("record_id", kind)
        .agg(pl.col(verified).fill_null(False).any().alias("verified"))
    )
    found = found.join(current.select("record_id", kind, pl.lit(True).alias("is_current")), on=["record_id", kind], how="left")
    reason = (
        pl.when("verified").then(pl.lit("Verified ")).otherwise(pl.lit("Unverified "))
        + pl.lit(kind + " ") + pl.col(kind)
        + pl.when(pl.col("is_current").is_null()).then(pl.lit(", since replaced")).otherwise(pl.lit(""))
    )  # fmt: skip
    return _nodes(found, kind, pl.col(kind), pl.when("verified").then(trust).otherwise(CONTACT), reason)


def _marketplace_evidence(documents: pl.DataFrame, region: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return records and identifiers of the marketplace orders."""
    orders = parse_documents(documents, region).orders
    orders = orders.with_columns(
        (pl.lit(ORDER_PREFIX) + pl.col("order_id")).alias("record_id"),
        pl.col("placed_at").alias("first_seen"),
        contacts.normalise_names(orders["buyer_name"]).alias("name"),
        contacts.normalise_addresses(orders["shipping_address"]).alias("address"),
        pl.lit(None, pl.String).alias("city"),
        trimmed("device_id"),
        trimmed("loyalty_id"),
    )
    identifiers = [
        _nodes(orders, "email", pl.col("email"), CONTACT, pl.lit("Email of the marketplace order ") + pl.col("email")),
        _nodes(orders, "phone", pl.col("phone"), CONTACT, pl.lit("Phone of the marketplace order ") + pl.col("phone")),
        _nodes(orders, "loyalty", pl.col("loyalty_id"), LOYALTY, pl.lit("Loyalty id ") + pl.col("loyalty_id")),
        _nodes(orders, "device", pl.col("device_id"), DEVICE, pl.lit("Ordered from device ") + pl.col("device_id")),
        _addresses(orders, "Buyer and address of the marketplace order"),
    ]
    return orders.select(_cast_to(RECORD_SCHEMA)), pl.concat(identifiers)


def _cast_to(schema: Mapping[str, object]) -> list[pl.Expr]:
    return [pl.col(name).cast(dtype) for name, dtype in schema.items()]  # type: ignore[arg-type]


def _nodes(
    rows: pl.DataFrame, kind: str, value: pl.Expr, trust: int | pl.Expr, reason: pl.Expr, place: pl.Expr | None = None
) -> pl.DataFrame:
    """Return the identifiers of a kind in `rows`; a null value has none."""
    return (
        rows.lazy()
        .filter(value.is_not_null())
        .select(
            pl.col("record_id"),
            (pl.lit(kind + ":") + value).alias("node"),
            pl.lit(kind).alias("kind"),
            (pl.lit(trust) if isinstance(trust, int) else trust).cast(pl.Int32).alias("trust"),
            (pl.lit(None, pl.String) if place is None else place).alias("place"),
            reason.alias("reason"),
        )
        .unique(["record_id", "node"], keep="any")
        .collect()
    )


def _addresses(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Return the names with address; without a name the address alone, as a place."""
    named = pl.when(pl.col("name").is_not_null()).then(pl.col("name"))
    both = rows.filter(pl.col("address").is_not_null())
    whole = _nodes(
        both, "address", named + pl.lit("|") + pl.col("address"), ADDRESS, pl.lit(reason), pl.lit("place:") + pl.col("address")
    )
    nameless = both.filter(pl.col("name").is_null())
    return pl.concat([whole, _nodes(nameless, "place", pl.col("address"), ADDRESS, pl.lit("Address without a name"))])


def _places(identifiers: pl.DataFrame) -> pl.DataFrame:
    """Return the address of each name with address as a place, which all of its residents share."""
    return (
        identifiers.filter(pl.col("kind") == "address")
        .select(
            "record_id",
            pl.col("place").alias("node"),
            pl.lit("place").alias("kind"),
            pl.lit(ADDRESS, pl.Int32).alias("trust"),
            pl.lit(None, pl.String).alias("place"),
            pl.lit("Address, whoever lives there").alias("reason"),
        )
        .unique(["record_id", "node"], keep="any")
    )


def _blocking_keys(records: pl.DataFrame, identifiers: pl.DataFrame) -> pl.DataFrame:
    """Return blocking keys, under which similar records are compared. They are no evidence in themselves.

    A key is the set of letters of a full name with one of: the numbers of an address, its words and first or last number, the
    local part of an e-mail address. A typing error changes some of these keys, rarely all.
    """
    full = records.filter(pl.col("name").str.len_chars() >= 6).select("record_id", "name")
    letters = full.select(pl.col("name").unique()).with_columns(
        pl.col("name").str.replace_all(" ", "").str.split("").list.unique().list.sort().list.join("").alias("letters")
    )
    full = full.join(letters, on="name")
    near = (
        identifiers.filter(pl.col("kind").is_in(["address", "email"]))
        .join(full, on="record_id")
        .select("record_id", "kind", "node", "place", "letters")
    )
    local = pl.col("node").str.slice(len("email:")).str.split("@").list.first()
    numbers = pl.col("place").str.extract_all(r"\d+")
    words = pl.col("place").str.slice(len("place:")).str.replace_all(r"\d+", "").str.replace_all(r"\s+", " ").str.strip_chars()
    of_email = near.filter(pl.col("kind") == "email")
    of_address = near.filter(pl.col("kind") == "address").with_columns(numbers.alias("numbers"), words.alias("words"))
    several = of_address.filter(pl.col("numbers").list.len() > 1, pl.col("words").str.len_chars() >= 4)
    single = of_address.filter(pl.col("numbers").list.len() <= 1, pl.col("words").str.len_chars() >= 8)
    all_numbers = pl.col("numbers").list.sort().list.join(" ")
    keys = (
        of_email.select("record_id", "letters", pl.when(local.str.len_chars() >= 5).then(local).alias("key")),
        of_address.select("record_id", "letters", pl.when(all_numbers.str.len_chars() >= 3).then(all_numbers).alias("key")),
        several.select("record_id", "letters", (pl.col("words") + pl.lit(" ") + pl.col("numbers").list.first()).alias("key")),
        several.select("record_id", "letters", (pl.col("words") + pl.lit(" ") + pl.col("numbers").list.last()).alias("key")),
        single.select("record_id", "letters", pl.col("words").alias("key")),
    )
    value = pl.col("letters") + pl.lit("|") + pl.col("key")
    return _nodes(pl.concat(keys), "block", value, ADDRESS, pl.lit("Close spelling, compared only"))


def _with_holder(records: pl.DataFrame, identifiers: pl.DataFrame) -> pl.DataFrame:
    """Add `holder`, by which people at a node are counted, and `evidence`, a digest of the record and its identifiers."""
    distinct = records["name"].drop_nulls().unique()
    signatures = pl.DataFrame(
        {"name": distinct, "holder": pl.Series([signature(name) for name in distinct.to_list()], dtype=pl.String)}
    )
    held = records.join(signatures, on="name", how="left", maintain_order="left").with_columns(
        pl.coalesce("holder", pl.lit(NAMELESS) + pl.coalesce("email", "phone", "record_id")).alias("holder")
    )
    lines = (
        identifiers.lazy()
        .select("record_id", pl.concat_str("node", "trust", "reason", separator="\x1f").alias("line"))
        .sort("record_id", "line")
        .group_by("record_id")
        .agg(pl.col("line").str.join("\x1e"))
        .collect()
    )
    texts = held.join(lines, on="record_id", how="left", maintain_order="left").select(
        text=pl.concat_str(
            *(
                pl.col(name).cast(pl.String).fill_null("")
                for name in ("name", "email", "phone", "address", "city", "holder", "line")
            ),
            pl.col("first_seen").cast(pl.Int64).cast(pl.String).fill_null(""),
            separator="\x1d",
        ),
    )
    digests = [blake2b(text.encode(), digest_size=8).hexdigest() for text in texts["text"].to_list()]
    return held.with_columns(pl.Series("evidence", digests, dtype=pl.String))
