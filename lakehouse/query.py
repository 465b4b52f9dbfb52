"""SQL queries over all tables by layer and name, with time travel, on DuckDB.

Time travel: `gold.sales_daily FOR VERSION AS OF <snapshot id>` or `FOR TIMESTAMP AS OF '<time>'`. A version may also be
the name of a branch or tag: `FOR VERSION AS OF 'shopsphere_audit'` is the staged snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import polars as pl
import pyarrow as pa
import sqlglot
from sqlglot import TokenType, exp
from sqlglot.errors import SqlglotError

from lakehouse.errors import QueryError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.reader import live_rows
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.table import BOOKKEEPING, Table


@dataclass(frozen=True)
class AsOfClause:
    """An `AS OF` clause. kind: VERSION or TIMESTAMP."""

    kind: str
    value: str


@dataclass(frozen=True)
class TableReference:
    """A table referenced in a statement, as of an earlier snapshot or time if it has an `AS OF` clause."""

    name: str
    as_of: AsOfClause | None = None


def resolve_snapshot(handle: TableHandle, reference: TableReference) -> int | None:
    """Return the id of the snapshot that a reference selects, None for the current one. Raises QueryError if there is none."""
    as_of = reference.as_of
    if as_of is None:
        return None
    if as_of.kind == "VERSION":
        return _snapshot_of_version(handle, reference.name, as_of.value)
    try:
        moment = datetime.fromisoformat(as_of.value)
    except ValueError:
        raise QueryError(f"'{as_of.value}' is not a time. Expected a time such as '2026-01-31 12:00:00' (UTC).") from None
    limit = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
    if (snapshot_id := handle.snapshot_id_at(limit)) is None:
        raise QueryError(
            f"{reference.name} has no snapshot at or before {as_of.value}, or it has expired. "
            f"The oldest that is left is of {_oldest_time(handle)}."
        )
    return snapshot_id


def _oldest_time(handle: TableHandle) -> str:
    """Return the earliest time of which a snapshot is left."""
    log = handle.iceberg_table.metadata.snapshot_log
    times = [entry.timestamp_ms for entry in log if handle.snapshot_id_at(entry.timestamp_ms) is not None]
    return datetime.fromtimestamp(times[0] / 1000, UTC).isoformat(" ", "milliseconds") if times else "none"


def _snapshot_of_version(handle: TableHandle, name: str, version: str) -> int:
    """Return the snapshot of a branch, a tag or a snapshot id."""
    metadata = handle.iceberg_table.metadata
    if (ref := metadata.refs.get(version)) is not None:
        return ref.snapshot_id
    known = [s.snapshot_id for s in metadata.snapshots]
    if not version.isdigit() or int(version) not in known:
        raise QueryError(
            f"{name} has no snapshot {version}, nor a branch of that name. "
            f"Snapshots: {', '.join(map(str, known[-10:])) or 'none'}."
        )
    return int(version)


def read_rows(handle: TableHandle, snapshot_id: int | None, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return the live rows of a snapshot (None: the current one), without the engine's columns. columns: None for all."""
    reader = handle.reader
    names = [n for n in reader.schema.names if n not in BOOKKEEPING and (columns is None or n in columns)]
    if snapshot_id is None and handle.snapshot is None:
        return reader.read((), names)
    return reader.read(handle.files(snapshot_id=snapshot_id), names, live_rows(handle.table, None))


MARK = "@as-of-"
"""Separates a table's name from the number of its `AS OF` clause while a statement is parsed."""


def extract_time_travel(statement: str) -> tuple[str, list[AsOfClause]]:
    """Remove each `[FOR] VERSION|TIMESTAMP AS OF <literal>` from a statement and mark the name of its table.

    This works on tokens instead of parsing with a dialect that has the clause, since a double-quoted name is a string in
    those. Raises QueryError if a clause does not follow a table's name, and SqlglotError.
    """
    tokens = sqlglot.tokenize(statement, read="duckdb")
    clauses: list[AsOfClause] = []
    parts, end = [], 0
    for n in range(len(tokens) - 3):
        words = [token.text.upper() for token in tokens[n : n + 3]]
        if words[0] not in ("VERSION", "TIMESTAMP") or words[1:] != ["AS", "OF"]:
            continue
        if n and tokens[n - 1].token_type == TokenType.DOT:
            continue  # a column named VERSION or TIMESTAMP
        first = n - 1 if n and tokens[n - 1].text.upper() == "FOR" else n
        last = n + 4 if words[0] == "TIMESTAMP" and tokens[n + 3].text.upper() == "TIMESTAMP" and n + 4 < len(tokens) else n + 3
        name, literal = tokens[first - 1] if first else None, tokens[last]
        if name is None or name.token_type not in (TokenType.VAR, TokenType.IDENTIFIER):
            raise QueryError(f"{words[0]} AS OF must directly follow a table's name: gold.sales_daily FOR {words[0]} AS OF ...")
        if literal.token_type not in (TokenType.STRING, TokenType.NUMBER):
            raise QueryError(f"{words[0]} AS OF needs a literal: a snapshot id, or a time such as '2026-01-31 12:00:00'.")
        parts += [statement[end : name.start], f'"{name.text}{MARK}{len(clauses)}"']
        clauses.append(AsOfClause(words[0], literal.text))
        end = literal.end + 1
    return "".join([*parts, statement[end:]]), clauses


