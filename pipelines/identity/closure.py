"""Which records must be resolved again when some change: exactly those whose links or person may differ."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from lakehouse.step import ReadRows
from lakehouse.table import Table
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, USERS
from pipelines.identity.evidence import NAMELESS, Evidence, read_evidence
from pipelines.identity.links import COMPARED, CONTACTS, CROWDED, WEAK, is_crowd, people_at
from pipelines.identity.records import ORDER_PREFIX, ORDER_RECORD_ID, user_ids_of_records
from pipelines.settings import BusinessSettings

CROWD = "crowd|"
"""Prefix of a group that has no rows: the node after it is crowded, though `transform` is not given all who show it."""

USER_COLUMNS = (
    "user_id", "email", "email_verified", "phone_number", "phone_verified", "name", "address", "city", "country", "loyalty_id",
    "created_at", "updated_at", "_op", "_source_position", "_source_time", "_ingested_at", "_unchanged",
)  # fmt: skip
ORDER_COLUMNS = (
    "order_id", "user_id", "device_id", "shipping_address", "_op", "_source_position", "_ingested_at", "_unchanged",
)  # fmt: skip
DOCUMENT_COLUMNS = ("document_id", "platform", "mp_order_id", "document", "_op", "_source_position", "_ingested_at")

_EMPTIED = pl.col("_op").eq_missing(pl.lit("t"))
"""Rows that say that all before them is gone: they concern every record."""

_ROWS = ("record_id", "node", "kind", "status", "holder", "master_user_id")


def widened(groups: pl.DataFrame, lookup: ReadRows, graph: Table, context: BusinessSettings) -> pl.DataFrame:
    """The records to resolve again, given those with new rows.

    Records that show what they showed are left out. For the others: everybody at an identifier that they show or
    showed, unless it was and stays crowded; everybody that those meet anywhere to whom an identifier became or
    ceased to be crowded; then the whole persons these belong to (as stored), and those whom a judged but not
    joining link ties to them (an identifier under several names, a stopped match), to closure. Nodes that stay
    crowded come as groups named with CROWD.
    """
    touched = groups["record_id"].unique()
    of_touched = (pl.col("kind") == "self") & pl.col("record_id").is_in(touched.implode())
    before = lookup(graph, ("record_id", "evidence"), of_touched)
    evidence = _shown_now(touched, lookup, context.default_region)
    now = evidence.records.select("record_id", "evidence")
    both = now.join(before, on="record_id", how="full", coalesce=True, suffix="_before")
    changed = both.filter(~pl.col("evidence").eq_missing(pl.col("evidence_before")))["record_id"]
    if changed.is_empty():
        return groups.clear()
    new = evidence.shown.join(evidence.records.select("record_id", "holder"), on="record_id")
    new = new.filter(pl.col("record_id").is_in(changed.implode())).select("record_id", "node", "kind", "holder")
    rows = _rows_at(lookup, graph, new["node"], changed)
    old = rows.filter(pl.col("record_id").is_in(changed.implode()))
    missing = old.filter(~pl.col("node").is_in(new["node"].implode()))["node"]
    rows = pl.concat([rows, _rows_at(lookup, graph, missing)]).unique(["record_id", "node"])
    nodes = pl.concat([new["node"], old["node"]]).unique()
    rows = rows.filter(pl.col("node").is_in(nodes.implode()))
    others = rows.filter(~pl.col("record_id").is_in(changed.implode()))
    before_crowded, after_crowded = _crowded(rows, others, new, context)
    staying = before_crowded.filter(before_crowded.is_in(after_crowded.implode()))
    turned = pl.concat([before_crowded, after_crowded]).filter(
        ~pl.concat([before_crowded, after_crowded]).is_in(staying.implode())
    )
    met = _met(others, new, staying, turned)
    met = pl.concat(
        [met, _met_elsewhere(lookup, graph, others.filter(pl.col("node").is_in(turned.implode()))["record_id"].unique())]
    )
    masters = pl.concat([met["master_user_id"], old["master_user_id"]]).unique()
    members, boundary = _persons(lookup, graph, masters)
    judged_anew = nodes.filter(~nodes.is_in(staying.implode()))
    crowds = pl.concat([staying, boundary.filter(~boundary.is_in(judged_anew.implode()))]).unique()
    records = pl.concat([changed, members, met["record_id"]]).unique().sort()
    marks = pl.Series("record_id", [CROWD + node for node in crowds.sort()], dtype=pl.String)
    return pl.DataFrame({"record_id": pl.concat([records, marks])})


def _shown_now(touched: pl.Series, lookup: ReadRows, region: str) -> Evidence:
    """What the touched records show now."""
    users = user_ids_of_records(touched)
    orders = touched.filter(touched.str.starts_with(ORDER_PREFIX))
    of_users = pl.col("user_id").is_in(users.implode())
    # a delete need not say whose the order was, and an order may have moved on to somebody else
    of_orders = pl.col("order_id").is_in(lookup(ORDERS, ("order_id",), of_users)["order_id"].unique().implode())
    documents = pl.DataFrame(schema=dict.fromkeys(DOCUMENT_COLUMNS, pl.String))
    if not orders.is_empty():
        named = lookup(MARKETPLACE_ORDERS, ("document_id",), ORDER_RECORD_ID.is_in(orders.implode()))
        documents = lookup(
            MARKETPLACE_ORDERS,
            DOCUMENT_COLUMNS,
            pl.col("document_id").is_in(named["document_id"].unique().implode()) | _EMPTIED,
        )
    frames = {
        "users": lookup(USERS, USER_COLUMNS, of_users | _EMPTIED),
        "orders": lookup(ORDERS, ORDER_COLUMNS, of_orders | _EMPTIED),
        "marketplace": documents,
    }
    evidence = read_evidence(frames, region)
    inside = pl.col("record_id").is_in(touched.implode())
    return Evidence(evidence.records.filter(inside), evidence.shown.filter(inside))


def _rows_at(lookup: ReadRows, graph: Table, nodes: pl.Series, records: pl.Series | None = None) -> pl.DataFrame:
    wanted = pl.col("node").is_in(nodes.unique().implode())
    if records is not None:
        return lookup(graph, _ROWS, wanted | pl.col("record_id").is_in(records.implode()))
    if nodes.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(_ROWS, pl.String))
    return lookup(graph, _ROWS, wanted)


def _crowded(
    rows: pl.DataFrame, others: pl.DataFrame, new: pl.DataFrame, context: BusinessSettings
) -> tuple[pl.Series, pl.Series]:
    """The nodes of changed records that were crowded, and those that now are."""
    before = rows.filter((pl.col("status") == CROWDED) & (pl.col("kind") != "address"))["node"].unique()
    people = people_at(pl.concat([others.select("node", "kind", "holder"), new.select("node", "kind", "holder")]))
    return before, people.filter(is_crowd(context.address_crowd, context.identifier_crowd))["node"]


def _met(others: pl.DataFrame, new: pl.DataFrame, staying: pl.Series, turned: pl.Series) -> pl.DataFrame:
    """The rows of others at nodes of changed records through which something about them may change.

    Crowded addresses are met at their place, should the crowd dissolve. At a node that only calls for a comparison
    nothing can change but for those whose names begin alike: others are not compared (see `links`).
    """
    initial = pl.col("holder").str.head(1)
    open_rows = others.filter(
        ~pl.col("node").is_in(staying.implode()), ~((pl.col("kind") == "address") & (pl.col("status") == CROWDED))
    )
    compared = pl.col("kind").is_in(COMPARED) & ~pl.col("node").is_in(turned.implode())
    asked = new.group_by("node").agg(initial.unique().alias("initials"))
    weak = open_rows.filter(compared).join(asked, on="node")
    anybody = (initial == NAMELESS) | pl.col("initials").list.contains(NAMELESS)
    alike = weak.filter(anybody | pl.col("initials").list.contains(initial)).drop("initials")
    return pl.concat([open_rows.filter(~compared), alike])


def _met_elsewhere(lookup: ReadRows, graph: Table, records: pl.Series) -> pl.DataFrame:
    """Rows of those who share a weak identifier with `records`: their profiles changed, so they are compared anew."""
    if records.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(_ROWS, pl.String))
    own = lookup(graph, _ROWS, pl.col("record_id").is_in(records.implode()))
    return _rows_at(lookup, graph, own.filter(pl.col("status") == WEAK)["node"])


def _persons(lookup: ReadRows, graph: Table, masters: pl.Series) -> tuple[pl.Series, pl.Series]:
    """All members of the persons, and of those tied to them; and the crowded nodes that they show."""
    rows = pl.DataFrame(schema=dict.fromkeys(_ROWS, pl.String))
    seen = masters.clear()
    while not masters.is_empty():
        found = lookup(graph, _ROWS, pl.col("master_user_id").is_in(masters.implode()))
        rows = pl.concat([rows, found])
        seen = pl.concat([seen, masters])
        tied = found.filter((pl.col("status") == WEAK) & pl.col("kind").is_in([*CONTACTS, "match"]))
        if tied.is_empty():
            break
        matched = tied.filter(pl.col("kind") == "match")["node"]
        contacts = tied.filter(pl.col("kind") != "match")["node"]
        there = _rows_at(lookup, graph, pl.concat([matched, contacts]))
        further = there["master_user_id"].unique()
        masters = further.filter(~further.is_in(seen.implode()))
    crowded = rows.filter((pl.col("status") == CROWDED) & (pl.col("kind") != "address"))["node"].unique()
    return rows["record_id"].unique(), crowded


def crowded_groups(groups: pl.DataFrame) -> Collection[str]:
    """The nodes that `widened` found to be crowded."""
    names = groups["record_id"]
    return names.filter(names.str.starts_with(CROWD)).str.slice(len(CROWD)).to_list()
