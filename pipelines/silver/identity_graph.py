"""silver.identity_graph: which records are the same person, and by which links."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, row_count_drift
from lakehouse.step import Grouped, Lookup, ReadRows, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, USERS
from pipelines.identity.closure import (
    DOCUMENT_COLUMNS,
    ORDER_COLUMNS,
    USER_COLUMNS,
    crowded_groups,
    widened,
)
from pipelines.identity.evidence import Evidence, read_evidence
from pipelines.identity.links import resolve
from pipelines.identity.records import ORDER_RECORD_ID, USER_RECORD_ID
from pipelines.settings import BusinessSettings

IDENTITY_GRAPH = Table(
    name="silver.identity_graph",
    doc="Links between source records and the identifiers they show; records joined by links are one master user",
    columns=(
        column(
            "record_id",
            pa.string(),
            "'user:<user_id>' of a users row, 'order:<platform>:<mp_order_id>' of a marketplace order",
            required=True,
        ),
        column(
            "node",
            pa.string(),
            "'<kind>:<value>' of the identifier shown; 'record:<record_id>' of the record itself or of one it matches",
            required=True,
            personal="identifier",
        ),
        column(
            "kind",
            pa.string(),
            "loyalty, email, phone, device, address; 'place', 'block': an address, or a close spelling of one, without a name; "
            "'self' of the record itself; 'match' of a probabilistic link",
            required=True,
        ),
        column(
            "trust",
            pa.int32(),
            "1 loyalty id, 2 verified email, 3 verified phone, 4 other email or phone, 5 device, 6 name with address",
            required=True,
        ),
        column("weight", pa.float64(), "Splink match weight (log2 of the odds) of a probabilistic link, else null"),
        column("reason", pa.string(), "Why this link is there, in words", required=True, personal="identifier"),
        column(
            "status",
            pa.string(),
            "'linked' joins; 'crowded' (shared by too many people) and 'weak' (no proof alone) do not",
            required=True,
        ),
        column("master_user_id", pa.string(), "'M-' and the record_id of the oldest member of the person", required=True),
        column("first_seen", TIMESTAMP, "When the record began at its source: users.created_at or order_time", required=True),
        column("holder", pa.string(), "Short form of the name shown: people at a node are counted by it", personal="name"),
        column("evidence", pa.string(), "On the record's own row: digest of all it shows; null elsewhere", personal="identifier"),
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
DEFAULTS = BusinessSettings()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The links of the gathered records, which are whole persons: see `identity.closure`."""
    wanted = pl.col("record_id").is_in(frames["groups"]["record_id"].unique().implode())
    # rows that empty the table name no order, so they come with the names
    orders = pl.concat([frames["orders"], frames["named_orders"].filter(pl.col("_op") == "t")], how="diagonal")
    evidence = read_evidence({**frames, "orders": orders}, context.default_region)
    given = Evidence(evidence.records.filter(wanted), evidence.shown.filter(wanted))
    return resolve(given, crowded_groups(frames["groups"]), context.address_crowd, context.identifier_crowd)


def expand(groups: pl.DataFrame, lookup: ReadRows, context: BusinessSettings = DEFAULTS) -> pl.DataFrame:
    """The records whose links or person the touched ones may change."""
    return widened(groups, lookup, IDENTITY_GRAPH, context)


def named_orders(frames: Mapping[str, pl.DataFrame]) -> pl.Series:
    """The orders of the gathered accounts."""
    return frames["named_orders"]["order_id"].drop_nulls()


def same_orders(new: pl.DataFrame) -> pl.Expr:
    """The rows of the orders that new rows are about."""
    return pl.col("order_id").is_in(new["order_id"].drop_nulls().unique().implode())


STEP = Step(
    target=IDENTITY_GRAPH,
    reads={
        "users": Grouped(USERS, keys=((USER_RECORD_ID,),), columns=USER_COLUMNS),
        "marketplace": Grouped(
            MARKETPLACE_ORDERS, keys=((ORDER_RECORD_ID,),), columns=DOCUMENT_COLUMNS, resolve=("document_id",)
        ),
        "named_orders": Grouped(ORDERS, keys=((USER_RECORD_ID,),), columns=("order_id", "_op", "_source_position")),
        # all rows of these orders, whomever they name: a deletion need not name anybody
        "orders": Lookup(
            ORDERS,
            on="order_id",
            values=named_orders,
            columns=ORDER_COLUMNS,
            affects=same_orders,
            through=ORDERS,
            affected_keys=(USER_RECORD_ID,),
        ),
    },
    transform=transform,
    expand=expand,
)
