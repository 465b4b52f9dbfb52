"""Epochs: rows that are re-read from the beginning of a source sort after all rows read before.

Rows of the first read of a table, and of the changes that follow it, have plain positions. Each time the table is re-read
(`rebuild`), the next epoch begins: from then on its positions have a prefix, '~000001~', '~000002~' and so on. ('~' sorts after
every character that a position begins with.) The first row of an epoch is its marker: `_op` 't' at the prefix alone. It ends
the rows whose keys the new read did not find: they were deleted while nothing was read.

Snapshots store the number of the epoch under the key "generation" (Kafka: "generations", by topic).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa

from lakehouse.source import Rows
from lakehouse.table import TIMESTAMP

_PREFIX = "^~[0-9]{6}~"


def epoch_prefix(epoch: int) -> str:
    """Return what the positions of an epoch begin with; '' for the first epoch, 0."""
    return f"~{epoch:06d}~" if epoch else ""


def epoch_prefix_of(position: pl.Expr) -> pl.Expr:
    """Return the epoch prefix of positions; null in the first epoch."""
    return position.str.extract(f"({_PREFIX})")


def is_epoch_marker(position: pl.Expr) -> pl.Expr:
    """Return whether rows with `_op` 't' are markers of an epoch. The others record that the source table was emptied."""
    return position.str.contains(f"{_PREFIX}$")


@dataclass(frozen=True)
class EpochMarkerTask:
    """Gives the marker of an epoch. moment: microseconds since 1970, when the new read was planned."""

    table: str
    schema: pa.Schema = field(repr=False)
    epoch: int
    moment: int

    def read(self) -> Iterator[Rows]:
        """Give the one row."""
        values = {"_op": "t", "_source_position": epoch_prefix(self.epoch), "_source_time": self.moment}
        columns = [pa.array([values.get(item.name)], pa.int64() if item.type == TIMESTAMP else item.type) for item in self.schema]
        yield Rows(self.table, pa.table(columns, names=self.schema.names).cast(self.schema))
