"""Gold tables: input rows to output rows."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakehouse.iceberg.schema import polars_schema
from lakehouse.step import Step, upstream_names
from pipelines import GOLD_STEPS
from pipelines.gold import (
    cohort_retention,
    customer_360,
    dim_date,
    dim_products,
    dim_stores,
    dim_users,
    fact_orders,
    sales_daily,
    user_risk_scores,
)
from pipelines.gold.dim_stores import NO_STORE
from pipelines.settings import BusinessSettings
from pipelines.silver import chargebacks
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS

STEPS: tuple[Step, ...] = tuple(step for step in GOLD_STEPS if INVENTORY_SNAPSHOTS.name not in upstream_names(step))
"""All steps of gold but those of the stock ledger, which test_inventory covers."""


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def money(text: str) -> Decimal:
    return Decimal(text)


def frame(step: Step, read: str, *rows: dict[str, Any]) -> pl.DataFrame:
    """Return rows of a table that a step reads, with the columns that it requests; missing values are null."""
    source = step.reads[read]
    schema = polars_schema(source.table.schema)
    columns = source.columns or tuple(schema)
    unknown = {name for row in rows for name in row} - set(schema)
    assert not unknown, f"{source.table.name} has no {unknown}"
    full = {name: [row.get(name) for row in rows] for name in columns}
    return pl.DataFrame(full, schema={name: schema[name] for name in columns})


def run(step: Step, **rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that a step computes from these rows, with the declared types, sorted by the key."""
    frames = {name: frame(step, name, *rows.get(name, [])) for name in step.reads}
    return transformed(step, frames).to_dicts()


def transformed(step: Step, frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    result = step.transform(frames, BusinessSettings())
    types = polars_schema(step.target.schema)
    assert result.columns == list(types)
    result = result.select(pl.col(name).cast(dtype) for name, dtype in types.items()).sort(step.target.key)
    assert not result.select(step.target.key).is_duplicated().any()
    for item in step.target.columns:
        assert not item.required or result[item.name].null_count() == 0, item.name
    return result


ORDER = {
    "order_id": "1",
    "channel": "web",
    "status": "paid",
    "currency": "USD",
    "total_amount": money("10"),
    "total_base": money("10"),
    "placed_at": at("2026-01-05T10:00"),
    "order_date": date(2026, 1, 5),
    "master_user_id": "M-user:1",
}
LINE = {
    "order_id": "1",
    "line_no": 1,
    "quantity": 1,
    "net_base": money("10"),
    "counts_as_sale": True,
    "order_date": date(2026, 1, 5),
    "channel": "web",
}
USER = {"user_id": 1, "valid_from": at("2025-01-01"), "is_current": True, "master_user_id": "M-user:1"}


def placed(moment: str, **other: Any) -> dict[str, Any]:
    return {"order_id": moment, **ORDER, "placed_at": at(moment), "order_date": at(moment).date(), **other}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.target.name)
def test_empty_input_has_empty_output(step: Step) -> None:
    assert run(step) == []


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.target.name)
def test_every_column_is_documented(step: Step) -> None:
    assert step.target.doc
    assert step.target.owner
    for item in step.target.columns:
        assert item.doc.endswith("."), f"{step.target.name}.{item.name}"


