"""Charts as inline SVG.

Colours come from classes of the style sheet, which has a light and a dark scheme. A chart is an image with a name; the page also
shows its figures as text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from markupsafe import Markup

from pipelines.identity.links import LINKED
from serve.api.customers import Channel, Entry, Link

MAX_LINES = 40
"""Lines of a graph that a reader can still distinguish."""
MAX_RECORD_LABEL, MAX_NODE_LABEL = 28, 34
"""Maximum length of labels in characters."""
ROW, TOP = 34, 30
LANES = ("web", "pos", "marketplace", "account")
LANE_NAMES = {"web": "Web shop", "pos": "Stores", "marketplace": "Marketplaces", "account": "Account"}
KIND_NAMES = {"loyalty": "card", "user": "account"}


@dataclass(frozen=True)
class RecordGroup:
    """Records with the same links: many orders of one marketplace are one node of the graph."""

    records: tuple[str, ...]
    links: tuple[Link, ...]

    @property
    def label(self) -> str:
        """A label such as 'account 42', 'order ORD-7 (ebay)' or '12 orders (ebay)'."""
        kind, _, rest = self.records[0].partition(":")
        if kind == "user":
            return f"account {rest}"
        platform, _, order = rest.partition(":")
        return f"order {order} ({platform})" if len(self.records) == 1 else f"{len(self.records)} orders ({platform})"


def group_records(links: Iterable[Link]) -> list[RecordGroup]:
    """Return accounts, and orders of a marketplace grouped by equal links; those with most links first."""
    by_record: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_record[link.record_id].append(link)
    equal: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = defaultdict(list)
    for record, record_links in by_record.items():
        source = record.rpartition(":")[0] if record.startswith("order:") else record
        equal[source, tuple(sorted({(link.node, link.status) for link in record_links}))].append(record)
    groups = [RecordGroup(tuple(sorted(records)), tuple(by_record[records[0]])) for records in equal.values()]
    return sorted(groups, key=lambda group: (-len(group.links), group.records))


def drawable(groups: Sequence[RecordGroup]) -> list[RecordGroup]:
    """Return the first groups with at most MAX_LINES links together, at least one group."""
    drawn: list[RecordGroup] = []
    for group in groups:
        if drawn and sum(len(one.links) for one in [*drawn, group]) > MAX_LINES:
            break
        drawn.append(group)
    return drawn


def identity_graph(groups: Sequence[RecordGroup]) -> Markup:
    """Return a graph of records on the left and their identifiers on the right; dashed links do not join."""
    nodes: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for link in group.links:
            nodes[link.node].append(number)
    # place identifiers near the records that show them, so that fewer lines cross
    order = sorted(nodes, key=lambda node: (sum(nodes[node]) / len(nodes[node]), node))
    height = TOP + ROW * max(len(groups), len(order)) + 6
    record_ys = _row_centers(len(groups), height)
    node_ys = dict(zip(order, _row_centers(len(order), height), strict=True))
    parts = [
        Markup('<text x="0" y="16" class="head">Accounts and orders</text>'),
        Markup('<text x="400" y="16" class="head">Identifiers</text>'),
        *_link_lines(groups, record_ys, node_ys),
        *_record_boxes(groups, record_ys),
        *_node_boxes(node_ys),
    ]
    return _svg(720, height, "Identity graph: the identifiers of accounts and orders", "graph", parts)


def _link_lines(groups: Sequence[RecordGroup], record_ys: Sequence[float], node_ys: Mapping[str, float]) -> list[Markup]:
    line = '<path d="M212 {y:.0f} C300 {y:.0f} 300 {z:.0f} 388 {z:.0f}" class="link {css}"><title>{title}</title></path>'
    lines = []
    for y, group in zip(record_ys, groups, strict=True):
        for link in group.links:
            linked = link.status == LINKED
            title = f"{group.label}: {link.reason} ({'joins' if linked else link.status + ', does not join'})"
            lines.append(Markup(line).format(y=y, z=node_ys[link.node], css="on" if linked else "off", title=title))
    return lines


def _record_boxes(groups: Sequence[RecordGroup], ys: Sequence[float]) -> list[Markup]:
    boxes = []
    for y, group in zip(ys, groups, strict=True):
        kind = "account" if group.records[0].startswith("user:") else "order"
        boxes.append(Markup('<rect x="0" y="{:.0f}" width="212" height="26" rx="6" class="node {}"/>').format(y - 13, kind))
        boxes.append(Markup('<text x="10" y="{:.0f}">{}</text>').format(y + 5, _truncated(group.label, MAX_RECORD_LABEL)))
    return boxes


def _node_boxes(ys: Mapping[str, float]) -> list[Markup]:
    label = '<text x="400" y="{:.0f}"><title>{}</title><tspan class="kind">{}</tspan> {}</text>'
    boxes = []
    for node, y in ys.items():
        kind, _, value = node.partition(":")
        boxes.append(Markup('<rect x="388" y="{:.0f}" width="332" height="26" rx="13" class="node id"/>').format(y - 13))
        boxes.append(Markup(label).format(y + 5, value, KIND_NAMES.get(kind, kind), _truncated(value, MAX_NODE_LABEL)))
    return boxes


def timeline(entries: Sequence[Entry]) -> Markup:
    """Return a timeline with a lane per channel and one for accounts; a chargeback is a cross in the lane of its order."""
    channel_of = {entry.order_id: entry.channel for entry in entries if entry.kind == "order"}
    first, last = min(entry.at for entry in entries), max(entry.at for entry in entries)
    last = max(last, first + timedelta(days=1))
    seconds = (last - first).total_seconds()
    lane_ys = {name: 26 + 34 * number for number, name in enumerate(LANES)}
    bottom = 26 + 34 * len(LANES)
    parts: list[Markup] = []
    for name, y in lane_ys.items():
        parts.append(Markup('<line x1="110" y1="{0}" x2="712" y2="{0}" class="axis"/>').format(y))
        parts.append(Markup('<text x="0" y="{}">{}</text>').format(y + 4, LANE_NAMES[name]))
    for moment in _ticks(first, last):
        x = 118 + 586 * (moment - first).total_seconds() / seconds
        parts.append(Markup('<line x1="{0:.1f}" y1="8" x2="{0:.1f}" y2="{1}" class="tick"/>').format(x, bottom - 16))
        anchor = "end" if x > 688 else "start" if x < 130 else "middle"
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(x, bottom, anchor, _tick_label(moment)))
    for entry in sorted(entries, key=lambda entry: entry.kind == "chargeback"):
        x = 118 + 586 * (entry.at - first).total_seconds() / seconds
        channel = channel_of.get(entry.order_id) if entry.kind in ("order", "chargeback") else "account"
        parts.append(_entry_mark(entry, channel or "account", x, lane_ys.get(channel or "account", lane_ys["account"])))
    return _svg(720, bottom + 8, "Orders and account changes over time, by channel", "timeline", parts)


def channel_mix(channels: Sequence[Channel]) -> Markup:
    """Return one bar, divided by the channels' shares."""
    parts, x = [], 0.0
    for one in channels:
        width = 720 * one.share
        shape = '<rect x="{:.1f}" y="0" width="{:.1f}" height="28" class="fill {}"><title>{}: {:.0%}</title></rect>'
        parts.append(Markup(shape).format(x, max(width - 2, 1), one.channel, LANE_NAMES.get(one.channel, one.channel), one.share))
        x += width
    return _svg(720, 28, "Share of purchases by channel", "mix", parts)


