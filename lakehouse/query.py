"""SQL over all tables by layer and name, time travel included, on DuckDB.

Time travel: `gold.sales_daily FOR VERSION AS OF <snapshot id>` or `FOR TIMESTAMP AS OF '<time>'`. A version may also be
the name of a branch or tag: `FOR VERSION AS OF 'audit'` is the build that waits to be published.
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
class Mention:
    """A table named in a statement, perhaps as of an earlier snapshot or moment."""

    name: str
    kind: str = ""
    moment: str = ""


def snapshot_of(handle: TableHandle, mention: Mention) -> int | None:
    """The snapshot that a mention means; None: the current one. Raises QueryError when there is none."""
    if not mention.kind:
        return None
    snapshots = handle.published_snapshots
    if mention.kind == "VERSION":
        if (ref := handle.iceberg_table.metadata.refs.get(mention.moment)) is not None:
            return ref.snapshot_id
        known = [s.snapshot_id for s in handle.iceberg_table.metadata.snapshots]
        if not mention.moment.isdigit() or int(mention.moment) not in known:
            raise QueryError(
                f"{mention.name} has no snapshot {mention.moment}, nor a branch of that name. "
                f"Snapshots: {', '.join(map(str, known[-10:])) or 'none'}."
            )
        return int(mention.moment)
    try:
        moment = datetime.fromisoformat(mention.moment)
    except ValueError:
        raise QueryError(f"'{mention.moment}' is not a time. Write it as '2026-01-31 12:00:00' (UTC).") from None
    limit = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
    before = [s for s in snapshots if s.timestamp_ms <= limit]
    if not before:
        raise QueryError(f"{mention.name} has no snapshot at or before {mention.moment}.")
    return max(before, key=lambda s: (s.timestamp_ms, s.sequence_number or 0)).snapshot_id


def rows_of(handle: TableHandle, snapshot_id: int | None, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The living rows of a snapshot without the engine's bookkeeping columns."""
    reader = handle.reader
    names = [n for n in reader.schema.names if n not in BOOKKEEPING and (columns is None or n in columns)]
    if snapshot_id is None and handle.snapshot is None:
        return reader.read((), names)
    return reader.read(handle.files(snapshot_id=snapshot_id), names, live_rows(handle.table, None))


@dataclass(frozen=True)
class Moment:
    """An `AS OF` clause of a statement."""

    kind: str
    at: str


MARK = "@as-of-"
"""Between a table's name and the number of its `AS OF` clause, while the statement is being read."""


def without_time_travel(statement: str) -> tuple[str, list[Moment]]:
    """The statement with each `[FOR] VERSION|TIMESTAMP AS OF <literal>` taken out and its table's name marked.

    Cut out by token and not left to a dialect that knows the clause: in those a double-quoted name is text. Raises
    QueryError where the clause does not follow a table's name, and SqlglotError.
    """
    tokens = sqlglot.tokenize(statement, read="duckdb")
    moments: list[Moment] = []
    parts, end = [], 0
    for n in range(len(tokens) - 3):
        words = [token.text.upper() for token in tokens[n : n + 3]]
        if words[0] not in ("VERSION", "TIMESTAMP") or words[1:] != ["AS", "OF"]:
            continue
        if n and tokens[n - 1].token_type == TokenType.DOT:
            continue  # a column of that name
        first = n - 1 if n and tokens[n - 1].text.upper() == "FOR" else n
        last = n + 4 if words[0] == "TIMESTAMP" and tokens[n + 3].text.upper() == "TIMESTAMP" and n + 4 < len(tokens) else n + 3
        name, literal = tokens[first - 1] if first else None, tokens[last]
        if name is None or name.token_type not in (TokenType.VAR, TokenType.IDENTIFIER):
            raise QueryError(f"{words[0]} AS OF belongs right behind a table's name: gold.sales_daily FOR {words[0]} AS OF ...")
        if literal.token_type not in (TokenType.STRING, TokenType.NUMBER):
            raise QueryError(f"{words[0]} AS OF needs a literal: a snapshot's number, or a time such as '2026-01-31 12:00:00'.")
        parts += [statement[end : name.start], f'"{name.text}{MARK}{len(moments)}"']
        moments.append(Moment(words[0], literal.text))
        end = literal.end + 1
    return "".join([*parts, statement[end:]]), moments


def _mentions(tree: exp.Query, tables: Mapping[str, Table], moments: Sequence[Moment]) -> dict[Mention, list[exp.Table]]:
    local = {cte.alias_or_name for cte in tree.find_all(exp.CTE)}
    found: dict[Mention, list[exp.Table]] = {}
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
        moment = moments[int(number)] if number else Moment("", "")
        found.setdefault(Mention(name, moment.kind, moment.at), []).append(node)
    if any(MARK in identifier.name for identifier in tree.find_all(exp.Identifier)):
        raise QueryError("AS OF belongs right behind a table's name, before its alias.")
    return found


def _used_columns(tree: exp.Query) -> set[str] | None:
    """The names of columns that the statement mentions; None: all (a star)."""
    if any(not isinstance(star.parent, exp.Count) for star in tree.find_all(exp.Star)):
        return None
    if tree.find(exp.Pivot, exp.Columns) or any(join.args.get("method") == "NATURAL" for join in tree.find_all(exp.Join)):
        return None  # these use columns that they do not name
    if any(alias.args.get("columns") for alias in tree.find_all(exp.TableAlias)):
        return None  # t(a, b): by place
    tables = {table.alias_or_name.lower() for table in tree.find_all(exp.Table)}
    if any(not column.table and column.name.lower() in tables for column in tree.find_all(exp.Column)):
        return None  # a whole row: to_json(t)
    names = {column.name for column in tree.find_all(exp.Column)} | {i.name for i in tree.find_all(exp.Identifier)}
    return {name.lower() for name in names}


def query(lake: Lake, tables: Mapping[str, Table], statement: str) -> pa.Table:
    """Run one SELECT. Raises QueryError with what is wrong and what there is."""
    try:
        plain, moments = without_time_travel(statement)
        trees = [tree for tree in sqlglot.parse(plain, dialect="duckdb") if tree]
    except SqlglotError as error:
        raise QueryError(f"The statement cannot be read: {str(error).splitlines()[0]}") from None
    if len(trees) != 1 or not isinstance(trees[0], exp.Query):
        raise QueryError("Give exactly one SELECT: the lakehouse is read here, never written.")
    tree = trees[0]
    mentions = _mentions(tree, tables, moments)
    used = _used_columns(tree)
    for column in tree.find_all(exp.Column):
        # gold.sales_daily.units: what runs has the table under its name alone
        column.set("db", None)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'")
        connection.execute("SET enable_external_access=false")
        for number, (mention, nodes) in enumerate(mentions.items()):
            handle = lake.load(tables[mention.name], create=False)
            columns = None if used is None else [n for n in handle.reader.schema.names if n.lower() in used]
            rows = rows_of(handle, snapshot_of(handle, mention), columns or None)
            connection.register(f"t{number}", rows.to_arrow(compat_level=pl.CompatLevel.oldest()))
            for node in nodes:
                # what hangs on the table (a sample, a pivot, joins) stays where it is
                if not node.alias:
                    node.set("alias", exp.TableAlias(this=exp.to_identifier(node.name, quoted=True)))
                node.set("this", exp.to_identifier(f"t{number}"))
                node.set("db", None)
                node.set("catalog", None)
        try:
            return connection.sql(tree.sql(dialect="duckdb")).to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(f"The statement cannot be run: {str(error).splitlines()[0]}") from None
