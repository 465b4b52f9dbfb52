"""silver.users_scd: every user over time, as one row per stretch of time in which nothing about them changed."""

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
from pipelines.settings import BusinessSettings
from pipelines.silver.identity_graph import IDENTITY_GRAPH

USERS_SCD = Table(
    "silver.users_scd",
    doc="Users over time (SCD 2): intervals of a user never overlap and leave no gap while the account lives.",
    columns=(
        column("user_id", pa.int64(), "User account.", required=True),
        column("valid_from", TIMESTAMP, "From when on this version holds.", required=True),
        column("valid_to", TIMESTAMP, "Until when it held (exclusive); null while it holds."),
        column("is_current", pa.bool_(), "True for the version that holds now; a deleted account has none.", required=True),
        column("email", pa.string(), "E-mail address, normalised; null when there is none that can be one.", personal="email"),
        column("email_verified", pa.bool_(), "Whether the user proved to own the e-mail address."),
        column("phone_number", pa.string(), "Phone number in E.164; null when there is none that can be one.", personal="phone"),
        column("phone_verified", pa.bool_(), "Whether the user proved to own the phone number."),
        column("name", pa.string(), "Name as typed.", personal="name"),
        column("address", pa.string(), "Street address as typed.", personal="address"),
        column("city", pa.string(), "City as typed.", personal="city"),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2."),
        column("loyalty_id", pa.string(), "Loyalty card.", personal="loyalty"),
        column("created_at", TIMESTAMP, "When the account was opened, as the source says."),
        column("updated_at", TIMESTAMP, "When the source says that it last changed the row, for the newest row of the interval."),
        column("email_raw", pa.string(), "E-mail address as the source has it.", personal="email"),
        column("phone_raw", pa.string(), "Phone number as the source has it.", personal="phone"),
        column("closed_by", pa.string(), "What ended the interval: 'update', 'delete', or null while it holds."),
        column("master_user_id", pa.string(), "The person behind the account, from silver.identity_graph."),
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
"""Columns of the source whose change makes a new interval; a changed `updated_at` alone does not."""


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """All versions of the users -> their intervals, with contacts normalised and the master user."""
    history = intervals(frames["users"])
    country = history["country"].str.strip_chars().str.to_uppercase()
    region = phone_regions(country).fill_null(context.default_region)
    return (
        history.with_columns(
            record_id=USER_RECORD_ID,
            email_raw="email",
            phone_raw="phone_number",
            email=normalise_emails(history["email"]),
            phone_number=normalise_phones(history["phone_number"], region),
            country=pl.select(pl.when(country != "").then(country)).to_series(),
        )
        .join(masters_by_record(frames["identity"]), on="record_id", how="left")
        .select(USERS_SCD.schema.names)
    )


def intervals(users: pl.DataFrame) -> pl.DataFrame:
    """Versions and deletes in any order, any number of times -> user_id, the attributes as the source has them,
    updated_at, valid_from, valid_to, is_current, closed_by.

    A version holds from its effective time on: updated_at, else created_at, else the commit. In that order, and in
    source order where effective times are equal (the later one then stands alone), versions follow each other.
    A delete ends the life of an account, no earlier than anything known of that life began; what the source
    wrote after the delete is a new life, which begins no earlier than the delete.
    """
    named = users.filter(pl.col("user_id").is_not_null() | (pl.col("_op") == "t"))
    versions = _lives(row_versions(named, ("user_id",)))
    life = ["user_id", "life"]
    ordered = versions.sort(*life, "effective", "_source_position").filter(
        ~(_same_as_next(*life, "effective")) & (pl.col("effective") < pl.col("ends")).fill_null(True)
    )
    # the newest row of an interval is the last of its run of equal rows, the interval begins with the first
    runs = ordered.with_columns(changed=~_same_as_previous(*life, *ATTRIBUTES))
    runs = runs.with_columns(valid_from=pl.when("changed").then("effective").forward_fill())
    merged = runs.filter(pl.col("changed").shift(-1, fill_value=True))
    following = pl.when(_same_as_next(*life)).then(pl.col("valid_from").shift(-1))
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


def _lives(changes: pl.DataFrame) -> pl.DataFrame:
    """Versions (sorted by user and source position, deletes among them) with their `life` (0, 1, ... between deletes),
    their `effective` time and when their life `ends` (null: it has not)."""
    deleted = pl.col("_op") == "d"
    own = pl.when(deleted).then("_source_time").otherwise(pl.coalesce("updated_at", "created_at", "_source_time"))
    known = changes.with_columns(
        life=deleted.cast(pl.Int64).cum_sum().over("user_id") - deleted.cast(pl.Int64),
        own=own,
        latest=own.cum_max().forward_fill().over("user_id"),
    )
    ends = known.filter(deleted).select("user_id", "life", ends="latest")
    begins = ends.select("user_id", pl.col("life") + 1, begins="ends")
    return (
        known.filter(~deleted)
        .join(ends, on=["user_id", "life"], how="left")
        .join(begins, on=["user_id", "life"], how="left")
        .with_columns(effective=pl.max_horizontal("own", "begins"))
    )


def _same_as_next(*names: str) -> pl.Expr:
    return pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(-1)) for name in names])


def _same_as_previous(*names: str) -> pl.Expr:
    return pl.all_horizontal([pl.col(name).eq_missing(pl.col(name).shift(1)) for name in names])


def _records(gathered: Mapping[str, pl.DataFrame]) -> pl.Series:
    """The record ids of the gathered users."""
    return user_record_ids(gathered["users"]["user_id"].drop_nulls().unique())


def _users_of(identity: pl.DataFrame) -> pl.Expr:
    """The target's rows of the users whose records changed."""
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
            values=_records,
            columns=("record_id", "master_user_id"),
            affects=_users_of,
        ),
    },
    transform=transform,
)
