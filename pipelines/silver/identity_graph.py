"""silver.identity_graph: links between source records and identifiers, and the person of each record."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, row_count_drift
from lakehouse.step import Grouped, Lookup, ReadRows, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.affected_rows import rows_with
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, USERS
from pipelines.identity.affected_records import (
    DOCUMENT_COLUMNS,
    ORDER_COLUMNS,
    USER_COLUMNS,
    crowded_nodes,
    expand_affected,
)
from pipelines.identity.evidence import Evidence, read_evidence
from pipelines.identity.links import resolve
from pipelines.identity.records import ORDER_RECORD_ID, USER_RECORD_ID
from pipelines.settings import BusinessSettings

IDENTITY_GRAPH = Table(
    name="silver.identity_graph",
    doc="Links between source records and their identifiers. Records connected by links belong to one person (master user).",
    columns=(
        column(
            "record_id",
            pa.string(),
            "Record id: 'user:<user_id>' for an account, 'order:<platform>:<mp_order_id>' for a marketplace order.",
            required=True,
        ),
        column(
            "node",
            pa.string(),
            "Identifier as '<kind>:<value>', or 'record:<record_id>' for the record itself or a record that it matches.",
            required=True,
            personal="identifier",
        ),
        column(
            "kind",
            pa.string(),
            "Kind of node: loyalty, email, phone, device, address (with a name), place (an address without a name), block (a "
            "key for similar names and addresses), self (the record itself) or match (a probabilistic link).",
            required=True,
        ),
        column(
            "trust",
            pa.int32(),
            "Trust in the link: 1 loyalty id, 2 verified email, 3 verified phone, 4 other email or phone, 5 device, 6 name with "
            "address.",
            required=True,
        ),
        column("weight", pa.float64(), "Splink match weight (log2 of the odds) of a probabilistic link; null for other links."),
        column("reason", pa.string(), "Reason for the link, in words.", required=True, personal="identifier"),
        column(
            "status",
            pa.string(),
            "linked: the link joins records; crowded: shared by too many people to join; weak: not sufficient on its own to "
            "join.",
            required=True,
        ),
        column(
            "master_user_id",
            pa.string(),
            "Id of the person: 'M-' and the record_id of the person's oldest record.",
            required=True,
        ),
        column(
            "first_seen",
            TIMESTAMP,
            "When the record was created at its source (UTC): users.created_at or order_time.",
            required=True,
        ),
        column(
            "holder",
            pa.string(),
            "Short form of the name on the record, by which the people who share a node are counted.",
            personal="name",
        ),
        column(
            "evidence",
            pa.string(),
            "Digest of all identifiers of the record, on its row of kind self; null on other rows.",
            personal="identifier",
        ),
    ),
    key=("record_id", "node"),
    group=("record_id",),
    tracked=("master_user_id",),
    sort_by=("master_user_id", "record_id"),
    expectations=(
        accepted("kind", {"block", "loyalty", "email", "phone", "device", "address", "place", "self", "match"}),
        accepted("status", {"linked", "crowded", "weak"}),
        row_count_drift(0.5),
    ),
    named_by=("record_id",),
)
DEFAULT_SETTINGS = BusinessSettings()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the links of the affected records. They include whole persons: see `identity.affected_records`."""
    is_affected = pl.col("record_id").is_in(frames["groups"]["record_id"].unique().implode())
    # a truncate has no order id, so the look-up by order id does not find it
    orders = pl.concat([frames["orders"], frames["named_orders"].filter(pl.col("_op") == "t")], how="diagonal")
    evidence = read_evidence({**frames, "orders": orders}, context.default_region)
    affected = Evidence(evidence.records.filter(is_affected), evidence.identifiers.filter(is_affected))
    return resolve(affected, crowded_nodes(frames["groups"]), context.address_crowd, context.identifier_crowd)


def expand(groups: pl.DataFrame, lookup: ReadRows, context: BusinessSettings = DEFAULT_SETTINGS) -> pl.DataFrame:
    """Return the records whose links or person a change of these records can affect."""
    return expand_affected(groups, lookup, IDENTITY_GRAPH, context)


def order_ids_of_accounts(frames: Mapping[str, pl.DataFrame]) -> pl.Series:
    """Return the ids of the orders that name an affected account."""
    return frames["named_orders"]["order_id"].drop_nulls()


STEP = Step(
    target=IDENTITY_GRAPH,
    reads={
        "users": Grouped(USERS, keys=((USER_RECORD_ID,),), columns=USER_COLUMNS),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS, keys=((ORDER_RECORD_ID,),), columns=DOCUMENT_COLUMNS, resolve=("document_id",)
        ),
        "named_orders": Grouped(ORDERS, keys=((USER_RECORD_ID,),), columns=("order_id", "_op", "_source_position")),
        # all rows of these orders, whatever account they name: a delete may name none
        "orders": Lookup(
            ORDERS,
            on="order_id",
            values=order_ids_of_accounts,
            columns=ORDER_COLUMNS,
            affects=rows_with("order_id"),
            through=ORDERS,
            affected_keys=(USER_RECORD_ID,),
        ),
    },
    transform=transform,
    expand=expand,
)
