"""silver.users_scd: intervals of accounts from versions in any order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.property_tests import property_test

from pipelines.settings import BusinessSettings
from pipelines.silver.users_scd import ATTRIBUTES, STEP, USERS_SCD
from pipelines.sources.epochs import epoch_prefix

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TS = pl.Datetime("us", "UTC")
BRONZE = {
    "user_id": pl.Int64,
    "email": pl.String,
    "email_verified": pl.Boolean,
    "phone_number": pl.String,
    "phone_verified": pl.Boolean,
    "name": pl.String,
    "address": pl.String,
    "city": pl.String,
    "country": pl.String,
    "loyalty_id": pl.String,
    "created_at": TS,
    "updated_at": TS,
    "_unchanged": pl.String,
    "_op": pl.String,
    "_source_position": pl.String,
    "_source_time": TS,
    "_ingested_at": TS,
}


def at(hours: float) -> datetime:
    return T0 + timedelta(hours=hours)


def version(
    position: int,
    updated: float | None,
    *,
    user: int = 1,
    op: str = "u",
    committed: float | None = None,
    epoch: int = 0,
    **values: Any,
) -> dict[str, Any]:
    """Return a bronze row of user 1, updated `updated` hours after T0."""
    changed = None if updated is None else at(updated)
    row = {
        "user_id": user,
        "created_at": None if op == "d" else T0,
        "updated_at": changed,
        "_op": op,
        "_source_position": f"{epoch_prefix(epoch)}{position:016X}{'-000000.' if op == 'r' else '/'}{0:010d}",
        "_source_time": at(position if committed is None else committed),
        "_ingested_at": at(10_000),
    }
    return row | values


def marker(epoch: int, read: float) -> dict[str, Any]:
    """Return the marker of a new epoch, read `read` hours after T0."""
    row = version(0, None, op="t", committed=read)
    return row | {"user_id": None, "created_at": None, "_source_position": epoch_prefix(epoch)}


def transform(rows: Sequence[dict[str, Any]], identity: dict[str, str] | None = None) -> pl.DataFrame:
    users = pl.DataFrame([{name: row.get(name) for name in BRONZE} for row in rows], schema=BRONZE)
    known = identity or {}
    graph_schema = {"record_id": pl.String, "master_user_id": pl.String}
    graph = pl.DataFrame({"record_id": list(known), "master_user_id": list(known.values())}, schema=graph_schema)
    filled = STEP.transform({"users": users, "identity": graph}, BusinessSettings())
    assert filled.columns == USERS_SCD.schema.names
    filled.to_arrow().select(USERS_SCD.schema.names).cast(USERS_SCD.schema)
    return filled.sort("user_id", "valid_from")


def intervals_of(frame: pl.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    """Return valid_from and valid_to in hours after T0, then the named columns."""
    hours = [((pl.col(name) - T0).dt.total_minutes() / 60).alias(name) for name in ("valid_from", "valid_to")]
    return frame.with_columns(hours).select("valid_from", "valid_to", *names).rows()


def test_versions_follow_each_other() -> None:
    filled = transform([version(1, 0, name="A", op="c"), version(2, 5, name="B"), version(3, 9, name="C")])
    assert intervals_of(filled, "name", "is_current", "closed_by") == [
        (0, 5, "A", False, "update"),
        (5, 9, "B", False, "update"),
        (9, None, "C", True, None),
    ]


def test_late_version_is_inserted_in_order() -> None:
    filled = transform([version(1, 0, name="A"), version(2, 9, name="C"), version(3, 5, name="B")])
    assert intervals_of(filled, "name") == [(0, 5, "A"), (5, 9, "B"), (9, None, "C")]


def test_version_without_updated_at_is_valid_from_creation_or_commit() -> None:
    filled = transform([version(1, None, name="A", created_at=at(2)), version(2, None, name="B", created_at=None, committed=7)])
    assert intervals_of(filled, "name") == [(2, 7, "A"), (7, None, "B")]


def test_unchanged_version_starts_no_interval() -> None:
    filled = transform([version(1, 0, name="A"), version(2, 5, name="A"), version(3, 9, name="B"), version(3, 9, name="B")])
    assert intervals_of(filled, "name") == [(0, 9, "A"), (9, None, "B")]
    assert filled["updated_at"].to_list() == [at(5), at(9)]


def test_last_of_simultaneous_versions_is_kept() -> None:
    filled = transform([version(1, 0, name="A"), version(2, 5, name="B"), version(3, 5, name="C")])
    assert intervals_of(filled, "name") == [(0, 5, "A"), (5, None, "C")]


def test_delete_ends_the_lifetime_and_insert_starts_another() -> None:
    rows = [version(1, 0, name="A", op="c"), version(2, None, op="d", committed=6), version(3, 8, name="A", op="c")]
    assert intervals_of(transform(rows[:2]), "name", "is_current", "closed_by") == [(0, 6, "A", False, "delete")]
    assert intervals_of(transform(rows), "name", "is_current", "closed_by") == [
        (0, 6, "A", False, "delete"),
        (8, None, "A", True, None),
    ]


def test_truncate_deletes_every_account() -> None:
    rows = [version(1, 0, name="A"), version(2, 2, user=2, name="B"), version(3, None, op="t", committed=6) | {"user_id": None}]
    assert intervals_of(transform([*rows, version(4, 8, name="C")]), "user_id", "name", "closed_by") == [
        (0, 6, 1, "A", "delete"),
        (8, None, 1, "C", None),
        (2, 6, 2, "B", "delete"),
    ]


def test_new_epoch_does_not_split_a_continuing_lifetime() -> None:
    before = [version(1, 0, name="A", op="r"), version(9, 4, name="B"), version(8, 1, user=2, name="C", op="c")]
    reread = [marker(1, 6), version(2, 4, name="B", op="r", epoch=1), version(2, 1, user=2, name="C", op="r", epoch=1)]
    assert_frame_equal(transform([*before, *reread]), transform(before))
    changed = [marker(1, 6), version(2, 5, name="D", op="r", epoch=1), version(3, 8, name="E", epoch=1)]
    assert intervals_of(transform([*before, *changed]), "user_id", "name", "closed_by") == [
        (0, 4, 1, "A", "update"),
        (4, 5, 1, "B", "update"),
        (5, 8, 1, "D", "update"),
        (8, None, 1, "E", None),
        (1, 6, 2, "C", "delete"),
    ]


def test_account_missing_in_a_new_epoch_ends_at_its_marker() -> None:
    rows = [version(9, 0, name="A"), marker(1, 6)]
    assert intervals_of(transform(rows), "name", "closed_by") == [(0, 6, "A", "delete")]
    returned = version(3, 8, name="B", op="c", epoch=1)
    assert intervals_of(transform([*rows, returned]), "name", "closed_by") == [(0, 6, "A", "delete"), (8, None, "B", None)]
    later = [marker(2, 9), version(1, 8, name="B", op="r", epoch=2)]
    assert_frame_equal(transform([*rows, returned, *later]), transform([*rows, returned]))


def test_delete_is_no_earlier_than_the_deleted_versions() -> None:
    filled = transform([version(1, 0, name="A"), version(2, 9, name="B"), version(3, None, op="d", committed=6)])
    assert intervals_of(filled, "name", "closed_by") == [(0, 9, "A", "delete")]


def test_new_lifetime_starts_no_earlier_than_the_delete() -> None:
    filled = transform([version(1, 0, name="A"), version(2, None, op="d", committed=6), version(3, 1, name="B", op="c")])
    assert intervals_of(filled, "name", "closed_by") == [(0, 6, "A", "delete"), (6, None, "B", None)]


def test_unsent_columns_have_the_previous_value_in_source_order() -> None:
    filled = transform(
        [
            version(1, 0, name="A", address="Long street 1"),
            version(3, 2, name="C", _unchanged="address,city"),
            version(2, 9, name="B", address="Short street 2"),
        ]
    )
    assert intervals_of(filled, "name", "address") == [
        (0, 2, "A", "Long street 1"),
        (2, 9, "C", "Short street 2"),
        (9, None, "B", "Short street 2"),
    ]


def test_correction_replaces_the_original() -> None:
    wrong, right = version(1, 0, name="wrong"), version(1, 0, name="right", op="fix")
    assert intervals_of(transform([right, wrong]), "name") == [(0, None, "right")]


def test_contacts_are_normalised_and_originals_kept() -> None:
    filled = transform(
        [version(1, 0, email=" Ann.Lee@Example.COM ", phone_number="0812-3456-7890", country="id")], {"user:1": "M-user:1"}
    )
    assert filled.select("email", "email_raw", "phone_number", "phone_raw", "country", "master_user_id").row(0) == (
        "ann.lee@example.com",
        " Ann.Lee@Example.COM ",
        "+6281234567890",
        "0812-3456-7890",
        "ID",
        "M-user:1",
    )


def test_empty_input_has_empty_output() -> None:
    assert transform([]).is_empty()


def test_changed_records_affect_their_users() -> None:
    affects = STEP.reads["identity"].affects  # type: ignore[union-attr]
    assert affects is not None
    changed = pl.DataFrame({"record_id": ["user:7", "order:tokopedia:1", "user:x"], "master_user_id": ["M-user:1"] * 3})
    assert pl.DataFrame({"user_id": [6, 7]}).filter(affects(changed))["user_id"].to_list() == [7]


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Versions of two users: times in any order and often equal, no-op updates, deletes, new inserts, unsent columns,
    truncates, and new epochs after which LSNs begin anywhere and either user may be missing."""
    rows: list[dict[str, Any]] = []
    live = {1: False, 2: False}
    epoch, shift = 0, 100
    for step in range(draw(st.integers(0, 14))):
        position = shift + step
        user = draw(st.integers(1, 2))
        kinds = ["write", "write", "write", "unsent", "delete"] if live[user] else ["write", "write"]
        kind = draw(st.sampled_from([*kinds, "truncate", "reread"]))
        moment = draw(st.none() | st.integers(0, 8))
        committed = draw(st.integers(0, 8))
        values = {"name": draw(st.sampled_from(["A", "B"])), "created_at": draw(st.sampled_from([None, at(3)]))}
        if kind == "reread":
            epoch, shift = epoch + 1, draw(st.sampled_from([0, 100, 200]))
            rows.append(marker(epoch, committed))
            found = draw(st.sets(st.integers(1, 2)))
            for each in sorted(found):
                read = {"user": each, "op": "r", "committed": committed, "epoch": epoch, "address": "X"}
                rows.append(version(shift + step, moment, **read, **values))
            live = {each: each in found for each in live}
        elif kind == "truncate":
            rows.append(version(position, None, op="t", committed=committed, epoch=epoch) | {"user_id": None})
            live = dict.fromkeys(live, False)
        elif kind == "delete":
            rows.append(version(position, None, user=user, op="d", committed=committed, epoch=epoch))
            live[user] = False
        else:
            values |= {"_unchanged": "address"} if kind == "unsent" else {"address": draw(st.sampled_from([None, "X", "Y"]))}
            change = {"user": user, "op": "u" if live[user] else "c", "committed": committed, "epoch": epoch}
            rows.append(version(position, moment, **change, **values))
            live[user] = True
    return rows


