"""What catalogs raise when they refuse or cannot be reached, in our words: nothing of it is shown but its kind, since
the text may hold an address with a password, or whatever a server chose to say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from pyiceberg.exceptions import ForbiddenError, OAuthError, RESTError, UnauthorizedError
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from lakehouse.errors import CatalogUnreachable, ShopSphereError

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


def refused(name: str, error: Exception) -> ShopSphereError:
    """The error of a catalog that said no."""
    return ShopSphereError(
        f"{name}: the catalog refuses what it was asked ({type(error).__name__}; --debug shows more). "
        "Correct the credentials or rights in the [catalog] section of the settings."
    )
