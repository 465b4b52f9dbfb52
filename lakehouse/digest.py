"""A digest of a table's business columns: the same whatever the order of rows, the files, or the time of the run."""

from __future__ import annotations

import duckdb

from lakehouse.iceberg.reader import live_rows
from lakehouse.iceberg.table_handle import TableHandle

MODULUS = 2**64


def business_columns(handle: TableHandle) -> list[str]:
    """The columns that count: all but those whose name starts with an underscore, in alphabetical order."""
    return sorted(name for name in handle.reader.schema.names if not name.startswith("_"))


def digest(handle: TableHandle) -> str:
    """'<rows>-<16 hex digits>': the sum, modulo 2^64, of each row's MD5 over its columns' text."""
    columns = business_columns(handle)
    rows, total = 0, 0
    # each value behind its length, so that no value can look like two
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
