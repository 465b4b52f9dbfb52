"""Entity resolution: from source rows to links and people; merges and splits; any order equals a rebuild."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.identity_world import GraphInMemory, document, masters, shop, sorted_rows, truncated, user, web_order

from app.demo.identity_scores import pairwise_scores
from pipelines.settings import BusinessSettings
from pipelines.sources.epochs import epoch_prefix


def people(*rows):
    return masters(GraphInMemory().run(rows).graph)


def links(memory: GraphInMemory, record: str) -> dict[str, tuple[str, str]]:
    """Return status and reason of a record's links, by node."""
    own = memory.graph.filter(pl.col("record_id") == record)
    return {node: (status, reason) for node, status, reason in own.select("node", "status", "reason").iter_rows()}


def assert_equals_rebuild(memory: GraphInMemory) -> None:
    assert sorted_rows(memory.graph) == sorted_rows(memory.rebuilt())


def test_records_have_own_rows_and_the_oldest_names_the_person():
    memory = GraphInMemory().run(
        [
            user(7, at=5, name="Budi Santoso", email="budi@x.com", email_verified=True),
            document("A", at=2, buyer_name="Budi Santoso", user_email=" BUDI@x.com"),
        ]
    )
    assert masters(memory.graph) == {"user:7": "M-order:tokopedia:A", "order:tokopedia:A": "M-order:tokopedia:A"}
    assert links(memory, "user:7")["record:user:7"] == ("linked", "The record itself")
    row = memory.graph.filter(pl.col("record_id") == "user:7", pl.col("kind") == "email").row(0, named=True)
    assert (row["node"], row["trust"], row["reason"]) == ("email:budi@x.com", 2, "Verified email budi@x.com")


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ({"loyalty_id": "L1", "name": "Budi"}, {"loyalty_id": "L1", "name": "Ani Wijaya"}, True),
        ({"email": "a@x.com", "email_verified": True, "name": "Budi Santoso"}, {"email": "a@x.com", "name": "B. Santoso"}, True),
        ({"email": "a@x.com", "email_verified": True, "name": "Budi Santoso"}, {"email": "a@x.com", "name": "Ani Wijaya"}, False),
        (
            {"email": "a@x.com", "email_verified": True, "name": "Budi"},
            {"email": "a@x.com", "email_verified": True, "name": "Ani"},
            True,
        ),
        (
            {"phone_number": "0812-3456-7890", "name": "Budi Santoso"},
            {"phone_number": "+62 812 34567890", "name": "Budi Santso"},
            True,
        ),
        (
            {"phone_number": "0812-3456-7890", "name": "Budi Santoso"},
            {"phone_number": "+62 812 34567890", "name": "Siti Santoso"},
            False,
        ),
        ({"phone_number": "0812-3456-7890", "name": "Budi Santoso"}, {"phone_number": "+62 812 34567890"}, True),
        ({"name": "Budi Santoso", "address": "Jl. Merdeka No. 5"}, {"name": "Santoso, Budi", "address": "Jalan Merdeka 5"}, True),
        ({"name": "Budi Santoso", "address": "Jl. Merdeka No. 5"}, {"name": "Budi Santoso", "address": "Jl. Sudirman 7"}, False),
        ({"name": "Budi Santoso", "address": "Jl. Merdeka No. 5"}, {"name": "Budi Santso", "address": "Jl. Merdeka 5"}, True),
        ({"name": "Budi Santoso", "address": "Jl. Merdeka No. 5"}, {"name": "Siti Santoso", "address": "Jl. Merdeka 5"}, False),
        ({"name": "Budi Santoso", "address": "Jl. Merdeka No. 125"}, {"name": "Budi Santoso", "address": "Jl. Merdka 125"}, True),
    ],
)
def test_accounts_of_one_person(one, other, together):
    found = people(user(1, **one), user(2, at=1, **other))
    assert (found["user:1"] == found["user:2"]) is together


