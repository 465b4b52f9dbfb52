"""Bronze rows without suppressed values: the pure part of erasure."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lakehouse.errors import SettingsError
from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import Table
from pipelines.bronze.tables import CHARGEBACKS, EVENTS, MARKETPLACE_ORDERS, ORDER_ITEMS, ORDERS, USERS, row_schema
from pipelines.parsing.contacts import normalise_address, normalise_email, normalise_name, normalise_phone
from pipelines.parsing.marketplace_documents import parse_documents
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.pseudonyms import KEY_FILE, Pseudonyms, erasure_key, is_pseudonym, normalise_value
from pipelines.privacy.suppression import Suppression
from pipelines.settings import Settings
from pipelines.silver.events_clean import parse_events

P = Pseudonyms(b"a key for tests only, of good length", "ID")
ERASED = datetime(2026, 3, 1, tzinfo=UTC)
BEFORE, AFTER = ERASED - timedelta(days=30), ERASED + timedelta(days=1)
ADA = {
    "user_id": 7, "email": "Ada.Lovelace+x@GMAIL.com", "phone_number": "0812 3456 7890", "name": "Ada Lovelace",
    "address": "Jl. Mawar 8", "city": "Bandung", "country": "ID", "loyalty_id": "L-77",
}  # fmt: skip


def suppression(**values: str) -> Suppression:
    """What is suppressed: kind=value in its one spelling; an account is the person's."""
    until = int(ERASED.timestamp() * 1_000_000)
    return Suppression(P, {P.digest(kind, value): ("e1", until) for kind, value in values.items()})


def rows(table: Table, *given: dict[str, Any], **more: pl.DataType) -> pl.DataFrame:
    schema = {**polars_schema(row_schema(table)), **more}
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in given], schema=schema)


def user(**values: Any) -> dict[str, Any]:
    return {"_op": "r", "_source_position": "1", "created_at": BEFORE, **ADA, **values}


def message(value: Any, offset: int = 1, **more: Any) -> dict[str, Any]:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {
        "topic": "events",
        "partition": 0,
        "offset": offset,
        "value": raw,
        "_op": "c",
        "_source_position": str(offset),
        **more,
    }


def event(**values: Any) -> dict[str, Any]:
    return {"event_id": "E1", "event_type": "login", "timestamp": BEFORE.isoformat(), "channel": "web", "metadata": {}, **values}


def document(**values: Any) -> dict[str, Any]:
    fields = {
        "_id": {"$oid": "65"},
        "platform": "lazada",
        "mp_order_id": "LZ-1",
        "order_time": {"$date": BEFORE.isoformat()},
        **values,
    }
    return {
        "document_id": "65", "platform": "lazada", "mp_order_id": "LZ-1", "document": json.dumps(fields), "_op": "c",
        "_source_position": "1",
    }  # fmt: skip


def once(table: Table, frame: pl.DataFrame, what: Suppression) -> pl.DataFrame:
    """Return the anonymised rows; assert that a second time changes nothing and that `changed` is right."""
    edited = Anonymiser(what)(table, frame)
    again = Anonymiser(what)(table, edited.rows)
    assert again.rows.equals(edited.rows)
    assert not again.changed.any()
    same = [frame[n : n + 1].equals(edited.rows[n : n + 1]) for n in range(frame.height)]
    assert edited.changed.to_list() == [not one for one in same]
    return edited.rows


def test_an_account_of_the_person_has_pseudonyms_of_the_same_format() -> None:
    row = once(USERS, rows(USERS, user()), suppression(account="7")).row(0, named=True)
    assert not {str(value) for value in row.values()} & {
        str(value) for name, value in ADA.items() if name not in ("user_id", "country")
    }
    assert normalise_email(row["email"]) == row["email"]
    assert normalise_phone(row["phone_number"], "ID") == row["phone_number"]
    assert normalise_address(row["address"]) == row["address"]
    assert normalise_name(row["name"]) == row["name"].lower()
    assert (row["user_id"], row["country"], row["created_at"], row["city"]) == (7, "ID", BEFORE, None)


