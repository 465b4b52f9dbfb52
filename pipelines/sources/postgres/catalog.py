"""Published tables in the catalog of the source: columns, size and identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from lakehouse.errors import OffsetExpired, SourceError
from lakehouse.source import Position
from pipelines.bronze.tables import POSTGRES_TABLES
from pipelines.settings import PostgresSettings
from pipelines.sources.postgres.errors import resnapshot_hint
from pipelines.sources.postgres.positions import ORIGIN
from pipelines.sources.postgres.types import SourceColumn

ROWS_PER_BLOCK = 80
"""Estimate for a table that was never analyzed."""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table as it is in the source's catalog now.

    splittable  whether it can be read by ranges of blocks
    rows        estimate of the server
    storage     file node, which changes when the table is rewritten
    origin      identity of the table and of its publication: it changes when the table is re-created, or leaves the publication
                and joins it again
    """

    name: str
    columns: tuple[SourceColumn, ...]
    blocks: int
    rows: int
    splittable: bool
    row_filter: str | None
    storage: int
    origin: str = ""

    @property
    def bronze_table(self) -> str:
        """The bronze table that receives its rows."""
        return POSTGRES_TABLES[self.name][0].name


QUERY = """
    SELECT p.tablename, to_jsonb(p)->>'rowfilter', c.relkind = 'r', greatest(c.reltuples, 0)::bigint,
           pg_relation_size(c.oid) / current_setting('block_size')::int, coalesce(pg_relation_filenode(c.oid)::bigint, 0),
           (SELECT json_agg(json_build_array(a.attname, a.atttypid::bigint, a.atttypmod) ORDER BY a.attnum)
            FROM pg_attribute a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
              AND coalesce(to_jsonb(p)->'attnames' ? a.attname, a.attgenerated = '')),
           concat_ws('/', c.oid, b.oid, {joined})
    FROM pg_publication_tables p
    JOIN pg_publication b ON b.pubname = p.pubname
    JOIN pg_namespace n ON n.nspname = p.schemaname
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
    WHERE p.pubname = %s AND p.schemaname = %s AND p.tablename = ANY(%s)
"""
JOINED = "coalesce((SELECT oid FROM pg_publication_rel WHERE prpubid = b.oid AND prrelid = c.oid), ({}), 0)"
"""Which entry of the publication the table belongs to: its own, its schema's, or 0 when all tables are published."""
JOINED_BY_SCHEMA = "SELECT oid FROM pg_publication_namespace WHERE pnpubid = b.oid AND pnnspid = n.oid"


def published_tables(connection: psycopg.Connection[Any], settings: PostgresSettings) -> list[PublishedTable]:
    """Return the published tables for which there is a bronze table, with the published columns."""
    has_schema_publications = connection.info.server_version >= 150_000
    joined = sql.SQL(JOINED).format(sql.SQL(JOINED_BY_SCHEMA if has_schema_publications else "NULL"))
    query = sql.SQL(QUERY).format(joined=joined)
    rows = connection.execute(query, (settings.publication, settings.schema_name, list(POSTGRES_TABLES))).fetchall()
    found = {row[0]: row for row in rows}
    return [
        PublishedTable(
            name=name,
            columns=tuple(SourceColumn(*column) for column in found[name][6] or ()),
            blocks=found[name][4],
            rows=found[name][3] or found[name][4] * ROWS_PER_BLOCK,
            splittable=found[name][2],
            row_filter=found[name][1],
            storage=found[name][5],
            origin=found[name][7],
        )
        for name in POSTGRES_TABLES
        if name in found
    ]


def table_origins(published: Sequence[PublishedTable]) -> dict[str, str]:
    """Return the origin of each published table, by bronze table."""
    return {item.bronze_table: item.origin for item in published}


def check_published(published: Sequence[PublishedTable], settings: PostgresSettings, stored: Mapping[str, Position]) -> None:
    """Raise SourceError when no table is published, or when one that was read is no longer published."""
    if not published:
        raise SourceError(
            f"PostgreSQL: publication '{settings.publication}' has none of the tables "
            f"{', '.join(POSTGRES_TABLES)} of schema '{settings.schema_name}'. "
            f"Add them: ALTER PUBLICATION {settings.publication} ADD TABLE ..."
        )
    names = {item.bronze_table for item in published}
    if dropped := [name for name, (table, _) in POSTGRES_TABLES.items() if table.name in stored and table.name not in names]:
        raise SourceError(
            f"PostgreSQL: {', '.join(dropped)} left publication '{settings.publication}', so changes are being missed. "
            f"Add it: ALTER PUBLICATION {settings.publication} ADD TABLE ..., then: python -m app rebuild "
            f"{' '.join(POSTGRES_TABLES[name][0].name for name in dropped)}"
        )


def check_origins(published: Sequence[PublishedTable], settings: PostgresSettings, continuing: Mapping[str, Position]) -> None:
    """Raise OffsetExpired when a table is not the one that was read, or was not published all the time since."""
    origins = {table: position[ORIGIN] for table, position in continuing.items() if ORIGIN in position}
    if replaced := [item for item in published if origins.get(item.bronze_table, item.origin) != item.origin]:
        raise OffsetExpired(
            f"PostgreSQL: {', '.join(item.name for item in replaced)} was re-created, or left publication "
            f"'{settings.publication}' and joined it again, so changes are missing. "
            + resnapshot_hint(item.bronze_table for item in replaced)
        )
