"""Which records must be resolved again when some change: exactly those whose links or person can differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import polars as pl

from lakehouse.step import ReadRows
from lakehouse.table import Table
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, USERS
from pipelines.identity.evidence import NAMELESS, Evidence, read_evidence
from pipelines.identity.links import COMPARED_KINDS, CONTACT_KINDS, CROWDED, WEAK, is_crowd, people_at
from pipelines.identity.records import ORDER_PREFIX, ORDER_RECORD_ID, user_ids_of_records
from pipelines.settings import BusinessSettings

CROWD_PREFIX = "crowd|"
"""Prefix of a group without rows: the node that follows is crowded, although `transform` does not get all of its records."""

USER_COLUMNS = (
    "user_id", "email", "email_verified", "phone_number", "phone_verified", "name", "address", "city", "country", "loyalty_id",
    "created_at", "updated_at", "_op", "_source_position", "_source_time", "_ingested_at", "_unchanged",
)  # fmt: skip
ORDER_COLUMNS = (
    "order_id", "user_id", "device_id", "shipping_address", "_op", "_source_position", "_ingested_at", "_unchanged",
)  # fmt: skip
DOCUMENT_COLUMNS = ("document_id", "platform", "mp_order_id", "document", "_op", "_source_position", "_ingested_at")

_IS_TRUNCATE = pl.col("_op").eq_missing(pl.lit("t"))
"""Truncates and epoch markers: they concern every record."""

_GRAPH_COLUMNS = ("record_id", "node", "kind", "status", "holder", "master_user_id")
_NO_ROWS = pl.DataFrame(schema=dict.fromkeys(_GRAPH_COLUMNS, pl.String))


@dataclass(frozen=True)
class _Change:
    """The changed records and the stored graph around them.

    records     ids of the records whose evidence changed
    current     their identifiers now: record_id, node, kind, holder
    stored      their rows in the graph
    nodes       the nodes of `current` and `stored`
    neighbours  rows of other records at these nodes
    """

    records: pl.Series
    current: pl.DataFrame
    stored: pl.DataFrame
    nodes: pl.Series
    neighbours: pl.DataFrame


def expand_affected(groups: pl.DataFrame, lookup: ReadRows, graph: Table, context: BusinessSettings) -> pl.DataFrame:
    """Return the records to resolve again, given those with new rows, as groups.

    Records whose evidence is unchanged are left out. For each changed record the result has:

    - the records at its current and former identifiers, except at identifiers that were and stay crowded;
    - the records that share a weak identifier with those, where an identifier became or ceased to be crowded;
    - the whole persons of all these as stored, and transitively the persons tied to them by links that do not join (an
      identifier under several names, a stopped match).

    Nodes that stay crowded are groups of their own, with CROWD_PREFIX.
    """
    change = _read_change(groups["record_id"].unique(), lookup, graph, context)
    if change.records.is_empty():
        return groups.clear()
    stay_crowded, turned = _crowds(change, context)
    met = _neighbours_to_resolve(change, stay_crowded, turned)
    at_turned = change.neighbours.filter(pl.col("node").is_in(turned.implode()))["record_id"].unique()
    met = pl.concat([met, _rows_sharing_weak_identifiers(lookup, graph, at_turned)])
    masters = pl.concat([met["master_user_id"], change.stored["master_user_id"]]).unique()
    members, crowded_elsewhere = _tied_persons(lookup, graph, masters)
    resolved_nodes = change.nodes.filter(~change.nodes.is_in(stay_crowded.implode()))
    crowds = pl.concat([stay_crowded, crowded_elsewhere.filter(~crowded_elsewhere.is_in(resolved_nodes.implode()))]).unique()
    records = pl.concat([change.records, members, met["record_id"]]).unique().sort()
    marks = pl.Series("record_id", [CROWD_PREFIX + node for node in crowds.sort()], dtype=pl.String)
    return pl.DataFrame({"record_id": pl.concat([records, marks])})


def crowded_nodes(groups: pl.DataFrame) -> Collection[str]:
    """Return the nodes that `expand_affected` found to be crowded."""
    names = groups["record_id"]
    return names.filter(names.str.starts_with(CROWD_PREFIX)).str.slice(len(CROWD_PREFIX)).to_list()


def _read_change(candidates: pl.Series, lookup: ReadRows, graph: Table, context: BusinessSettings) -> _Change:
    """Return the records among the candidates whose evidence changed, and the stored graph around them."""
    is_own_row = (pl.col("kind") == "self") & pl.col("record_id").is_in(candidates.implode())
    stored_evidence = lookup(graph, ("record_id", "evidence"), is_own_row)
    evidence = _current_evidence(candidates, lookup, context.default_region)
    both = evidence.records.select("record_id", "evidence").join(
        stored_evidence, on="record_id", how="full", coalesce=True, suffix="_stored"
    )
    changed = both.filter(~pl.col("evidence").eq_missing(pl.col("evidence_stored")))["record_id"]
    is_changed = pl.col("record_id").is_in(changed.implode())
    current = evidence.identifiers.join(evidence.records.select("record_id", "holder"), on="record_id")
    current = current.filter(is_changed).select("record_id", "node", "kind", "holder")
    if changed.is_empty():
        return _Change(changed, current, _NO_ROWS, current["node"], _NO_ROWS)
    rows = _rows_at(lookup, graph, current["node"], changed)
    stored = rows.filter(is_changed)
    former_nodes = stored.filter(~pl.col("node").is_in(current["node"].implode()))["node"]
    rows = pl.concat([rows, _rows_at(lookup, graph, former_nodes)]).unique(["record_id", "node"])
    nodes = pl.concat([current["node"], stored["node"]]).unique()
    neighbours = rows.filter(pl.col("node").is_in(nodes.implode()) & ~is_changed)
    return _Change(changed, current, stored, nodes, neighbours)


def _current_evidence(candidates: pl.Series, lookup: ReadRows, region: str) -> Evidence:
    """Return the evidence of the candidate records now."""
    orders = candidates.filter(candidates.str.starts_with(ORDER_PREFIX))
    is_user = pl.col("user_id").is_in(user_ids_of_records(candidates).implode())
    # all rows of their orders: a delete may name no account, and an order may have moved to another account
    is_order = pl.col("order_id").is_in(lookup(ORDERS, ("order_id",), is_user)["order_id"].unique().implode())
    documents = pl.DataFrame(schema=dict.fromkeys(DOCUMENT_COLUMNS, pl.String))
    if not orders.is_empty():
        ids = lookup(MARKETPLACE_ORDERS, ("document_id",), ORDER_RECORD_ID.is_in(orders.implode()))["document_id"]
        is_document = pl.col("document_id").is_in(ids.unique().implode())
        documents = lookup(MARKETPLACE_ORDERS, DOCUMENT_COLUMNS, is_document | _IS_TRUNCATE)
    frames = {
        "users": lookup(USERS, USER_COLUMNS, is_user | _IS_TRUNCATE),
        "orders": lookup(ORDERS, ORDER_COLUMNS, is_order | _IS_TRUNCATE),
        "marketplace": documents,
    }
    evidence = read_evidence(frames, region)
    is_candidate = pl.col("record_id").is_in(candidates.implode())
    return Evidence(evidence.records.filter(is_candidate), evidence.identifiers.filter(is_candidate))


def _rows_at(lookup: ReadRows, graph: Table, nodes: pl.Series, records: pl.Series | None = None) -> pl.DataFrame:
    """Return the graph's rows at these nodes, and those of these records."""
    wanted = pl.col("node").is_in(nodes.unique().implode())
    if records is not None:
        return lookup(graph, _GRAPH_COLUMNS, wanted | pl.col("record_id").is_in(records.implode()))
    if nodes.is_empty():
        return _NO_ROWS
    return lookup(graph, _GRAPH_COLUMNS, wanted)