def test_shared_phone_joins_records_of_the_same_name():
    memory = GraphInMemory().run(
        [
            user(1, phone_number="081234567890", name="Budi Santoso"),
            user(2, phone_number="081234567890", name="Siti Santoso"),
            document("A", at=1, buyer_phone="+62 812-3456-7890", buyer_name="BUDI SANTOSO"),
            document("B", at=2, buyer_phone="0812 3456 7890", buyer_name="S. Santoso"),
        ]
    )
    found = masters(memory.graph)
    assert found["order:tokopedia:A"] == "M-user:1"
    assert found["order:tokopedia:B"] == "M-user:2"
    shown = links(memory, "order:tokopedia:B")
    assert shown["phone:+6281234567890"][0] == "weak"
    assert shown["phone:+6281234567890|siti santoso"] == (
        "linked",
        "Phone of the marketplace order +6281234567890, under the name 'siti santoso'",
    )


def test_device_joins_only_records_of_the_same_name():
    rows = [web_order(1, 1, device_id="d1"), web_order(2, 2, device_id="d1"), web_order(3, 3, device_id="d1")]
    memory = GraphInMemory().run([user(1, name="Budi Santoso"), user(2, name="Budi Santoso"), user(3, name="Ani Wijaya"), *rows])
    found = masters(memory.graph)
    assert found["user:1"] == found["user:2"] != found["user:3"]
    status, reason = links(memory, "user:2")["record:user:1"]
    assert status == "linked"
    assert reason.startswith("Probable match, weight ")
    assert reason.endswith("same name, same device")


def test_many_people_are_a_crowd_but_many_orders_are_not():
    own = [
        document(f"A{n}", at=n, user_email="budi@x.com", buyer_name=name)
        for n, name in enumerate(["Budi Santoso", "BUDI SANTOSO", "Budi Santso"] * 10)
    ]
    assert len(set(people(*own).values())) == 1
    names = [
        "Ani Wijaya",
        "Budi Santoso",
        "Citra Lubis",
        "Dedi Kusuma",
        "Eka Halim",
        "Fajar Utami",
        "Gita Hakim",
        "Hadi Nugroho",
        "Indah Siregar",
    ]
    crowd = [document(f"B{n}", at=n, user_email="noreply@x.com", buyer_name=name) for n, name in enumerate(names * 2)]
    memory = GraphInMemory().run(crowd)
    assert len(set(masters(memory.graph).values())) == len(crowd)
    assert links(memory, "order:tokopedia:B0")["email:noreply@x.com"] == (
        "crowded",
        "Email of the marketplace order noreply@x.com; shared by too many people to tell anything",
    )


def test_address_that_becomes_crowded_splits_and_that_ceases_to_be_merges():
    context = BusinessSettings(address_crowd=2)
    at_home = {"address": "Menara Satu 1"}
    memory = GraphInMemory(context).run(
        [user(1, name="Budi Santoso", **at_home), user(2, name="Budi Santoso", **at_home), user(3, name="Ani Wijaya", **at_home)]
    )
    assert masters(memory.graph)["user:2"] == "M-user:1"
    memory.run([user(4, name="Citra Lubis", **at_home)])
    assert masters(memory.graph)["user:2"] == "M-user:2"
    assert_equals_rebuild(memory)
    memory.run([user(4, at=9, op="d")])
    assert masters(memory.graph) == {"user:1": "M-user:1", "user:2": "M-user:1", "user:3": "M-user:3"}
    assert_equals_rebuild(memory)


def test_people_of_an_address_no_longer_crowded_are_compared_again():
    tower = {"address": "Menara Satu 12345"}
    memory = GraphInMemory(BusinessSettings(address_crowd=2)).run(
        [
            user(1, name="Budi Santoso", **tower),
            user(2, name="Budi Santoso", address="Menara Sattu 12345"),
            user(3, name="Ani Wijaya", **tower),
            user(4, name="Citra Lubis", **tower),
        ]
    )
    assert masters(memory.graph)["user:2"] == "M-user:2"
    memory.run([user(4, at=5, op="d")])
    assert masters(memory.graph)["user:2"] == "M-user:1"
    assert_equals_rebuild(memory)
    memory.run([user(4, at=6, op="c", name="Citra Lubis", **tower)])
    assert masters(memory.graph)["user:2"] == "M-user:2"
    assert_equals_rebuild(memory)


