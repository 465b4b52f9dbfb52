"""silver.events_clean: from messages to typed events, and rejection of invalid messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.property_tests import property_test

from lakehouse.step import Parsed
from pipelines.settings import BusinessSettings
from pipelines.silver.events_clean import CHUNK, EVENTS_CLEAN, STEP, STOCK_EVENTS, parse_events

WHEN = datetime(2026, 1, 2, 10, 0, 0, 123000, tzinfo=UTC)
BRONZE = {"topic": pl.String, "value": pl.Binary, "_op": pl.String, "_source_position": pl.String}


def event(**fields: Any) -> dict[str, Any]:
    return {"event_id": "e1", "event_type": "click", "timestamp": "2026-01-02T10:00:00.123Z", **fields}


def stock(event_type: str = "stock_sold", **metadata: Any) -> dict[str, Any]:
    return event(event_type=event_type, metadata={"store_id": "S1", "product_id": "P1", "quantity": 3, **metadata})


def messages(
    values: Sequence[bytes | dict[str, Any] | None], op: Sequence[str] | None = None, positions: Sequence[int] | None = None
) -> pl.DataFrame:
    raw = [json.dumps(value).encode() if isinstance(value, dict) else value for value in values]
    numbers = list(positions) if positions is not None else list(range(len(raw)))
    return pl.DataFrame(
        {
            "topic": ["events"] * len(raw),
            "value": raw,
            "_op": list(op) if op is not None else ["c"] * len(raw),
            "_source_position": [f"events/00000/{number:019d}" for number in numbers],
        },
        schema=BRONZE,
    )


def parse(*values: bytes | dict[str, Any] | None) -> Parsed:
    parsed = parse_events(messages(values))
    assert parsed.rejected is not None
    assert parsed.parsed_positions is not None
    assert parsed.rejected.columns == ["reason", "source_position", "original"]
    parsed.rows.to_arrow().select(EVENTS_CLEAN.schema.names).cast(EVENTS_CLEAN.schema)
    assert parsed.rows.height == len(parsed.parsed_positions)
    return parsed


def row(*values: bytes | dict[str, Any] | None) -> dict[str, Any]:
    parsed = parse(*values)
    assert parsed.rejected is not None
    assert parsed.rejected.is_empty(), parsed.rejected
    return parsed.rows.row(0, named=True)


def reasons(*values: bytes | dict[str, Any] | None) -> list[str]:
    rejected = parse(*values).rejected
    assert rejected is not None
    return rejected["reason"].to_list()


def test_behaviour_event() -> None:
    found = row(
        event(
            event_type="payment_attempted",
            user_id=1,
            session_id="s-1",
            device_id="d-1",
            ip_address="203.0.113.7",
            channel="web",
            metadata={"order_ref": "9", "outcome": "declined", "card_fingerprint": "c1", "amount": 1.5},
        )
    )
    expected = {
        "event_id": "e1",
        "event_type": "payment_attempted",
        "occurred_at": WHEN,
        "user_id": 1,
        "session_id": "s-1",
        "device_id": "d-1",
        "ip_address": "203.0.113.7",
        "channel": "web",
        "order_ref": "9",
        "outcome": "declined",
        "card_fingerprint": "c1",
        "metadata": '{"amount":1.5,"card_fingerprint":"c1","order_ref":"9","outcome":"declined"}',
        "topic": "events",
    }
    assert found == dict.fromkeys(EVENTS_CLEAN.schema.names) | expected


def test_stock_events() -> None:
    found = row(stock("stock_adjusted", sign=-1, reason="theft", quantity=4))
    assert [found[name] for name in ("store_id", "product_id", "quantity", "sign", "reason")] == ["S1", "P1", 4, -1, "theft"]
    assert row(stock("stock_transferred", to_store_id="S2"))["to_store_id"] == "S2"
    assert row(stock(reserved=True))["reserved"] is True
    assert row(stock("stock_incoming", purchase_order="PO1"))["purchase_order"] == "PO1"
    assert row(stock("stock_counted", quantity=0))["quantity"] == 0
    assert row(event(event_type="account_changed", metadata={"field": "email"}))["changed_field"] == "email"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty message"),
        (b"", "empty message"),
        (b" \n", "empty message"),
        (b'{"event_id": "\xff"}', "not UTF-8"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"event_id": "a"} {}', "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (event(event_id=None), "event_id is missing"),
        (event(event_id=" "), "event_id is missing"),
        (event(event_id={"a": 1}), "event_id is missing"),
        (event(event_type=""), "event_type is missing"),
        (event(timestamp=None), "timestamp is missing"),
        (event(timestamp="yesterday"), "timestamp is not ISO 8601"),
        (event(timestamp="2026-02-30T10:00:00Z"), "timestamp is not ISO 8601"),
        (event(timestamp="2026-01-02T25:00:00Z"), "timestamp is not ISO 8601"),
        (event(timestamp="0001-01-01T00:00:00+23:00"), "timestamp is not ISO 8601"),
        (stock(store_id=None), "metadata.store_id of a stock event is missing"),
        (stock(product_id=""), "metadata.product_id of a stock event is missing"),
        (stock(quantity=0), "metadata.quantity of a stock event is not a positive whole number"),
        (stock(quantity=-1), "metadata.quantity of a stock event is not a positive whole number"),
        (stock(quantity=1.5), "metadata.quantity of a stock event is not a positive whole number"),
        (stock(quantity=None), "metadata.quantity of a stock event is not a positive whole number"),
        (stock(quantity=True), "metadata.quantity of a stock event is not a positive whole number"),
        (stock(quantity=2**31), "metadata.quantity of a stock event is not a positive whole number"),
        (stock("stock_counted", quantity=-1), "metadata.quantity of a stock event is not a positive whole number"),
        (stock("stock_transferred"), "metadata.to_store_id of a transfer is missing"),
        (stock("stock_adjusted", sign=2), "metadata.sign of an adjustment is neither 1 nor -1"),
    ],
)
def test_invalid_message_is_rejected_with_its_bytes(value: Any, reason: str) -> None:
    parsed = parse(event(), value)
    raw = json.dumps(value).encode() if isinstance(value, dict) else value
    assert parsed.rejected is not None
    assert parsed.rejected.rows() == [(reason, "events/00000/0000000000000000001", raw)]
    assert parsed.rows.height == 1


def test_rejection_contains_no_values_of_the_message() -> None:
    secret = "ann@example.com"
    odd = [event(timestamp=secret), stock(quantity=secret), {"event_id": secret}, secret.encode()]
    assert not any(secret in reason for reason in reasons(*odd))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-02T10:00:00Z", datetime(2026, 1, 2, 10, tzinfo=UTC)),
        ("2026-01-02T10:00:00", datetime(2026, 1, 2, 10, tzinfo=UTC)),
        ("2026-01-02 10:00:00.5", datetime(2026, 1, 2, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-02t10:00:00,5z", datetime(2026, 1, 2, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-02T10:00:00.1234567Z", datetime(2026, 1, 2, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-01-02T10:00:00.123456999999Z", datetime(2026, 1, 2, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-01-02T10:00:00+07:00", datetime(2026, 1, 2, 3, tzinfo=UTC)),
        ("2026-01-02T10:00:00.1-0330", datetime(2026, 1, 2, 13, 30, 0, 100_000, tzinfo=UTC)),
        ("1969-12-31T23:59:59.9999999Z", datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (" 2026-01-02T10:00Z ", datetime(2026, 1, 2, 10, tzinfo=UTC)),
    ],
)
def test_timestamps(text: str, moment: datetime) -> None:
    assert row(event(timestamp=text))["occurred_at"] == moment


@given(
    st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)),
    st.none() | st.integers(-23 * 60, 23 * 60),
    st.sampled_from([" ", "T"]),
)
@settings(max_examples=200, deadline=None)
def test_any_iso_timestamp_is_parsed_exactly(moment: datetime, offset: int | None, separator: str) -> None:
    zoned = moment if offset is None else moment.replace(tzinfo=timezone(timedelta(minutes=offset)))
    expected = zoned.replace(tzinfo=UTC) if offset is None else zoned.astimezone(UTC)
    text = zoned.isoformat(separator)
    assert row(event(timestamp=text))["occurred_at"] == expected
    if offset is None:
        assert row(event(timestamp=text + "Z"))["occurred_at"] == expected


def test_other_types_are_converted_without_loss() -> None:
    for one in (1, 1.0, "1", " 1 ", "1.0", "+1"):
        found = row({**stock("stock_adjusted", quantity=one, sign=one), "user_id": one})
        assert (found["user_id"], found["quantity"], found["sign"]) == (1, 1, 1)
    for yes in (True, "true", "TRUE", 1, "1"):
        assert row(stock(reserved=yes))["reserved"] is True
    found = row(event(event_id=7, session_id=12))
    assert (found["event_id"], found["session_id"]) == ("7", "12")


def test_values_without_a_column_are_kept() -> None:
    found = row(event(user_id="anonymous", new_field={"b": 1, "a": [None]}, metadata={"z": "é", "a": 2**70}))
    assert found["user_id"] is None
    assert (
        found["metadata"]
        == '{"_extra":{"new_field":{"a":[null],"b":1},"user_id":"anonymous"},"a":1180591620717411303424,"z":"é"}'
    )
    assert row(event(metadata=[1]))["metadata"] == '{"_extra":{"metadata":[1]}}'
    assert row(event(metadata=None))["metadata"] == "{}"
    assert row(event(x=1, metadata={"_extra": 2}))["metadata"] == '{"_extra":{"_extra":2,"x":1}}'
    assert row(event(user_id=2**64))["metadata"] == '{"_extra":{"user_id":18446744073709551616}}'
    assert row(event(event_type="drone_landed"))["event_type"] == "drone_landed"


def test_empty_input_has_empty_output() -> None:
    parsed = parse()
    assert parsed.rows.is_empty()
    assert parsed.rows.columns == EVENTS_CLEAN.schema.names


def test_invalid_messages_do_not_affect_others() -> None:
    many = messages([event(event_id=str(number)) if number % 7 else b"?" for number in range(CHUNK + 10)])
    parsed = parse_events(many)
    assert parsed.rows["event_id"].to_list() == [str(number) for number in range(CHUNK + 10) if number % 7]
    assert parsed.rejected is not None
    assert parsed.rejected.height == (CHUNK + 10 + 6) // 7


def test_correction_ends_the_rejection() -> None:
    parsed = parse_events(messages([b"?", event(), b"!", b"?!"], op=["c", "fix", "c", "fix"], positions=[1, 1, 2, 2]))
    assert parsed.parsed_positions is not None
    assert parsed.rejected is not None
    assert [position[-1] for position in parsed.parsed_positions] == ["1"]
    assert parsed.rejected.rows() == [("not JSON", "events/00000/0000000000000000002", b"?!")]


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TOP = ["event_id", "event_type", "timestamp", "user_id", "session_id", "device_id", "ip_address", "channel", "metadata", "other"]
META = ["store_id", "product_id", "quantity", "sign", "reserved", "reason", "field", "to_store_id", "_extra", "other"]
metadatas = json_values | st.dictionaries(st.sampled_from(META), json_values, max_size=4)
objects = st.fixed_dictionaries({}, optional={name: metadatas if name == "metadata" else json_values for name in TOP})


@property_test(
    st.lists(st.binary(max_size=20) | objects | objects.map(lambda fields: event() | fields) | st.none(), max_size=8),
    fast=100,
    slow=300,
)
def test_every_message_is_a_complete_row_or_a_rejection(values: list[Any]) -> None:
    together = parse(*values)
    assert together.rejected is not None
    assert together.rows.height + together.rejected.height == len(values)
    alone = [parse(value).rows for value in values]
    assert_frame_equal(together.rows, pl.concat([*alone, together.rows.head(0)]))
    for value, found in zip(values, alone, strict=True):
        if found.height and isinstance(value, dict):
            kept = json.loads(found["metadata"][0])
            extra = kept.pop("_extra", {}) if set(value) - set(TOP[:-1]) or kept.get("_extra") else kept
            for name, field in value.items():
                if name == "metadata" or field is None:
                    continue
                column = "occurred_at" if name == "timestamp" else name
                assert found.to_dicts()[0].get(column) is not None or extra[name] == field
            if isinstance(value.get("metadata"), dict):
                for name in set(value["metadata"]) - {"_extra"}:
                    assert kept[name] == value["metadata"][name]


def rows_of(values: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return parse_events(messages(values)).rows


def merged(new: pl.DataFrame, old: pl.DataFrame | None = None) -> pl.DataFrame:
    frames = {"events": new, "old": new.head(0) if old is None else old, "groups": new.select("event_id").unique()}
    return STEP.transform(frames, BusinessSettings())


def test_repeated_event_is_kept_once() -> None:
    first, second = event(timestamp="2026-01-02T10:00:00Z", channel="web"), event(timestamp="2026-01-02T09:00:00Z", channel="app")
    for order in ([first, second, first], [second, first]):
        assert merged(rows_of(order))["channel"].to_list() == ["app"]


same_id = st.builds(
    event,
    event_id=st.sampled_from(["a", "b"]),
    timestamp=st.sampled_from(["2026-01-02T10:00:00Z", "2026-01-02T11:00:00Z"]),
    channel=st.sampled_from([None, "web", "app"]),
    event_type=st.sampled_from(["click", "search"]),
    metadata=st.sampled_from([None, {"x": 1}, {"x": 2}]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(same_id, max_size=8), st.integers(0, 8), st.randoms(use_true_random=False))
def test_result_is_independent_of_order_duplication_and_split(values: list[dict[str, Any]], cut: int, random: Any) -> None:
    whole = merged(rows_of(values)).sort("event_id")
    shuffled = values + random.sample(values, random.randint(0, len(values)))
    random.shuffle(shuffled)
    stepwise = merged(rows_of(shuffled[cut:]), merged(rows_of(shuffled[:cut])))
    assert_frame_equal(whole, stepwise.sort("event_id"))
    assert whole["event_id"].is_unique().all()


def test_stock_events_of_the_source_contract_are_known() -> None:
    assert set(STOCK_EVENTS) == {
        "stock_received", "stock_incoming", "stock_reserved", "reservation_released", "stock_sold", "stock_returned",
        "stock_adjusted", "stock_transferred", "stock_counted", "safety_stock_set",
    }  # fmt: skip