def _crowds(change: _Change, context: BusinessSettings) -> tuple[pl.Series, pl.Series]:
    """Return the nodes of changed records that were and stay crowded, and those that became or ceased to be."""
    rows = pl.concat([change.stored, change.neighbours])
    before = rows.filter((pl.col("status") == CROWDED) & (pl.col("kind") != "address"))["node"].unique()
    columns = ("node", "kind", "holder")
    people = people_at(pl.concat([change.neighbours.select(columns), change.current.select(columns)]))
    after = people.filter(is_crowd(context.address_crowd, context.identifier_crowd))["node"]
    stay = before.filter(before.is_in(after.implode()))
    either = pl.concat([before, after])
    return stay, either.filter(~either.is_in(stay.implode()))


def _neighbours_to_resolve(change: _Change, stay_crowded: pl.Series, turned: pl.Series) -> pl.DataFrame:
    """Return the neighbours' rows at nodes where the change can affect them.

    A crowded address is handled at its place, in case the crowd dissolves. At a node that only leads to comparisons, a change
    can affect only records whose names have the same initial: others are not compared (see `links`).
    """
    initial = pl.col("holder").str.head(1)
    rows = change.neighbours.filter(
        ~pl.col("node").is_in(stay_crowded.implode()), ~((pl.col("kind") == "address") & (pl.col("status") == CROWDED))
    )
    only_compared = pl.col("kind").is_in(COMPARED_KINDS) & ~pl.col("node").is_in(turned.implode())
    initials = change.current.group_by("node").agg(initial.unique().alias("initials"))
    compared = rows.filter(only_compared).join(initials, on="node")
    is_nameless = (initial == NAMELESS) | pl.col("initials").list.contains(NAMELESS)
    compared = compared.filter(is_nameless | pl.col("initials").list.contains(initial)).drop("initials")
    return pl.concat([rows.filter(~only_compared), compared])


def _rows_sharing_weak_identifiers(lookup: ReadRows, graph: Table, records: pl.Series) -> pl.DataFrame:
    """Return the rows at the weak identifiers of `records`: their profiles changed, so they are compared again."""
    if records.is_empty():
        return _NO_ROWS
    own = lookup(graph, _GRAPH_COLUMNS, pl.col("record_id").is_in(records.implode()))
    return _rows_at(lookup, graph, own.filter(pl.col("status") == WEAK)["node"])


def _tied_persons(lookup: ReadRows, graph: Table, masters: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return all records of the persons and of those transitively tied to them, and the crowded nodes of these records."""
    rows = _NO_ROWS
    seen = masters.clear()
    while not masters.is_empty():
        found = lookup(graph, _GRAPH_COLUMNS, pl.col("master_user_id").is_in(masters.implode()))
        rows = pl.concat([rows, found])
        seen = pl.concat([seen, masters])
        tied = found.filter((pl.col("status") == WEAK) & pl.col("kind").is_in([*CONTACT_KINDS, "match"]))
        if tied.is_empty():
            break
        further = _rows_at(lookup, graph, tied["node"])["master_user_id"].unique()
        masters = further.filter(~further.is_in(seen.implode()))
    crowded = rows.filter((pl.col("status") == CROWDED) & (pl.col("kind") != "address"))["node"].unique()
    return rows["record_id"].unique(), crowded