def test_all_spellings_of_a_value_have_the_same_pseudonym() -> None:
    spelled = [user(), user(email="adalovelace@gmail.com", phone_number="+62 812-3456-7890", address="jalan mawar no. 8")]
    one, other = once(USERS, rows(USERS, *spelled), suppression(account="7")).to_dicts()
    assert [one[name] for name in ADA] == [other[name] for name in ADA]
    third = once(USERS, rows(USERS, user(email="ada@other.example")), suppression(account="7")).row(0, named=True)
    assert third["email"] != one["email"]
    # the same pseudonym in an order that is shipped to the address, so that the identity graph links it
    shipped = rows(
        ORDERS, {"order_id": 1, "user_id": 7, "shipping_address": "Jl. Mawar 8, Bandung", "_op": "r", "_source_position": "1"}
    )
    assert once(ORDERS, shipped, suppression(account="7"))["shipping_address"][0] == one["address"]


def test_rows_of_others_lose_only_suppressed_values_of_older_records() -> None:
    what = suppression(email="adalovelace@gmail.com", address="jalan mawar 8 bandung")
    housemate = user(user_id=8, name="Bo", phone_number="0811 111 1112", loyalty_id="L-8")
    stranger = user(user_id=9, email="eve@x.example", address="Jl. Mawar 88")
    new = user(user_id=10, created_at=AFTER)
    before = rows(USERS, housemate, stranger, new)
    after = once(USERS, before, what)
    assert after[1:].equals(before[1:])
    row = after.row(0, named=True)
    assert is_pseudonym("email", row["email"])
    assert is_pseudonym("address", row["address"])
    assert (row["name"], row["phone_number"], row["loyalty_id"], row["city"]) == ("Bo", "0811 111 1112", "L-8", None)


@pytest.mark.parametrize("begun", [None, datetime(1969, 7, 20, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)])
def test_a_row_without_a_creation_time_loses_only_suppressed_values(begun: datetime | None) -> None:
    housemate = user(user_id=8, created_at=begun, phone_number="0811 111 1112")
    stranger = user(user_id=9, created_at=begun, email="eve@x.example", address="Elsewhere 1", phone_number="0811 111 1113")
    before = rows(USERS, housemate, stranger)
    after = once(USERS, before, suppression(email="adalovelace@gmail.com"))
    assert after.drop("email").equals(before.drop("email"))
    assert is_pseudonym("email", after["email"][0])
    assert after["email"][1] == "eve@x.example"
    order = document(user_email="eve@x.example", order_time="whenever")
    frame = rows(MARKETPLACE_ORDERS, order)
    assert once(MARKETPLACE_ORDERS, frame, suppression(email="adalovelace@gmail.com")).equals(frame)


def test_undeclared_columns_are_emptied_in_the_persons_rows_only() -> None:
    frame = rows(
        USERS, user(nickname="Addie", born=3), user(user_id=8, nickname="Bo", born=4), nickname=pl.String(), born=pl.Int64()
    )
    after = once(USERS, frame, suppression(account="7"))
    assert after["nickname"].to_list() == [None, "Bo"]
    assert after["born"].to_list() == [None, 4]


def test_undeclared_unreadable_values_keep_only_their_column_name() -> None:
    row = user(_unreadable=json.dumps({"created_at": "infinity", "nickname": "Addie"}))
    left = once(USERS, rows(USERS, row), suppression(account="7"))["_unreadable"][0]
    assert json.loads(left) == {"created_at": "infinity", "nickname": "erased"}


def test_documents_keep_amounts_and_items_and_lose_the_rest() -> None:
    order = document(
        user_email="ada@x.example", buyer_phone="0812 3456 7890", buyer_name={"first": "Ada", "last": "L"},
        shipping_address=["Jl. Mawar 8", "Bandung"], gift_note="for Ada", amount={"$numberDecimal": "12.50"}, currency="IDR",
        items=[{"product_id": "P1", "quantity": {"$numberInt": "2"}, "price": {"$numberInt": "6"}}],
    )  # fmt: skip
    frame = rows(MARKETPLACE_ORDERS, order)
    for what in (suppression(record="order:lazada:LZ-1"), suppression(record=f"{MARKETPLACE_ORDERS.name}|65")):
        after = once(MARKETPLACE_ORDERS, frame, what)
        assert "Ada" not in after["document"][0]
        assert "Mawar" not in after["document"][0]
        assert "gift_note" not in after["document"][0]
        was, now = parse_documents(frame, "ID"), parse_documents(after, "ID")
        assert now.items.equals(was.items)
        kept = ["order_id", "total_amount", "currency", "placed_at", "platform"]
        assert now.orders.select(kept).equals(was.orders.select(kept))
        assert is_pseudonym("email", now.orders["email"][0])
        assert is_pseudonym("phone", now.orders["phone"][0])
    mail = once(MARKETPLACE_ORDERS, frame, suppression(email="ada@x.example"))["document"][0]
    assert "ada@x.example" not in mail
    assert "for Ada" in mail


