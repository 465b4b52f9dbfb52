"""The condition of a table in a few words, for the freshness page."""

from __future__ import annotations

from dataclasses import dataclass

from lakehouse.status import TableStatus
from pipelines.privacy.suppression import ERASURES
from pipelines.silver.quarantine import QUARANTINE

UP_TO_DATE = ("up to date", "0 changes", "0 messages")
"""Values of `TableStatus.lag` without a lag."""


@dataclass(frozen=True)
class Condition:
    """The condition of a table. good: nothing has to be done."""

    text: str
    good: bool


def condition(table: TableStatus) -> Condition:
    """Return the condition of a table."""
    if table.table == QUARANTINE.name:  # written by the steps that read bronze, so it has no lag
        return Condition(f"{table.rows:,} quarantined rows" if table.rows else "empty", not table.rows)
    if table.table == ERASURES.name:  # written by `erase` alone
        return Condition("up to date" if table.rows else "empty", True)
    if table.last_run is None:
        return Condition("never filled", False)
    return Condition(table.lag, table.lag in UP_TO_DATE)


def severity(table: TableStatus) -> str:
    """Return the CSS class of a table's expectations: good, medium for warnings, high for failures."""
    return "good" if not table.broken else "high" if any(text.startswith("fail") for text in table.broken) else "medium"