def own_rows(rows: list[dict[str, Any]], user: int) -> list[dict[str, Any]]:
    """Return a user's rows in source order, with a delete where a truncate or a marker ends the lifetime."""
    own: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if row["user_id"] == user:
            own.append(row)
        elif row["_op"] == "t" and own:
            read = [next_row for next_row in rows[number + 1 : number + 3] if next_row["_op"] == "r"]
            is_marker = row["_source_position"].endswith("~")
            if not (is_marker and any(r["user_id"] == user and in_epoch(r, row) for r in read)):
                own.append(row | {"_op": "d"})
    return own


def in_epoch(row: dict[str, Any], marker: dict[str, Any]) -> bool:
    return str(row["_source_position"]).startswith(marker["_source_position"])


def oracle(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the intervals, computed one user and one row at a time."""
    result: list[tuple[Any, ...]] = []
    for user in (1, 2):
        lifetimes: list[tuple[datetime | None, datetime | None, list[tuple[datetime, int, dict[str, Any]]]]] = []
        begins: datetime | None = None
        versions: list[tuple[datetime, int, dict[str, Any]]] = []
        latest: datetime | None = None
        address = None
        for position, row in enumerate(own_rows(rows, user)):
            row = {name: row.get(name) for name in BRONZE}
            moment = row["updated_at"] or row["created_at"] or row["_source_time"]
            if row["_op"] == "d":
                moment = row["_source_time"]
            latest = moment if latest is None else max(latest, moment)
            if row["_op"] == "d":
                lifetimes.append((begins, latest, versions))
                begins, versions = latest, []
                continue
            if row["_unchanged"]:
                row["address"] = address
            address = row["address"]
            versions.append((moment if begins is None else max(moment, begins), position, row))
        lifetimes.append((begins, None, versions))
        for _, ends, lifetime in lifetimes:
            ordered = sorted(lifetime, key=lambda item: item[:2])
            timeline = {moment: row for moment, _, row in ordered if ends is None or moment < ends}
            kept: list[list[Any]] = []
            for moment in sorted(timeline):
                content = [timeline[moment][name] for name in ATTRIBUTES]
                if not kept or kept[-1][1] != content:
                    kept.append([moment, content])
            for number, (moment, content) in enumerate(kept):
                last = number + 1 == len(kept)
                until = ends if last else kept[number + 1][0]
                how = ("delete" if ends else None) if last else "update"
                name, address_then = (content[ATTRIBUTES.index(attribute)] for attribute in ("name", "address"))
                result.append((user, moment, until, until is None, name, address_then, how))
    return result


@property_test(histories(), st.randoms(use_true_random=False), fast=100, slow=300)
def test_any_order_and_duplication_equals_the_oracle(rows: list[dict[str, Any]], random: Any) -> None:
    delivered = rows + random.sample(rows, random.randint(0, len(rows)))
    random.shuffle(delivered)
    filled = transform(delivered)
    assert_frame_equal(filled, transform(rows))
    assert filled.select("user_id", "valid_from", "valid_to", "is_current", "name", "address", "closed_by").rows() == oracle(rows)


@property_test(histories(), fast=70, slow=200)
def test_intervals_have_no_overlaps_or_gaps(rows: list[dict[str, Any]]) -> None:
    filled = transform(rows)
    for user in (1, 2):
        own = filled.filter(user_id=user)
        starts, ends, how = own["valid_from"].to_list(), own["valid_to"].to_list(), own["closed_by"].to_list()
        assert all(end is None or start < end for start, end in zip(starts, ends, strict=True))
        for end, closed_by, following in zip(ends, how, starts[1:], strict=False):
            assert end == following if closed_by == "update" else end <= following
        history = [row["_op"] for row in own_rows(rows, user)]
        live = bool(history) and history[-1] != "d"
        assert own["is_current"].sum() == int(live)
        assert not live or own["is_current"].to_list()[-1]
