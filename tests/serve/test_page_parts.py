"""The parts of pages: charts, segments, formatting, colours and links."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.html_page import HtmlPage

from lakehouse.status import TableStatus
from pipelines.privacy.suppression import ERASURES
from serve.api.customers import AccountVersion, Channel, Entry, Link
from serve.pages import charts, segments
from serve.pages.assets import DIRECTORY
from serve.pages.customer_pages import account_changes, identifier_kinds
from serve.pages.formatting import insert_line_breaks
from serve.pages.local_path import local_path
from serve.pages.table_condition import condition

T0 = datetime(2026, 1, 1, tzinfo=UTC)

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


def parse_chart(markup: str) -> ET.Element:
    """Parse a chart, which must be well-formed and have a name."""
    chart = ET.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", markup))
    assert chart.attrib["role"] == "img"
    assert chart.attrib["aria-label"]
    return chart


@given(st.lists(LINKS, min_size=1, max_size=30))
def test_identity_graph_has_a_node_per_record_and_a_line_per_link(links: list[Link]) -> None:
    groups = charts.group_records(links)
    assert sorted(record for group in groups for record in group.records) == sorted({link.record_id for link in links})
    group_of = {record: group for group in groups for record in group.records}
    for link in links:
        assert (link.node, link.status) in {(one.node, one.status) for one in group_of[link.record_id].links}
    chart = parse_chart(charts.identity_graph(groups))
    lines = [path.attrib["class"] for path in chart.findall("path")]
    assert len(lines) == sum(len(group.links) for group in groups)
    assert lines.count("link on") == sum(link.status == "linked" for group in groups for link in group.links)
    assert sum(len(group.links) for group in charts.drawable(groups)[1:]) <= charts.MAX_LINES


@given(st.lists(ENTRIES, min_size=1, max_size=20))
def test_timeline_has_a_mark_per_entry(entries: list[Entry]) -> None:
    chart = parse_chart(charts.timeline(entries))
    marks = [one for one in chart.iter() if one.find("title") is not None]
    assert len(marks) == len(entries)
    assert 2 <= len([one for one in chart.findall("line") if one.attrib["class"] == "tick"]) <= 9


@given(st.lists(st.integers(1, 99), min_size=1, max_size=3))
def test_channel_mix_fills_the_bar(counts: list[int]) -> None:
    total = sum(counts)
    mix = [Channel(name, count, count / total) for name, count in zip(("web", "pos", "marketplace"), counts, strict=False)]
    bars = parse_chart(charts.channel_mix(mix)).findall("rect")
    assert float(bars[-1].attrib["x"]) + float(bars[-1].attrib["width"]) == pytest.approx(718, abs=1.1)


@given(st.integers(0, 500), st.integers(1, 500))
def test_shade_is_zero_for_none_and_strongest_for_the_maximum(count: int, maximum: int) -> None:
    shade = charts.shade(min(count, maximum), maximum)
    assert (shade == 0) == (min(count, maximum) == 0)
    assert charts.shade(maximum, maximum) == 6
    assert shade <= charts.shade(min(count + 1, maximum), maximum)


@given(st.lists(st.tuples(st.integers(-5, 900), st.integers(1, 5), st.integers(1, 5)), max_size=40), st.integers(0, 5))
def test_each_customer_is_counted_in_one_cell_per_grid(people: list[tuple[int, int, int]], without: int) -> None:
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


def test_band_names_have_no_gaps() -> None:
    assert segments.FREQUENCY_NAMES == ("1", "2–3", "4–6", "7–12", "13+")
    assert segments.RECENCY_NAMES == ("0–30", "31–90", "91–180", "181–365", "366+")
    assert segments.MONETARY_NAMES == ("under 100", "100–499", "500–999", "1,000–4,999", "5,000+")


def account_version(user: int, day: int, **fields: Any) -> AccountVersion:
    empty = dict.fromkeys(AccountVersion.__struct_fields__)
    return AccountVersion(**(empty | {"user_id": user, "valid_from": T0 + timedelta(days=day), "is_current": False} | fields))


def test_changes_are_relative_to_the_previous_version_of_the_same_account() -> None:
    history = [
        account_version(1, 3, email="b", city="x"),
        account_version(2, 2, email="c"),
        account_version(1, 1, email="a", city="x"),
    ]
    assert [(one.version.user_id, one.changed) for one in account_changes(history)] == [(1, {"email"}), (2, set()), (1, set())]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("M-user:7", "master_user_id"), ("a@b.example", "email"), ("+62 812", "phone"), ("0812-99", "phone"),
        ("184467", "order_id"),        ("ebay:ORD-EB-7", "loyalty_id"), ("L-1042", "loyalty_id"), ("Siti", "name"),
    ],
)  # fmt: skip
def test_search_term_is_classified(text: str, first: str) -> None:
    assert identifier_kinds(text)[0] == first


@given(st.one_of(st.text(), st.from_regex(r"[/\\]{1,3}[a-z.:/\\@?]*", fullmatch=True)))
def test_local_path_never_leaves_the_site(text: str) -> None:
    path = local_path(text)
    assert path.startswith("/")
    assert not path.startswith(("//", "/\\"))
    assert "\\" not in path
    assert local_path("/" + "a" * 4_000 + "!") == "/"


@given(st.text())
def test_line_breaks_keep_a_name_escaped(text: str) -> None:
    page = HtmlPage()
    page.feed(str(insert_line_breaks(text)))
    assert {tag for tag, _ in page.tags} <= {"wbr"}


def colour_schemes() -> dict[str, dict[str, str]]:
    """Return the colours of the style sheet by scheme and name."""
    style = (DIRECTORY / "static" / "page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    found = {mode: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for mode, part in (("light", light), ("dark", dark))}
    assert found["light"].keys() == found["dark"].keys()
    return found


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_have_enough_contrast(mode: str) -> None:
    colours = colour_schemes()[mode]
    text = [
        *((ink, ground) for ink in ("ink", "muted", "accent") for ground in ("ground", "card")),
        ("on-accent", "accent"), ("on-changed", "changed"), ("on-zero", "h0"),
        *((f"{name}", f"{name}-ground") for name in ("good", "medium", "high")),
        *(("on-light", f"h{n}") for n in (1, 2, 3)), *(("on-dark", f"h{n}") for n in (4, 5, 6)),
    ]  # fmt: skip
    assert {pair: round(ratio, 2) for pair in text if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 4.5} == {}
    marks = [(name, "card") for name in ("web", "pos", "marketplace", "account", "cross", "focus")]
    assert {pair: round(ratio, 2) for pair in marks if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 3} == {}


def test_pages_request_nothing_from_other_sites() -> None:
    files = [file for file in DIRECTORY.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+", file.read_text()))
        assert addresses <= {"http://www.w3.org"}, file  # the namespace of SVG, never requested


@pytest.mark.parametrize("rows", [0, 3])
def test_table_without_runs_is_not_behind(rows: int) -> None:
    status = TableStatus(
        table=ERASURES.name, rows=rows, snapshot=1 if rows else None, last_run=T0 if rows else None, files=1, bytes=100
    )
    assert condition(status).good
    assert condition(status).text