def weight(share: float) -> Markup:
    """Return a short bar, filled to a share (0 to 1), for a table cell that contains the figure."""
    parts = [
        Markup('<rect x="0" y="0" width="80" height="8" rx="4" class="empty"/>'),
        Markup('<rect x="0" y="0" width="{:.1f}" height="8" rx="4" class="full"/>').format(80 * min(max(share, 0.0), 1.0)),
    ]
    return Markup('<svg class="weight" viewBox="0 0 80 8" width="80" height="8" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def shade(count: float, maximum: float) -> int:
    """Return the shade of a cell: 0 for an empty one, else 1 to 6 by its ratio to the maximum."""
    return 0 if count <= 0 or maximum <= 0 else min(6, 1 + int(6 * count / maximum * 0.999))


def link_statuses(links: Iterable[Link]) -> Counter[str]:
    """Return the number of links by status."""
    return Counter(link.status for link in links)


def _svg(width: int, height: float, name: str, css: str, parts: Sequence[Markup]) -> Markup:
    svg = '<svg class="chart {}" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(css, width, height, name, Markup("").join(parts))


def _row_centers(count: int, height: float) -> list[float]:
    """Return the vertical centers of `count` rows, spread over the height."""
    row = (height - TOP) / max(count, 1)
    return [TOP + row * (number + 0.5) for number in range(count)]


def _entry_mark(entry: Entry, channel: str, x: float, y: float) -> Markup:
    """Return the mark of an entry, whose shape and colour both indicate the channel."""
    shapes = {
        "web": '<circle cx="{x:.1f}" cy="{y}" r="6" class="fill web">{t}</circle>',
        "pos": '<rect x="{a:.1f}" y="{b}" width="11" height="11" class="fill pos">{t}</rect>',
        "marketplace": '<path d="M{x:.1f} {c} l7 12 h-14 z" class="fill marketplace">{t}</path>',
        "account": '<path d="M{x:.1f} {c} l6 7 l-6 7 l-6 -7 z" class="fill account">{t}</path>',
    }
    if entry.kind == "chargeback":
        shape = '<path d="M{a:.1f} {b} l11 11 m0 -11 l-11 11" class="cross">{t}</path>'
    else:
        shape = shapes.get(channel, shapes["account"])
    title = f"{entry.kind.replace('_', ' ')}{f' {entry.order_id}' if entry.order_id else ''}, {entry.at:%d %b %Y}"
    return Markup(shape).format(x=x, y=y, a=x - 5.5, b=y - 5.5, c=y - 7, t=Markup("<title>{}</title>").format(title))


def _ticks(first: datetime, last: datetime) -> list[datetime]:
    """Return at most eight evenly spaced first days of months; for a short period its ends."""
    months = range(first.year * 12 + first.month, last.year * 12 + last.month)
    step = next((step for step in (1, 2, 3, 6, 12, 24, 60, 120) if len(months) / step <= 8), 1_200)
    ticks = [datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC) for month in months if month % step == 0]
    return ticks if len(ticks) > 1 else [first, last]


def _tick_label(moment: datetime) -> str:
    return f"{moment:%b %Y}" if moment.day == 1 and moment.hour == moment.minute == 0 else f"{moment:%d %b %Y}".lstrip("0")


def _truncated(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
