"""Positions of the PostgreSQL source: how far a bronze table has read the write-ahead log (WAL).

    {"lsn": "0/1B69EF8", "system": "7412...", "timeline": 1, "slot": 1764115200000000, "origin": "16390/16500/0", "generation": 1}

lsn         every change committed before it is in the table
system      system identifier of the server
timeline    timeline of the server; a new one begins with each promotion or restore
slot        when all tables were last read together, in microseconds since 1970; missing in old positions. A table with an older
            time than another was not re-read with it, and lacks the changes in between
origin      which table was read, see `PublishedTable`; missing in old positions
generation  the epoch, see `pipelines.sources.epochs`; missing in epoch 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakehouse.source import EPOCH, Position

ORIGIN = "origin"


def stored_position(*, lsn: int, system: str, timeline: int, slot_time: int, epoch: int, origin: str) -> dict[str, Any]:
    """Return a position as it is stored."""
    position: dict[str, Any] = {"lsn": format_lsn(lsn), "system": system, "timeline": timeline}
    position |= {ORIGIN: origin} if origin else {}
    return position | ({"slot": slot_time} if slot_time else {}) | ({EPOCH: epoch} if epoch else {})


def slot_time(position: Position) -> int:
    """Return when all tables were last read together, in microseconds since 1970; 0 when the position does not record it."""
    return int(position.get("slot", 0))


def table_lsns(positions: Mapping[str, Position]) -> dict[str, int]:
    """Return the LSN of each table."""
    return {table: parse_lsn(position["lsn"]) for table, position in positions.items()}


def last_read_lsn(continuing: Mapping[str, Position], stored: Mapping[str, Position]) -> int | None:
    """Return how far the slot was read; None when no table continues with it.

    Only tables that received rows have moved, so it is the greatest LSN of the tables that were last read together, including
    those that are to be re-snapshotted.
    """
    if not continuing:
        return None
    newest = max(map(slot_time, continuing.values()))
    return max(table_lsns({table: item for table, item in stored.items() if slot_time(item) == newest}).values())


def parse_lsn(text: str) -> int:
    """Return the number of an LSN such as '0/1B69EF8'."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def format_lsn(lsn: int) -> str:
    """Return an LSN as PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
