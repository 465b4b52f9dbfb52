"""Anonymises bronze rows by the suppression list: the same function for stored rows and for rows that arrive.

A row belongs to an erased person through one of their accounts or records. In such a row every personal value is replaced,
and values that no declaration covers are dropped. In rows of other people only suppressed values are replaced, and only in
records that began before the erasure. A row that mentions an erased value in a place that no declaration covers loses all
undeclared values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.iceberg.schema import as_arrow
from lakehouse.table import Table
from pipelines.bronze.tables import EVENTS, MARKETPLACE_ORDERS, POSTGRES_KEYS, TABLES
from pipelines.privacy.anonymise_json import anonymise_documents, anonymise_messages, anonymise_scored_order
from pipelines.privacy.anonymise_rows import AnonymisedRows, anonymise_rows, unchanged
from pipelines.privacy.pseudonyms import Digest
from pipelines.privacy.suppression import Suppression
from pipelines.privacy.value_replacer import PersonalValue, ValueReplacer

TABLES_BY_NAME = {table.name: table for table in TABLES}


@dataclass
class Anonymiser:
    """Applies a suppression list to bronze rows. collected, latest_begins: see ValueReplacer; they are not pickled."""

    suppression: Suppression
    collected: set[PersonalValue] | None = None
    latest_begins: dict[Digest, int] | None = None
    _replacer: ValueReplacer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._replacer = ValueReplacer(self.suppression, self.collected, self.latest_begins)

    def __reduce__(self) -> tuple[Any, ...]:
        return Anonymiser, (self.suppression,)

    def __call__(self, table: Table, rows: pl.DataFrame) -> AnonymisedRows:
        """Return the anonymised rows of a bronze table. Applying it twice changes nothing more."""
        if rows.is_empty():
            return unchanged(rows)
        if table.name == EVENTS.name:
            return anonymise_messages(self._replacer, rows)
        if table.name == MARKETPLACE_ORDERS.name:
            return anonymise_documents(self._replacer, rows)
        return anonymise_rows(self._replacer, table, rows) if table.name in POSTGRES_KEYS else unchanged(rows)

    def scored_order(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an anonymised order of a served score."""
        return anonymise_scored_order(self._replacer, row)


@dataclass(frozen=True)
class OnArrival:
    """Anonymises the rows that an ingest is about to store. Picklable."""

    anonymiser: Anonymiser

    def __call__(self, table: str, rows: pa.Table) -> pa.Table:
        """Return the rows of a bronze table, anonymised."""
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        edited = self.anonymiser(TABLES_BY_NAME[table], frame)
        return as_arrow(edited.rows, rows.schema) if edited.changed.any() else rows
