"""silver.quarantine: rows that cannot be read, until they are corrected, and rows that violate an expectation."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.table import TIMESTAMP, Table, column

QUARANTINE = Table(
    "silver.quarantine",
    doc="Source rows that cannot be read, with the reason and the original. The engine adds the rows that a step's parsing "
    "rejects and removes a row once its correction (`python -m app replay`) can be read. Rows of silver and gold that "
    "violate an expectation of severity quarantine are here too, until the table has a valid version of them.",
    columns=(
        column(
            "source_table",
            pa.string(),
            "Bronze table of the row; for a violated expectation, the table that declares it.",
            required=True,
        ),
        column(
            "source_position",
            pa.string(),
            "`_source_position` of the row; for a violated expectation, its key as JSON.",
            required=True,
        ),
        column(
            "reason",
            pa.string(),
            "The unreadable field and the type found, or the violated expectation; never a value.",
            required=True,
        ),
        column(
            "original",
            pa.binary(),
            "Row, document or message as received; for a violated expectation, the row as JSON.",
            personal="text",
        ),
        column("_source_time", TIMESTAMP, "Time of the change by the clock of the source (UTC)."),
    ),
    key=("source_table", "source_position"),
)
