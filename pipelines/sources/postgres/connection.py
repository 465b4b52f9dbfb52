"""Connections to PostgreSQL."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from lakehouse.errors import SourceError
from pipelines.settings import PostgresSettings

LOCK_TIMEOUT = "30s"


def connect(settings: PostgresSettings, **options: Any) -> psycopg.Connection[Any]:
    """Open a connection on which values print the same whatever the server's defaults are.

    Raises SourceError when postgres.dsn is missing or malformed, and psycopg.Error when the server cannot be reached.
    """
    dsn = settings.dsn.get_secret_value()
    if not dsn:
        raise SourceError(
            "PostgreSQL: postgres.dsn is not set. Set it (SHOPSPHERE_POSTGRES__DSN), or disable the source "
            "(SHOPSPHERE_POSTGRES__ENABLED=false)."
        )
    try:
        configured = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        configured = None
    # otherwise libpq takes a part of the password for the host or the database, and its errors would show it
    if configured is None or _has_unencoded_password(dsn):
        raise SourceError(
            "PostgreSQL: postgres.dsn is not a valid libpq connection string or URI. Write it as "
            "postgresql://user:password@host:5432/shopsphere, with special characters in the password percent-encoded (@ as %40)."
        ) from None
    connection = psycopg.connect(
        dsn,
        autocommit=True,
        **{"connect_timeout": 10, **configured, "client_encoding": "utf8", "application_name": "shopsphere", **options},
    )
    connection.execute(
        "SET datestyle TO 'ISO, YMD'; SET timezone TO 'UTC'; SET intervalstyle TO 'postgres'; SET extra_float_digits TO 1; "
        # rows hidden from the role by a policy would be missing from the initial read and come by the stream: raise an error
        f"SET row_security TO off; SET bytea_output TO 'hex'; SET lock_timeout TO '{LOCK_TIMEOUT}'; SET statement_timeout TO 0; "
        "SET idle_in_transaction_session_timeout TO 0"
    )
    # so that a killed run does not keep the slot busy; not supported on every platform
    with suppress(psycopg.Error):
        connection.execute("SET client_connection_check_interval TO '2s'")
    return connection


def _has_unencoded_password(dsn: str) -> bool:
    """Return whether the password in a URI has an '@' or '/' that is not percent-encoded."""
    _, uri, rest = dsn.partition("://")
    authority, _, path = rest.partition("/")
    return bool(uri) and (authority.count("@") > 1 or "@" in path.partition("?")[0])
