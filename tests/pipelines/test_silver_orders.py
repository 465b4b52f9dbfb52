"""Orders, order lines, products, stores and exchange rates: from bronze rows to silver rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import make_engine
from support.property_tests import property_test

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.schema import polars_schema
from lakehouse.step import Broadcast, Grouped, Lookup, Step
from lakehouse.table import Table, column
from pipelines.bronze import tables as bronze
from pipelines.bronze.current_rows import current_rows, row_versions, unreadable_rows
from pipelines.parsing.marketplace_documents import find_unreadable_documents, parse_documents
from pipelines.settings import BusinessSettings
from pipelines.silver import exchange_rates, order_items_unified, orders_unified, products, stores
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.quarantine import QUARANTINE
from pipelines.silver.users_scd import USERS_SCD
from pipelines.sources.epochs import epoch_prefix

START = datetime(2026, 1, 2, 10, 0, tzinfo=UTC)
Row = dict[str, Any]


def frame(table: Table, rows: Sequence[Row]) -> pl.DataFrame:
    """Return rows with the table's columns; missing values are null."""
    schema = polars_schema(table.schema)
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def change(at: int, op: str = "c", **values: Any) -> Row:
    """Return a PostgreSQL bronze row at position `at`."""
    stamps = {"_op": op, "_source_position": f"{at:016X}/{1:010d}", "_source_time": START + timedelta(minutes=at)}
    return {**stamps, "_ingested_at": START + timedelta(days=1, minutes=at), **values}


def order(at: int, order_id: int = 1, op: str = "c", **values: Any) -> Row:
    usual = {"source": "web", "status": "paid", "currency": "USD", "total_amount": Decimal("10.00"), "created_at": START}
    return change(at, op, order_id=order_id, **({**usual, "updated_at": START, **values} if op != "d" else values))


def line(at: int, order_id: int = 1, line_no: int = 1, op: str = "c", **values: Any) -> Row:
    usual = {"product_id": "P001", "quantity": 1, "unit_price": Decimal("10.0000")}
    return change(at, op, order_id=order_id, line_no=line_no, **({**usual, **values} if op != "d" else values))


def when(moment: datetime) -> Row:
    return {"$date": {"$numberLong": str(int(moment.timestamp() * 1000))}}


def document(at: int, document_id: str = "65a0", op: str = "c", *, without: Sequence[str] = (), **fields: Any) -> Row:
    """Return a bronze row of a marketplace document at position `at`. fields: in Extended JSON."""
    content: Row = {
        "_id": {"$oid": document_id},
        "mp_order_id": "ORD-TP-1",
        "platform": "tokopedia",
        "amount": {"$numberInt": "350000"},
        "currency": "IDR",
        "status": "paid",
        "order_time": when(START),
        "updated_at": when(START),
        **fields,
    }
    content = {key: value for key, value in content.items() if key not in without}
    row = change(at, op, document_id=document_id, _source_position=f"{at:020d}")
    if op == "d":
        return row
    copied = {key: content[key] if isinstance(content.get(key), str) else None for key in ("platform", "mp_order_id")}
    return {**row, **copied, "document": json.dumps(content, separators=(",", ":"))}


def marketplace(rows: Sequence[Row]) -> pl.DataFrame:
    return frame(bronze.MARKETPLACE_ORDERS, rows)


def order_frames(
    web: Sequence[Row] = (),
    documents: Sequence[Row] = (),
    *,
    rates: Sequence[Row] = (),
    stores: Sequence[Row] = (),
    users: Sequence[Row] = (),
    identity: Sequence[Row] = (),
) -> dict[str, pl.DataFrame]:
    return {
        "web": frame(bronze.ORDERS, web),
        "marketplace": marketplace(documents),
        "rates": frame(exchange_rates.EXCHANGE_RATES, rates),
        "stores": frame(stores_table, stores),
        "users": frame(USERS_SCD, users),
        "identity": frame(IDENTITY_GRAPH, identity),
    }


stores_table = stores.STORES
IDR = {"rate_date": date(2026, 1, 1), "currency": "IDR", "to_base": Decimal("0.00006500")}


