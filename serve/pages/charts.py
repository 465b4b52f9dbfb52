"""Charts as inline SVG: data in, markup out.

Colours come from classes of the style sheet, so that they suit light and dark. A chart is an image with a name: the page
tells the same figures beside it as text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from markupsafe import Markup

from pipelines.identity.links import LINKED
from serve.api.customers import Channel, Entry, Link

DRAWN = 40
"""Lines of a graph that can still be told apart."""
LONGEST = 34
"""Characters of a label."""
ROW, TOP = 34, 30
LANES = ("web", "pos", "marketplace", "account")
LANE_NAMES = {"web": "Web shop", "pos": "Stores", "marketplace": "Marketplaces", "account": "Account"}


@dataclass(frozen=True)
class Group:
    """Records with the same links: many orders of one marketplace are one node of the graph."""

    records: tuple[str, ...]
    links: tuple[Link, ...]

    @property
    def label(self) -> str:
        """'account 42', 'order ORD-7 (ebay)', '12 orders (ebay)'."""
        kind, _, rest = self.records[0].partition(":")
        if kind == "user":
            return f"account {rest}"
        platform, _, order = rest.partition(":")
        return f"order {order} ({platform})" if len(self.records) == 1 else f"{len(self.records)} orders ({platform})"


def groups(links: Iterable[Link]) -> list[Group]:
    """Accounts, and orders of a marketplace that show the same in one; those with most links first."""
    by_record: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_record[link.record_id].append(link)
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = defaultdict(list)
    for record, mine in by_record.items():
        source = record.rpartition(":")[0] if record.startswith("order:") else record
        alike[source, tuple(sorted({(link.node, link.status) for link in mine}))].append(record)
    found = [Group(tuple(sorted(records)), tuple(by_record[records[0]])) for records in alike.values()]
    return sorted(found, key=lambda one: (-len(one.links), one.records))


def drawn(every: Sequence[Group]) -> list[Group]:
    """As many of the groups as fit into DRAWN lines, at least one."""
    kept: list[Group] = []
    for group in every:
        if kept and sum(len(one.links) for one in [*kept, group]) > DRAWN:
            break
        kept.append(group)
    return kept


def identity_graph(every: Sequence[Group]) -> Markup:
    """Records on the left, what they show on the right; a broken line joins nobody."""
    nodes: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(every):
        for link in group.links:
            nodes[link.node].append(number)
    # identifiers near the records that show them: fewer lines cross
    order = sorted(nodes, key=lambda node: (sum(nodes[node]) / len(nodes[node]), node))
    height = TOP + ROW * max(len(every), len(order)) + 6
    left, right = _places(len(every), height), _places(len(order), height)
    place = dict(zip(order, right, strict=True))
    parts = [
        Markup('<text x="0" y="16" class="head">Accounts and orders</text>'),
        Markup('<text x="400" y="16" class="head">What they show</text>'),
    ]
    for y, group in zip(left, every, strict=True):
        for link in group.links:
            line = '<path d="M212 {y:.0f} C300 {y:.0f} 300 {z:.0f} 388 {z:.0f}" class="link {status}"><title>{why}</title></path>'
            why = f"{group.label}: {link.reason} ({'joins' if link.status == LINKED else link.status + ', joins nobody'})"
            parts.append(Markup(line).format(y=y, z=place[link.node], status="on" if link.status == LINKED else "off", why=why))
    for y, group in zip(left, every, strict=True):
        kind = "account" if group.records[0].startswith("user:") else "order"
        parts.append(Markup('<rect x="0" y="{:.0f}" width="212" height="26" rx="6" class="node {}"/>').format(y - 13, kind))
        parts.append(Markup('<text x="10" y="{:.0f}">{}</text>').format(y + 5, _clipped(group.label, 28)))
    for node, y in place.items():
        kind, _, value = node.partition(":")
        parts.append(Markup('<rect x="388" y="{:.0f}" width="332" height="26" rx="13" class="node id"/>').format(y - 13))
        label = Markup('<text x="400" y="{:.0f}"><title>{}</title><tspan class="kind">{}</tspan> {}</text>')
        parts.append(label.format(y + 5, value, KINDS.get(kind, kind), _clipped(value, LONGEST)))
    return _svg(720, height, "Identity graph: which accounts and orders show which identifiers", "graph", parts)


KINDS = {"loyalty": "card", "user": "account"}


def timeline(entries: Sequence[Entry]) -> Markup:
    """A lane for each channel and one for accounts; a chargeback is a cross in the lane of its order's channel."""
    channel_of = {entry.order_id: entry.channel for entry in entries if entry.kind == "order"}
    first, last = min(entry.at for entry in entries), max(entry.at for entry in entries)
    last = max(last, first + timedelta(days=1))
    span = (last - first).total_seconds()
    lane = {name: 26 + 34 * number for number, name in enumerate(LANES)}
    foot = 26 + 34 * len(LANES)
    parts: list[Markup] = []
    for name, y in lane.items():
        parts.append(Markup('<line x1="110" y1="{0}" x2="712" y2="{0}" class="axis"/>').format(y))
        parts.append(Markup('<text x="0" y="{}">{}</text>').format(y + 4, LANE_NAMES[name]))
    for moment in _ticks(first, last):
        x = 118 + 586 * (moment - first).total_seconds() / span
        parts.append(Markup('<line x1="{0:.1f}" y1="8" x2="{0:.1f}" y2="{1}" class="tick"/>').format(x, foot - 16))
        anchor = "end" if x > 688 else "start" if x < 130 else "middle"
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(x, foot, anchor, _name(moment)))
    for entry in sorted(entries, key=lambda one: one.kind == "chargeback"):
        x = 118 + 586 * (entry.at - first).total_seconds() / span
        channel = channel_of.get(entry.order_id) if entry.kind in ("order", "chargeback") else "account"
        parts.append(_mark(entry, channel or "account", x, lane.get(channel or "account", lane["account"])))
    return _svg(720, foot + 8, "Orders and account changes over time, by channel", "timeline", parts)


