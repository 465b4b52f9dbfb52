"""The page: what its parts make of data, what it tells and to whom, and how it behaves in a browser."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.scoring_desk import made, replica, running, trained

from lakehouse.iceberg.catalog import Lake
from lakehouse.status import TableStatus
from lakehouse.table import Table
from ml.registry import Registry
from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.privacy.suppression import ERASURES
from pipelines.settings import Settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from serve.api.customers import AccountVersion, Channel, Entry, Link
from serve.http.access_log import AccessLog
from serve.http.authentication import COOKIE
from serve.http.keys import SCOPES, Keys
from serve.pages import charts, segments
from serve.pages.assets import DIRECTORY
from serve.pages.customer_pages import account_changes, identifier_kinds
from serve.pages.formatting import insert_line_breaks
from serve.pages.local_path import local_path
from serve.pages.renderer import HEADERS
from serve.pages.table_condition import condition

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TABS = ("/", "/stock", "/stock?product_id=P0001", "/fraud", "/freshness")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


# charts

LINKS = st.builds(
    Link,
    record_id=st.sampled_from(["user:1", "user:2", *(f"order:{shop}:{n}" for shop in ("ebay", "amazon") for n in range(5))]),
    kind=st.just("email"),
    node=st.sampled_from(["email:a@b.example", "phone:+1", "device:<x>&y", "match:user:9"]),
    reason=st.text(max_size=10),
    status=st.sampled_from(["linked", "weak", "crowded"]),
    trust=st.integers(1, 6),
    weight=st.none(),
    first_seen=st.just(T0),
)
ENTRIES = st.builds(
    Entry,
    at=st.datetimes(datetime(1990, 1, 1), datetime(2060, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC)),
    kind=st.sampled_from(["order", "chargeback", "account_opened", "account_changed", "account_closed"]),
    channel=st.sampled_from(["web", "pos", "marketplace", None, "<new>"]),
    order_id=st.sampled_from(["1", "<2>", None]),
)


def drawn(markup: str) -> ET.Element:
    """The picture, which must be well-formed and have a name."""
    picture = ET.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", markup))
    assert picture.attrib["role"] == "img"
    assert picture.attrib["aria-label"]
    return picture


@given(st.lists(LINKS, min_size=1, max_size=30))
def test_every_record_is_a_node_of_the_graph_and_every_link_a_line(links: list[Link]) -> None:
    every = charts.group_records(links)
    assert sorted(record for group in every for record in group.records) == sorted({link.record_id for link in links})
    of = {record: group for group in every for record in group.records}
    for link in links:
        assert (link.node, link.status) in {(one.node, one.status) for one in of[link.record_id].links}
    picture = drawn(charts.identity_graph(every))
    lines = [path.attrib["class"] for path in picture.findall("path")]
    assert len(lines) == sum(len(group.links) for group in every)
    assert lines.count("link on") == sum(link.status == "linked" for group in every for link in group.links)
    assert sum(len(group.links) for group in charts.drawable(every)[1:]) <= charts.MAX_LINES


@given(st.lists(ENTRIES, min_size=1, max_size=20))
def test_every_entry_is_a_mark_of_the_timeline(entries: list[Entry]) -> None:
    picture = drawn(charts.timeline(entries))
    marks = [one for one in picture.iter() if one.find("title") is not None]
    assert len(marks) == len(entries)
    assert 2 <= len([one for one in picture.findall("line") if one.attrib["class"] == "tick"]) <= 9


@given(st.lists(st.integers(1, 99), min_size=1, max_size=3))
def test_the_channel_mix_fills_the_bar(counts: list[int]) -> None:
    total = sum(counts)
    mix = [Channel(name, count, count / total) for name, count in zip(("web", "pos", "marketplace"), counts, strict=False)]
    bars = drawn(charts.channel_mix(mix)).findall("rect")
    assert float(bars[-1].attrib["x"]) + float(bars[-1].attrib["width"]) == pytest.approx(718, abs=1.1)


@given(st.integers(0, 500), st.integers(1, 500))
def test_a_shade_is_none_for_nothing_and_strongest_for_most(count: int, most: int) -> None:
    shade = charts.shade(min(count, most), most)
    assert (shade == 0) == (min(count, most) == 0)
    assert charts.shade(most, most) == 6
    assert shade <= charts.shade(min(count + 1, most), most)


# segments


@given(st.lists(st.tuples(st.integers(-5, 900), st.integers(1, 5), st.integers(1, 5)), max_size=40), st.integers(0, 5))
def test_every_customer_is_in_one_cell_of_each_grid(people: list[tuple[int, int, int]], without: int) -> None:
    now = T0 + timedelta(days=1)
    frame = pl.DataFrame(
        {
            "last_order_at": [now - timedelta(days=days) for days, _, _ in people] + [None] * without,
            "frequency_score": [f for _, f, _ in people] + [None] * without,
            "monetary_score": [m for _, _, m in people] + [None] * without,
        },
        schema={"last_order_at": pl.Datetime("us", "UTC"), "frequency_score": pl.Int32, "monetary_score": pl.Int32},
    )
    grid = segments.rfm(frame, now)
    assert grid.recency == Counter((segments.recency_band(max(days, 0)), f) for days, f, _ in people)
    assert grid.monetary == Counter((m, f) for _, f, m in people)
    assert (grid.customers, grid.without) == (len(people), without)


def test_bands_have_names_without_gaps() -> None:
    assert segments.FREQUENCY_NAMES == ("1", "2–3", "4–6", "7–12", "13+")
    assert segments.RECENCY_NAMES == ("0–30", "31–90", "91–180", "181–365", "366+")
    assert segments.MONETARY_NAMES == ("under 100", "100–499", "500–999", "1,000–4,999", "5,000+")


# small parts


def version(user: int, day: int, **about: Any) -> AccountVersion:
    empty = dict.fromkeys(AccountVersion.__struct_fields__)
    return AccountVersion(**(empty | {"user_id": user, "valid_from": T0 + timedelta(days=day), "is_current": False} | about))


def test_a_change_is_told_against_the_same_accounts_version_before() -> None:
    history = [version(1, 3, email="b", city="x"), version(2, 2, email="c"), version(1, 1, email="a", city="x")]
    assert [(one.version.user_id, one.changed) for one in account_changes(history)] == [(1, {"email"}), (2, set()), (1, set())]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("M-user:7", "master_user_id"), ("a@b.example", "email"), ("+62 812", "phone"), ("0812-99", "phone"),
        ("184467", "order_id"),        ("ebay:ORD-EB-7", "loyalty_id"), ("L-1042", "loyalty_id"), ("Siti", "name"),
    ],
)  # fmt: skip
def test_what_a_text_is_looked_up_as(text: str, first: str) -> None:
    assert identifier_kinds(text)[0] == first


@given(st.one_of(st.text(), st.from_regex(r"[/\\]{1,3}[a-z.:/\\@?]*", fullmatch=True)))
def test_signing_in_never_leads_away(text: str) -> None:
    path = local_path(text)
    assert path.startswith("/")
    assert not path.startswith(("//", "/\\"))
    assert "\\" not in path
    assert local_path("/" + "a" * 4_000 + "!") == "/"


@given(st.text())
def test_a_breakable_name_stays_text(text: str) -> None:
    parser = Page()
    parser.feed(str(insert_line_breaks(text)))
    assert {tag for tag, _ in parser.tags} <= {"wbr"}


def colours() -> dict[str, dict[str, str]]:
    style = (DIRECTORY / "static" / "page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    found = {mode: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for mode, part in (("light", light), ("dark", dark))}
    assert found["light"].keys() == found["dark"].keys()
    return found


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_are_readable(mode: str) -> None:
    of = colours()[mode]
    text = [
        *((ink, ground) for ink in ("ink", "muted", "accent") for ground in ("ground", "card")),
        ("on-accent", "accent"), ("on-changed", "changed"), ("on-zero", "h0"),
        *((f"{name}", f"{name}-ground") for name in ("good", "medium", "high")),
        *(("on-light", f"h{n}") for n in (1, 2, 3)), *(("on-dark", f"h{n}") for n in (4, 5, 6)),
    ]  # fmt: skip
    assert {pair: round(ratio, 2) for pair in text if (ratio := contrast(of[pair[0]], of[pair[1]])) < 4.5} == {}
    marks = [(name, "card") for name in ("web", "pos", "marketplace", "account", "cross", "focus")]
    assert {pair: round(ratio, 2) for pair in marks if (ratio := contrast(of[pair[0]], of[pair[1]])) < 3} == {}


def test_no_file_of_the_page_asks_anybody_else() -> None:
    files = [file for file in DIRECTORY.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+", file.read_text()))
        assert addresses <= {"http://www.w3.org"}, file  # the name of SVG, never asked for


# what it tells


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(client: TestClient, path: str, status: int = 200) -> Page:
    response = client.get(path, headers={"accept": "text/html"})
    assert response.status_code == status, (path, response.text)
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    return read(response.text)


def read(text: str) -> Page:
    """A page that must keep to the rules: nothing inline, names for everything, ids once."""
    parser = Page()
    parser.feed(text)
    for tag, attributes in parser.tags:
        assert tag != "style"
        assert not any(name == "style" or name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "script" or attributes.get("src")
        assert tag != "img" or "alt" in attributes
    ids = [one["id"] for _, one in parser.tags if "id" in one]
    assert len(ids) == len(set(ids)), ids
    named = {one.get("for") for one in parser.all("label")}
    assert all(one.get("type") == "hidden" or one["id"] in named for tag in ("input", "select") for one in parser.all(tag))
    for _, one in parser.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert one.get(reference) is None or one[reference] in ids
    assert len(parser.all("main")) == len(parser.all("h1")) == 1
    assert parser.all("html") == [{"lang": "en"}]
    return parser


def rows(settings: Settings, table: Table) -> pl.DataFrame:
    return Lake(settings).load(table).read(table.schema.names)


@pytest.fixture(scope="module")
def client(filled: Settings) -> Iterator[TestClient]:
    with running(replica(filled, scores_topic="")) as client:
        yield client


@pytest.fixture(scope="module")
def merged(filled: Settings) -> str:
    """The person of most accounts and orders who bought in every channel."""
    people = rows(filled, CUSTOMER_360).sort("channels", "accounts", "records", "master_user_id", descending=True)
    return str(people["master_user_id"][0])


@pytest.mark.parametrize("path", TABS)
def test_every_tab_answers(client: TestClient, path: str) -> None:
    current = [one["href"] for one in page(client, path).all("a") if one.get("aria-current") == "page"]
    assert current == [path.partition("?")[0]]


def search(client: TestClient, text: str) -> Any:
    return client.post("/customers", data={"q": text}, follow_redirects=False)


def test_whatever_a_person_shows_finds_their_page(client: TestClient, filled: Settings, merged: str) -> None:
    linked = rows(filled, IDENTITY_GRAPH).filter(master_user_id=merged, status="linked")
    shown = linked.filter(pl.col("kind").is_in(["email", "phone", "loyalty"])).select("kind", "node").unique()
    asked = 0
    for kind, node in shown.iter_rows():
        value = node.partition(":")[2]
        for text in (value, value.upper() if kind == "email" else f" {value} "):
            response = search(client, text)
            assert (response.status_code, response.headers["location"]) == (303, f"/customers/{merged}"), text
            asked += 1
    assert asked > 3
    assert search(client, merged).headers["location"] == f"/customers/{merged}"


def test_a_part_of_a_name_finds_people(client: TestClient, filled: Settings) -> None:
    people = rows(filled, CUSTOMER_360).filter(pl.col("name").is_not_null())
    part = people["name"][0].split()[0].lower()
    expected = people.filter(pl.col("name").str.to_lowercase().str.contains(part, literal=True))
    found = read(search(client, part).text)
    links = {one["href"] for one in found.all("a") if (one["href"] or "").startswith("/customers/")}
    assert links
    assert links <= {f"/customers/{one}" for one in expected["master_user_id"]}
    assert f"{expected.height} customers match" in found.text


def test_an_identifier_of_several_people_lists_them(client: TestClient, filled: Settings) -> None:
    """What crowds show, or nobody has verified, joins nobody."""
    shown = rows(filled, IDENTITY_GRAPH).filter(pl.col("kind").is_in(["email", "phone", "loyalty"]))
    linked = shown.filter(status="linked")["node"].implode()
    several = (
        shown.filter(~pl.col("node").is_in(linked))
        .group_by("node")
        .agg(pl.col("master_user_id").unique().sort())
        .filter(pl.col("master_user_id").list.len() > 1)
        .sort("node")
    )
    node, people = several.row(0)
    found = read(search(client, node.partition(":")[2]).text)
    links = [one["href"] for one in found.all("a") if (one["href"] or "").startswith("/customers/")]
    assert len(links) == min(len(people), 20)
    assert {str(one).removeprefix("/customers/") for one in links} <= set(people)
    assert f"{len(people)} customers match" in found.text


@pytest.mark.parametrize("text", ["nobody@nowhere.example", "000", "Zzyzx Qwfp", "L-does-not-exist", '<b>"&', "x" * 300, "\x00"])
def test_a_search_without_a_hit_helps(client: TestClient, text: str) -> None:
    response = search(client, text)
    assert response.status_code == 200
    assert "No customer found" in read(response.text).text
    assert "<b>" not in response.text


def test_the_figures_are_those_of_the_api(client: TestClient, merged: str) -> None:
    told = client.get(f"/v1/customers/{merged}").json()
    found = page(client, f"/customers/{merged}")
    text = " ".join(found.text.split())
    for value in (
        told["profile"]["email"], told["profile"]["phone"], f"{Decimal(told['lifetime_value']['historic']):,.2f}",
        f"All {told['timeline_total']} entries", f"{len(told['links'])} links",
        *(one["order_id"] for one in told["timeline"] if one["order_id"]), *(one["reason"] for one in told["links"]),
        *(f"{one['share']:.0%}" for one in told["channel_mix"]),
    ):  # fmt: skip
        assert value in text
    assert len([one for one in found.all("svg") if one.get("role") == "img"]) == 3
    assert len([one for one in found.all("td") if "mine" in (one.get("class") or "").split()]) == 2


def test_the_cohorts_are_those_of_gold(client: TestClient, filled: Settings) -> None:
    found = segments.cohorts(rows(filled, COHORT_RETENTION).select(segments.RETENTION_READS))
    cells = [one.get("title") for one in page(client, "/").all("td") if one.get("title")]
    assert cells == [f"{active} of {cohort.customers}" for cohort in found for active, _ in cohort.retention]


def test_stock_is_that_of_the_api(client: TestClient) -> None:
    low = client.get("/v1/inventory/low-stock", params={"limit": 100}).json()
    shown = [(one["data-product"], one["data-store"]) for one in page(client, "/stock").all("tr") if one.get("data-store")]
    assert shown == [(one["product_id"], one["store_id"]) for one in low["levels"]]
    levels = client.get("/v1/inventory/P0001").json()["stores"]
    found = page(client, "/stock?product_id=P0001&store_id=&as_of=")
    assert [one["data-store"] for one in found.all("tr") if one.get("data-store")] == [one["store_id"] for one in levels]
    then = page(client, "/stock?product_id=P0001&as_of=2025-12-01T00:00")
    assert not [one for one in then.tags if "data-live" in one[1]]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/stock?product_id=NOPE", 404, "No stock of “NOPE”"),
        ("/customers/M-user:0", 404, "No customer matches"),
        ("/customers/M-user:0?limit=0", 400, "limit"),
        ("/orders/none", 404, "next run"),
        ("/nothing", 404, "This path does not exist"),
        ("/static/none.js", 404, "no such file"),
    ],
)
def test_what_is_not_there_is_said_in_words(client: TestClient, path: str, status: int, says: str) -> None:
    assert says in page(client, path, status).text


def test_a_program_gets_problems_as_before(client: TestClient) -> None:
    assert client.get("/nothing").headers["content-type"] == "application/problem+json"


def test_files_are_kept_by_the_browser_under_the_name_of_their_content(client: TestClient) -> None:
    found = page(client, "/")
    paths = [one["href"] for one in found.all("link")] + [one["src"] for one in found.all("script")]
    assert len(paths) == 3
    for path in paths:
        response = client.get(str(path))
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]


def test_freshness_names_every_table_and_says_what_is_late(client: TestClient, filled: Settings) -> None:
    import pipelines

    text = page(client, "/freshness").text
    assert all(name in text for name in pipelines.TABLES)
    assert "events:0" in text


def test_freshness_tells_what_is_expected_and_does_not_hold(filled: Settings) -> None:
    from lakehouse.engine.engine import StepResult
    from lakehouse.expectations import ExpectationsFailed, Result
    from lakehouse.run_history import RunHistory, RunRecord
    from pipelines.gold.sales_daily import SALES_DAILY
    from pipelines.runner import open_engine

    rule = next(str(rule) for rule in SALES_DAILY.rules if "gross_revenue >=" in str(rule))
    with open_engine(filled) as engine:
        kept = Result(SALES_DAILY.name, rule, "fail", "fail", 10, 3, ("order_date=2026-01-01, channel=<web>",))
        error = ExpectationsFailed(SALES_DAILY.name, [kept], "audit")
        RunHistory(engine.lake).note(engine, RunRecord("run"), [StepResult("gold.dim_date", "changed")], [error])
    with running(replica(filled, scores_topic="")) as client:
        text = page(client, "/freshness").text
    assert "1 fail" in text
    assert "3 of 10 rows break it" in text.replace("<wbr>", "")
    assert "channel=<web>" in text, "text, not a tag"
    assert "Tables changed" in text


@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_that_no_run_fills_is_not_behind(rows: int) -> None:
    told = TableStatus(ERASURES.name, rows, 1 if rows else None, None, "", T0 if rows else None, 1, 100)
    assert condition(told).good
    assert condition(told).text


def test_without_a_state_it_says_so(filled: Settings) -> None:
    client = TestClient(replica(filled).asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1")
    assert "Try again" in page(client, "/stock", 503).text
    assert "no online state yet" in page(client, "/freshness").text
    assert "No champion model yet" in page(client, "/fraud").text
    assert page(client, "/")


def test_an_old_state_says_so(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    application = replica(filled, scores_topic="")
    with running(application) as client:
        fresh = application.state.freshness
        monkeypatch.setattr(application.state, "freshness", lambda follower: replace(fresh(follower), staleness_ms=60_000))
        assert "may be out of date" in page(client, "/stock").text
        assert "Events arrive late" in page(client, "/freshness").text


@pytest.fixture
def champion(filled: Settings, tmp_path: Path) -> Registry:
    """A model that reviews about every second order: the shop's own amounts are on both sides of its label's 80.

    In a registry of its own: other tests want the shop without a model.
    """
    registry, training = Registry(home=tmp_path), trained(filled, 1)
    training = replace(training, evaluation=replace(training.evaluation, threshold=0.5))
    registry.promote(registry.record(training).number)
    return registry


def test_the_queue_shows_who_waits_with_reasons_and_no_one_else(filled: Settings, champion: Registry) -> None:
    application = replica(filled, scores_topic="")
    application.models.registry = champion
    with running(application) as client:
        until = time.monotonic() + 60
        while "version 1. Review threshold" not in page(client, "/fraud").text:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert "No order was scored" in page(client, "/fraud").text
        orders = [made(order_id=f"q{n}", total_amount=f"{5 + 40 * n}.00", device_id=f"d{n % 2}") for n in range(12)]
        scores = client.post("/v1/fraud/score:batch", json={"orders": orders}).json()["scores"]
        waiting = sorted((one for one in scores if one["decision"] != "approve"), key=lambda one: -one["score"])
        assert 0 < len(waiting) < len(scores)
        text = " ".join(page(client, "/fraud").text.split())
        shown = re.findall(r"Order (q\d+) (?:approve|review|decline) ", text)
        assert Counter(shown) == Counter(one["order_id"] for one in waiting)
        assert [next(one["score"] for one in waiting if one["order_id"] == name) for name in shown] == [
            one["score"] for one in waiting
        ]
        for one in waiting:
            assert all(reason["text"] in text for reason in one["reasons"])


# to whom it tells it


@pytest.fixture
def keyed(filled: Settings, tmp_path: Path) -> tuple[TestClient, dict[str, str]]:
    file = tmp_path / "keys.json"
    scopes = {"stock": ("inventory",), "people": ("customers",), "checkout": ("score",), "all": SCOPES}
    keys = {name: Keys.read(file).add(file, name, of) for name, of in scopes.items()}  # type: ignore[arg-type]
    return TestClient(replica(filled, keys_file=file).asgi(), follow_redirects=False), keys


def signed_in(client: TestClient, key: str, to: str = "/freshness") -> Any:
    client.cookies.clear()
    return client.post("/sign-in", data={"key": key, "next": to})


def test_each_key_opens_its_tabs_only(keyed: tuple[TestClient, dict[str, str]], merged: str) -> None:
    client, keys = keyed
    paths = ("/", f"/customers/{merged}", "/fraud", "/freshness")

    def opens() -> list[int]:
        return [client.get(path).status_code for path in paths] + [search(client, "nobody@nowhere.example").status_code]

    assert opens() == [401] * 5
    expected = {"stock": [403, 403, 403, 200, 403], "people": [200, 200, 403, 200, 200], "checkout": [403, 403, 200, 200, 403]}
    for name, statuses in expected.items():
        assert signed_in(client, keys[name]).headers["location"] == "/freshness"
        assert opens() == statuses, name
    assert "requires a key with the scope" in client.get("/fraud").text
    signed_in(client, keys["stock"])
    assert "no scope 'customers'" in read(client.get("/").text).text
    # there is no state: what is let in gets no further than that
    assert client.get("/stock").status_code == client.get("/v1/inventory/stream").status_code == 503


def test_the_cookie_opens_nothing_but_the_page(keyed: tuple[TestClient, dict[str, str]], merged: str) -> None:
    client, keys = keyed
    cookie = signed_in(client, keys["all"]).headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in cookie.split(";")}
    assert client.get(f"/v1/customers/{merged}").status_code == 401
    assert client.post("/v1/fraud/score", json=made()).status_code == 401
    assert client.get("/v1/inventory/P0001").status_code == 401
    signed_out = client.post("/sign-out")
    assert signed_out.headers["location"] == "/"
    assert client.get("/").status_code == 401


def test_signing_in_goes_wrong_in_words(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = keyed
    wrong = signed_in(client, "sk_none")
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert "not valid" in read(wrong.text).text
    assert "sk_none" not in wrong.text
    assert client.post("/sign-in", data={"key": keys["all"]}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/sign-in", json={"key": keys["all"]}).status_code == 415
    assert client.post("/sign-in", data={"key": "x" * 5000}).status_code == 413
    assert signed_in(client, keys["all"], "https://elsewhere.example/").headers["location"] == "/"
    assert COOKIE in client.cookies


def test_the_access_log_names_nobody(filled: Settings, merged: str, tmp_path: Path) -> None:
    application = replica(filled)
    application.log = AccessLog(tmp_path / "access.jsonl")
    client = TestClient(application.asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1")
    assert client.get(f"/customers/{merged}").status_code == 200
    assert search(client, "siti.hidayat@nowhere.example").status_code == 200
    application.log.flush()
    written = (tmp_path / "access.jsonl").read_text()
    assert [json.loads(line)["route"] for line in written.splitlines()] == ["/customers/{master_user_id}", "/customers"]
    assert merged not in written
    assert "siti" not in written


# in a browser


@dataclass
class Tab:
    """A headless Chromium, and where the shop is served for it."""

    driver: Any
    address: str

    def open(self, path: str, width: int = 1280, dark: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.address + path)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + 20
        while not (found := holds()):
            assert time.monotonic() < end, f"{what}: {self.driver.current_url}"
            time.sleep(0.05)
        return found

    @property
    def complaints(self) -> list[str]:
        return [one["message"] for one in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def tab(filled: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed (apt-get install chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with served(filled) as address:
        driver = Chrome(options, ChromeService(DRIVER))
        try:
            yield Tab(driver, address)
        finally:
            driver.quit()


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The application on a port of its own."""
    import uvicorn

    application = replica(settings, scores_topic="")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application.asgi(), port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert application.state.ready.wait(60)
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_nothing_is_cut_off_and_nothing_complains(tab: Tab, merged: str, width: int, dark: bool) -> None:
    for path in (*TABS, f"/customers/{merged}"):
        tab.open(path, width, dark)
        assert tab.run("return document.documentElement.scrollWidth") <= width, path
        # a page of a closed stream says so on the console; nothing else may be said
        assert tab.complaints == [], path
        ground = tab.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
        small = tab.run(
            "return [...document.querySelectorAll('button, input:not([type=hidden]), select, header a')]"
            ".filter(one => one.offsetParent && one.getBoundingClientRect().height < 24).map(one => one.outerHTML)"
        )
        assert small == [], path
        asked = tab.run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert asked
        assert all(name.startswith(tab.address) for name in asked)


