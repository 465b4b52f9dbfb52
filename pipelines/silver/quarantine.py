"""silver.quarantine: rows that cannot be read, until they are corrected."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.table import TIMESTAMP, Table, column

QUARANTINE = Table(
    "silver.quarantine",
    doc="Rows of the sources that cannot be read, with the reason and what was received. The engine fills it from what "
    "the steps' parsing rejects; a row leaves when its correction (`python -m app replay`) can be read.",
    columns=(
        column("source_table", pa.string(), "The bronze table that holds the row.", required=True),
        column("source_position", pa.string(), "Its `_source_position` there.", required=True),
        column("reason", pa.string(), "What is wrong: the field and the type met, never the value.", required=True),
        column("original", pa.binary(), "The row, document or message as it was received.", personal="text"),
        column("_source_time", TIMESTAMP, "When it happened, by the source's clock."),
    ),
    key=("source_table", "source_position"),
)
