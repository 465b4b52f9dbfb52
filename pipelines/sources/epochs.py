"""Generations: what is read anew from a source's beginning sorts after all that was read before.

The first read of a table, and what follows it, has plain positions. Each time the table is read anew (`rebuild`), a
prefix is put before the positions of all that comes from then on: '~000001~', '~000002~' ... ('~' sorts after every
character that a position begins with.) The first row of such a generation is a marker: `_op` 't' at the prefix alone.
It ends the rows with keys that the new read did not find: they were deleted while nobody looked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa

from lakehouse.source import Rows
from lakehouse.table import TIMESTAMP

_PREFIX = "^~[0-9]{6}~"


def prefix(generation: int) -> str:
    """What the positions of a generation begin with; '' for the first one, 0."""
    return f"~{generation:06d}~" if generation else ""


def prefix_of(position: pl.Expr) -> pl.Expr:
    """The prefix of positions; null in the first generation."""
    return position.str.extract(f"({_PREFIX})")


def is_marker(position: pl.Expr) -> pl.Expr:
    """Whether positions of `_op` 't' are markers; the others are of rows that say that the source's table was emptied."""
    return position.str.contains(f"{_PREFIX}$")


@dataclass(frozen=True)
class MarkerTask:
    """Gives the marker of a generation. moment: microseconds since 1970, when the new read was planned."""

    table: str
    schema: pa.Schema = field(repr=False)
    generation: int
    moment: int

    def read(self) -> Iterator[Rows]:
        """Give the one row."""
        values = {"_op": "t", "_source_position": prefix(self.generation), "_source_time": self.moment}
        columns = [pa.array([values.get(item.name)], pa.int64() if item.type == TIMESTAMP else item.type) for item in self.schema]
        yield Rows(self.table, pa.table(columns, names=self.schema.names).cast(self.schema))