@pytest.mark.browser
def test_with_the_keyboard_alone_an_email_finds_the_merged_person(tab: Tab, client: TestClient, merged: str) -> None:
    from selenium.webdriver.common.keys import Keys as Press

    email = client.get(f"/v1/customers/{merged}").json()["profile"]["email"]
    tab.open("/")

    def focused() -> Any:
        return tab.run("const one = document.activeElement; return one.id || one.textContent.trim()")

    tab.press(Press.TAB)
    assert focused() == "Skip to content"
    assert tab.run("return document.activeElement.getBoundingClientRect().left") >= 0
    tab.press(Press.ENTER)
    assert tab.until(lambda: focused() == "main", "the content has the focus")
    tab.press(Press.TAB)
    assert focused() == "q"
    assert tab.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press(email.upper(), Press.ENTER)
    tab.until(lambda: tab.driver.current_url.endswith(f"/customers/{merged}"), "the person's page")
    reached = set()
    for _ in range(60):
        tab.press(Press.TAB)
        reached.add(focused())
    # what scrolls can be reached and so scrolled without a mouse; so can what is folded
    assert "All links with their reasons" in reached
    assert tab.run("return [...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0)")


@pytest.mark.browser
def test_stock_changes_before_the_eyes(tab: Tab, filled: Settings) -> None:
    from confluent_kafka import Producer

    tab.open("/stock?product_id=P0001")
    tab.run("window.stays = true")
    store = tab.run("return document.querySelector('#levels tr[data-store]').dataset.store")
    tab.until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "the stream is open")
    producer = Producer({"bootstrap.servers": filled.kafka.bootstrap_servers})

    def count(units: int) -> None:
        event = {
            "event_id": f"page-{units}-{time.time_ns()}",
            "event_type": "stock_counted",
            "timestamp": datetime.now(UTC).isoformat(),
            "metadata": {"product_id": "P0001", "store_id": store, "counted": units, "quantity": units},
        }
        producer.produce("events", json.dumps(event).encode(), key=b"P0001")
        assert producer.flush(10) == 0

    def on_hand() -> str:
        cell = f"#levels tr[data-store='{store}'] [data-field=on_hand]"
        return str(tab.run(f'return document.querySelector("{cell}").textContent'))

    count(4321)
    tab.until(lambda: on_hand() == "4,321", "the new figure in the table")
    assert tab.run("return window.stays") is True
    assert "4,321 on hand" in tab.run("return document.querySelector('#changes li').textContent")
    tab.run("document.getElementById('pause').click()")
    count(17)
    time.sleep(1.0)
    assert on_hand() == "4,321"
    tab.run("document.getElementById('pause').click()")
    tab.until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "it goes on")
    assert tab.complaints == []


