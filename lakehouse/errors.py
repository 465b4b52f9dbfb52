"""Errors people see: each names the thing, what was expected, and the way out.

ShopSphereError            anything this project raises on purpose (one line, exit code 1)
|- SettingsError           a setting is missing or wrong
|- SourceError             a source cannot be reached, or does not hold what was asked
|  |- OffsetExpired           records were deleted at the source before they were read
|- SchemaConflict          a source changed the type of a column incompatibly
|- UnknownColumn           a column was met that the plan did not know (the engine adds it and retries)
|- CommitConflict          another writer committed first, or the answer to a commit was lost: to be tried again
|  |- CatalogUnreachable   the catalog does not answer
|- TableNotFound           no such table
|- MissingFilesError            a table has lost a file
|- TransientError                  the disk, the object store, the catalog or Ray failed; what was committed is whole
|- QueryError              a SQL statement cannot be run
|- ExpectationsFailed      a build broke an expectation and was not published (lakehouse/expectations.py)
|- SandboxError            a sandbox server cannot be started, or is not running
In ml/: FeatureError, TrainingError, RegistryError, GateRefused
"""

from __future__ import annotations


class ShopSphereError(Exception):
    """Anything this project raises on purpose: one line, with a way out.

    `remedy` names what resolves the error, so that the command line can add the command that does it: "rebuild" (re-create
    the table from its source or inputs), "run" (run again), "status", or "" when the message says all there is to do.
    """

    remedy: str = ""


class SettingsError(ShopSphereError):
    """A setting is missing or wrong."""


class SourceError(ShopSphereError):
    """A source cannot be reached, or does not hold what was asked of it."""


class OffsetExpired(SourceError):
    """Records were deleted at the source before they were read."""


class SchemaConflict(ShopSphereError):
    """A source changed the type of a column in a way that cannot be widened."""

    def __init__(self, table: str, column: str, established: str, arriving: str, way_out: str = "") -> None:
        self.table, self.column = table, column
        super().__init__(
            f"{table}: column '{column}' is {established}, but the source now sends {arriving}. "
            f"Nothing was read past this point and nothing is lost. "
            + (way_out or f"Change the source back to {established}, or give the new values a new column name.")
        )


class UnknownColumn(ShopSphereError):
    """A source sent a column that the plan did not announce; the engine adds it and tries again."""

    def __init__(self, table: str, column: str, type_name: str, arrow_type: object) -> None:
        self.table, self.column, self.arrow_type = table, column, arrow_type
        super().__init__(f"{table}: the source sent a column '{column}' ({type_name}) that was not announced. Run again.")

    def __reduce__(self) -> tuple[object, ...]:
        return (UnknownColumn, (self.table, self.column, str(self.arrow_type), self.arrow_type))


class CommitConflict(ShopSphereError):
    """Another writer committed to the table first, or the answer to a commit was lost. Trying again begins with loading the
    table, whose positions tell whether the commit arrived."""


class CatalogUnreachable(CommitConflict):
    """The catalog does not answer. A CommitConflict, so that what is under way is tried again."""


class TableNotFound(ShopSphereError):
    """No such table in the lakehouse."""


class MissingFilesError(ShopSphereError):
    """A table has lost a file that its newest snapshot needs."""


class TransientError(ShopSphereError):
    """The disk, the object store, the catalog or Ray failed below us, and may work again by itself."""


class QueryError(ShopSphereError):
    """A SQL statement cannot be run."""


class SandboxError(ShopSphereError):
    """A sandbox server cannot be started, or is not running."""
