"""Errors of MongoDB as SourceError: one line, without the password, with a way to fix them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bson.errors import InvalidBSON
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError, ServerSelectionTimeoutError
from pymongo.uri_parser import parse_uri

from lakehouse.errors import OffsetExpired, SourceError
from pipelines.bronze.tables import MARKETPLACE_ORDERS
from pipelines.settings import MongoSettings

RESUME_TOKEN_ERRORS = frozenset({286, 280, 260, 222})
"""ChangeStreamHistoryLost, ChangeStreamFatalError, InvalidResumeToken, CloseChangeStream."""
HINTS = {18: "Correct user and password in mongo.uri.", 13: "Let the user read the collection and its change stream."}
"""How to fix an error, by code: AuthenticationFailed, Unauthorized."""


@contextmanager
def mongo_errors(settings: MongoSettings, hosts: str, timeout_seconds: int) -> Iterator[None]:
    """Raise SourceError for errors of the server and the driver, OffsetExpired when the server refuses the resume token."""
    uri = settings.uri.get_secret_value()
    collection = f"{hosts}, collection '{settings.database}.{settings.collection}'"
    try:
        yield
    except ServerSelectionTimeoutError:
        raise SourceError(
            f"MongoDB: no server answered at {hosts} within {timeout_seconds} s. Check that it is running and that mongo.uri "
            "(SHOPSPHERE_MONGO__URI) is correct."
        ) from None
    except OperationFailure as error:
        if error.code in RESUME_TOKEN_ERRORS:
            raise resume_token_expired(f"error code {error.code}") from None
        message = _redact(str((error.details or {}).get("errmsg", error)), uri)
        raise SourceError(f"MongoDB: {collection}: {message}. {HINTS.get(error.code or 0, 'Run again.')}") from None
    except ConnectionFailure as error:
        raise SourceError(f"MongoDB: the connection to {hosts} was lost ({type(error).__name__}). Run again.") from None
    except (PyMongoError, InvalidBSON) as error:
        raise SourceError(f"MongoDB: {collection}: {_redact(str(error), uri)}. Run again.") from None


def resume_token_expired(reason: str) -> OffsetExpired:
    """Return the error for a resume token after which changes may be missing."""
    table = MARKETPLACE_ORDERS.name
    return OffsetExpired(
        f"MongoDB: the resume token of {table} is no longer valid ({reason}), so changes may be missing. "
        f"Re-snapshot the collection: python -m app rebuild {table}. To prevent this, run more often or keep a longer oplog."
    )


def _redact(text: str, uri: str) -> str:
    """Return the text on one line, without the password."""
    password = parse_uri(uri).get("password")
    if password:
        text = text.replace(str(password), "***")
    return " ".join(text.split())[:500].rstrip(".")