def test_lines_and_chargebacks_of_the_persons_orders_lose_undeclared_columns() -> None:
    what = suppression(record=f"{ORDERS.name}|1")
    lines = rows(
        ORDER_ITEMS,
        *({"order_id": n, "line_no": 1, "product_id": "P1", "gift_message": "Dear Ada", "_op": "r"} for n in (1, 2)),
        gift_message=pl.String(),
    )
    after = once(ORDER_ITEMS, lines, what)
    assert after["gift_message"].to_list() == [None, "Dear Ada"]
    assert after.drop("gift_message").equals(lines.drop("gift_message"))
    charged = rows(
        CHARGEBACKS,
        *(
            {"chargeback_id": n, "order_ref": ref, "cardholder": "Ada L", "_op": "r"}
            for n, ref in enumerate(("1", "11", "lazada:1"))
        ),
        cardholder=pl.String(),
    )
    assert once(CHARGEBACKS, charged, what)["cardholder"].to_list() == [None, "Ada L", "Ada L"]
    of_marketplace = suppression(record="order:lazada:1")
    assert once(CHARGEBACKS, charged, of_marketplace)["cardholder"].to_list() == ["Ada L", "Ada L", None]


def test_a_shipping_event_keeps_its_device_and_loses_the_recipient() -> None:
    sent = event(event_type="order_shipped", device_id="scanner-3", metadata={"order_ref": "1", "recipient": "Ada L"})
    other = event(event_id="E2", event_type="order_shipped", metadata={"order_ref": 2, "recipient": "Bo"})
    frame = rows(EVENTS, message(sent, key=b"Ada L"), message(other, 2, key=b"Bo"))
    after = once(EVENTS, frame, suppression(record=f"{ORDERS.name}|1"))
    assert after["key"].to_list() == [None, b"Bo"]
    assert json.loads(after["value"][0]) == {**sent, "metadata": {"order_ref": "1"}}
    assert after["value"][1] == frame["value"][1]


def test_items_of_the_persons_documents_keep_product_texts_unless_they_mention_the_person() -> None:
    item = {"product_id": "P1", "product_name": "Mug", "quantity": {"$numberInt": "2"}, "variant": {"size": "M"}}
    frame = rows(MARKETPLACE_ORDERS, document(items=[{**item, "gift_message": "Dear Ada"}, "for Ada"]))
    mine = {"record": "order:lazada:LZ-1"}
    (kept, nothing) = json.loads(once(MARKETPLACE_ORDERS, frame, suppression(**mine))["document"][0])["items"]
    assert (kept, nothing) == (item, None)
    named = suppression(**mine, mention=f"{MARKETPLACE_ORDERS.name}|65")
    (kept, _) = json.loads(once(MARKETPLACE_ORDERS, frame, named)["document"][0])["items"]
    assert kept == {**item, "product_name": "erased", "variant": "erased"}


def test_a_message_key_or_header_that_mentions_the_person_is_removed() -> None:
    frame = rows(EVENTS, message(event(), key=b"ada@x.example", headers="[]"), message(event(event_id="E2"), 2, key=b"8"))
    after = once(EVENTS, frame, suppression(mention=f"{EVENTS.name}|events/0/1"))
    assert after.select("key", "headers").rows() == [(None, None), (b"8", None)]
    assert after["value"].equals(frame["value"])


def test_messages_keep_their_position_and_counted_fields() -> None:
    sent = event(
        user_id=7,
        device_id="d-1",
        ip_address="10.0.0.1",
        session_id="s",
        search="Ada L",
        metadata={"product_id": "P1", "note": "Ada"},
    )
    frame = rows(EVENTS, message(sent, key=b"7", headers="[]"), message(event(event_id="E2", user_id=8), 2, key=b"8"))
    after = once(EVENTS, frame, suppression(account="7"))
    assert after["key"].to_list() == [None, b"8"]
    was, now = parse_events(frame).rows, parse_events(after).rows
    kept = ["event_id", "event_type", "occurred_at", "user_id", "channel", "product_id"]
    assert now.select(kept).equals(was.select(kept))
    assert now["metadata"][0] == '{"product_id":"P1"}'
    assert [is_pseudonym(name, now[f"{name}_id"][0]) for name in ("device", "session")] == [True, True]


