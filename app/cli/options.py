"""Options and argument parsing that several commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from lakehouse.errors import ShopSphereError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]

_UNITS = {"s": 1, "m": 60, "h": 3600, None: 1}


def parse_seconds(text: str) -> float:
    """Return the seconds in a duration such as '5s', '2m', '1h' or '30' (seconds). Raises ShopSphereError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if not match:
        raise ShopSphereError(f"'{text}' is not a duration. Write it as 5s, 2m or 1h.")
    return float(match[1]) * _UNITS[match[2]]