class TestFactOrders:
    def test_an_order_with_everything(self) -> None:
        rows = run(
            fact_orders.STEP,
            orders=[{**ORDER, "user_id": 1}],
            lines=[
                LINE,
                {**LINE, "line_no": 2, "quantity": -1, "net_base": money("-2.5")},
                {**LINE, "line_no": 3, "net_base": None},
            ],
            users=[
                USER,
                {**USER, "valid_from": at("2026-01-05T09:59")},
                {**USER, "valid_from": at("2026-01-05T10:00:00.000001")},
            ],
            chargebacks=[
                {"chargeback_id": 2, "order_ref": "1", "reason": "fraud", "reported_at": at("2026-02-02")},
                {"chargeback_id": 1, "order_ref": "1", "reason": "other", "reported_at": at("2026-02-01")},
                {"chargeback_id": 3, "order_ref": "another", "reason": "fraud", "reported_at": at("2026-01-01")},
            ],
        )
        (row,) = rows
        assert row["date_key"] == 20260105
        assert row["user_key"] == "1@2026-01-05T09:59:00.000000Z"
        assert (row["items"], row["units"], row["unconverted_lines"]) == (3, 1, 1)
        assert (row["gross_revenue"], row["returns_revenue"], row["net_revenue"]) == (money("10"), money("2.5"), money("7.5"))
        assert (row["is_chargeback"], row["chargebacks"], row["chargeback_reason"]) == (True, 2, "other")
        assert row["chargeback_reported_at"] == at("2026-02-01")

    def test_an_order_alone(self) -> None:
        (row,) = run(fact_orders.STEP, orders=[{**ORDER, "master_user_id": None, "status": "cancelled"}])
        assert (row["items"], row["units"], row["net_revenue"], row["is_chargeback"]) == (0, 0, money("0"), False)
        assert (row["is_cancelled"], row["user_key"], row["master_user_id"]) == (True, None, None)

    def test_an_order_before_the_first_known_version_has_the_first(self) -> None:
        (row,) = run(
            fact_orders.STEP,
            orders=[{**ORDER, "user_id": 1}],
            users=[{**USER, "valid_from": at("2026-03-01")}, {**USER, "valid_from": at("2026-02-01")}],
        )
        assert row["user_key"] == "1@2026-02-01T00:00:00.000000Z"

    def test_cancelled_lines_count_for_nothing(self) -> None:
        (row,) = run(fact_orders.STEP, orders=[{**ORDER, "status": "cancelled"}], lines=[{**LINE, "counts_as_sale": False}])
        assert (row["items"], row["units"], row["gross_revenue"]) == (1, 0, money("0"))

    def test_user_keys_are_those_of_the_dimension(self) -> None:
        (fact,) = run(fact_orders.STEP, orders=[{**ORDER, "user_id": 1}], users=[USER])
        (version,) = run(dim_users.STEP, users=[USER])
        assert fact["user_key"] == version["user_key"]


class TestSalesDaily:
    def test_lines_add_up_by_day_channel_store_country_and_category(self) -> None:
        shoe = {**LINE, "store_id": "S1", "country": "ID", "product_id": "P1"}
        rows = run(
            sales_daily.STEP,
            lines=[
                shoe,
                {**shoe, "line_no": 2, "quantity": 2, "net_base": money("0.0001")},
                {**shoe, "order_id": "2", "quantity": -1, "net_base": money("-3")},
                {**shoe, "order_id": "3", "counts_as_sale": False},
                {**shoe, "order_id": "4", "net_base": None},
                {**shoe, "order_date": date(2026, 1, 6)},
            ],
            products=[{"product_id": "P1", "category": "shoes"}],
        )
        assert [(row["order_date"], row["category"]) for row in rows] == [
            (date(2026, 1, 5), "shoes"),
            (date(2026, 1, 6), "shoes"),
        ]
        first = rows[0]
        assert (first["orders"], first["cancelled_orders"], first["units"], first["unconverted_lines"]) == (3, 1, 3, 1)
        assert first["gross_revenue"] == money("10.0001")
        assert (first["returns_revenue"], first["net_revenue"]) == (money("3"), money("7.0001"))

    def test_what_is_unknown_has_a_name(self) -> None:
        rows = run(
            sales_daily.STEP,
            lines=[{**LINE, "product_id": "P1"}, {**LINE, "product_id": "not in the catalogue"}, {**LINE, "product_id": None}],
            products=[{"product_id": "P1", "category": None}],
        )
        (row,) = rows
        assert (row["store_id"], row["country"], row["category"]) == ("none", "ZZ", "uncategorised")
        assert row["net_revenue"] == money("30")

    @given(
        st.lists(
            st.tuples(
                st.integers(1, 6),
                st.sampled_from([None, "S1"]),
                st.sampled_from(["P1", "P2", None]),
                st.integers(-(10**12), 10**12),
                st.booleans(),
            ),
            max_size=30,
        )
    )
    @settings(max_examples=40, deadline=None)
    def test_no_penny_is_lost(self, lines: list[tuple[int, str | None, str | None, int, bool]]) -> None:
        given_lines = [
            {
                **LINE,
                "order_id": str(order),
                "line_no": number,
                "store_id": store,
                "product_id": product,
                "net_base": Decimal(amount).scaleb(-4),
                "counts_as_sale": sale,
            }
            for number, (order, store, product, amount, sale) in enumerate(lines)
        ]
        rows = run(sales_daily.STEP, lines=given_lines, products=[{"product_id": "P1", "category": "shoes"}])
        assert sum(row["net_revenue"] for row in rows) == sum(line["net_base"] for line in given_lines if line["counts_as_sale"])
        assert all(row["gross_revenue"] - row["returns_revenue"] == row["net_revenue"] for row in rows)