def channel_mix(channels: Sequence[Channel]) -> Markup:
    """One bar, divided by the channels' shares."""
    parts, x = [], 0.0
    for one in channels:
        width = 720 * one.share
        shape = '<rect x="{:.1f}" y="0" width="{:.1f}" height="28" class="fill {}"><title>{}: {:.0%}</title></rect>'
        parts.append(Markup(shape).format(x, max(width - 2, 1), one.channel, LANE_NAMES.get(one.channel, one.channel), one.share))
        x += width
    return _svg(720, 28, "Share of purchases by channel", "mix", parts)


def weight(share: float) -> Markup:
    """A short bar, filled to a share (0 to 1), for a table whose cell tells the figure."""
    parts = [
        Markup('<rect x="0" y="0" width="80" height="8" rx="4" class="empty"/>'),
        Markup('<rect x="0" y="0" width="{:.1f}" height="8" rx="4" class="full"/>').format(80 * min(max(share, 0.0), 1.0)),
    ]
    return Markup('<svg class="weight" viewBox="0 0 80 8" width="80" height="8" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def level(count: float, most: float) -> int:
    """The shade of a cell: 0 for none, 1 to 6 by its share of the largest."""
    return 0 if count <= 0 or most <= 0 else min(6, 1 + int(6 * count / most * 0.999))


def _svg(width: int, height: float, name: str, kind: str, parts: Sequence[Markup]) -> Markup:
    whole = '<svg class="chart {}" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>'
    return Markup(whole).format(kind, width, height, name, Markup("").join(parts))


def _places(count: int, height: float) -> list[float]:
    """The middles of `count` rows, spread over the height."""
    room = (height - TOP) / max(count, 1)
    return [TOP + room * (number + 0.5) for number in range(count)]


def _mark(entry: Entry, channel: str, x: float, y: float) -> Markup:
    """Shape and colour both tell the channel."""
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
    what = f"{entry.kind.replace('_', ' ')}{f' {entry.order_id}' if entry.order_id else ''}, {entry.at:%d %b %Y}"
    return Markup(shape).format(x=x, y=y, a=x - 5.5, b=y - 5.5, c=y - 7, t=Markup("<title>{}</title>").format(what))


def _ticks(first: datetime, last: datetime) -> list[datetime]:
    """Firsts of months between two moments, at most eight of them, evenly apart; of a short time its ends."""
    numbers = range(first.year * 12 + first.month, last.year * 12 + last.month)
    step = next((step for step in (1, 2, 3, 6, 12, 24, 60, 120) if len(numbers) / step <= 8), 1_200)
    found = [datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC) for number in numbers if number % step == 0]
    return found if len(found) > 1 else [first, last]


def _name(moment: datetime) -> str:
    return f"{moment:%b %Y}" if moment.day == 1 and moment.hour == moment.minute == 0 else f"{moment:%d %b %Y}".lstrip("0")


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def statuses(links: Iterable[Link]) -> Counter[str]:
    """How many links join, and how many do not."""
    return Counter(link.status for link in links)
