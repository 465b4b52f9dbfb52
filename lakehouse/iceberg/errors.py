"""What catalogs raise when they refuse or cannot be reached, in our words: nothing of it is shown but its kind, since
the text may hold an address with a password, or whatever a server chose to say."""

from __future__ import annotations

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
)
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from lakehouse.errors import CatalogUnreachable, CommitConflict, ShopSphereError

try:
    from botocore.exceptions import BotoCoreError, ClientError

    AWS: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
except ImportError:  # no Glue without it
    AWS = ()

REFUSALS = (ForbiddenError, OAuthError, UnauthorizedError)
"""The catalog knows who asks, or does not want to, and says no: asking again is of no use."""

UNANSWERED: tuple[type[Exception], ...] = (RESTError, RequestException, SQLAlchemyError, ValidationError, *AWS)
"""No answer, or none that tells whether what was asked was done. (ValidationError: the answer cannot be read.)"""


@contextmanager
def catalog_errors(name: str) -> Iterator[None]:
    """Around what asks the catalog for a table. Raises CatalogUnreachable, and ShopSphereError for a refusal."""
    try:
        yield
    except REFUSALS as error:
        raise refused(name, error) from error
    except UNANSWERED as error:
        raise CatalogUnreachable(
            f"{name}: the catalog cannot be reached ({type(error).__name__}; --debug shows more). "
            "Run again when it answers; nothing is lost."
        ) from error


@contextmanager
def committing(name: str) -> Iterator[None]:
    """Around a commit to a table. Raises CommitConflict if anyone was first or the answer was lost, and ShopSphereError for a
    refusal or a full disk."""
    try:
        yield
    except (CommitFailedException, NoSuchTableError, FileNotFoundError) as error:
        # a file is not found when the snapshot that we began from was expired meanwhile
        raise CommitConflict(f"{name}: another writer committed first ({type(error).__name__}). Run again.") from error
    except REFUSALS as error:
        raise refused(name, error) from error
    except UNANSWERED as error:
        if "full" in (cause := str(getattr(error, "orig", None) or "")):
            raise ShopSphereError(
                f"{name}: the catalog cannot be written: {cause}. Make room and run again; nothing is lost."
            ) from error
        raise CommitConflict(
            f"{name}: the catalog is busy or unreachable, and whether the commit arrived is not known "
            f"({type(error).__name__}). Run again: nothing is lost or doubled."
        ) from error


def refused(name: str, error: Exception) -> ShopSphereError:
    """The error of a catalog that said no."""
    return ShopSphereError(
        f"{name}: the catalog refuses what it was asked ({type(error).__name__}; --debug shows more). "
        "Correct the credentials or rights in the [catalog] section of the settings."
    )
