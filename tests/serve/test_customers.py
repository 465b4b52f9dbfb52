"""Customers over HTTP on a lakehouse filled by `run`."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from starlette.testclient import TestClient

from app.project import PROJECT
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.user_risk_scores import USER_RISK_SCORES
from pipelines.settings import Settings, business_settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD
from serve.application import Application
from serve.http.keys import Keys
from serve.settings import ServeSettings

PEOPLE = 15


@pytest.fixture(scope="module")
def settings(filled: Settings) -> Settings:
    return filled


@pytest.fixture(scope="module")
def client(settings: Settings) -> TestClient:
    """A client of an application that is not started: customers need no online state."""
    return TestClient(
        Application(settings, ServeSettings(), business_settings(settings), Keys(), project=PROJECT).asgi(),
        client=("127.0.0.1", 1),
        base_url="http://127.0.0.1",
    )


@pytest.fixture(scope="module")
def graph(settings: Settings) -> pl.DataFrame:
    return rows(settings, IDENTITY_GRAPH)


def rows(settings: Settings, table: Table) -> pl.DataFrame:
    return Lake(settings).load(table).read(table.schema.names)


@pytest.fixture(scope="module")
def merged(graph: pl.DataFrame) -> list[str]:
    """People with several records, those with most first."""
    sizes = graph.filter(kind="self").group_by("master_user_id").len().sort("len", "master_user_id", descending=True)
    return sizes.filter(pl.col("len") > 2)["master_user_id"].to_list()[:PEOPLE]


def find(client: TestClient, **query: Any) -> str:
    response = client.get("/v1/customers", params=query)
    assert response.status_code == 200, (query, response.text)
    posted = client.post("/v1/customers/search", json=query)
    assert all(posted.json()[field] == response.json()[field] for field in ("master_user_id", "profile", "links", "timeline"))
    return str(response.json()["master_user_id"])


def test_every_identifier_of_a_merged_customer_finds_them(
    client: TestClient, graph: pl.DataFrame, merged: list[str], settings: Settings
) -> None:
    assert len(merged) == PEOPLE
    orders = rows(settings, ORDERS_UNIFIED)
    names = {"email": "email", "phone": "phone", "loyalty": "loyalty_id"}
    searches = 0
    for master in merged:
        mine = graph.filter(master_user_id=master)
        shown = mine.filter(pl.col("kind").is_in(list(names)), status="linked").unique("node").sort("node")
        for kind, node in shown.select("kind", "node").head(6).iter_rows():
            assert find(client, **{names[kind]: node.partition(":")[2]}) == master
            searches += 1
        for order in orders.filter(master_user_id=master)["order_id"].sort().head(3):
            assert find(client, order_id=order) == master
        for record in mine.filter(kind="self")["record_id"].sort().head(3):
            assert client.get(f"/v1/customers/M-{record}").json()["master_user_id"] == master
    assert searches > PEOPLE


def test_identifiers_match_in_any_spelling(client: TestClient, graph: pl.DataFrame, merged: list[str]) -> None:
    linked = graph.filter(pl.col("master_user_id").is_in(merged), status="linked")
    email = linked.filter(kind="email").sort("node").row(0, named=True)
    assert (
        find(client, email=f"  <{email['node'].removeprefix('email:').upper()}> ".replace("<", "x <")) == email["master_user_id"]
    )
    phone = linked.filter(pl.col("node").str.starts_with("phone:+62")).sort("node").row(0, named=True)
    local = "0" + phone["node"].removeprefix("phone:+62")
    assert find(client, phone=f"{local[:4]}-{local[4:8]} {local[8:]}") == phone["master_user_id"]
    # a '+' that was not percent-encoded
    answer = client.get(f"/v1/customers?phone={phone['node'].removeprefix('phone:')}").json()
    assert answer["master_user_id"] == phone["master_user_id"]


def test_answer_equals_the_tables(client: TestClient, merged: list[str], settings: Settings, graph: pl.DataFrame) -> None:
    summaries, risks = rows(settings, CUSTOMER_360), rows(settings, USER_RISK_SCORES)
    orders, users = rows(settings, ORDERS_UNIFIED), rows(settings, USERS_SCD)
    for master in merged:
        answer = client.get(f"/v1/customers/{master}", params={"limit": 1000}).json()
        row = summaries.filter(master_user_id=master).row(0, named=True)
        assert answer["profile"]["email"] == row["email"]
        assert answer["rfm"]["frequency"] == row["orders"]
        assert Decimal(answer["rfm"]["monetary"]) == row["net_revenue"]
        assert answer["rfm"]["frequency_score"] == row["frequency_score"]
        assert (answer["lifetime_value"]["predicted"] is None) == (row["predicted_lifetime_value"] is None)
        assert sum(one["orders"] for one in answer["channel_mix"]) == row["orders"]
        mine = orders.filter(master_user_id=master)
        timeline = [one for one in answer["timeline"] if one["kind"] == "order"]
        assert {one["order_id"] for one in timeline} == set(mine["order_id"])
        assert {one["channel"] for one in timeline} == set(mine["channel"])
        moments = [datetime.fromisoformat(one["at"]) for one in answer["timeline"]]
        assert moments == sorted(moments, reverse=True)
        assert len(answer["history"]) == users.filter(master_user_id=master).height
        records = graph.filter(master_user_id=master, kind="self")["record_id"]
        assert {link["record_id"] for link in answer["links"]} <= set(records)
        assert all(link["reason"] for link in answer["links"])
        score = risks.filter(master_user_id=master)["risk_score"].to_list()
        assert [answer["risk"]["score"]] == (score or [None])
        assert answer["snapshots"].keys() >= {"gold.customer_360", "silver.identity_graph"}


def test_long_timeline_is_truncated(client: TestClient, merged: list[str]) -> None:
    answer = client.get(f"/v1/customers/{merged[0]}", params={"limit": 1}).json()
    assert len(answer["timeline"]) == 1
    assert answer["timeline_total"] > 1


def test_several_identifiers_must_match_one_customer(client: TestClient, graph: pl.DataFrame, merged: list[str]) -> None:
    emails = graph.filter(kind="email", status="linked").filter(pl.col("master_user_id").is_in(merged)).sort("node")
    cards = graph.filter(kind="loyalty", status="linked")
    both = emails.join(cards.select("master_user_id", card="node"), on="master_user_id").row(0, named=True)
    email, card = both["node"].removeprefix("email:"), both["card"].removeprefix("loyalty:")
    assert find(client, email=email, loyalty_id=card) == both["master_user_id"]
    other = cards.filter(pl.col("master_user_id") != both["master_user_id"])["node"].sort()[0].removeprefix("loyalty:")
    assert client.get("/v1/customers", params={"email": email, "loyalty_id": other}).status_code == 409


def test_shared_identifier_lists_the_customers(client: TestClient, graph: pl.DataFrame) -> None:
    shared = (
        graph.filter(pl.col("kind") == "email", pl.col("status") != "linked")
        .group_by("node")
        .agg(pl.col("master_user_id").n_unique())
        .filter(pl.col("master_user_id") > 1)
    )
    linked = set(graph.filter(kind="email", status="linked")["node"])
    for node in shared["node"]:
        response = client.get("/v1/customers", params={"email": node.removeprefix("email:")})
        assert response.status_code == (200 if node in linked else 409)
        if response.status_code == 409:
            assert len(response.json()["errors"]) > 1


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?email=nobody@nowhere.example", 404),
        ("?email=nothing", 404),
        ("?phone=000", 404),
        ("?order_id=0", 404),
        ("", 404),
        ("?email=a@b.example&phone=1", 404),
        ("?loyalty_id=%20", 404),
        ("/M-user:0", 404),
        ("/user:1", 404),
        ("/M-user:1?limit=x", 400),
    ],
)
def test_unknown_or_invalid_identifiers(client: TestClient, query: str, status: int) -> None:
    assert client.get(f"/v1/customers{query}").status_code == status


def test_personal_data_requires_its_own_scope(settings: Settings, merged: list[str], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = {scope: Keys.read(file).add(file, scope, (scope,)) for scope in ("inventory", "customers")}  # type: ignore[arg-type]
    application = Application(settings, ServeSettings(keys_file=file), business_settings(settings), project=PROJECT)
    client = TestClient(application.asgi())
    statuses = {
        scope: client.get(f"/v1/customers/{merged[0]}", headers={"authorization": f"Bearer {key}"}).status_code
        for scope, key in keys.items()
    }
    assert statuses == {"inventory": 403, "customers": 200}