def transformed(step: Step, frames: Mapping[str, pl.DataFrame], context: BusinessSettings | None = None) -> list[Row]:
    """Return the rows of the target, with its declared columns and types, sorted by its key."""
    rows = step.transform(frames, context or BusinessSettings())
    assert rows.columns == step.target.schema.names
    return rows.cast(polars_schema(step.target.schema)).sort(step.target.key).to_dicts()  # type: ignore[arg-type]


def unified(**frames: Any) -> list[Row]:
    return transformed(orders_unified.STEP, order_frames(**frames))


# ---- orders


def test_web_order_has_rate_country_and_person() -> None:
    (row,) = unified(
        web=[order(1, 123, user_id=7, store_id="S1", currency="eur ", status="Paid", total_amount=Decimal("10.01"))],
        rates=[
            {"rate_date": date(2026, 1, 1), "currency": "EUR", "to_base": Decimal("1.12345678")},
            {"rate_date": date(2026, 1, 3), "currency": "EUR", "to_base": Decimal("9.00000000")},
        ],
        stores=[{"store_id": "S1", "country": "SG"}],
        users=[{"user_id": 7, "valid_from": START, "country": "ID"}],
        identity=[{"record_id": "user:7", "node": node, "master_user_id": "M-user:3"} for node in ("a", "b")],
    )
    expected = {
        "order_id": "123",
        "source_order_id": "123",
        "channel": "web",
        "platform": None,
        "customer_record": "user:7",
        "master_user_id": "M-user:3",
        "status": "paid",
        "currency": "EUR",
        "total_amount": Decimal("10.0100"),
        "exchange_rate": Decimal("1.12345678"),
        "total_base": Decimal("11.2458"),
        "country": "SG",
        "placed_at": START,
        "order_date": date(2026, 1, 2),
    }
    assert {name: row[name] for name in expected} == expected


def test_country_is_of_the_store_else_the_user_else_unknown() -> None:
    users = [
        {"user_id": 7, "valid_from": START, "country": "ID", "is_current": False},
        {"user_id": 7, "valid_from": START + timedelta(days=1), "country": "MY", "is_current": False},
    ]
    rows = unified(
        web=[order(1, 1, user_id=7, store_id="S1"), order(2, 2, user_id=7, store_id="online"), order(3, 3, source="pos")],
        stores=[{"store_id": "S1", "country": "SG"}, {"store_id": "online", "country": None}],
        users=users,
    )
    assert [row["country"] for row in rows] == ["SG", "MY", None]
    assert [row["customer_record"] for row in rows] == ["user:7", "user:7", None]


def test_base_currency_needs_no_rate_and_unknown_rate_is_null() -> None:
    early = {"rate_date": date(2026, 1, 3), "currency": "EUR", "to_base": Decimal("1.1")}
    rows = unified(web=[order(1, 1), order(2, 2, currency="EUR"), order(3, 3, currency=None)], rates=[early])
    assert [(row["exchange_rate"], row["total_base"]) for row in rows] == [(Decimal(1), Decimal(10)), (None, None), (None, None)]


def test_newest_version_is_used_and_deleted_order_is_removed() -> None:
    rows = unified(web=[order(9, 1, "u", status="shipped"), order(1, 1), order(5, 1, "u", status="delivered")])
    assert [row["status"] for row in rows] == ["shipped"]
    assert unified(web=[order(2, 1, "d"), order(1, 1)]) == []
    assert [row["order_id"] for row in unified(web=[order(1, 1), order(2, 1, "d"), order(3, 1)])] == ["1"]


def test_marketplace_order() -> None:
    (row,) = unified(
        documents=[
            document(1, user_email="A@Example.com", buyer_phone="0812-3456-7890", shipping_address=" Jl. X ", amount="Rp 350.000")
        ],
        rates=[IDR],
        identity=[{"record_id": "order:tokopedia:ORD-TP-1", "node": "x", "master_user_id": "M-user:3"}],
    )
    expected = {
        "order_id": "tokopedia:ORD-TP-1",
        "source_order_id": "ORD-TP-1",
        "channel": "marketplace",
        "platform": "tokopedia",
        "user_id": None,
        "customer_record": "order:tokopedia:ORD-TP-1",
        "master_user_id": "M-user:3",
        "currency": "IDR",
        "total_amount": Decimal(350000),
        "total_base": Decimal("22.75"),
        "email": "a@example.com",
        "phone": "+6281234567890",
        "shipping_address": "Jl. X",
        "country": "ID",
        "placed_at": START,
    }
    assert {name: row[name] for name in expected} == expected


