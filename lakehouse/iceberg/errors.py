"""Conversion of the exceptions that catalogs raise to ShopSphere's.

Of a catalog's exception only the type is shown, since its text may contain an address with a password, or any other text
from a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from pyiceberg.exceptions import (
    CommitFailedException,
    ForbiddenError,
    NoSuchTableError,
    OAuthError,
    RESTError,
    UnauthorizedError,
    ValidationException,
)
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from lakehouse.errors import CatalogUnreachable, CommitConflict, ShopSphereError

try:
    from botocore.exceptions import BotoCoreError, ClientError

    AWS_ERRORS: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
except ImportError:  # installed only with the Glue catalog
    AWS_ERRORS = ()

REFUSED_ERRORS = (ForbiddenError, OAuthError, UnauthorizedError)
"""The catalog rejects the credentials or rights. A retry does not help."""

NO_RESPONSE_ERRORS: tuple[type[Exception], ...] = (RESTError, RequestException, SQLAlchemyError, ValidationError, *AWS_ERRORS)
"""No response, or none that shows whether the request succeeded. (ValidationError: the response cannot be parsed.)"""

STALE_METADATA = re.compile(
    r"Cannot add snapshot with sequence number|Cannot add a snapshot with first row id|Cannot set \S+ to unknown snapshot"
    r"|Cannot remove \S+ ref with unknown snapshot|[Ss]napshot with snapshot id \d+ does not exist|Cannot find starting snapshot"
)
"""The messages with which PyIceberg refuses to apply an update that another writer's commit has overtaken.

The SQL and Glue catalogs apply updates to the newest metadata. A commit to another branch leaves our requirements fulfilled
and still takes our sequence number, and an expiry removes the snapshots that ours removes.
"""


@contextmanager
def catalog_errors(table: str) -> Iterator[None]:
    """Convert the errors of a request for a table: raise CatalogUnreachable, or ShopSphereError if it is refused."""
    try:
        yield
    except REFUSED_ERRORS as error:
        raise refused_error(table, error) from error
    except NO_RESPONSE_ERRORS as error:
        raise CatalogUnreachable(
            f"{table}: the catalog cannot be reached ({type(error).__name__}). Nothing is lost. Run again when it responds.",
            remedy="debug",
        ) from error


@contextmanager
def committing(table: str) -> Iterator[None]:
    """Convert the errors of a commit to a table.

    Raise CommitConflict if another writer committed first or the response was lost, and ShopSphereError if the catalog
    refuses the commit or its disk is full.
    """
    try:
        yield
    except (CommitFailedException, NoSuchTableError, FileNotFoundError) as error:
        # a file is missing when the snapshot that was loaded has expired since
        raise overtaken_error(table, error) from error
    except REFUSED_ERRORS as error:
        raise refused_error(table, error) from error
    except NO_RESPONSE_ERRORS as error:
        if "full" in (cause := str(getattr(error, "orig", None) or "")):
            raise ShopSphereError(
                f"{table}: the catalog cannot be written: {cause}. Free some space and run again. Nothing is lost."
            ) from error
        raise CommitConflict(
            f"{table}: the catalog is busy or unreachable, so it is unknown whether the commit succeeded "
            f"({type(error).__name__}). Run again: nothing is lost or written twice."
        ) from error
    except (ValueError, ValidationException) as error:
        if not STALE_METADATA.search(str(error)):
            raise
        raise overtaken_error(table, error) from error


def overtaken_error(table: str, error: Exception) -> CommitConflict:
    """Return the error for a commit that another writer's commit has overtaken."""
    return CommitConflict(f"{table}: another writer committed first ({type(error).__name__}). Run again.")


def refused_error(table: str, error: Exception) -> ShopSphereError:
    """Return the error for a request that the catalog refused."""
    return ShopSphereError(
        f"{table}: the catalog refuses the request ({type(error).__name__}). "
        "Correct the credentials or rights in the [catalog] section of the settings.",
        remedy="debug",
    )
