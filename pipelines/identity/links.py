"""From what records show to links, and from links to people. A function of the set of records given.

An identifier that several people show is judged by how many people show it, never by how many records: a loyal
customer shows one e-mail in fifty orders. People at an identifier are told apart by `names.signature` of the name
they show (a nameless record by its own best contact), because that count only grows with the records seen, and so
never takes a partly seen identifier for a crowd.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import polars as pl

from pipelines.identity.components import Indices, connected
from pipelines.identity.evidence import ADDRESS, VERIFIED_EMAIL, VERIFIED_PHONE, Evidence
from pipelines.identity.names import groups
from pipelines.identity.probabilistic import THRESHOLD, compare
from pipelines.identity.records import MASTER_PREFIX, RECORD_NODE_PREFIX

LINKED, CROWDED, WEAK = "linked", "crowded", "weak"
CONTACTS = ("email", "phone")
JOINING = ("loyalty", "email", "phone", "address")
"""Kinds that join records by themselves."""
COMPARED = ("device", "place", "block")
"""Kinds at which records only meet, to be compared."""
MATCH = {
    "at": pl.Int64,
    "other": pl.Int64,
    "record_id": pl.String,
    "node": pl.String,
    "kind": pl.String,
    "trust": pl.Int32,
    "weight": pl.Float64,
    "reason": pl.String,
    "status": pl.String,
}


def people_at(shown: pl.DataFrame) -> pl.DataFrame:
    """node, kind, people: how many people show each node. `shown` has node, kind, holder."""
    return shown.group_by("node", "kind").agg(pl.col("holder").n_unique().cast(pl.Int64).alias("people"))


def is_crowd(address_crowd: int, identifier_crowd: int) -> pl.Expr:
    """Whether `people` at a node of `kind` are too many. Name with address is judged by its address ('place')."""
    limit = pl.when(pl.col("kind") == "place").then(address_crowd).otherwise(identifier_crowd)
    return (pl.col("people") > limit) & (pl.col("kind") != "address")


def resolve(evidence: Evidence, known_crowded: Collection[str], address_crowd: int, identifier_crowd: int) -> pl.DataFrame:
    """All rows of the graph for these records.

    known_crowded: nodes that are crowded whatever is seen of them here.
    """
    records = evidence.records.sort("record_id").with_row_index("at").with_columns(pl.col("at").cast(pl.Int64))
    shown = evidence.shown.join(records.select("record_id", "at", "name", "holder"), on="record_id")
    crowded = people_at(shown).filter(is_crowd(address_crowd, identifier_crowd) | pl.col("node").is_in(list(known_crowded)))
    shown = _with_status(shown, crowded["node"])
    links = pl.concat([shown, _by_name(shown)])
    joining = links.filter(pl.col("status") == LINKED)
    hubs = _connected(records.height, joining)
    matches = _matches(records, shown, hubs)
    matched = matches.filter(pl.col("status") == LINKED)
    people = connected(records.height, hubs[matched["at"].to_numpy()], hubs[matched["other"].to_numpy()])[hubs]
    masters = _masters(records, people)
    own = masters.select(
        "at",
        "record_id",
        (RECORD_NODE_PREFIX + pl.col("record_id")).alias("node"),
        pl.lit("self").alias("kind"),
        pl.lit(1, pl.Int32).alias("trust"),
        pl.lit(None, pl.Float64).alias("weight"),
        pl.lit("The record itself").alias("reason"),
        pl.lit(LINKED).alias("status"),
        "evidence",
    )
    edges = pl.concat([own, links, matches], how="diagonal")
    return edges.join(masters.select("at", "master_user_id", "first_seen", "holder"), on="at").select(
        "record_id", "node", "kind", "trust", "weight", "reason", "status", "master_user_id", "first_seen", "holder", "evidence"
    )


def _with_status(shown: pl.DataFrame, crowded: pl.Series) -> pl.DataFrame:
    """Add `status` and finish `reason`."""
    mark = pl.DataFrame({"node": crowded}).unique()
    shown = shown.join(mark.with_columns(pl.lit(True).alias("crowd")), on="node", how="left")
    shown = shown.join(mark.select(pl.col("node").alias("place"), pl.lit(True).alias("crowd_place")), on="place", how="left")
    several = _names_at(shown.filter(pl.col("crowd").is_null() & pl.col("kind").is_in(CONTACTS)))
    shown = shown.join(several, on=["node", "name"], how="left")
    split = several.select("node", pl.lit(True).alias("split")).unique()
    shown = shown.join(split, on="node", how="left")
    crowd = pl.col("crowd").is_not_null() | pl.col("crowd_place").is_not_null()
    status = (
        pl.when(crowd).then(pl.lit(CROWDED))
        .when(pl.col("split").is_not_null() | ~pl.col("kind").is_in(JOINING)).then(pl.lit(WEAK))
        .otherwise(pl.lit(LINKED))
    )  # fmt: skip
    why = (
        pl.when(crowd).then(pl.lit("; shared by too many people to tell anything"))
        .when(pl.col("split").is_not_null()).then(pl.lit("; shown under several names, so it joins only those of one name"))
        .when(pl.col("kind") == "device").then(pl.lit("; no proof without a matching name"))
        .otherwise(pl.lit(""))
    )  # fmt: skip
    return shown.with_columns(status.alias("status"), (pl.col("reason") + why).alias("reason"))


def _names_at(shown: pl.DataFrame) -> pl.DataFrame:
    """node, name, person: of the nodes shown under names of more than one person, whose each name is.

    Two who both verified an e-mail are one person whatever they call themselves: both read the same mailbox.
    """
    named = shown.filter(pl.col("name").is_not_null())
    distinct = named.group_by("node", "name").agg(
        ((pl.col("kind") == "email") & (pl.col("trust") == VERIFIED_EMAIL)).any().alias("sure")
    )
    suspects = distinct.filter(pl.col("name").len().over("node") > 1)
    by_node = suspects.group_by("node").agg("name", pl.col("name").filter(pl.col("sure")).alias("sure"))
    found: list[tuple[str, str, str]] = []
    for node, names, sure in by_node.iter_rows():
        person = groups(names, sure)
        if len(set(person.values())) > 1:
            found += [(node, name, whose) for name, whose in person.items()]
    return pl.DataFrame(found, schema={"node": pl.String, "name": pl.String, "person": pl.String}, orient="row")


def _by_name(shown: pl.DataFrame) -> pl.DataFrame:
    """The links of an identifier that people of several names show: one node per person, where it joins anything."""
    own = shown.filter((pl.col("status") == WEAK) & pl.col("person").is_not_null()).with_columns(
        (pl.col("node") + pl.lit("|") + pl.col("person")).alias("node"), pl.lit(LINKED).alias("status")
    )
    reason = pl.col("reason").str.split("; ").list.first() + pl.lit(", under the name '") + pl.col("person") + pl.lit("'")
    return own.filter(pl.len().over("node") > 1).with_columns(reason.alias("reason"))


def _connected(count: int, links: pl.DataFrame) -> Indices:
    """Components of records that share a node in `links` (at, node): the smallest `at` of each."""
    pairs = links.select("at", pl.col("at").min().over("node").alias("first"))
    return connected(count, pairs["at"].to_numpy(), pairs["first"].to_numpy())


def _items(records: pl.DataFrame, shown: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """What Splink compares: the distinct profiles of each hub (records joined by proof), and the oldest record of each.

    What a crowd shares says nothing about a person, so it is left out of the profile.
    """
    devices = (
        shown.filter(pl.col("status") != CROWDED, pl.col("kind") == "device")
        .group_by("at")
        .agg(pl.col("node").unique().sort().alias("devices"))
    )
    profile = ["hub", "name", "address", "phone", "email"]
    crowds = shown.filter(pl.col("status") == CROWDED)["node"].unique()

    def told(name: str, kind: str) -> pl.Expr:
        return pl.when(~(pl.lit(kind + ":") + pl.col(name)).is_in(crowds.implode())).then(pl.col(name)).alias(name)

    return (
        records.with_columns(pl.Series("hub", hubs), told("email", "email"), told("phone", "phone"), told("address", "place"))
        .join(devices, on="at", how="left")
        .with_columns(pl.col("devices").list.join("\n").alias("device_key"))
        .sort("first_seen", "record_id")
        .with_columns(pl.col("at").first().over([*profile, "device_key"]).alias("item"))
    )


def _matches(records: pl.DataFrame, shown: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """Probable links between hubs that meet at a weak identifier: both directions, the best pair of each two hubs."""
    nothing = pl.DataFrame(schema=MATCH)
    items = _items(records, shown, hubs)
    meeting = shown.filter(pl.col("status") == WEAK).select("at", "node").join(items.select("at", "item", "hub", "name"), on="at")
    meeting = meeting.select("node", "item", "hub", initial=pl.col("name").str.head(1)).unique()
    meeting = meeting.filter(pl.col("hub").n_unique().over("node") > 1)
    pairs = (
        meeting.join(meeting, on="node", suffix="_r")
        .filter(
            pl.col("hub") < pl.col("hub_r"),
            (pl.col("initial") == pl.col("initial_r")) | pl.col("initial").is_null() | pl.col("initial_r").is_null(),
        )
        .select("item", "item_r", "hub", "hub_r")
        .unique()
        .sort("item", "item_r")
    )
    if pairs.is_empty():
        return nothing
    words = pl.col("name").str.split(" ")
    profiles = items.select(
        "at",
        "name",
        words.list.first().alias("given"),
        pl.when(words.list.len() > 1).then(words.list.first().str.head(1) + pl.lit(" ") + words.list.last()).alias("short"),
        "address",
        "phone",
        "email",
        pl.col("email").str.split("@").list.first().alias("local"),
        "devices",
    )
    sides = [
        pairs.select(pl.col(name).alias("at")).join(profiles, on="at", how="left", maintain_order="left").drop("at")
        for name in ("item", "item_r")
    ]
    scored = pl.concat([pairs, compare(*sides)], how="horizontal").filter(pl.col("weight") >= THRESHOLD)
    if scored.is_empty():
        return nothing
    ids = records.select("at", "record_id")
    best = (
        scored.join(ids, left_on="item", right_on="at")
        .join(ids, left_on="item_r", right_on="at", suffix="_r")
        .with_columns(low=pl.min_horizontal("record_id", "record_id_r"), high=pl.max_horizontal("record_id", "record_id_r"))
        .sort("weight", "low", "high", descending=[True, False, False])
        .unique(["hub", "hub_r"], keep="first", maintain_order=True)
    )
    best = _guarded(best, records, shown, hubs)
    other_way = {"item": "item_r", "item_r": "item", "record_id": "record_id_r", "record_id_r": "record_id"}
    there = best.select("item", "item_r", "record_id", "record_id_r", "weight", "reason", "status")
    back = there.rename(other_way).select(there.columns)
    return (
        pl.concat([there, back])
        .with_columns(
            pl.col("item").alias("at"),
            pl.col("item_r").alias("other"),
            (RECORD_NODE_PREFIX + pl.col("record_id_r")).alias("node"),
            pl.lit("match").alias("kind"),
            pl.lit(ADDRESS, pl.Int32).alias("trust"),
        )
        .select(list(MATCH))
    )


def _guarded(best: pl.DataFrame, records: pl.DataFrame, shown: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """Add `status`: two who each proved an e-mail and a phone, all different, and have no name in common, are not joined."""
    hub = pl.DataFrame({"at": np.arange(len(hubs)), "hub": hubs})
    proven = (
        shown.filter(pl.col("kind").is_in(CONTACTS), pl.col("trust").is_in([VERIFIED_EMAIL, VERIFIED_PHONE]))
        .join(hub, on="at")
        .group_by("hub")
        .agg(
            pl.col("node").filter(pl.col("kind") == "email").unique().alias("emails"),
            pl.col("node").filter(pl.col("kind") == "phone").unique().alias("phones"),
        )
    )
    named = records.join(hub, on="at").group_by("hub").agg(pl.col("name").drop_nulls().unique().alias("names"))
    sides = best.join(proven, on="hub", how="left").join(proven, left_on="hub_r", right_on="hub", how="left", suffix="_r")
    sides = sides.join(named, on="hub", how="left").join(named, left_on="hub_r", right_on="hub", how="left", suffix="_r")

    def apart(name: str) -> pl.Expr:
        both = (pl.col(name).list.len() > 0) & (pl.col(f"{name}_r").list.len() > 0)
        return (both & (pl.col(name).list.set_intersection(f"{name}_r").list.len() == 0)).fill_null(False)

    stopped = apart("emails") & apart("phones") & apart("names")
    text = pl.format("Probable match, weight {}: {}", pl.col("weight").round(2), pl.col("reason"))
    return sides.with_columns(
        pl.when(stopped).then(pl.lit(WEAK)).otherwise(pl.lit(LINKED)).alias("status"),
        (text + pl.when(stopped).then(pl.lit("; stopped by different verified contacts and names")).otherwise(pl.lit(""))).alias(
            "reason"
        ),
    )


def _masters(records: pl.DataFrame, people: Indices) -> pl.DataFrame:
    """Add `master_user_id`: the oldest member of each component."""
    oldest = pl.col("record_id").sort_by("first_seen", "record_id").first().over("person")
    return records.with_columns(pl.Series("person", people)).with_columns((MASTER_PREFIX + oldest).alias("master_user_id"))