@pytest.mark.browser
def test_a_product_that_becomes_low_appears(tab: Tab, client: TestClient, filled: Settings) -> None:
    from confluent_kafka import Producer

    low = {(one["product_id"], one["store_id"]) for one in client.get("/v1/inventory/low-stock").json()["levels"]}
    levels = client.get("/v1/inventory/P0002").json()["stores"]
    store = next(one["store_id"] for one in levels if ("P0002", one["store_id"]) not in low)
    tab.open("/stock")
    tab.until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "the stream is open")
    event = {
        "event_id": f"page-low-{time.time_ns()}",
        "event_type": "stock_counted",
        "timestamp": datetime.now(UTC).isoformat(),
        "metadata": {"product_id": "P0002", "store_id": store, "counted": 0, "quantity": 0},
    }
    producer = Producer({"bootstrap.servers": filled.kafka.bootstrap_servers})
    producer.produce("events", json.dumps(event).encode(), key=b"P0002")
    assert producer.flush(10) == 0
    row = f"#levels tr[data-product='P0002'][data-store='{store}']"
    tab.until(lambda: tab.run(f'return Boolean(document.querySelector("{row}"))'), "the new row")
    assert tab.run(f"return document.querySelector(\"{row}\").querySelector('[data-field=low_stock]').textContent") == "Low"