class TestDimensions:
    def test_users_keep_their_versions(self) -> None:
        rows = run(
            dim_users.STEP,
            users=[
                {**USER, "valid_from": at("2026-01-01")},
                {**USER, "valid_to": at("2026-01-01"), "is_current": False, "closed_by": "update"},
            ],
        )
        assert [row["user_key"] for row in rows] == ["1@2025-01-01T00:00:00.000000Z", "1@2026-01-01T00:00:00.000000Z"]
        assert [row["closed_by"] for row in rows] == ["update", None]

    def test_a_product_without_category_has_one(self) -> None:
        rows = run(
            dim_products.STEP,
            products=[{"product_id": "P1", "list_price": money("1.50")}, {"product_id": "P2", "category": "shoes"}],
        )
        assert [row["category"] for row in rows] == ["uncategorised", "shoes"]
        assert rows[0]["list_price"] == money("1.50")

    def test_stores(self) -> None:
        row, member = run(dim_stores.STEP, stores=[{"store_id": "S1", "kind": "warehouse"}])
        assert (row["store_id"], row["kind"], row["country"]) == ("S1", "warehouse", None)
        assert (member["store_id"], member["kind"], member["city"]) == (NO_STORE, "none", None)

    def test_the_calendar_has_the_whole_year(self) -> None:
        rows = run(dim_date.STEP, orders=[{"order_date": date(2024, 12, 31)}, {"order_date": date(2024, 1, 3)}])
        assert len(rows) == 366
        assert [row["date"] for row in rows] == [date(2024, 1, 1) + timedelta(days=n) for n in range(366)]
        last = rows[-1]
        assert (last["date_key"], last["day_name"], last["month_name"], last["quarter"]) == (20241231, "Tuesday", "December", 4)
        assert (last["iso_year"], last["iso_week"], last["day_of_year"], last["is_weekend"]) == (2025, 1, 366, False)
        assert last["month_start"] == date(2024, 12, 1)

    @given(st.dates(date(1990, 1, 1), date(2090, 12, 31)))
    @settings(max_examples=30, deadline=None)
    def test_calendar_columns_agree_with_the_standard_library(self, day: date) -> None:
        (row,) = (row for row in run(dim_date.STEP, orders=[{"order_date": day}]) if row["date"] == day)
        assert (row["iso_year"], row["iso_week"], row["day_of_week"]) == tuple(day.isocalendar())
        assert (row["month_name"], row["day_name"]) == (day.strftime("%B"), day.strftime("%A"))