def test_document_with_required_fields_only() -> None:
    bare = document(1, without=("amount", "currency", "status", "updated_at"), platform="another")
    (row,) = unified(documents=[bare])
    assert (row["currency"], row["total_amount"], row["status"], row["country"]) == (None, None, None, None)
    assert row["updated_at"] == row["placed_at"] == START


@pytest.mark.parametrize(
    "amount",
    [
        {"$numberInt": "350000"},
        {"$numberLong": "350000"},
        {"$numberDouble": "350000.0"},
        {"$numberDecimal": "3.5E+5"},
        "350.000",
        "Rp 350.000",
        "350,000.00",
    ],
)
def test_amount_in_every_form(amount: Any) -> None:
    parsed = parse_documents(marketplace([document(1, amount=amount)]), "ID")
    assert parsed.orders["total_amount"].to_list() == [Decimal(350000)]
    assert parsed.rejected.is_empty()


def test_last_changed_document_of_an_order_is_used() -> None:
    early = document(9, "65a1", status="paid", updated_at=when(START))
    late = document(1, "65a2", status="delivered", updated_at=when(START + timedelta(hours=1)))
    assert [row["status"] for row in unified(documents=[early, late])] == ["delivered"]
    assert [row["status"] for row in unified(documents=[late, early, document(10, "65a2", "d")])] == ["paid"]
    assert unified(documents=[late, document(10, "65a2", "d")]) == []


def test_newest_position_of_a_document_is_used_whatever_its_updated_at() -> None:
    rows = [document(2, status="paid"), document(1, status="delivered", updated_at=when(START + timedelta(hours=1)))]
    assert [row["status"] for row in unified(documents=rows)] == ["paid"]


def test_document_that_becomes_another_order_leaves_the_first() -> None:
    rows = unified(documents=[document(1), document(2, op="u", mp_order_id="ORD-TP-2")])
    assert [row["order_id"] for row in rows] == ["tokopedia:ORD-TP-2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**document(1), "document": "{"}, "document is no JSON, expected an Extended JSON object"),
        ({**document(1), "document": "[]"}, "document is an array, expected an object"),
        (document(1, without=("platform",)), "platform is null or absent, expected text"),
        (document(1, mp_order_id={"$numberInt": "5"}), "mp_order_id is int, expected text"),
        (document(1, mp_order_id=""), "mp_order_id is empty, expected text"),
        (document(1, without=("order_time",)), "order_time is null or absent, expected a date"),
        (document(1, order_time="yesterday"), "order_time is text, expected a date or its ISO 8601 spelling"),
        (document(1, order_time={"$date": {"$numberLong": "9" * 18}}), "order_time is a date outside the years 1 to 9999"),
        (document(1, updated_at=True), "updated_at is boolean, expected a date"),
        (document(1, amount="free"), "amount is text and is not an amount"),
        (document(1, amount={"$numberDouble": "NaN"}), "amount is double and is not a finite number"),
        (document(1, amount=[]), "amount is an array, expected a number or its spelling"),
        (document(1, amount="$ 5", currency="IDRX"), "currency is other text, expected an ISO 4217 code of three letters"),
        (document(1, amount="€5"), "amount is text and has the mark of EUR, but the currency is IDR"),
        (document(1, items="x"), "items is text, expected an array"),
        (document(1, items=["x"]), "items[0] is text, expected an object"),
        (document(1, items=[{"quantity": "two"}]), "items[0].quantity is text, expected a whole number of 32 bits"),
        (
            document(1, items=[{}, {"quantity": {"$numberDouble": "1.5"}}]),
            "items[1].quantity is double, expected a whole number of 32 bits",
        ),
        (document(1, items=[{"price": {"currency": "IDR"}}]), "items[0].price is an object, expected a number or its spelling"),
        (document(1, items=[{"product_id": ["P1"]}]), "items[0].product_id is an array, expected text"),
        (document(1, user_email={"$oid": "65a0"}), "user_email is objectId, expected text"),
    ],
)
def test_unreadable_document_is_rejected_with_reason(row: Row, reason: str) -> None:
    parsed = find_unreadable_documents(marketplace([row, document(2, "65b0")]))
    assert parsed.rejected is not None
    assert parsed.parsed_positions is not None
    assert parsed.rejected.to_dicts() == [
        {"reason": reason, "source_position": row["_source_position"], "original": row["document"].encode()}
    ]
    assert parsed.parsed_positions.to_list() == [document(2)["_source_position"]]
    assert [found["order_id"] for found in unified(documents=[row])] == []


