"""Errors for users: each names what failed, the value involved, what was expected and how to fix it.

ShopSphereError            any error that this project raises on purpose (one line, exit code 1)
|- SettingsError           a setting is missing or invalid
|- SourceError             a source is unreachable, or lacks what was requested
|  |- OffsetExpired        records were deleted at the source before they were read
|- SchemaConflict          a source changed the type of a column incompatibly
|- UnknownColumn           a source sent a column that its plan lacks (the engine adds it and retries)
|- CommitConflict          another writer committed first, or the response to a commit was lost; retried
|  |- CatalogUnreachable   the catalog does not respond
|- TableNotFound           the table does not exist
|- MissingFilesError       a file of a table is missing
|- TransientError          the disk, the object store, the catalog or Ray failed; committed data is complete
|- UnforeseenError         an unforeseen exception in one source or table; the others went on
|- QueryError              a SQL statement cannot be run
|- ExpectationsFailed      a staged snapshot violates an expectation and was not published (lakehouse/expectations.py)
|- SandboxError            a sandbox server cannot be started, or is not running
The packages above add their own: StateError in serve/, DemoError in app/, and in ml/ FeatureError, TrainingError,
TrainingSetError, RegistryError, GateRefused, MonitorError and HandbookError.
"""

from __future__ import annotations

from collections.abc import Iterable


class ShopSphereError(Exception):
    """Any error that this project raises on purpose: one line that says how to fix it.

    The message names no command, since the foundation layer knows none. `remedy` names the kind of fix, for which the
    command line adds the command: "run" (a run creates or refreshes what is missing), "rebuild" (re-create the tables
    `remedy_tables` from their source or inputs), "train", "publish", "erase", "status", "debug" (show the underlying error),
    or "" if the message is complete.
    """

    remedy: str = ""
    remedy_tables: tuple[str, ...] = ()

    def __init__(self, *args: object, remedy: str = "", remedy_tables: Iterable[str] = ()) -> None:
        super().__init__(*args)
        if remedy:  # otherwise the class's own
            self.remedy, self.remedy_tables = remedy, tuple(remedy_tables)


class SettingsError(ShopSphereError):
    """A setting is missing or invalid."""


class SourceError(ShopSphereError):
    """A source is unreachable, or lacks what was requested of it."""


class OffsetExpired(SourceError):
    """Records were deleted at the source before they were read."""


class SchemaConflict(ShopSphereError):
    """A source changed the type of a column in a way that cannot be promoted."""

    def __init__(self, table: str, column: str, stored: str, incoming: str, fix: str = "") -> None:
        self.table, self.column = table, column
        super().__init__(
            f"{table}: column '{column}' is {stored}, but the source now sends {incoming}. "
            "Nothing was read beyond this point and nothing is lost. "
            + (fix or f"Change the source back to {stored}, or give the new values a new column name.")
        )


class UnknownColumn(ShopSphereError):
    """A source sent a column that its plan lacks; the engine adds it and retries."""

    def __init__(self, table: str, column: str, type_name: str, arrow_type: object) -> None:
        self.table, self.column, self.arrow_type = table, column, arrow_type
        super().__init__(f"{table}: the source sent column '{column}' ({type_name}), which was not in its plan. Run again.")

    def __reduce__(self) -> tuple[object, ...]:
        return (UnknownColumn, (self.table, self.column, str(self.arrow_type), self.arrow_type))


class CommitConflict(ShopSphereError):
    """Another writer committed to the table first, or the response to a commit was lost.

    A retry must reload the table first: its positions show whether the commit succeeded.
    """


class CatalogUnreachable(CommitConflict):
    """The catalog does not respond. A CommitConflict, so that the work in progress is retried."""


class TableNotFound(ShopSphereError):
    """The table does not exist in the lakehouse."""


class MissingFilesError(ShopSphereError):
    """A file that a table's current snapshot needs is missing."""


class TransientError(ShopSphereError):
    """The disk, the object store, the catalog or Ray failed, and may recover without a change to the project."""


class UnforeseenError(ShopSphereError):
    """An unforeseen exception ended the work on one source or table, and nothing else. `__cause__` is that exception.

    The message leaves the exception's text out, since it may quote values of rows.
    """

    remedy = "debug"

    def __init__(self, table: str, kind: str, place: str) -> None:
        """table: the source or table. kind: the exception's type. place: where it was raised, as file:line, or ''."""
        self.table, self.kind, self.place = table, kind, place
        super().__init__(
            f"{table}: unforeseen {kind}{f' at {place}' if place else ''}. Committed data is complete, nothing else was stopped, "
            "and the next run tries again."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (UnforeseenError, (self.table, self.kind, self.place))


class QueryError(ShopSphereError):
    """A SQL statement cannot be run."""


class SandboxError(ShopSphereError):
    """A sandbox server cannot be started, or is not running."""
