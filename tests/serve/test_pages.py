"""Pages: they show the answers of the API, explain problems, and follow the rules for accessible HTML."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from starlette.testclient import TestClient
from support.html_page import get_page, parse_page
from support.page_client import PAGES, search, table_rows
from support.scoring_desk import order_body, replica, running, train_model

from ml.registry import Registry
from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.settings import Settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from serve.pages import segments


@pytest.mark.parametrize("path", PAGES)
def test_navigation_marks_the_current_section(client: TestClient, path: str) -> None:
    current = [one["href"] for one in get_page(client, path).all("a") if one.get("aria-current") == "page"]
    assert current == [path.partition("?")[0]]


def test_every_identifier_finds_the_customer_page(client: TestClient, filled: Settings, merged_customer: str) -> None:
    linked = table_rows(filled, IDENTITY_GRAPH).filter(master_user_id=merged_customer, status="linked")
    identifiers = linked.filter(pl.col("kind").is_in(["email", "phone", "loyalty"])).select("kind", "node").unique()
    searches = 0
    for kind, node in identifiers.iter_rows():
        value = node.partition(":")[2]
        for text in (value, value.upper() if kind == "email" else f" {value} "):
            response = search(client, text)
            assert (response.status_code, response.headers["location"]) == (303, f"/customers/{merged_customer}"), text
            searches += 1
    assert searches > 3
    assert search(client, merged_customer).headers["location"] == f"/customers/{merged_customer}"


def test_part_of_a_name_finds_customers(client: TestClient, filled: Settings) -> None:
    people = table_rows(filled, CUSTOMER_360).filter(pl.col("name").is_not_null())
    part = people["name"][0].split()[0].lower()
    expected = people.filter(pl.col("name").str.to_lowercase().str.contains(part, literal=True))
    found = parse_page(search(client, part).text)
    links = {one["href"] for one in found.all("a") if (one["href"] or "").startswith("/customers/")}
    assert links
    assert links <= {f"/customers/{one}" for one in expected["master_user_id"]}
    assert f"{expected.height} customers match" in found.text


def test_shared_identifier_lists_customers(client: TestClient, filled: Settings) -> None:
    """Identifiers that are unverified or shared by many people do not join records."""
    shown = table_rows(filled, IDENTITY_GRAPH).filter(pl.col("kind").is_in(["email", "phone", "loyalty"]))
    linked = shown.filter(status="linked")["node"].implode()
    several = (
        shown.filter(~pl.col("node").is_in(linked))
        .group_by("node")
        .agg(pl.col("master_user_id").unique().sort())
        .filter(pl.col("master_user_id").list.len() > 1)
        .sort("node")
    )
    node, people = several.row(0)
    found = parse_page(search(client, node.partition(":")[2]).text)
    links = [one["href"] for one in found.all("a") if (one["href"] or "").startswith("/customers/")]
    assert len(links) == min(len(people), 20)
    assert {str(one).removeprefix("/customers/") for one in links} <= set(people)
    assert f"{len(people)} customers match" in found.text


@pytest.mark.parametrize("text", ["nobody@nowhere.example", "000", "Zzyzx Qwfp", "L-does-not-exist", '<b>"&', "x" * 300, "\x00"])
def test_search_without_results_gives_advice(client: TestClient, text: str) -> None:
    response = search(client, text)
    assert response.status_code == 200
    assert "No customer found" in parse_page(response.text).text
    assert "<b>" not in response.text


def test_customer_page_shows_the_figures_of_the_api(client: TestClient, merged_customer: str) -> None:
    customer = client.get(f"/v1/customers/{merged_customer}").json()
    found = get_page(client, f"/customers/{merged_customer}")
    text = " ".join(found.text.split())
    for value in (
        customer["profile"]["email"], customer["profile"]["phone"], f"{Decimal(customer['lifetime_value']['historic']):,.2f}",
        f"All {customer['timeline_total']} entries", f"{len(customer['links'])} links",
        *(one["order_id"] for one in customer["timeline"] if one["order_id"]), *(one["reason"] for one in customer["links"]),
        *(f"{one['share']:.0%}" for one in customer["channel_mix"]),
    ):  # fmt: skip
        assert value in text
    assert len([one for one in found.all("svg") if one.get("role") == "img"]) == 3
    assert len([one for one in found.all("td") if "mine" in (one.get("class") or "").split()]) == 2


def test_home_page_shows_the_cohorts_of_gold(client: TestClient, filled: Settings) -> None:
    found = segments.cohorts(table_rows(filled, COHORT_RETENTION).select(segments.RETENTION_READS))
    cells = [one.get("title") for one in get_page(client, "/").all("td") if one.get("title")]
    assert cells == [f"{active} of {cohort.customers}" for cohort in found for active, _ in cohort.retention]


def test_stock_page_shows_the_levels_of_the_api(client: TestClient) -> None:
    low = client.get("/v1/inventory/low-stock", params={"limit": 100}).json()
    shown = [(one["data-product"], one["data-store"]) for one in get_page(client, "/stock").all("tr") if one.get("data-store")]
    assert shown == [(one["product_id"], one["store_id"]) for one in low["levels"]]
    levels = client.get("/v1/inventory/P0001").json()["stores"]
    found = get_page(client, "/stock?product_id=P0001&store_id=&as_of=")
    assert [one["data-store"] for one in found.all("tr") if one.get("data-store")] == [one["store_id"] for one in levels]
    then = get_page(client, "/stock?product_id=P0001&as_of=2025-12-01T00:00")
    assert not [one for one in then.tags if "data-live" in one[1]]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/stock?product_id=NOPE", 404, "No stock of “NOPE”"),
        ("/customers/M-user:0", 404, "No customer matches"),
        ("/customers/M-user:0?limit=0", 400, "limit"),
        ("/orders/none", 404, "next run"),
        ("/nothing", 404, "This path does not exist"),
        ("/static/none.js", 404, "no such file"),
    ],
)
def test_problem_page_explains_the_problem(client: TestClient, path: str, status: int, text: str) -> None:
    assert text in get_page(client, path, status).text


def test_api_clients_get_problem_documents(client: TestClient) -> None:
    assert client.get("/nothing").headers["content-type"] == "application/problem+json"


def test_static_files_are_cached_by_content(client: TestClient) -> None:
    found = get_page(client, "/")
    paths = [one["href"] for one in found.all("link")] + [one["src"] for one in found.all("script")]
    assert len(paths) == 3
    for path in paths:
        response = client.get(str(path))
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]


def test_freshness_page_lists_every_table_and_offset(client: TestClient, filled: Settings) -> None:
    import pipelines

    text = get_page(client, "/freshness").text
    assert all(name in text for name in pipelines.TABLES)
    assert "events:0" in text


def test_freshness_page_shows_violated_expectations(filled: Settings) -> None:
    from lakehouse.engine.step_result import StepResult
    from lakehouse.expectations import ExpectationResult, ExpectationsFailed
    from lakehouse.run_history import RunHistory, RunRecord
    from pipelines.gold.sales_daily import SALES_DAILY
    from pipelines.runner import open_engine

    rule = next(str(rule) for rule in SALES_DAILY.rules if "gross_revenue >=" in str(rule))
    with open_engine(filled) as engine:
        kept = ExpectationResult(
            SALES_DAILY.name, rule, "fail", "fail", rows=10, violations=3, examples=("order_date=2026-01-01, channel=<web>",)
        )
        error = ExpectationsFailed(SALES_DAILY.name, [kept], "shopsphere_audit")
        RunHistory(engine.lake).record(RunRecord("run"), [StepResult("gold.dim_date", "changed")], [error])
    with running(replica(filled, scores_topic="")) as client:
        text = get_page(client, "/freshness").text
    assert "1 fail" in text
    assert "3 of 10 rows violate it" in text.replace("<wbr>", "")
    assert "channel=<web>" in text, "escaped, not a tag"
    assert "Tables changed" in text


def test_pages_explain_a_missing_online_state(filled: Settings) -> None:
    client = TestClient(replica(filled).asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1")
    assert "Try again" in get_page(client, "/stock", 503).text
    assert "no online state yet" in get_page(client, "/freshness").text
    assert "No champion model yet" in get_page(client, "/fraud").text
    assert get_page(client, "/")


def test_pages_warn_about_a_stale_state(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    application = replica(filled, scores_topic="")
    with running(application) as client:
        fresh = application.state.freshness
        monkeypatch.setattr(application.state, "freshness", lambda follower: replace(fresh(follower), staleness_ms=60_000))
        assert "may be out of date" in get_page(client, "/stock").text
        assert "Events arrive late" in get_page(client, "/freshness").text


@pytest.fixture
def champion(filled: Settings, tmp_path: Path) -> Registry:
    """A model that reviews about every second order: amounts are on both sides of its label's threshold of 80.

    In its own registry, since other tests need a sandbox without a model.
    """
    registry, training = Registry(home=tmp_path), train_model(filled, 1)
    training = replace(training, evaluation=replace(training.evaluation, threshold=0.5))
    registry.promote(registry.record(training).number)
    return registry


def test_review_queue_shows_unapproved_orders_with_reasons(filled: Settings, champion: Registry) -> None:
    application = replica(filled, scores_topic="")
    application.models.registry = champion
    with running(application) as client:
        until = time.monotonic() + 60
        while "version 1. Review threshold" not in get_page(client, "/fraud").text:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert "No order was scored" in get_page(client, "/fraud").text
        orders = [order_body(order_id=f"q{n}", total_amount=f"{5 + 40 * n}.00", device_id=f"d{n % 2}") for n in range(12)]
        scores = client.post("/v1/fraud/score:batch", json={"orders": orders}).json()["scores"]
        waiting = sorted((one for one in scores if one["decision"] != "approve"), key=lambda one: -one["score"])
        assert 0 < len(waiting) < len(scores)
        text = " ".join(get_page(client, "/fraud").text.split())
        shown = re.findall(r"Order (q\d+) (?:approve|review|decline) ", text)
        assert Counter(shown) == Counter(one["order_id"] for one in waiting)
        assert [next(one["score"] for one in waiting if one["order_id"] == name) for name in shown] == [
            one["score"] for one in waiting
        ]
        for one in waiting:
            assert all(reason["text"] in text for reason in one["reasons"])