def test_last_readable_version_is_used() -> None:
    rows = [
        document(1),
        document(2, op="u", status="shipped"),
        document(3, op="u", amount="free"),
        document(4, op="u", document=None),
    ]
    rows[3]["document"] = None
    assert [row["status"] for row in unified(documents=rows)] == ["shipped"]
    assert unified(documents=[document(1), document(2, op="d"), document(3, amount="free")]) == []


def test_correction_replaces_the_original() -> None:
    broken = document(3, op="u", amount="free")
    fixed = {**document(3, op="fix", status="shipped"), "_ingested_at": START + timedelta(days=9)}
    again = {**document(3, op="fix", status="delivered"), "_ingested_at": START + timedelta(days=10)}
    assert [row["status"] for row in unified(documents=[fixed, document(1), broken])] == ["shipped"]
    assert [row["status"] for row in unified(documents=[again, fixed, broken])] == ["delivered"]
    parsed = find_unreadable_documents(marketplace([broken, fixed]))
    assert parsed.rejected is not None
    assert parsed.rejected.is_empty()
    assert unified(documents=[fixed, broken, document(4, op="d")]) == []
    corrected = order(1, 1, "fix", status="shipped")
    assert [row["status"] for row in unified(web=[order(1, 1), corrected])] == ["shipped"]


def test_dropped_collection_or_truncated_table_deletes_earlier_rows() -> None:
    dropped = {**change(2, "t"), "_source_position": f"{2:020d}"}
    assert unified(documents=[document(1), dropped]) == []
    assert len(unified(documents=[document(1), dropped, document(3)])) == 1
    assert [row["order_id"] for row in unified(web=[order(1, 1), change(2, "t"), order(3, 2)])] == ["2"]


def test_new_epoch_deletes_rows_it_did_not_find() -> None:
    marked = {**change(2, "t"), "_source_position": epoch_prefix(1)}

    def in_next_epoch(row: Row) -> Row:
        return {**row, "_op": "r", "_source_position": f"{epoch_prefix(1)}0{row['_source_position']}"}

    other = {"mp_order_id": "ORD-TP-2"}
    before = [document(8), document(9, "65a1", **other)]
    assert [row["source_order_id"] for row in unified(documents=[*before, marked, in_next_epoch(document(1))])] == ["ORD-TP-1"]
    assert unified(documents=[*before, marked]) == []
    # the new epoch found the document but cannot read it: its previous version is still used
    broken = in_next_epoch(document(1, amount="free"))
    assert [row["source_order_id"] for row in unified(documents=[*before, marked, broken])] == ["ORD-TP-1"]
    web = [order(8, 1), order(9, 2), marked, in_next_epoch(order(1, 2, status="shipped"))]
    assert [(row["order_id"], row["status"]) for row in unified(web=web)] == [("2", "shipped")]


def test_lookups_request_only_needed_values() -> None:
    frames = order_frames(web=[order(1, user_id=7), order(2, 2)], documents=[document(1)])
    users, identity = orders_unified.STEP.reads["users"], orders_unified.STEP.reads["identity"]
    assert isinstance(users, Lookup)
    assert isinstance(identity, Lookup)
    assert users.values(frames).to_list() == [7]
    assert sorted(identity.values(frames)) == ["order:tokopedia:ORD-TP-1", "user:7"]