class TestCustomer360:
    def test_one_person_over_three_channels(self) -> None:
        graph = [
            ("user:1", "record:user:1", "self", "linked"),
            ("user:1", "email:a@x.com", "email", "linked"),
            ("user:2", "record:user:2", "self", "linked"),
            ("user:2", "email:a@x.com", "email", "linked"),
            ("user:2", "device:d1", "device", "crowded"),
            ("order:shopee:9", "record:order:shopee:9", "self", "linked"),
            ("order:shopee:9", "record:user:1", "match", "linked"),
        ]
        (row,) = run(
            customer_360.STEP,
            orders=[
                placed("2026-01-01", order_id="1", card_fingerprint="c1"),
                placed("2026-01-11", order_id="2", channel="pos", card_fingerprint="c1", country="ID"),
                placed("2026-01-31", order_id="shopee:9", channel="marketplace", platform="shopee", email="b@x.com"),
                placed("2026-02-01", order_id="3", status="cancelled"),
                placed("2026-02-02", order_id="4", status="returned", total_amount=money("-4"), total_base=money("-4")),
            ],
            lines=[
                {"order_id": "1", "net_base": money("10"), "counts_as_sale": True},
                {"order_id": "2", "net_base": money("20"), "counts_as_sale": True},
                {"order_id": "shopee:9", "net_base": None, "counts_as_sale": True},
                {"order_id": "3", "net_base": money("99"), "counts_as_sale": False},
                {"order_id": "4", "net_base": money("-4"), "counts_as_sale": True},
            ],
            users=[
                {**USER, "name": "A. Person", "email": "a@x.com", "updated_at": at("2026-01-09")},
                {
                    **USER,
                    "user_id": 2,
                    "name": "a. person",
                    "email_verified": True,
                    "city": "Bandung",
                    "loyalty_id": "L2",
                    "updated_at": at("2025-01-09"),
                },
                {**USER, "user_id": 3, "is_current": False, "name": "Closed"},
            ],
            identity=[
                {
                    "record_id": record,
                    "node": node,
                    "kind": kind,
                    "status": status,
                    "master_user_id": "M-user:1",
                    "first_seen": at("2024-06-01"),
                }
                for record, node, kind, status in graph
            ],
            chargebacks=[{"order_ref": "1", "reason": "fraud"}, {"order_ref": "2", "reason": "other"}],
        )
        assert (row["primary_user_id"], row["name"], row["email"], row["city"]) == (2, "a. person", "a@x.com", "Bandung")
        assert (row["accounts"], row["records"], row["apparent_customers"], row["names"]) == (2, 3, 3, 1)
        assert (row["emails"], row["phones"], row["devices"], row["probable_links"]) == (1, 0, 1, 1)
        assert (row["orders"], row["cancelled_orders"], row["returned_orders"]) == (3, 1, 1)
        assert (row["orders_web"], row["orders_pos"], row["orders_marketplace"], row["channels"]) == (1, 1, 1, 3)
        assert (row["favourite_channel"], row["platforms"], row["loyalty_ids"]) == ("marketplace", "shopee", "L2")
        assert (row["gross_revenue"], row["returns_revenue"], row["net_revenue"]) == (money("30"), money("4"), money("26"))
        assert (row["unconverted_lines"], row["average_order_value"]) == (1, money("8.6667"))
        assert (row["cards"], row["countries"], row["country"]) == (1, 1, "ID")
        assert (row["chargebacks"], row["fraud_chargebacks"]) == (2, 1)
        assert row["customer_since"] == at("2024-06-01")
        assert (row["first_order_at"], row["last_order_at"]) == (at("2026-01-01"), at("2026-01-31"))
        # 30 days between 3 purchases; (30 + 90) / 3 = 40 days to the next
        assert (row["average_days_between_orders"], row["expected_gap_days"]) == (15.0, 40.0)
        assert row["expected_next_order_at"] == at("2026-01-31") + timedelta(days=40)
        assert row["churn_after"] == at("2026-01-31") + timedelta(days=120)
        assert row["predicted_lifetime_value"] == (money("26") + money("26") * 365 / 120).quantize(money("0.0001"))
        assert (row["frequency_score"], row["monetary_score"]) == (2, 1)

    def test_an_account_that_never_bought(self) -> None:
        (row,) = run(customer_360.STEP, users=[{**USER, "name": "A"}])
        assert (row["accounts"], row["orders"], row["net_revenue"], row["apparent_customers"]) == (1, 0, money("0"), 1)
        for name in (
            "average_order_value",
            "favourite_channel",
            "expected_gap_days",
            "churn_after",
            "frequency_score",
            "last_order_at",
        ):
            assert row[name] is None, name

    def test_a_marketplace_buyer_without_account(self) -> None:
        (row,) = run(
            customer_360.STEP,
            orders=[
                placed("2026-01-01", channel="marketplace", platform="shopee", email="new@x.com", phone="+62811", country="ID"),
                placed("2025-01-01", order_id="0", channel="marketplace", platform="shopee", email="old@x.com", phone="+62811"),
            ],
        )
        assert (row["email"], row["phone"], row["country"], row["primary_user_id"]) == ("new@x.com", "+62811", "ID", None)
        assert row["apparent_customers"] == 2

    def test_anonymous_sales_make_no_customer(self) -> None:
        assert run(customer_360.STEP, orders=[{**ORDER, "master_user_id": None}]) == []

    @pytest.mark.parametrize(("purchases", "expected"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 4), (12, 4), (13, 5), (40, 5)])
    def test_frequency_bins(self, purchases: int, expected: int) -> None:
        (row,) = run(customer_360.STEP, orders=[{**ORDER, "order_id": str(n)} for n in range(purchases)])
        assert row["frequency_score"] == expected

    @pytest.mark.parametrize(("net", "expected"), [("-5", 1), ("99.9999", 1), ("100", 2), ("500", 3), ("1000", 4), ("5000", 5)])
    def test_monetary_bins(self, net: str, expected: int) -> None:
        (row,) = run(customer_360.STEP, orders=[ORDER], lines=[{"order_id": "1", "net_base": money(net), "counts_as_sale": True}])
        assert row["monetary_score"] == expected


