"""gold.dim_users: versions of user accounts, with a surrogate key for facts."""

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
    doc="Versions of user accounts (slowly changing dimension, type 2): one row per interval in which nothing about the account "
    "changed.",
    columns=(
        column(
            "user_key",
            pa.string(),
            "Id of the version: '<user_id>@<valid_from>'; fact_orders.user_key refers to it.",
            required=True,
        ),
        column("user_id", pa.int64(), "User id of the account.", required=True),
        column(
            "master_user_id",
            pa.string(),
            "Person who owns the account, as currently resolved (not versioned); null when unresolved.",
        ),
        column("valid_from", TIMESTAMP, "Start of the version (UTC, inclusive).", required=True),
        column("valid_to", TIMESTAMP, "End of the version (UTC, exclusive); null while it is current."),
        column(
            "is_current", pa.bool_(), "Whether the version is current; a closed account has no current version.", required=True
        ),
        column("closed_by", pa.string(), "Change that ended the version: update or delete; null while it is current."),
        column("name", pa.string(), "Name as entered.", personal="name"),
        column("email", pa.string(), "E-mail address, normalised; null when absent or invalid.", personal="email"),
        column("email_verified", pa.bool_(), "Whether the user verified the e-mail address."),
        column("phone_number", pa.string(), "Phone number, E.164; null when absent or invalid.", personal="phone"),
        column("phone_verified", pa.bool_(), "Whether the user verified the phone number."),
        column("address", pa.string(), "Street address as entered.", personal="address"),
        column("city", pa.string(), "City as entered.", personal="city"),
        column("country", pa.string(), "Country, ISO 3166-1 alpha-2 code."),
        column("loyalty_id", pa.string(), "Loyalty card number; null without one.", personal="loyalty"),
        column("created_at", TIMESTAMP, "When the account was opened (UTC)."),
        column("updated_at", TIMESTAMP, "Last change of the source row within the version (UTC)."),
    ),
    key=("user_id", "valid_from"),
    group=("user_id",),
    references=(references("master_user_id", CUSTOMER_360),),
    owner="customer",
    expectations=(row_count_drift(0.5),),
)


def user_key() -> pl.Expr:
    """Return the key of a version, over user_id and valid_from. Microseconds make it unique."""
    return pl.format("{}@{}", pl.col("user_id"), pl.col("valid_from").dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")).alias("user_key")


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return all versions of the affected users."""
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