def test_changed_lookups_affect_only_their_orders() -> None:
    rows = frame(
        orders_unified.ORDERS_UNIFIED,
        [
            {"order_id": "1", "store_id": "S1", "currency": "EUR", "order_date": date(2026, 1, 2), "user_id": 7},
            {"order_id": "2", "store_id": "S2", "currency": "EUR", "order_date": date(2026, 1, 4), "customer_record": "user:7"},
            {"order_id": "3", "store_id": None, "currency": "IDR", "order_date": date(2026, 1, 4)},
        ],
    )

    def affected(name: str, changed: pl.DataFrame) -> list[str]:
        read = orders_unified.STEP.reads[name]
        assert isinstance(read, Broadcast | Lookup)
        assert read.affects is not None
        expression = read.affects(changed)
        assert set(expression.meta.root_names()) <= set(rows.columns)
        return rows.filter(expression)["order_id"].to_list()

    assert affected("stores", pl.DataFrame({"store_id": ["S1"]})) == ["1"]
    assert affected("users", pl.DataFrame({"user_id": [7]})) == ["1"]
    assert affected("identity", pl.DataFrame({"record_id": ["user:7"]})) == ["2"]
    rates = pl.DataFrame({"currency": ["EUR", "EUR", "USD"], "rate_date": [date(2026, 1, 5), date(2026, 1, 3), date(2026, 1, 1)]})
    assert affected("rates", rates) == ["2"]


# ---- lines


def item_frames(lines: Sequence[Row] = (), documents: Sequence[Row] = (), orders: Sequence[Row] = ()) -> dict[str, pl.DataFrame]:
    return {
        "lines": frame(bronze.ORDER_ITEMS, lines),
        "marketplace": marketplace(documents),
        "orders": frame(orders_unified.ORDERS_UNIFIED, orders),
    }


def lines_of(**frames: Any) -> list[Row]:
    return transformed(order_items_unified.STEP, item_frames(**frames))


def test_lines_are_priced_exactly_and_rounded_once() -> None:
    eur = {
        "order_id": "1",
        "currency": "EUR",
        "exchange_rate": Decimal("1.00005"),
        "status": "paid",
        "order_date": date(2026, 1, 2),
    }
    rows = lines_of(
        lines=[line(1, quantity=-3, unit_price=Decimal("0.3333")), line(2, line_no=2, unit_price=Decimal("1.0000"))], orders=[eur]
    )
    assert [(row["line_amount"], row["net_base"]) for row in rows] == [
        (Decimal("-0.9999"), Decimal("-0.9999")),
        (Decimal("1.0000"), Decimal("1.0000")),
    ]
    assert [(row["order_date"], row["counts_as_sale"]) for row in rows] == [(date(2026, 1, 2), True)] * 2


def test_lines_of_a_cancelled_or_unknown_order_are_no_sale() -> None:
    orders = [
        {"order_id": "1", "status": "cancelled"},
        {"order_id": "2", "status": "returned"},
        {"order_id": "3", "status": None},
    ]
    rows = lines_of(lines=[line(n, n) for n in (1, 2, 3, 4)], orders=orders)
    assert [(row["order_id"], row["counts_as_sale"]) for row in rows] == [("1", False), ("2", True), ("3", True), ("4", False)]


def test_marketplace_items_with_their_variant() -> None:
    items = [
        {
            "product_id": "P001",
            "product_name": "Shoe",
            "variant": {"size": {"$numberInt": "42"}, "colour": "röd"},
            "quantity": {"$numberDouble": "2.0"},
            "price": "Rp 1.500",
        },
        {"product_id": {"$numberLong": "17"}, "quantity": "1", "price": {"$numberDecimal": "0.10"}, "variant": "x / y"},
        {"product_id": "P003"},
    ]
    rows = lines_of(documents=[document(1, items=items)])
    columns = ("order_id", "line_no", "product_id", "product_name", "quantity", "unit_price", "line_amount", "variant")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("tokopedia:ORD-TP-1", 1, "P001", "Shoe", 2, Decimal(1500), Decimal(3000), '{"colour":"röd","size":42}'),
        ("tokopedia:ORD-TP-1", 2, "17", None, 1, Decimal("0.1"), Decimal("0.1"), '"x / y"'),
        ("tokopedia:ORD-TP-1", 3, "P003", None, 1, None, None, None),
    ]


def test_document_without_items_has_one_line() -> None:
    (row,) = lines_of(documents=[document(1, product_name="Shoe")])
    assert (row["line_no"], row["product_name"], row["quantity"], row["unit_price"]) == (1, "Shoe", 1, Decimal(350000))
    assert lines_of(documents=[document(1)]) == []


def test_deleted_line_is_removed() -> None:
    assert [row["line_no"] for row in lines_of(lines=[line(1), line(2, line_no=2), line(3, op="d")])] == [2]


