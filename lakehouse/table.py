"""Declarations: tables and their columns. Frozen values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from lakehouse.expectations import Expectation, declaration_error, not_null, unique

TIMESTAMP = pa.timestamp("us", tz="UTC")
MONEY = pa.decimal128(20, 4)

SEQUENCE = "_seq"
GROUP_HASH = "_group_hash"
DELETED = "_deleted"
BOOKKEEPING = (SEQUENCE, GROUP_HASH, DELETED)
"""Columns that the engine adds: sequence of the commit that wrote the row, hash of its group, tombstone flag."""


Personal = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Column:
    """A column: name, Arrow type, documentation.

    personal  the kind of personal value it contains ('email', 'name', ...; see docs/concepts/erasure.md), '' for none. For a
              JSON column: pairs of a path and its kind ('' for none, including everything below the path). Paths that are not
              listed count as personal
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

    Partition no finer than needed: a full build writes a file per partition and bucket, and a lookup opens them all.
    """
    return Partition(column_name, "year")


@dataclass(frozen=True)
class Reference:
    """A foreign key: a column whose non-null values are values of a column of another table."""

    column: str
    table: Table
    to: str


def references(column_name: str, table: Table, to: str = "") -> Reference:
    """Declare a foreign key. `to`: the column of the other table, if its name differs."""
    return Reference(column_name, table, to or column_name)


@dataclass(frozen=True)
class Table:
    """A table of the lakehouse.

    name         'layer.table', e.g. 'silver.orders_unified'
    key          columns that identify a row; empty in bronze, which is append-only
    group        columns that identify the rows recomputed together; part of the key (default: the key)
    tracked      columns whose old values downstream tables need: an update that changes one keeps a before-image, the
                 row with the old value, as a tombstone
    sort_by      order of rows within a data file
    references   foreign keys
    expectations on its rows, in addition to those that columns and key imply: a required column is never null, a key is
                 unique
    named_by     columns of the key that messages may show (default: all of it); none that contains personal data
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    tracked: tuple[str, ...] = ()
    partition_by: tuple[Partition, ...] = ()
    sort_by: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    owner: str = "data platform"
    expectations: tuple[Expectation, ...] = ()
    named_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {item.name for item in self.columns}
        partitioned = tuple(item.column for item in self.partition_by)
        referencing = tuple(item.column for item in self.references)
        named = (*self.key, *self.group, *self.tracked, *partitioned, *self.sort_by, *referencing)
        if missing := [name for name in named if name not in known]:
            raise ValueError(f"{self.name}: no column {missing}. Existing columns: {sorted(known)}")
        if absent := [f"{item.table.name}.{item.to}" for item in self.references if item.to not in item.table.schema.names]:
            raise ValueError(f"{self.name}: no column {absent} to reference.")
        if not self.group:
            object.__setattr__(self, "group", self.key)
        types = {item.name: item.type for item in self.columns}
        if errors := [text for rule in self.rules if (text := declaration_error(rule, self.group, types))]:
            raise ValueError(f"{self.name}: {errors[0]}")

    @property
    def layer(self) -> str:
        """Return the Iceberg namespace: bronze, silver, gold, or operations for the run history."""
        return self.name.split(".")[0]

    @property
    def short_name(self) -> str:
        """Return the name without its layer."""
        return self.name.split(".")[1]

    @property
    def rules(self) -> tuple[Expectation, ...]:
        """Return all expectations: those that required columns and the key imply, then the declared ones."""
        required = tuple(item.name for item in self.columns if item.required)
        by_key = bool(self.key) and set(self.group) <= set(self.key)
        implied = (*((not_null(*required),) if required else ()), *((unique(*self.key),) if by_key else ()))
        return tuple(dict.fromkeys((*implied, *self.expectations)))

    @property
    def quarantines(self) -> bool:
        """Return whether rows that violate an expectation go to quarantine."""
        return any(rule.severity == "quarantine" for rule in self.rules)

    @property
    def keeps_tombstones(self) -> bool:
        """Return whether deleted rows stay as tombstones: in silver, so that downstream tables can process them."""
        return self.layer == "silver"

    @property
    def identifier(self) -> tuple[str, ...]:
        """Return the columns that identify a row for readers: the key of a gold table, if it is never null; else none."""
        never_null = {item.name for item in self.columns if item.required}
        return self.key if self.layer == "gold" and never_null.issuperset(self.key) else ()

    @property
    def schema(self) -> pa.Schema:
        """Return the Arrow schema of the declared columns, without those that the engine adds."""
        return pa.schema([pa.field(item.name, item.type, nullable=not item.required) for item in self.columns])
