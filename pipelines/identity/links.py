"""From the identifiers of records to links, and from links to people. A pure function of the set of records given.

An identifier shared by several people is judged by the number of people, never by the number of records: a loyal customer has
one e-mail address in fifty orders. People at an identifier are told apart by `names.signature` of the name on the record (a
record without a name by its own best contact). This count only grows with the records seen, so an identifier of which only
some records are given is never mistaken for a crowded one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import polars as pl

from pipelines.identity.components import Indices, connected_components
from pipelines.identity.evidence import ADDRESS, VERIFIED_EMAIL, VERIFIED_PHONE, Evidence
from pipelines.identity.names import group_names
from pipelines.identity.probabilistic import MIN_MATCH_WEIGHT, compare
from pipelines.identity.records import MASTER_PREFIX, RECORD_NODE_PREFIX

LINKED, CROWDED, WEAK = "linked", "crowded", "weak"
CONTACT_KINDS = ("email", "phone")
JOINING_KINDS = ("loyalty", "email", "phone", "address")
"""Kinds of identifiers that join records on their own."""
COMPARED_KINDS = ("device", "place", "block")
"""Kinds of identifiers whose records are compared, not joined."""
MATCH_SCHEMA = {
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
"""A probabilistic link, from the record with index `at` to the one with index `other`."""


def people_at(identifiers: pl.DataFrame) -> pl.DataFrame:
    """Return node, kind and `people`, the number of people at each node. identifiers: node, kind, holder."""
    return identifiers.group_by("node", "kind").agg(pl.col("holder").n_unique().cast(pl.Int64).alias("people"))


def is_crowd(address_crowd: int, identifier_crowd: int) -> pl.Expr:
    """Return whether a node of `kind` has too many `people`. Name with address is judged by its address ('place')."""
    limit = pl.when(pl.col("kind") == "place").then(address_crowd).otherwise(identifier_crowd)
    return (pl.col("people") > limit) & (pl.col("kind") != "address")


def resolve(evidence: Evidence, known_crowded: Collection[str], address_crowd: int, identifier_crowd: int) -> pl.DataFrame:
    """Return all rows of the graph for these records.

    known_crowded: nodes that are crowded, however few of their records are given.
    """
    records = evidence.records.sort("record_id").with_row_index("at").with_columns(pl.col("at").cast(pl.Int64))
    identifiers = evidence.identifiers.join(records.select("record_id", "at", "name", "holder"), on="record_id")
    crowd = is_crowd(address_crowd, identifier_crowd) | pl.col("node").is_in(list(known_crowded))
    identifiers = _with_status(identifiers, people_at(identifiers).filter(crowd)["node"])
    links = pl.concat([identifiers, _links_by_name(identifiers)])
    hubs = _components_by_node(records.height, links.filter(pl.col("status") == LINKED))
    matches = _probabilistic_links(records, identifiers, hubs)
    joining = matches.filter(pl.col("status") == LINKED)
    left, right = hubs[joining["at"].to_numpy()], hubs[joining["other"].to_numpy()]
    people = connected_components(records.height, left, right)[hubs]
    masters = _with_masters(records, people)
    edges = pl.concat([_own_rows(masters), links, matches], how="diagonal")
    return edges.join(masters.select("at", "master_user_id", "first_seen", "holder"), on="at").select(
        "record_id", "node", "kind", "trust", "weight", "reason", "status", "master_user_id", "first_seen", "holder", "evidence"
    )


def _own_rows(masters: pl.DataFrame) -> pl.DataFrame:
    """Return each record's row of kind self."""
    return masters.select(
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


def _with_status(identifiers: pl.DataFrame, crowded: pl.Series) -> pl.DataFrame:
    """Add `status`, and `person` where a contact has names of several people; complete `reason`."""
    marks = pl.DataFrame({"node": crowded}).unique()
    identifiers = identifiers.join(marks.with_columns(pl.lit(True).alias("crowd")), on="node", how="left")
    identifiers = identifiers.join(
        marks.select(pl.col("node").alias("place"), pl.lit(True).alias("crowd_place")), on="place", how="left"
    )
    persons = _persons_at_contacts(identifiers.filter(pl.col("crowd").is_null() & pl.col("kind").is_in(CONTACT_KINDS)))
    identifiers = identifiers.join(persons, on=["node", "name"], how="left")
    shared = persons.select("node", pl.lit(True).alias("shared")).unique()
    identifiers = identifiers.join(shared, on="node", how="left")
    is_crowded = pl.col("crowd").is_not_null() | pl.col("crowd_place").is_not_null()
    is_shared = pl.col("shared").is_not_null()
    status = (
        pl.when(is_crowded).then(pl.lit(CROWDED))
        .when(is_shared | ~pl.col("kind").is_in(JOINING_KINDS)).then(pl.lit(WEAK))
        .otherwise(pl.lit(LINKED))
    )  # fmt: skip
    explanation = (
        pl.when(is_crowded).then(pl.lit("; shared by too many people to tell anything"))
        .when(is_shared).then(pl.lit("; shown under several names, so it joins only those of one name"))
        .when(pl.col("kind") == "device").then(pl.lit("; no proof without a matching name"))
        .otherwise(pl.lit(""))
    )  # fmt: skip
    return identifiers.with_columns(status.alias("status"), (pl.col("reason") + explanation).alias("reason"))


def _persons_at_contacts(contacts: pl.DataFrame) -> pl.DataFrame:
    """Return node, name and `person` of the contacts that have names of more than one person.

    Two people who both verified an e-mail address are one person, whatever their names: both read the same mailbox.
    """
    is_verified = (pl.col("kind") == "email") & (pl.col("trust") == VERIFIED_EMAIL)
    named = contacts.filter(pl.col("name").is_not_null())
    distinct = named.group_by("node", "name").agg(is_verified.any().alias("verified"))
    several = distinct.filter(pl.col("name").len().over("node") > 1)
    by_node = several.group_by("node").agg("name", pl.col("name").filter(pl.col("verified")).alias("verified"))
    found: list[tuple[str, str, str]] = []
    for node, names, verified in by_node.iter_rows():
        person_of = group_names(names, verified)
        if len(set(person_of.values())) > 1:
            found += [(node, name, person) for name, person in person_of.items()]
    return pl.DataFrame(found, schema={"node": pl.String, "name": pl.String, "person": pl.String}, orient="row")


def _links_by_name(identifiers: pl.DataFrame) -> pl.DataFrame:
    """Return the links at contacts with names of several people: one node per person, if it has at least two records."""
    by_person = identifiers.filter((pl.col("status") == WEAK) & pl.col("person").is_not_null()).with_columns(
        (pl.col("node") + pl.lit("|") + pl.col("person")).alias("node"), pl.lit(LINKED).alias("status")
    )
    reason = pl.col("reason").str.split("; ").list.first() + pl.lit(", under the name '") + pl.col("person") + pl.lit("'")
    return by_person.filter(pl.len().over("node") > 1).with_columns(reason.alias("reason"))


def _components_by_node(count: int, links: pl.DataFrame) -> Indices:
    """Return the component of each of `count` records that share nodes in `links` (at, node): its smallest `at`."""
    pairs = links.select("at", pl.col("at").min().over("node").alias("first"))
    return connected_components(count, pairs["at"].to_numpy(), pairs["first"].to_numpy())


def _profiles(records: pl.DataFrame, identifiers: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """Return the records with their hub and `item`: the oldest record of the hub with the same profile.

    A hub is a set of records that are joined without a probabilistic match. A profile is what Splink compares: name, address,
    phone, email and devices. Crowded identifiers are left out, since they do not characterise a person.
    """
    devices = (
        identifiers.filter(pl.col("status") != CROWDED, pl.col("kind") == "device")
        .group_by("at")
        .agg(pl.col("node").unique().sort().alias("devices"))
    )
    crowded = identifiers.filter(pl.col("status") == CROWDED)["node"].unique()

    def unless_crowded(name: str, kind: str) -> pl.Expr:
        return pl.when(~(pl.lit(kind + ":") + pl.col(name)).is_in(crowded.implode())).then(pl.col(name)).alias(name)

    return (
        records.with_columns(
            pl.Series("hub", hubs),
            unless_crowded("email", "email"),
            unless_crowded("phone", "phone"),
            unless_crowded("address", "place"),
        )
        .join(devices, on="at", how="left")
        .with_columns(pl.col("devices").list.join("\n").alias("device_key"))
        .sort("first_seen", "record_id")
        .with_columns(pl.col("at").first().over("hub", "name", "address", "phone", "email", "device_key").alias("item"))
    )


def _probabilistic_links(records: pl.DataFrame, identifiers: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """Return the links (MATCH_SCHEMA, in both directions) between the best matching profiles of each two hubs."""
    profiles = _profiles(records, identifiers, hubs)
    pairs = _candidate_pairs(profiles, identifiers)
    if pairs.is_empty():
        return pl.DataFrame(schema=MATCH_SCHEMA)
    weights = _weigh(pairs, profiles).filter(pl.col("weight") >= MIN_MATCH_WEIGHT)
    if weights.is_empty():
        return pl.DataFrame(schema=MATCH_SCHEMA)
    best = _with_match_status(_best_per_hubs(weights, records), records, identifiers, hubs)
    return _in_both_directions(best)


def _candidate_pairs(profiles: pl.DataFrame, identifiers: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs of profiles of different hubs that share a weak identifier and have the same initial, if named."""
    weak = identifiers.filter(pl.col("status") == WEAK).select("at", "node")
    meeting = weak.join(profiles.select("at", "item", "hub", "name"), on="at")
    meeting = meeting.select("node", "item", "hub", initial=pl.col("name").str.head(1)).unique()
    meeting = meeting.filter(pl.col("hub").n_unique().over("node") > 1)
    same_initial = pl.col("initial") == pl.col("initial_r")
    return (
        meeting.join(meeting, on="node", suffix="_r")
        .filter(
            pl.col("hub") < pl.col("hub_r"),
            same_initial | pl.col("initial").is_null() | pl.col("initial_r").is_null(),
        )
        .select("item", "item_r", "hub", "hub_r")
        .unique()
        .sort("item", "item_r")
    )


def _weigh(pairs: pl.DataFrame, profiles: pl.DataFrame) -> pl.DataFrame:
    """Add `weight` and `reason` to pairs of profiles."""
    words = pl.col("name").str.split(" ")
    compared = profiles.select(
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
    left, right = (
        pairs.select(pl.col(name).alias("at")).join(compared, on="at", how="left", maintain_order="left").drop("at")
        for name in ("item", "item_r")
    )
    return pl.concat([pairs, compare(left, right)], how="horizontal")


def _best_per_hubs(weights: pl.DataFrame, records: pl.DataFrame) -> pl.DataFrame:
    """Return the pair with the greatest weight of each two hubs, the first by record ids on a tie."""
    ids = records.select("at", "record_id")
    return (
        weights.join(ids, left_on="item", right_on="at")
        .join(ids, left_on="item_r", right_on="at", suffix="_r")
        .with_columns(low=pl.min_horizontal("record_id", "record_id_r"), high=pl.max_horizontal("record_id", "record_id_r"))
        .sort("weight", "low", "high", descending=[True, False, False])
        .unique(["hub", "hub_r"], keep="first", maintain_order=True)
    )


def _in_both_directions(best: pl.DataFrame) -> pl.DataFrame:
    """Return one link (MATCH_SCHEMA) from each side of the pairs."""
    swapped = {"item": "item_r", "item_r": "item", "record_id": "record_id_r", "record_id_r": "record_id"}
    forward = best.select("item", "item_r", "record_id", "record_id_r", "weight", "reason", "status")
    backward = forward.rename(swapped).select(forward.columns)
    return (
        pl.concat([forward, backward])
        .with_columns(
            pl.col("item").alias("at"),
            pl.col("item_r").alias("other"),
            (RECORD_NODE_PREFIX + pl.col("record_id_r")).alias("node"),
            pl.lit("match").alias("kind"),
            pl.lit(ADDRESS, pl.Int32).alias("trust"),
        )
        .select(list(MATCH_SCHEMA))
    )


def _with_match_status(best: pl.DataFrame, records: pl.DataFrame, identifiers: pl.DataFrame, hubs: Indices) -> pl.DataFrame:
    """Add `status`: two people with different verified e-mails, phones and names are not joined. Complete `reason`."""
    hub = pl.DataFrame({"at": np.arange(len(hubs)), "hub": hubs})
    verified = (
        identifiers.filter(pl.col("kind").is_in(CONTACT_KINDS), pl.col("trust").is_in([VERIFIED_EMAIL, VERIFIED_PHONE]))
        .join(hub, on="at")
        .group_by("hub")
        .agg(
            pl.col("node").filter(pl.col("kind") == "email").unique().alias("emails"),
            pl.col("node").filter(pl.col("kind") == "phone").unique().alias("phones"),
        )
    )
    names = records.join(hub, on="at").group_by("hub").agg(pl.col("name").drop_nulls().unique().alias("names"))
    for known in (verified, names):
        best = best.join(known, on="hub", how="left").join(known, left_on="hub_r", right_on="hub", how="left", suffix="_r")

    def differ(name: str) -> pl.Expr:
        both = (pl.col(name).list.len() > 0) & (pl.col(f"{name}_r").list.len() > 0)
        return (both & (pl.col(name).list.set_intersection(f"{name}_r").list.len() == 0)).fill_null(False)

    is_stopped = differ("emails") & differ("phones") & differ("names")
    reason = pl.format("Probable match, weight {}: {}", pl.col("weight").round(2), pl.col("reason"))
    stopped = pl.when(is_stopped).then(pl.lit("; stopped by different verified contacts and names")).otherwise(pl.lit(""))
    return best.with_columns(
        pl.when(is_stopped).then(pl.lit(WEAK)).otherwise(pl.lit(LINKED)).alias("status"),
        (reason + stopped).alias("reason"),
    )


def _with_masters(records: pl.DataFrame, people: Indices) -> pl.DataFrame:
    """Add `master_user_id`, from the oldest record of each component."""
    oldest = pl.col("record_id").sort_by("first_seen", "record_id").first().over("person")
    return records.with_columns(pl.Series("person", people)).with_columns((MASTER_PREFIX + oldest).alias("master_user_id"))
