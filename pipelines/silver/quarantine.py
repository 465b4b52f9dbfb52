"""silver.quarantine: rows that cannot be read, until they are corrected, and rows that break an expectation."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.table import TIMESTAMP, Table, column

QUARANTINE = Table(
    "silver.quarantine",
    doc="Rows of the sources that cannot be read, with the reason and what was received. The engine fills it from what "
    "the steps' parsing rejects; a row leaves when its correction (`python -m app replay`) can be read. Rows of silver and gold "
    "that break an expectation of severity quarantine are here too, until their table is given a good version.",
    columns=(
        column(
            "source_table",
            pa.string(),
            "The bronze table that holds the row; the table that it was to be in, where it breaks an expectation.",
            required=True,
        ),
        column(
            "source_position",
            pa.string(),
            "Its `_source_position` there; the key as JSON, where it breaks an expectation.",
            required=True,
        ),
        column(
            "reason",
            pa.string(),
            "What is wrong: the field and the type met, or the expectation; never the value.",
            required=True,
        ),
        column(
            "original",
            pa.binary(),
            "The row, document or message as it was received; as JSON, where it breaks an expectation.",
            personal="text",
        ),
        column("_source_time", TIMESTAMP, "When it happened, by the source's clock."),
    ),
    key=("source_table", "source_position"),
)
