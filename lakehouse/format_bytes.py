"""Formatting of byte counts for output."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, such as '1.5 MB'."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