class TestCohorts:
    def test_a_cohort_comes_back(self) -> None:
        rows = run(
            cohort_retention.STEP,
            orders=[
                placed("2025-12-31", order_id="1"),
                placed("2026-02-01", order_id="2"),
                placed("2025-12-01", order_id="3", master_user_id="M-user:2"),
                placed("2026-01-15", order_id="4", master_user_id="M-user:3"),
                placed("2026-01-16", order_id="5", master_user_id="M-user:3"),
                placed("2026-02-16", order_id="6", master_user_id=None),
                placed("2025-11-16", order_id="7", master_user_id="M-user:3", status="cancelled"),
                placed("2026-02-20", order_id="8", master_user_id="M-user:3", total_amount=money("-3"), total_base=money("-3")),
            ],
        )
        figures = [
            (
                row["cohort_month"],
                row["months_since"],
                row["customers"],
                row["active_customers"],
                row["orders"],
                row["order_value"],
            )
            for row in rows
        ]
        assert figures == [
            (date(2025, 12, 1), 0, 2, 2, 2, money("20")),
            (date(2025, 12, 1), 1, 2, 0, 0, money("0")),
            (date(2025, 12, 1), 2, 2, 1, 1, money("10")),
            (date(2026, 1, 1), 0, 1, 1, 2, money("20")),
            (date(2026, 1, 1), 1, 1, 0, 0, money("-3")),
        ]
        assert rows[2]["retention"] == 0.5

    def test_a_credit_note_alone_starts_no_cohort(self) -> None:
        assert run(cohort_retention.STEP, orders=[placed("2026-01-01", status="returned", total_amount=money("-1"))]) == []


class TestRisk:
    def test_a_quiet_customer(self) -> None:
        (row,) = run(user_risk_scores.STEP, orders=[ORDER])
        assert (row["risk_score"], row["risk_band"], row["reasons"], row["rule_version"]) == (0, "low", None, "1")

    def test_a_ring(self) -> None:
        orders = [
            placed(f"2026-01-05T10:{minute:02}", order_id=str(minute), card_fingerprint=f"c{minute % 5}")
            for minute in range(0, 60, 10)
        ]
        (row,) = run(
            user_risk_scores.STEP,
            orders=orders,
            card_orders=[
                *({"card_fingerprint": f"c{n}", "master_user_id": "M-user:1"} for n in range(5)),
                {"card_fingerprint": "c0", "master_user_id": "M-user:7"},
                {"card_fingerprint": "c1", "master_user_id": None},
            ],
            chargebacks=[{"order_ref": "0", "reason": "fraud"}, {"order_ref": "10", "reason": "not_received"}],
            identity=[{"node": "device:d1", "kind": "device", "status": "crowded", "master_user_id": "M-user:1"}],
        )
        assert (row["most_orders_1h"], row["most_orders_24h"]) == (6, 6)
        assert (row["cards"], row["shared_cards"], row["crowded_devices"]) == (1, 1, 1)
        assert (row["fraud_chargebacks"], row["other_chargebacks"]) == (1, 1)
        assert row["risk_score"] == 100  # 40 + 10 + 25 + 8 + 10 + 10, and no more than 100
        assert row["risk_band"] == "high"
        assert row["reasons"].startswith("1 fraud chargebacks (+40); 1 other chargebacks (+10); 6 orders within an hour (+25)")

    def test_an_hour_and_a_day_are_counted_to_the_second(self) -> None:
        (row,) = run(
            user_risk_scores.STEP,
            orders=[
                placed(moment, order_id=moment)
                for moment in ("2026-01-05T10:00", "2026-01-05T11:00", "2026-01-05T11:00:01", "2026-01-06T10:00:01")
            ],
        )
        assert (row["most_orders_1h"], row["most_orders_24h"]) == (2, 3)

    def test_tested_cards_and_guessed_passwords(self) -> None:
        def event(kind: str, minute: int, **other: Any) -> dict[str, Any]:
            moment = at("2026-01-05T10:00") + timedelta(minutes=minute)
            return {"event_id": f"{kind}{minute}", "user_id": 1, "event_type": kind, "occurred_at": moment, **other}

        (row,) = run(
            user_risk_scores.STEP,
            orders=[{**ORDER, "user_id": 1}, {**ORDER, "order_id": "2", "user_id": None}],
            events=[
                *(event("payment_attempted", minute, outcome="declined") for minute in (0, 600, 1440, 3000)),
                event("payment_attempted", 1, outcome="Approved"),
                event("payment_attempted", 2),
                event("payment_attempted", 3, outcome="declined", user_id=9),
                *(event("login_failed", minute) for minute in range(6)),
                event("login", 3),
            ],
        )
        assert (row["most_failed_payments_24h"], row["most_failed_logins_1h"]) == (3, 6)
        assert row["reasons"] == "3 failed payments within 24 hours (+8); 6 failed logins within an hour (+10)"

    def test_points_stop_at_the_cap_and_reasons_add_up(self) -> None:
        (row,) = run(
            user_risk_scores.STEP,
            orders=[placed("2026-01-05", order_id=str(n), status="cancelled", shipping_address=f"Street {n}") for n in range(40)],
        )
        points = [int(reason.split("(+")[1].rstrip(")")) for reason in row["reasons"].split("; ")]
        assert sum(points) == row["risk_score"] == 25 + 15 + 10 + 10

    @given(st.integers(-3, 1000), st.sampled_from(user_risk_scores.RULES))
    @settings(max_examples=60, deadline=None)
    def test_every_rule_is_bounded_and_grows(self, value: int, rule: user_risk_scores.Rule) -> None:
        points = pl.DataFrame({rule.signal: [value, value + 1]}).select(rule.points).to_series().to_list()
        assert 0 <= points[0] <= points[1] <= rule.cap
        assert (points[0] == 0) == (value <= rule.free)