def test_deleted_record_is_removed_and_its_person_splits():
    joining = user(2, at=1, email="a@x.com", phone_number="081234567890", name="Budi Santoso")
    memory = GraphInMemory().run(
        [
            user(1, email="a@x.com", name="Budi Santoso"),
            joining,
            document("A", at=3, buyer_phone="081234567890", buyer_name="Budi Santoso"),
        ]
    )
    assert set(masters(memory.graph).values()) == {"M-user:1"}
    memory.run([user(2, at=5, op="d")])
    assert masters(memory.graph) == {"user:1": "M-user:1", "order:tokopedia:A": "M-order:tokopedia:A"}
    assert_equals_rebuild(memory)
    memory.run([user(2, at=6, op="c", email="a@x.com", phone_number="081234567890", name="Budi Santoso")])
    assert set(masters(memory.graph).values()) == {"M-user:1"}
    memory.run([document("A", at=9, op="d")])
    assert set(masters(memory.graph)) == {"user:1", "user:2"}
    assert_equals_rebuild(memory)


def test_changed_contact_moves_a_marketplace_order():
    memory = GraphInMemory().run(
        [
            user(1, email="a@x.com", name="Budi Santoso"),
            user(2, email="b@x.com", name="Budi Hartono"),
            document("A", at=1, user_email="a@x.com"),
        ]
    )
    assert masters(memory.graph)["order:tokopedia:A"] == "M-user:1"
    memory.run([document("A", at=2, op="u", user_email="b@x.com")])
    assert masters(memory.graph)["order:tokopedia:A"] == "M-user:2"
    assert_equals_rebuild(memory)


def test_former_email_of_an_account_links():
    memory = GraphInMemory().run(
        [
            user(1, email="old@x.com", email_verified=True, name="Budi Santoso"),
            user(1, at=5, op="u", email="new@x.com", email_verified=True, name="Budi Santoso"),
            document("A", at=1, user_email="old@x.com", buyer_name="Budi Santoso"),
        ]
    )
    assert masters(memory.graph)["order:tokopedia:A"] == "M-user:1"
    assert links(memory, "user:1")["email:old@x.com"][1] == "Verified email old@x.com, since replaced"


def test_probabilistic_match_does_not_join_different_verified_contacts():
    memory = GraphInMemory().run(
        [
            user(
                1,
                email="budi@x.com",
                email_verified=True,
                phone_number="081234567890",
                phone_verified=True,
                name="Budi Santoso",
                address="Jl. Merdeka 125",
            ),
            user(
                2,
                email="budi@y.com",
                email_verified=True,
                phone_number="081234567899",
                phone_verified=True,
                name="Budy Santoso",
                address="Jl. Merdeka 125",
            ),
            web_order(1, 1, device_id="d1"),
            web_order(2, 2, device_id="d1"),
        ]
    )
    assert masters(memory.graph)["user:2"] == "M-user:2"
    status, reason = links(memory, "user:2")["record:user:1"]
    assert status == "weak"
    assert reason.endswith("stopped by different verified contacts and names")


def test_truncated_accounts_are_removed_and_their_ids_can_be_reused():
    budi = {"email": "budi@x.com", "email_verified": True, "name": "Budi Santoso"}
    memory = GraphInMemory().run([user(1, **budi), user(2, at=1, **budi), document("A", at=2, user_email="budi@x.com")])
    assert set(masters(memory.graph).values()) == {"M-user:1"}
    memory.run([truncated("users", 3)])
    assert masters(memory.graph) == {"order:tokopedia:A": "M-order:tokopedia:A"}
    memory.run([user(1, at=4, op="c", email="ani@x.com", name="Ani Wijaya"), user(2, at=2, op="u", **budi)])
    assert masters(memory.graph) == {"order:tokopedia:A": "M-order:tokopedia:A", "user:1": "M-user:1"}
    assert "email:budi@x.com" not in links(memory, "user:1")
    assert_equals_rebuild(memory)


def test_new_epoch_keeps_evidence_and_removes_missing_accounts():
    def in_next_epoch(at, item):
        name, row = item
        return name, row | {"_op": "r", "_source_position": f"{epoch_prefix(1)}{at:016X}-000000.0000000000"}

    marker = truncated("users", 5)[0], {**truncated("users", 5)[1], "_source_position": epoch_prefix(1)}
    old = {"email": "old@x.com", "email_verified": True, "name": "Budi Santoso"}
    new = {**old, "email": "new@x.com"}
    rows = [user(1, **old), user(1, at=2, op="u", **new), user(2, at=3, name="Ani"), document("A", at=4, user_email="old@x.com")]
    memory = GraphInMemory().run(rows)
    before = sorted_rows(memory.graph.filter(pl.col("record_id") != "user:2"))
    assert masters(memory.graph)["order:tokopedia:A"] == "M-user:1"
    memory.run([marker, in_next_epoch(1, user(1, at=2, op="u", **new))])
    assert sorted_rows(memory.graph) == before
    assert_equals_rebuild(memory)


