"""silver.users_scd: user accounts over time, one row per interval in which nothing about the account changed."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Grouped, Lookup, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze.current_rows import row_versions, unreadable_rows
from pipelines.bronze.tables import USERS
from pipelines.identity.records import USER_RECORD_ID, masters_by_record, user_ids_of_records, user_record_ids
from pipelines.parsing.contacts import normalise_emails, normalise_phones, phone_regions
from pipelines.parsing.text import trimmed
from pipelines.settings import BusinessSettings
from pipelines.silver.identity_graph import IDENTITY_GRAPH

USERS_SCD = Table(
    "silver.users_scd",
    doc="User accounts over time (slowly changing dimension, type 2). The intervals of an account never overlap, and have no gap "
    "while the account exists.",
    columns=(
        column("user_id", pa.int64(), "User id of the account.", required=True),
        column("valid_from", TIMESTAMP, "Start of the interval (UTC, inclusive).", required=True),
        column("valid_to", TIMESTAMP, "End of the interval (UTC, exclusive); null while it is current."),
        column(
            "is_current",
            pa.bool_(),
            "Whether the interval is current; a deleted account has no current interval.",
            required=True,
        ),
        column("email", pa.string(), "E-mail address, normalised; null when absent or invalid.", personal="email"),
        column("email_verified", pa.bool_(), "Whether the user verified the e-mail address."),
        column("phone_number", pa.string(), "Phone number, E.164; null when absent or invalid.", personal="phone"),
        column("phone_verified", pa.bool_(), "Whether the user verified the phone number."),
        column("name", pa.string(), "Name as entered.", personal="name"),
        column("address", pa.string(), "Street address as entered.", personal="address"),
        column("city", pa.string(), "City as entered.", personal="city"),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2 code; null when unknown."),
        column("loyalty_id", pa.string(), "Loyalty card number; null without one.", personal="loyalty"),
        column("created_at", TIMESTAMP, "When the account was opened (UTC), as stated by the source."),
        column("updated_at", TIMESTAMP, "Last change of the newest source row of the interval (UTC), as stated by the source."),
        column("email_raw", pa.string(), "E-mail address as stated by the source.", personal="email"),
        column("phone_raw", pa.string(), "Phone number as stated by the source.", personal="phone"),
        column("closed_by", pa.string(), "Change that ended the interval: 'update' or 'delete'; null while it is current."),
        column("master_user_id", pa.string(), "Id of the person who owns the account, from silver.identity_graph."),
    ),
    key=("user_id", "valid_from"),
    group=("user_id",),
    tracked=("master_user_id",),
    owner="customer",
    expectations=(row_count_drift(0.5),),
)

ATTRIBUTES = (
    "email",
    "email_verified",
    "phone_number",
    "phone_verified",
    "name",
    "address",
    "city",
    "country",
    "loyalty_id",
    "created_at",
)
"""Columns of the source whose change starts a new interval; a changed `updated_at` alone does not."""


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the intervals of the accounts, with normalised contacts and the master user."""
    history = intervals(frames["users"])
    country = history.select(trimmed("country").str.to_uppercase()).to_series()
    region = phone_regions(country).fill_null(context.default_region)
    return (
        history.with_columns(
            record_id=USER_RECORD_ID,
            email_raw="email",
            phone_raw="phone_number",
            email=normalise_emails(history["email"]),
            phone_number=normalise_phones(history["phone_number"], region),
            country=country,
        )
        .join(masters_by_record(frames["identity"]), on="record_id", how="left")
        .select(USERS_SCD.schema.names)
    )


