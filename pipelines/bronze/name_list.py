"""Lists of column names in one text, for any legal name."""

from __future__ import annotations

from collections.abc import Iterable


def join_names(names: Iterable[str]) -> str:
    """Return the names separated by commas; a comma in a name is written %2C, and a percent sign %25."""
    return ",".join(map(escaped, names))


def split_names(text: str) -> list[str]:
    """Return the names in a text of `join_names`."""
    return [name.replace("%2C", ",").replace("%25", "%") for name in text.split(",") if name]


def escaped(name: str) -> str:
    """Return a name as it stands in a text of `join_names`."""
    return name.replace("%", "%25").replace(",", "%2C")