# ---- current rows of a bronze table


def test_unsent_columns_have_the_previous_value() -> None:
    rows = frame(
        bronze.USERS,
        [
            change(1, user_id=1, name="A", address="long"),
            change(2, "u", user_id=1, name="B", _unchanged="address"),
            change(3, "u", user_id=1, name="C", _unchanged="address"),
            change(4, "u", user_id=2, name="D", address=None),
        ],
    )
    for shuffled in (rows, rows.reverse(), pl.concat([rows, rows])):
        found = current_rows(shuffled, ("user_id",)).sort("user_id").select("name", "address").rows()
        assert found == [("C", "long"), ("D", None)]
        versions = row_versions(shuffled, ("user_id",)).filter(pl.col("user_id") == 1).select("name", "address").rows()
        assert versions == [("A", "long"), ("B", "long"), ("C", "long")]


def test_truncate_deletes_earlier_keys() -> None:
    rows = frame(bronze.STORES, [change(1, store_id="S1"), change(2, "t"), change(3, store_id="S2")])
    versions = row_versions(rows, ("store_id",))
    assert versions.select("store_id", "_op").rows() == [("S1", "c"), ("S1", "d"), ("S2", "c")]
    assert current_rows(rows, ("store_id",))["store_id"].to_list() == ["S2"]


def test_unreadable_value_is_rejected_and_the_row_is_kept() -> None:
    rows = frame(bronze.ORDER_ITEMS, [line(1, unit_price=None, _unreadable='{"unit_price":"NaN"}'), line(2, line_no=2)])
    parsed = unreadable_rows(rows)
    assert parsed.rejected is not None
    assert parsed.parsed_positions is not None
    (rejected,) = parsed.rejected.to_dicts()
    assert rejected["reason"] == "unit_price: a value that the column's type cannot hold"
    assert json.loads(rejected["original"])["unit_price"] == "NaN"
    assert parsed.parsed_positions.to_list() == [line(2)["_source_position"]]
    assert unreadable_rows(rows.tail(1)).rejected.is_empty()  # type: ignore[union-attr]


def test_products_stores_and_rates_are_current_rows() -> None:
    product: Row = {"name": "Shoe", "category": "shoes", "list_price": Decimal("9.90"), "currency": "USD"}
    rows = [change(1, product_id="P1", **product), change(2, "u", product_id="P1", **(product | {"category": "sport"}))]
    (found,) = transformed(
        products.STEP, {"products": frame(bronze.PRODUCTS, [*rows, change(1, product_id="P2"), change(3, "d", product_id="P2")])}
    )
    assert (found["product_id"], found["category"], found["list_price"]) == ("P1", "sport", Decimal("9.90"))
    rows = [change(1, store_id="S1", kind="store", country="id"), change(2, store_id="S2", country="  ")]
    assert [row["country"] for row in transformed(stores.STEP, {"stores": frame(bronze.STORES, rows)})] == ["ID", None]
    day = date(2026, 1, 1)
    rows = [
        change(1, rate_date=day, currency="eur", to_base=Decimal(1)),
        change(2, rate_date=day, currency="EUR", to_base=Decimal(2)),
    ]
    (rate,) = transformed(exchange_rates.STEP, {"rates": frame(bronze.EXCHANGE_RATES, rows)})
    assert (rate["currency"], rate["to_base"]) == ("EUR", Decimal(2))


@pytest.mark.parametrize("module", [orders_unified, order_items_unified, products, stores, exchange_rates])
def test_empty_input_has_empty_output(module: Any) -> None:
    frames = {name: frame(read.table, []) for name, read in module.STEP.reads.items()}
    assert transformed(module.STEP, frames) == []
    for read in module.STEP.reads.values():
        if isinstance(read, Grouped):
            assert all(len(keys) == len(module.STEP.target.group) for keys in read.keys)
            if read.parse is not None:
                assert read.parse(frame(read.table, [])).rejected.is_empty()  # type: ignore[union-attr]


# ---- order independence: a function of the set of rows, in one run or in many