def test_truncated_orders_are_no_evidence():
    memory = GraphInMemory().run(
        [
            user(1, name="Budi Santoso"),
            user(2, name="Budi Santoso"),
            web_order(1, 1, at=1, device_id="d1"),
            web_order(2, 2, at=2, device_id="d1"),
        ]
    )
    assert masters(memory.graph)["user:2"] == "M-user:1"
    memory.run([truncated("orders", 3)])
    assert masters(memory.graph)["user:2"] == "M-user:2"
    assert set(links(memory, "user:1")) == {"record:user:1"}
    memory.run([web_order(3, 2, at=4, device_id="d2"), web_order(4, 1, at=2, device_id="d2")])
    assert "device:d2" in links(memory, "user:2")
    assert set(links(memory, "user:1")) == {"record:user:1"}
    assert_equals_rebuild(memory)


def test_dropped_collection_removes_its_orders():
    memory = GraphInMemory().run([user(1, at=1, email="a@x.com", name="Budi Santoso"), document("A", at=0, user_email="a@x.com")])
    assert masters(memory.graph)["user:1"] == "M-order:tokopedia:A"
    memory.run([truncated("marketplace", 2)])
    assert masters(memory.graph) == {"user:1": "M-user:1"}
    memory.run([document("A", at=1, op="u", user_email="a@x.com"), document("B", at=3, user_email="a@x.com")])
    assert masters(memory.graph) == {"user:1": "M-user:1", "order:tokopedia:B": "M-user:1"}
    assert_equals_rebuild(memory)


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": None, "op": "d"},
        {"user_id": 1, "op": "d"},
        {"user_id": None, "op": "u", "device_id": "d1"},
        {"user_id": 3, "op": "u", "device_id": "d1"},
        {"user_id": 1, "op": "u", "device_id": "d9"},
    ],
    ids=["deleted by key alone", "deleted by whole row", "without an account", "of another account", "other device"],
)
def test_order_contributes_its_newest_version(change):
    memory = GraphInMemory().run(
        [
            user(1, name="Budi Santoso"),
            user(2, name="Budi Santoso"),
            user(3, name="Ani Wijaya"),
            web_order(1, 1, at=1, device_id="d1", shipping_address="Jl. Merdeka 505"),
            web_order(2, 2, at=2, device_id="d1"),
        ]
    )
    assert masters(memory.graph)["user:2"] == "M-user:1"
    memory.run([web_order(1, at=3, **change)])
    assert masters(memory.graph)["user:2"] == "M-user:2"
    assert not {"device:d1", "address:budi santoso|jalan merdeka 505"} & set(links(memory, "user:1"))
    assert ("device:d1" in links(memory, "user:3")) == (change["user_id"] == 3)
    assert_equals_rebuild(memory)


def test_unsent_columns_of_an_order_keep_their_values():
    memory = GraphInMemory().run(
        [user(1, name="Budi Santoso"), web_order(1, 1, at=1, device_id="d1", shipping_address="Jl. Merdeka 505")]
    )
    memory.run([web_order(1, 1, at=2, op="u", device_id="d2", _unchanged="shipping_address")])
    assert set(links(memory, "user:1")) >= {"device:d2", "address:budi santoso|jalan merdeka 505"}
    assert "device:d1" not in links(memory, "user:1")
    assert_equals_rebuild(memory)


def test_record_without_new_evidence_recomputes_nothing():
    memory = GraphInMemory().run(
        [user(1, name="Budi Santoso", email="a@x.com"), web_order(1, 1, device_id="d1"), user(2, name="Ani Wijaya")]
    )
    memory.run([web_order(2, 1, at=4, device_id="d1"), user(1, at=5, op="u", name="Budi Santoso", email="A@X.com ")])
    assert memory.recomputed == 0
    assert_equals_rebuild(memory)