def _table_references(
    tree: exp.Query, tables: Mapping[str, Table], clauses: Sequence[AsOfClause]
) -> dict[TableReference, list[exp.Table]]:
    """Return the tables that a statement references, each with its nodes. Raises QueryError for an unknown table."""
    local = {cte.alias_or_name for cte in tree.find_all(exp.CTE)}
    found: dict[TableReference, list[exp.Table]] = {}
    for node in tree.find_all(exp.Table):
        if (not node.db and node.name in local) or isinstance(node.this, exp.Func):
            continue
        plain, _, number = node.name.partition(MARK)
        name = (f"{node.db}.{plain}" if node.db else plain).lower()
        if name not in tables:
            near = [t for t in tables if t.split(".")[1] == plain.lower()]
            hint = f"Did you mean {near[0]}?" if near else f"Tables: {', '.join(sorted(tables))}."
            raise QueryError(f"There is no table {name}. {hint}")
        if node.args.get("version") or node.args.get("when") or node.args.get("system_time"):
            raise QueryError(f"Time travel is written {name} FOR VERSION AS OF <snapshot> or FOR TIMESTAMP AS OF '<time>'.")
        node.set("this", exp.to_identifier(plain))
        found.setdefault(TableReference(name, clauses[int(number)] if number else None), []).append(node)
    if any(MARK in identifier.name for identifier in tree.find_all(exp.Identifier)):
        raise QueryError("AS OF must directly follow a table's name, before its alias.")
    return found


def _used_columns(tree: exp.Query) -> set[str] | None:
    """Return the names of the columns that a statement uses, in lower case, or None if it may use all."""
    if any(not isinstance(star.parent, exp.Count) for star in tree.find_all(exp.Star)):
        return None
    if tree.find(exp.Pivot, exp.Columns) or any(join.args.get("method") == "NATURAL" for join in tree.find_all(exp.Join)):
        return None  # these use columns without naming them
    if any(alias.args.get("columns") for alias in tree.find_all(exp.TableAlias)):
        return None  # t(a, b): by position
    tables = {table.alias_or_name.lower() for table in tree.find_all(exp.Table)}
    if any(not column.table and column.name.lower() in tables for column in tree.find_all(exp.Column)):
        return None  # a whole row: to_json(t)
    names = {column.name for column in tree.find_all(exp.Column)} | {i.name for i in tree.find_all(exp.Identifier)}
    return {name.lower() for name in names}


def query(lake: Lake, tables: Mapping[str, Table], statement: str) -> pa.Table:
    """Run one SELECT statement and return its result. Raises QueryError, TableNotFound and CatalogUnreachable."""
    tree, clauses = _parse(statement)
    references = _table_references(tree, tables, clauses)
    used = _used_columns(tree)
    for column in tree.find_all(exp.Column):
        # gold.sales_daily.units: DuckDB has the table under its short name only
        column.set("db", None)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'")
        connection.execute("SET enable_external_access=false")
        for number, (reference, nodes) in enumerate(references.items()):
            handle = lake.load(tables[reference.name], create=False)
            columns = None if used is None else [n for n in handle.reader.schema.names if n.lower() in used]
            rows = read_rows(handle, resolve_snapshot(handle, reference), columns or None)
            connection.register(f"t{number}", rows.to_arrow(compat_level=pl.CompatLevel.oldest()))
            for node in nodes:
                _rename_table(node, f"t{number}")
        try:
            return connection.sql(tree.sql(dialect="duckdb")).to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(f"The statement cannot be run: {str(error).splitlines()[0]}") from None


def _parse(statement: str) -> tuple[exp.Query, list[AsOfClause]]:
    """Parse a statement without its `AS OF` clauses; return these too. Raises QueryError unless it is one SELECT."""
    try:
        plain, clauses = extract_time_travel(statement)
        trees = [tree for tree in sqlglot.parse(plain, dialect="duckdb") if tree]
    except SqlglotError as error:
        raise QueryError(f"The statement cannot be read: {str(error).splitlines()[0]}") from None
    if len(trees) != 1 or not isinstance(trees[0], exp.Query):
        raise QueryError("Expected exactly one SELECT statement; a query cannot change the lakehouse.")
    return trees[0], clauses


def _rename_table(node: exp.Table, name: str) -> None:
    """Let a node of a statement refer to another table; its sample, pivot and joins stay attached to it."""
    if not node.alias:
        node.set("alias", exp.TableAlias(this=exp.to_identifier(node.name, quoted=True)))
    node.set("this", exp.to_identifier(name))
    node.set("db", None)
    node.set("catalog", None)