WEB = st.builds(
    lambda at, order_id, op, status, currency: (
        order(at, order_id, op, status=status, currency=currency, user_id=order_id) if op != "d" else order(at, order_id, "d")
    ),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["c", "u", "d"]),
    st.sampled_from(["paid", "cancelled"]),
    st.sampled_from(["USD", "IDR", "EUR"]),
)
DOCUMENTS = st.builds(
    lambda at, document_id, op, number, hour, amount: document(
        at,
        document_id,
        op,
        mp_order_id=f"O{number}",
        amount=amount,
        updated_at=when(START + timedelta(hours=hour)),
        product_name="Shoe",
    ),
    st.integers(1, 9),
    st.sampled_from(["65a1", "65a2", "65a3"]),
    st.sampled_from(["c", "u", "u", "d"]),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from(["1.000", "free", {"$numberInt": "7"}]),
)
LINES = st.builds(
    lambda at, order_id, line_no, op: line(at, order_id, line_no, op),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from(["c", "u", "d"]),
)


def one_row_per_position(rows: list[Row]) -> list[Row]:
    """Return the rows with at most one change per position, as in a source."""
    return list({row["_source_position"]: row for row in rows}.values())


@settings(deadline=None)
@given(
    web=st.lists(WEB, max_size=6).map(one_row_per_position),
    documents=st.lists(DOCUMENTS, max_size=6).map(one_row_per_position),
    lines=st.lists(LINES, max_size=6).map(one_row_per_position),
    data=st.data(),
)
def test_result_is_independent_of_row_order_and_duplication(
    web: list[Row], documents: list[Row], lines: list[Row], data: st.DataObject
) -> None:
    expected = unified(web=web, documents=documents, rates=[IDR])
    items = lines_of(lines=lines, documents=documents, orders=expected)
    assert len({row["order_id"] for row in expected}) == len(expected)
    assert len({(row["order_id"], row["line_no"]) for row in items}) == len(items)

    def redelivered(rows: list[Row]) -> list[Row]:
        again = data.draw(st.lists(st.sampled_from(rows), max_size=4)) if rows else []
        return data.draw(st.permutations([*rows, *again]))

    assert unified(web=redelivered(web), documents=redelivered(documents), rates=[IDR]) == expected
    assert lines_of(lines=redelivered(lines), documents=redelivered(documents), orders=redelivered(expected)) == items


@settings(deadline=None)
@given(
    web=st.lists(WEB, max_size=6).map(one_row_per_position), documents=st.lists(DOCUMENTS, max_size=6).map(one_row_per_position)
)
def test_orders_by_group_equal_orders_at_once(web: list[Row], documents: list[Row]) -> None:
    together = unified(web=web, documents=documents, rates=[IDR])
    apart = []
    for order_id in {row["order_id"] for row in together}:
        of_order = [row for row in web if str(row["order_id"]) == order_id]
        keyed = [row for row in documents if f"{row.get('platform')}:{row.get('mp_order_id')}" == order_id]
        resolved = [row for row in documents if row["document_id"] in {found["document_id"] for found in keyed}]
        found = unified(web=of_order, documents=resolved, rates=[IDR])
        apart += [row for row in found if row["order_id"] == order_id]
    assert sorted(apart, key=lambda row: row["order_id"]) == together


LINKS = Table(
    "bronze.links",
    "Who is whom, for these tests",
    (
        column("record_id", pa.string(), "record"),
        column("master_user_id", pa.string(), "person"),
        column("country", pa.string(), "country of a user"),
        column("_op", pa.string(), "operation"),
        column("_source_position", pa.string(), "position"),
    ),
)


