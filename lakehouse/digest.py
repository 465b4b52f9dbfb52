"""A digest of a table's business columns. Independent of row order, files and the time of the run."""

from __future__ import annotations

import duckdb

from lakehouse.iceberg.reader import live_rows
from lakehouse.iceberg.table_handle import TableHandle

MODULUS = 2**64


def business_columns(handle: TableHandle) -> list[str]:
    """Return the columns whose name does not start with an underscore, in alphabetical order."""
    return sorted(name for name in handle.reader.schema.names if not name.startswith("_"))


def digest(handle: TableHandle) -> str:
    """Return '<rows>-<16 hex digits>': the sum, modulo 2^64, of each live row's MD5 over the text of its columns."""
    columns = business_columns(handle)
    rows, total = 0, 0
    # each value is prefixed by its length, so that no two rows have the same text
    text = ", ".join(f"coalesce(length(\"{name}\"::VARCHAR) || ':' || \"{name}\"::VARCHAR, '~')" for name in columns)
    for file in handle.files():
        frame = handle.reader.read([file], columns, live_rows(handle.table, None))
        with duckdb.connect() as connection:
            connection.register("frame", frame.to_arrow())
            query = f"SELECT count(*), coalesce(sum(md5_number_lower(concat({text}))::HUGEINT), 0) FROM frame"
            found = connection.execute(query).fetchone()
        assert found is not None
        rows += int(found[0])
        total = (total + int(found[1])) % MODULUS
    return f"{rows}-{total:016x}"