def test_chargebacks_are_current_rows() -> None:
    step = chargebacks.STEP
    rows = run(
        step,
        chargebacks=[
            {"chargeback_id": 1, "order_ref": "1", "reason": "other", "_op": "c", "_source_position": "1"},
            {"chargeback_id": 1, "order_ref": "2", "reason": "fraud", "_op": "u", "_source_position": "2"},
            {"chargeback_id": 2, "order_ref": "3", "reason": "other", "_op": "r", "_source_position": "0"},
            {"chargeback_id": 2, "_op": "d", "_source_position": "3"},
        ],
    )
    assert [(row["chargeback_id"], row["order_ref"], row["reason"]) for row in rows] == [(1, "2", "fraud")]


@st.composite
def shops(draw: st.DrawFn) -> dict[str, list[dict[str, Any]]]:
    """Draw a few rows of every silver table, with varied values of the columns that gold depends on."""
    moments = st.datetimes(datetime(2025, 1, 1), datetime(2026, 12, 31)).map(lambda moment: moment.replace(tzinfo=UTC))
    masters = st.sampled_from([None, "M-user:1", "M-user:2"])
    maybe = lambda *values: st.sampled_from([None, *values])  # noqa: E731
    amounts = st.integers(-(10**6), 10**7).map(lambda cents: Decimal(cents).scaleb(-2))
    orders: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for number in range(draw(st.integers(0, 12))):
        moment, status = draw(moments), draw(st.sampled_from(["paid", "cancelled", "returned"]))
        orders.append(
            {
                "order_id": str(number),
                "placed_at": moment,
                "order_date": moment.date(),
                "status": status,
                "channel": draw(st.sampled_from(["web", "pos", "marketplace"])),
                "platform": draw(maybe("shopee", "amazon")),
                "user_id": draw(maybe(1, 2)),
                "master_user_id": draw(masters),
                "store_id": draw(maybe("S1")),
                "country": draw(maybe("ID")),
                "total_amount": draw(amounts),
                "total_base": draw(st.one_of(st.none(), amounts)),
                "card_fingerprint": draw(maybe("c1", "c2")),
                "email": draw(maybe("a@x.com")),
                "shipping_address": draw(maybe("Street 1", "Street 2")),
            }
        )
        lines += [
            {
                **{name: orders[-1][name] for name in ("order_id", "order_date", "channel", "store_id", "country")},
                "line_no": line,
                "quantity": draw(st.integers(-2, 5)),
                "net_base": draw(st.one_of(st.none(), amounts)),
                "counts_as_sale": status != "cancelled",
                "product_id": draw(maybe("P1", "P2", "P3")),
            }
            for line in range(draw(st.integers(0, 3)))
        ]
    users = [
        {
            "user_id": user,
            "valid_from": moment,
            "is_current": number == 0 and draw(st.booleans()),
            "master_user_id": draw(masters),
            "name": draw(maybe("A", "B")),
            "email": draw(maybe("a@x.com", "b@x.com")),
            "email_verified": draw(maybe(True, False)),
            "updated_at": draw(st.one_of(st.none(), moments)),
            "loyalty_id": draw(maybe("L1", "L2")),
        }
        for user in (1, 2)
        for number, moment in enumerate(draw(st.lists(moments, max_size=3, unique=True)))
    ]
    identity = [
        {
            "record_id": f"user:{n}",
            "node": f"{kind}:{n}",
            "kind": kind,
            "status": draw(st.sampled_from(["linked", "crowded"])),
            "master_user_id": f"M-user:{n}",
            "first_seen": draw(moments),
        }
        for n in (1, 2)
        for kind in draw(st.lists(st.sampled_from(["self", "device", "email", "match"]), unique=True))
    ]
    charged = [
        {
            "chargeback_id": n,
            "order_ref": draw(maybe("0", "1")),
            "reason": draw(maybe("fraud", "other")),
            "reported_at": draw(moments),
        }
        for n in range(draw(st.integers(0, 3)))
    ]
    kinds = st.sampled_from(["login_failed", "payment_attempted", "login"])
    events = [
        {
            "user_id": draw(maybe(1, 2)),
            "event_type": draw(kinds),
            "outcome": draw(maybe("declined")),
            "occurred_at": draw(moments),
        }
        for _ in range(draw(st.integers(0, 5)))
    ]
    products = [{"product_id": f"P{n}", "category": draw(maybe("shoes", "hats"))} for n in range(draw(st.integers(0, 2)))]
    return {
        "orders": orders,
        "lines": lines,
        "users": users,
        "identity": identity,
        "chargebacks": charged,
        "products": products,
        "card_orders": orders,
        "events": events,
        "stores": [],
    }


