"""Errors of PostgreSQL as SourceError: one line, without passwords, with a way to fix them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psycopg
import pyarrow as pa
from psycopg.conninfo import conninfo_to_dict

from lakehouse.errors import CommitConflict, OffsetExpired, SourceError
from pipelines.settings import PostgresSettings

HINTS = {
    "28P01": "Correct user and password in postgres.dsn (SHOPSPHERE_POSTGRES__DSN).",
    "28000": "Correct the user in postgres.dsn, or allow it to connect (pg_hba.conf; the role needs LOGIN and REPLICATION).",
    "3D000": "Correct the database in postgres.dsn (SHOPSPHERE_POSTGRES__DSN).",
    "42501": "The role needs REPLICATION, SELECT on the published tables, and BYPASSRLS if they have row level security.",
    "53300": "Raise max_connections, or use fewer tasks.",
    "53400": "Raise max_replication_slots, or drop an unused slot.",
    "55P03": "A table is locked. Run again when the lock is released.",
}
"""How to fix an error, by SQLSTATE."""


class SlotAdvancedElsewhere(OffsetExpired, CommitConflict):
    """The slot is past all positions: another run committed in the meantime, or another client consumed changes.

    A CommitConflict, so that the run is retried with the current positions. If the slot is still past them, another client
    consumed changes and the error is an OffsetExpired.
    """


@contextmanager
def postgres_errors(settings: PostgresSettings) -> Iterator[None]:
    """Raise SourceError for errors of PostgreSQL, and for rows that cannot be parsed."""
    try:
        yield
    except psycopg.Error as error:
        text = " ".join((error.diag.message_primary or str(error) or type(error).__name__).split())
        for secret in _secrets(settings):
            text = text.replace(secret, "***")
        code = error.sqlstate or ""
        hint = HINTS.get(code or _login_error_code(text))
        if hint is None:
            unreachable = "Check that the server is running and that postgres.dsn (SHOPSPHERE_POSTGRES__DSN) is correct."
            hint = "Run again." if code else unreachable
        raise SourceError(f"PostgreSQL: {text.rstrip('.')}. {hint}") from None
    except pa.ArrowInvalid as error:
        raise SourceError(f"PostgreSQL: rows cannot be parsed: {' '.join(str(error).split())[:300]}") from None


def resnapshot_hint(bronze_tables: Iterable[str]) -> str:
    """Return the sentence that names the command which re-snapshots tables."""
    return f"Re-snapshot the tables: python -m app rebuild {' '.join(sorted(bronze_tables))}"


def _login_error_code(text: str) -> str:
    """Return the SQLSTATE of a failed login, for which libpq has only a message; '' when the message is of another error."""
    if "password authentication failed" in text or "no password supplied" in text:
        return "28P01"
    if "does not exist" in text and "database" in text:
        return "3D000"
    if "permission denied" in text:
        return "42501"
    return "28000" if "role" in text or "pg_hba" in text else ""


def _secrets(settings: PostgresSettings) -> list[str]:
    try:
        options = conninfo_to_dict(settings.dsn.get_secret_value())
    except psycopg.ProgrammingError:
        return []
    return [str(options[name]) for name in ("password", "sslpassword") if options.get(name)]