@pytest.mark.parametrize("account", [7, 7.0, "7", "+7", "007", "7.00", "7.", " 7\n", 8, "8.0", "7.5", "seven", True, None])
def test_a_message_belongs_to_the_account_that_silver_parses(account: Any) -> None:
    frame = rows(EVENTS, message(event(user_id=account, device_id="d-1")))
    mine = parse_events(frame).rows["user_id"][0] == 7
    after = once(EVENTS, frame, suppression(account="7"))
    assert is_pseudonym("device", parse_events(after).rows["device_id"][0]) == mine


def test_a_served_score_belongs_to_the_account_of_its_order() -> None:
    entity = {"order_id": "1", "account": 7, "card": "c", "device": "d", "address": "jl mawar 8", "ip": "10.0.0.1", "amount": 5}
    sent = event(
        event_type="order_scored", metadata={"order_ref": "1", "order": entity, "features": {"hour": 3}, "answer": {"score": 0.5}}
    )
    metadata = json.loads(once(EVENTS, rows(EVENTS, message(sent)), suppression(account="7"))["value"][0])["metadata"]
    assert all(is_pseudonym(name, metadata["order"][name]) for name in ("card", "device", "address", "ip"))
    assert (metadata["features"], metadata["answer"], metadata["order"]["amount"]) == ({"hour": 3}, {"score": 0.5}, 5)
    assert Anonymiser(suppression(account="7")).scored_order({**entity, "placed_at": BEFORE})["card"] == metadata["order"]["card"]


def test_an_unreadable_message_is_replaced_as_a_whole() -> None:
    what = suppression(mention=f"{EVENTS.name}|events/0/1")
    after = once(EVENTS, rows(EVENTS, message(b"{broken ada@x.example"), message(b"{broken", 2)), what)
    assert after["value"].to_list() == [b"erased", b"{broken"]


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["user_id", "device_id", "ip_address", "session_id", "metadata", "timestamp", "event_id", "user_email", "items"]
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(FIELDS, ANY, max_size=6), min_size=1, max_size=4), st.booleans())
def test_anonymising_any_json_is_idempotent(given: list[dict[str, Any]], mine: bool) -> None:
    what = suppression(account="7", device="d", **({"record": f"{EVENTS.name}|events/0/0"} if mine else {}))
    once(EVENTS, rows(EVENTS, *(message(value, offset) for offset, value in enumerate(given))), what)
    documents = [{**document(), "document": json.dumps(value)} for value in given]
    once(MARKETPLACE_ORDERS, rows(MARKETPLACE_ORDERS, *documents), suppression(record="order:lazada:LZ-1") if mine else what)


@settings(deadline=None)
@given(st.sampled_from(["email", "phone", "address", "card", "device", "ip", "loyalty", "session"]), st.text(min_size=1))
def test_a_pseudonym_is_its_own_normalised_form(kind: str, value: str) -> None:
    pseudonym = P.pseudonym(kind, value)
    assert is_pseudonym(kind, pseudonym)
    assert normalise_value(kind, pseudonym, "ID") == pseudonym
    assert P.pseudonym(kind, value) == pseudonym != Pseudonyms(b"another key", "ID").pseudonym(kind, value)


def test_a_pickled_anonymiser_contains_no_collected_values() -> None:
    seen: set[Any] = set()
    anonymiser = Anonymiser(suppression(account="7"), seen)
    anonymiser(USERS, rows(USERS, user()))
    assert {one.kind for one in seen} >= {"email", "phone", "name", "address", "city", "loyalty"}
    assert b"Lovelace" not in pickle.dumps(anonymiser)


@pytest.mark.parametrize("key", ["short", "a" * 64])
def test_a_weak_key_is_rejected_and_not_shown(key: str, tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match="too weak") as error:
        erasure_key(Settings(home=tmp_path, erasure={"key": key}))
    assert key not in str(error.value)


def test_the_key_file_is_created_once_and_private(tmp_path: Any) -> None:
    settings = Settings(home=tmp_path)
    assert erasure_key(settings) is None
    key = erasure_key(settings, create=True)
    assert key is not None
    assert erasure_key(settings, create=True) == key
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
