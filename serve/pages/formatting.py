"""Template filters: values as text."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from decimal import Decimal

from markupsafe import Markup, escape

MISSING = "–"


def format_moment(moment: datetime | None) -> str:
    """Return a date and time such as '31 Jan 2026, 14:56'."""
    return MISSING if moment is None else f"{moment.astimezone(UTC):%d %b %Y, %H:%M}".lstrip("0")


def format_day(moment: datetime | date | None) -> str:
    """Return a date such as '31 Jan 2026'."""
    return MISSING if moment is None else f"{moment:%d %b %Y}".lstrip("0")


def format_number(value: float | None, digits: int = 0) -> str:
    """Return a number such as '12,345.6'."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def format_count(number: int, noun: str) -> str:
    """Return a count such as '1 order' or '1,234 orders'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_money(value: Decimal | None, currency: str | None = None) -> str:
    """Return an amount such as '1,249.90 USD'."""
    return MISSING if value is None else f"{value:,.2f}{' ' + currency if currency else ''}"


def format_percent(value: float | None) -> str:
    """Return a share (0 to 1) such as '12%'."""
    return MISSING if value is None else f"{value:.0%}"


def format_age(moment: datetime | None, now: datetime) -> str:
    """Return an age such as '3 min ago'."""
    if moment is None:
        return "never"
    seconds = max(0, int((now - moment).total_seconds()))
    for length, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:,} {unit} ago"
    return f"{seconds} s ago"


def insert_line_breaks(name: str) -> Markup:
    """Return the name of a table or feature with line break opportunities after dots and underscores."""
    return Markup(re.sub(r"(?<=[._])(?=[^._])", "<wbr>", str(escape(name))))
