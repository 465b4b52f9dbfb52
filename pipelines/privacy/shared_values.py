"""Decides which of a person's values are theirs alone, and which too many other people show."""

from __future__ import annotations

import polars as pl

from lakehouse.iceberg.catalog import Lake
from pipelines.identity.records import USER_RECORD_ID
from pipelines.parsing.contacts import normalise_addresses
from pipelines.privacy.person import DataSubject
from pipelines.privacy.pseudonyms import normalise_value
from pipelines.privacy.value_replacer import PersonalValue
from pipelines.settings import settings_of
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

USER_VALUES = (("email", "email"), ("phone", "phone_number"), ("address", "address"), ("loyalty", "loyalty_id"))
"""(kind, column) of the values in silver.users_scd."""
ORDER_VALUES = (
    ("email", "email"),
    ("phone", "phone"),
    ("card", "card_fingerprint"),
    ("device", "device_id"),
    ("ip", "ip_address"),
    ("address", "shipping_address"),
)
"""(kind, column) of the values in silver.orders_unified."""


def split_by_sharing(lake: Lake, person: DataSubject, values: set[PersonalValue]) -> tuple[set[PersonalValue], dict[str, int]]:
    """Return the values that are replaced wherever they occur, and by kind how many are not.

    An e-mail, phone, card or device is the person's own unless a crowd shares it, by the limits of the identity graph. So
    is an address where they live. An address that they only ship to is theirs when no other customer shows it.
    """
    settings = settings_of(lake)
    holders = _count_holders(lake, person, {(value.kind, value.normalised) for value in values if value.normalised is not None})
    homes = _home_addresses(lake, person)
    own: set[PersonalValue] = set()
    shared: dict[str, int] = {}
    counted: set[tuple[str, str]] = set()
    for value in values:
        if value.normalised is None or value.kind in ("name", "city", "text"):
            continue
        key = (value.kind, value.normalised)
        limit = settings.identifier_crowd
        if value.kind == "address":
            limit = settings.address_crowd if value.normalised in homes else 0
        if holders.get(key, 0) <= limit:
            own.add(value)
        elif key not in counted:
            counted.add(key)
            shared[value.kind] = shared.get(value.kind, 0) + 1
    return own, shared


def _home_addresses(lake: Lake, person: DataSubject) -> set[str]:
    """Return the normalised addresses of the person's accounts."""
    users = lake.load(USERS_SCD).read(["address", "city"], pl.col("user_id").is_in(list(person.accounts)))
    normalised = (
        normalise_value("address", address, "", city or "") for address, city in users.unique().iter_rows() if address is not None
    )
    return {address for address in normalised if address is not None}


def _count_holders(lake: Lake, person: DataSubject, values: set[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return how many other people show each (kind, normalised value) in silver."""
    users, orders = _other_users(lake, person), _other_orders(lake, person)
    shown = [
        frame.select("holder", value=column).with_columns(pl.lit(kind).alias("kind"))
        for frame, columns in ((users, USER_VALUES), (orders, ORDER_VALUES))
        for kind, column in columns
    ]
    wanted = pl.DataFrame(sorted(values), schema={"kind": pl.String, "value": pl.String}, orient="row")
    matching = pl.concat(shown).join(wanted, on=["kind", "value"], how="semi")
    counts = matching.group_by("kind", "value").agg(pl.col("holder").n_unique())
    return {(kind, value): number for kind, value, number in counts.iter_rows()}


def _other_users(lake: Lake, person: DataSubject) -> pl.DataFrame:
    columns = ["user_id", "master_user_id", "email", "phone_number", "address", "city", "loyalty_id"]
    users = lake.load(USERS_SCD).read(columns, ~pl.col("user_id").is_in(list(person.accounts)))
    holder = pl.coalesce("master_user_id", USER_RECORD_ID)
    with_city = pl.concat_str("address", "city", separator=", ", ignore_nulls=True)
    users = users.with_columns(holder.alias("holder"), pl.when(pl.col("address").is_not_null()).then(with_city).alias("address"))
    return users.with_columns(normalise_addresses(users["address"]))


def _other_orders(lake: Lake, person: DataSubject) -> pl.DataFrame:
    columns = ["master_user_id", *(column for _, column in ORDER_VALUES)]
    own = pl.col("master_user_id").is_in(list(person.masters)).fill_null(False)
    orders = lake.load(ORDERS_UNIFIED).read(columns, ~own & pl.col("master_user_id").is_not_null())
    return orders.with_columns(normalise_addresses(orders["shipping_address"]), pl.col("master_user_id").alias("holder"))