def intervals(users: pl.DataFrame) -> pl.DataFrame:
    """Return user_id, the source's ATTRIBUTES, updated_at, valid_from, valid_to, is_current and closed_by of each interval.

    users: versions and deletes in any order, delivered any number of times. A version is valid from its effective time on:
    updated_at, else created_at, else the commit. Versions follow each other in the order of effective times; of versions with
    the same effective time only the last in source order counts. A delete ends the lifetime of an account, no earlier than the
    latest time known of it. Versions after the delete are a new lifetime, which starts no earlier than the delete.
    """
    relevant = users.filter(pl.col("user_id").is_not_null() | (pl.col("_op") == "t"))
    versions = _with_lifetimes(row_versions(relevant, ("user_id",)))
    lifetime = ["user_id", "lifetime"]
    ordered = versions.sort(*lifetime, "effective", "_source_position").filter(
        ~(_same_as_next(*lifetime, "effective")) & (pl.col("effective") < pl.col("ends")).fill_null(True)
    )
    # an interval is a run of equal rows: it starts with the first and has the values of the last
    runs = ordered.with_columns(changed=~_same_as_previous(*lifetime, *ATTRIBUTES))
    runs = runs.with_columns(valid_from=pl.when("changed").then("effective").forward_fill())
    merged = runs.filter(pl.col("changed").shift(-1, fill_value=True))
    following = pl.when(_same_as_next(*lifetime)).then(pl.col("valid_from").shift(-1))
    return merged.with_columns(
        valid_to=pl.coalesce(following, "ends"),
        closed_by=pl.when(following.is_not_null())
        .then(pl.lit("update"))
        .when(pl.col("ends").is_not_null())
        .then(pl.lit("delete")),
    ).select(
        "user_id",
        "valid_from",
        "valid_to",
        pl.col("valid_to").is_null().alias("is_current"),
        *ATTRIBUTES,
        "updated_at",
        "closed_by",
    )


def _with_lifetimes(changes: pl.DataFrame) -> pl.DataFrame:
    """Return the versions with `lifetime` (0, 1, ... between deletes), `effective` time, and `ends`, the end of the lifetime.

    changes: versions and deletes, sorted by user and source position. `ends` is null while the account exists.
    """
    deleted = pl.col("_op") == "d"
    own = pl.when(deleted).then("_source_time").otherwise(pl.coalesce("updated_at", "created_at", "_source_time"))
    known = changes.with_columns(
        lifetime=deleted.cast(pl.Int64).cum_sum().over("user_id") - deleted.cast(pl.Int64),
        own=own,
        latest=own.cum_max().forward_fill().over("user_id"),
    )
    ends = known.filter(deleted).select("user_id", "lifetime", ends="latest")
    begins = ends.select("user_id", pl.col("lifetime") + 1, begins="ends")
    return (
        known.filter(~deleted)
        .join(ends, on=["user_id", "lifetime"], how="left")
        .join(begins, on=["user_id", "lifetime"], how="left")
        .with_columns(effective=pl.max_horizontal("own", "begins"))
    )


def _same_as_next(*names: str) -> pl.Expr:
    """Return whether a row has the same values as the next row."""
    return pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(-1)) for name in names])


def _same_as_previous(*names: str) -> pl.Expr:
    """Return whether a row has the same values as the previous row."""
    return pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(1)) for name in names])


def _record_ids(frames: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Return the record ids of the accounts, to look up their master users."""
    return user_record_ids(frames["users"]["user_id"].drop_nulls().unique())


def _rows_of_records(identity: pl.DataFrame) -> pl.Expr:
    """Return a predicate for the accounts whose records changed."""
    return pl.col("user_id").is_in(user_ids_of_records(identity["record_id"]).unique().implode())


STEP = Step(
    target=USERS_SCD,
    reads={
        "users": Grouped(
            USERS,
            keys=((pl.col("user_id"),),),
            columns=(
                "user_id",
                *ATTRIBUTES,
                "updated_at",
                "_unchanged",
                "_unreadable",
                "_op",
                "_source_position",
                "_source_time",
                "_ingested_at",
            ),
            parse=unreadable_rows,
        ),
        "identity": Lookup(
            IDENTITY_GRAPH,
            on="record_id",
            values=_record_ids,
            columns=("record_id", "master_user_id"),
            affects=_rows_of_records,
        ),
    },
    transform=transform,
)
