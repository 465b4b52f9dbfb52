"""gold.dim_users: users over time, with a key for facts to point at."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import row_count_drift
from lakehouse.step import Grouped, Step
from lakehouse.table import TIMESTAMP, Table, column, references
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.settings import BusinessSettings
from pipelines.silver.users_scd import USERS_SCD

DIM_USERS = Table(
    "gold.dim_users",
    doc="Users over time (SCD 2): one row per stretch of time in which nothing about the account changed.",
    columns=(
        column(
            "user_key", pa.string(), "'<user_id>@<valid_from>': the version, as fact_orders.user_key names it.", required=True
        ),
        column("user_id", pa.int64(), "User account.", required=True),
        column("master_user_id", pa.string(), "The person behind the account, as known now (not versioned)."),
        column("valid_from", TIMESTAMP, "From when on this version holds.", required=True),
        column("valid_to", TIMESTAMP, "Until when it held (exclusive); null while it holds."),
        column("is_current", pa.bool_(), "True for the version that holds now; a closed account has none.", required=True),
        column("closed_by", pa.string(), "What ended the version: update, delete; null while it holds."),
        column("name", pa.string(), "Name as typed.", personal="name"),
        column("email", pa.string(), "E-mail address, normalised.", personal="email"),
        column("email_verified", pa.bool_(), "Whether the user proved to own the e-mail address."),
        column("phone_number", pa.string(), "Phone number, E.164.", personal="phone"),
        column("phone_verified", pa.bool_(), "Whether the user proved to own the phone number."),
        column("address", pa.string(), "Street address as typed.", personal="address"),
        column("city", pa.string(), "City as typed.", personal="city"),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2."),
        column("loyalty_id", pa.string(), "Loyalty card.", personal="loyalty"),
        column("created_at", TIMESTAMP, "When the account was opened."),
        column("updated_at", TIMESTAMP, "When the source last changed the row within this version."),
    ),
    key=("user_id", "valid_from"),
    group=("user_id",),
    references=(references("master_user_id", CUSTOMER_360),),
    owner="customer",
    expectations=(row_count_drift(0.5),),
)


def user_key() -> pl.Expr:
    """The key of a version, over user_id and valid_from: microseconds are kept, so that it is unique."""
    return pl.format("{}@{}", pl.col("user_id"), pl.col("valid_from").dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")).alias("user_key")


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The versions of the touched users."""
    return frames["users"].with_columns(user_key()).select(DIM_USERS.schema.names).sort("user_id", "valid_from")


STEP = Step(
    target=DIM_USERS,
    reads={
        "users": Grouped(
            USERS_SCD,
            keys=((pl.col("user_id"),),),
            columns=tuple(name for name in DIM_USERS.schema.names if name != "user_key"),
        )
    },
    transform=transform,
)