def transform_identity(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    now = current_rows(frames["links"], ("record_id",))
    return (
        frame(IDENTITY_GRAPH, [])
        .clear()
        .pipe(
            lambda empty: pl.concat(
                [
                    empty,
                    now.select(
                        "record_id",
                        pl.lit("self").alias("node"),
                        pl.lit("self").alias("kind"),
                        pl.lit(1, pl.Int32).alias("trust"),
                        pl.lit("").alias("reason"),
                        pl.lit("linked").alias("status"),
                        "master_user_id",
                        pl.lit(START).alias("first_seen"),
                    ),
                ],
                how="diagonal_relaxed",
            )
        )
    )


def transform_users(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    now = current_rows(frames["links"], ("record_id",)).filter(pl.col("record_id").str.starts_with("user:"))
    user_id = pl.col("record_id").str.strip_prefix("user:").cast(pl.Int64)
    rows = now.select(user_id.alias("user_id"), pl.lit(START).alias("valid_from"), pl.lit(True).alias("is_current"), "country")
    return pl.concat([frame(USERS_SCD, []), rows], how="diagonal_relaxed")


USER_ID = pl.when(pl.col("record_id").str.starts_with("user:")).then(pl.col("record_id").str.strip_prefix("user:")).cast(pl.Int64)
STEPS = (
    stores.STEP,
    exchange_rates.STEP,
    Step(IDENTITY_GRAPH, {"links": Grouped(LINKS, ((pl.col("record_id"),),))}, transform_identity),
    Step(USERS_SCD, {"links": Grouped(LINKS, ((USER_ID,),))}, transform_users),
    orders_unified.STEP,
    order_items_unified.STEP,
)


def position(at: int) -> Row:
    return {"_source_position": f"{at:016X}/{1:010d}"}


STORE_ROWS = st.builds(
    lambda store, country, op: change(1, op, store_id=store, country=country),
    st.sampled_from(["S1", "S2"]),
    st.sampled_from(["ID", "SG", None]),
    st.sampled_from("ccd"),
)
RATE_ROWS = st.builds(
    lambda day, currency, cents, op: change(
        1, op, rate_date=date(2026, 1, day), currency=currency, to_base=Decimal(cents).scaleb(-2) if op != "d" else None
    ),
    st.integers(1, 5),
    st.sampled_from(["IDR", "EUR"]),
    st.integers(1, 9),
    st.sampled_from("cccd"),
)
LINK_ROWS = st.builds(
    lambda record, master, country, op: change(1, op, record_id=record, master_user_id=f"M-{master}", country=country),
    st.sampled_from(["user:1", "user:2", "order:tokopedia:O1"]),
    st.integers(1, 2),
    st.sampled_from(["ID", "MY"]),
    st.sampled_from("cccd"),
)
PLACED = st.builds(
    lambda row, day, store: row if row["_op"] == "d" else {**row, "created_at": START + timedelta(days=day), "store_id": store},
    WEB,
    st.integers(0, 4),
    st.sampled_from(["S1", "S2", None]),
)
HISTORIES = st.lists(
    st.tuples(st.just(bronze.ORDERS), PLACED)
    | st.tuples(st.just(bronze.MARKETPLACE_ORDERS), DOCUMENTS)
    | st.tuples(st.just(bronze.ORDER_ITEMS), LINES)
    | st.tuples(st.just(bronze.STORES), STORE_ROWS)
    | st.tuples(st.just(bronze.EXCHANGE_RATES), RATE_ROWS)
    | st.tuples(st.just(LINKS), LINK_ROWS),
    min_size=1,
    max_size=16,
)


@property_test(HISTORIES, st.data(), fast=3, slow=8, suppress_health_check=list(HealthCheck))
def test_any_order_duplication_and_split_equals_one_run(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[Table, Row]], data: st.DataObject
) -> None:
    rows = [(table, {**row, **position(at)}) for at, (table, row) in enumerate(history)]

    def engine() -> Engine:
        return make_engine(tmp_path_factory.mktemp("lake"))

    def run(lake: Engine, part: Sequence[tuple[Table, Row]], **options: Any) -> list[str]:
        for table in {table.name: table for table, _ in part}.values():
            handle = lake.lake.load(table)
            written = frame(table, [row for of, row in part if of is table]).with_columns(
                pl.lit(handle.next_sequence, pl.Int64).alias("_seq")
            )
            handle.commit(handle.writer.write(written), positions={})
        return [lake.refresh(step, **options).status for step in STEPS]

    def digests(lake: Engine) -> dict[str, str]:
        return {table.name: digest(lake.lake.load(table)) for table in (*(step.target for step in STEPS), QUARANTINE)}

    whole, split = engine(), engine()
    run(whole, rows)
    expected = digests(whole)
    shuffled = data.draw(st.permutations(rows + data.draw(st.lists(st.sampled_from(rows), max_size=3))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shuffled)), max_size=3)))
    for start, end in zip([0, *cuts], [*cuts, len(shuffled)], strict=True):
        run(split, shuffled[start:end])
    assert digests(split) == expected
    assert run(split, []) == ["unchanged"] * len(STEPS)
    run(split, [], rebuild=True)
    assert digests(split) == expected