def frames_of(step: Step, shop: dict[str, list[dict[str, Any]]]) -> dict[str, pl.DataFrame]:
    """Return the frames that a step reads from a shop."""
    return {name: frame(step, name, *shop[name]) for name in step.reads}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.target.name)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_result_is_independent_of_row_order(step: Step, data: st.DataObject) -> None:
    shop = data.draw(shops())
    frames = frames_of(step, shop)
    shuffled = {name: rows.sample(fraction=1, shuffle=True, seed=data.draw(st.integers(0, 99))) for name, rows in frames.items()}
    assert transformed(step, frames).equals(transformed(step, shuffled))


@given(shops())
@settings(max_examples=25, deadline=None)
def test_tables_are_consistent_with_each_other(shop: dict[str, list[dict[str, Any]]]) -> None:
    facts = transformed(fact_orders.STEP, frames_of(fact_orders.STEP, shop))
    days = transformed(sales_daily.STEP, frames_of(sales_daily.STEP, shop))
    people = transformed(customer_360.STEP, frames_of(customer_360.STEP, shop))
    risks = transformed(user_risk_scores.STEP, frames_of(user_risk_scores.STEP, shop))
    known = facts.filter(pl.col("master_user_id").is_not_null())
    for name in ("gross_revenue", "returns_revenue", "net_revenue"):
        assert facts[name].sum() == days[name].sum()
        assert known[name].sum() == people[name].sum()
    assert facts["unconverted_lines"].sum() == days["unconverted_lines"].sum()
    assert facts["units"].sum() == days["units"].sum()
    assert (
        known["chargebacks"].sum()
        == people["chargebacks"].sum()
        == risks["fraud_chargebacks"].sum() + risks["other_chargebacks"].sum()
    )
    assert set(known["master_user_id"]) == set(risks["master_user_id"]) <= set(people["master_user_id"])
    cohorts = transformed(cohort_retention.STEP, frames_of(cohort_retention.STEP, shop))
    assert cohorts["orders"].sum() == people["orders"].sum()
    assert cohorts.filter(pl.col("months_since") == 0)["customers"].sum() == people.filter(pl.col("orders") > 0).height
