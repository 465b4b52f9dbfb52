"""Declarations: what a table is. Frozen values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")
MONEY = pa.decimal128(20, 4)

SEQUENCE = "_seq"
GROUP_HASH = "_group_hash"
DELETED = "_deleted"
BOOKKEEPING = (SEQUENCE, GROUP_HASH, DELETED)
"""Columns the engine adds and keeps: the commit that changed the row, a hash of its group, the tombstone mark."""


Personal = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Column:
    """A column: name, Arrow type, what it means.

    personal  the kind of personal value it holds ('email', 'name', ...; see docs/erasure.md); '': none. Of a JSON column
              pairs of a path and its kind ('': none, with all below it): what is not named there is not known to be harmless
    """

    name: str
    type: pa.DataType
    doc: str
    required: bool = False
    personal: Personal = ""


def column(name: str, type: pa.DataType, doc: str, *, required: bool = False, personal: Personal = "") -> Column:
    """Declare a column."""
    return Column(name, type, doc, required, personal)


@dataclass(frozen=True)
class Partition:
    """A partition field: an Iceberg transform of a column."""

    column: str
    transform: Literal["identity", "day", "month", "year"]


def year(column_name: str) -> Partition:
    """Partition by the year of a date or timestamp column.

    Not finer without need: a full build writes a file per partition and bucket, and a look-up opens them all.
    """
    return Partition(column_name, "year")


@dataclass(frozen=True)
class Table:
    """A table of the lakehouse.

    name         'layer.table', e.g. 'silver.orders_unified'
    key          columns that identify a row; empty in bronze, which is append-only
    group        columns of the unit that is recomputed together; part of the key (default: the key)
    traced       columns whose old value downstream tables must hear of: when one changes, the row with the old
                 value stays as a tombstone
    sort_by      order of rows within a data file
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    traced: tuple[str, ...] = ()
    partition_by: tuple[Partition, ...] = ()
    sort_by: tuple[str, ...] = ()
    owner: str = "data platform"

    def __post_init__(self) -> None:
        known = {item.name for item in self.columns}
        partitioned = tuple(item.column for item in self.partition_by)
        if missing := [name for name in (*self.key, *self.group, *self.traced, *partitioned, *self.sort_by) if name not in known]:
            raise ValueError(f"{self.name}: no column {missing}. Existing columns: {sorted(known)}")
        if not self.group:
            object.__setattr__(self, "group", self.key)

    @property
    def layer(self) -> str:
        """The Iceberg namespace: bronze, silver or gold."""
        return self.name.split(".")[0]

    @property
    def short_name(self) -> str:
        """The name without its layer."""
        return self.name.split(".")[1]

    @property
    def keeps_tombstones(self) -> bool:
        """Silver keeps deleted rows as tombstones, so that gold hears of them."""
        return self.layer == "silver"

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the declared columns, without the engine's own."""
        return pa.schema([pa.field(item.name, item.type, nullable=not item.required) for item in self.columns])