def test_new_order_at_a_crowded_device_does_not_recompute_the_crowd():
    names = [
        f"{first} {last}"
        for first in ("Ani", "Budi", "Citra", "Dedi", "Eka")
        for last in ("Wijaya", "Santoso", "Lubis", "Kusuma")
    ]
    accounts = [user(n, name=name, email=f"u{n}@x.com") for n, name in enumerate(names)]
    memory = GraphInMemory().run([*accounts, *(web_order(n, n, device_id="kiosk") for n in range(len(names)))])
    memory.run([user(99, name="Fajar Utami"), web_order(99, 99, device_id="kiosk")])
    assert memory.recomputed <= 2
    assert_equals_rebuild(memory)


NAMES = [
    "Budi Santoso",
    "B Santoso",
    "Budi Santso",
    "Siti Santoso",
    "Siti Rahayu",
    "Andi Wijaya",
    "Andy Wijaya",
    "Bambang Santoso",
    "Budi",
    None,
    "S. Rahayu",
]
EMAILS = ["a@x.com", "b@x.com", "c@x.com", "budi99@x.com", "budi99@y.com", None, None]
PHONES = ["0812-3456-7890", "+62 812 3456 7891", "0812 9999 1234", None, None]
ADDRESSES = ["Jl. Merdeka No. 505", "Jalan Merdeka 505", "Jl Merdka 505", "Jl. Merdeka 506", "Jl. Sudirman 7", None]
DEVICES = ["d1", "d2", "d3", None]


@st.composite
def histories(draw):
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    rows = []
    for at in range(draw(st.integers(2, 14))):
        kind = pick(["user", "user", "web", "web", "document", "document", "document", "truncated"])
        if kind == "truncated":
            rows.append(truncated(pick(["users", "orders", "orders", "marketplace"]), at))
        elif kind == "user":
            op, number = pick("ccuud"), pick([1, 2, 3, 4, 5])
            values = (
                {}
                if op == "d"
                else {
                    "email": pick(EMAILS),
                    "email_verified": pick([True, False]),
                    "phone_number": pick(PHONES),
                    "phone_verified": pick([True, False]),
                    "name": pick(NAMES),
                    "address": pick(ADDRESSES),
                    "loyalty_id": pick([None, None, None, "L1"]),
                }
            )
            rows.append(user(number, at=at, op=op, **values))
        elif kind == "web":
            op, order, account = pick("cccud"), pick([1, 2, 3]), pick([1, 2, 3, 4, 5, None])
            if op == "d":
                rows.append(web_order(order, pick([account, None]), at=at, op=op))
            else:
                unsent = pick([None, None, "shipping_address"]) if op == "u" else None
                address = None if unsent else pick(ADDRESSES)
                shown = {"device_id": pick(DEVICES), "shipping_address": address, "_unchanged": unsent}
                rows.append(web_order(order, account, at=at, op=op, **shown))
        else:
            ident = pick(["D1", "D2", "D3", "D4", "D5", "D6"])
            order = pick([ident, ident, ident, "D1", "D2"])
            rows.append(
                document(
                    order,
                    at=at,
                    op=pick("cccud"),
                    document_id=ident,
                    user_email=pick(EMAILS),
                    buyer_phone=pick(PHONES),
                    buyer_name=pick(NAMES),
                    shipping_address=pick(ADDRESSES),
                    device_id=pick(DEVICES),
                )
            )
    return rows


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories(), st.data())
def test_any_order_duplication_and_split_equals_a_rebuild(history, data):
    arrival = data.draw(st.permutations(history + data.draw(st.lists(st.sampled_from(history), max_size=3))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arrival)), max_size=3)))
    context = BusinessSettings(address_crowd=2, identifier_crowd=2)
    memory = GraphInMemory(context)
    for start, end in zip([0, *cuts], [*cuts, len(arrival)], strict=True):
        memory.run(arrival[start:end])
    whole = GraphInMemory(context).run(history).graph
    assert sorted_rows(memory.graph) == sorted_rows(whole)
    joined = whole.filter(pl.col("status") == "linked").group_by("node").agg(pl.col("master_user_id").n_unique().alias("n"))
    assert joined["n"].max() in (None, 1)


def test_persons_of_a_generated_shop_are_resolved():
    rows, truth = shop(people=250, seed=3)
    memory = GraphInMemory().run(rows)
    scores = pairwise_scores(masters(memory.graph), truth)
    assert scores.f1 >= 0.97, scores
    assert scores.precision >= 0.99, scores
