"""How a command ends: exit codes, signals, and one line per error."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType

import typer

from app.cli.output import printable
from lakehouse.errors import ShopSphereError
from lakehouse.transient_errors import as_transient_error

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
"""Exit codes after Ctrl-C and SIGTERM."""
REMEDIES = {
    "run": "Run `python -m app run`.",
    "rebuild": "Run `python -m app rebuild {table}`.",
    "publish": "Inspect the staged snapshot, then run `python -m app publish {table}`.",
    "status": "`python -m app status` shows the tables and their state.",
    "train": "Run `python -m app train`.",
    "debug": "Add --debug to see the underlying error.",
    "erase": "Run `python -m app erase` to finish pending erasures.",
}
"""The sentence for each ShopSphereError.remedy. `{table}` is the error's table, or its tables."""
NO_PARTIAL_DATA = "No partial data was committed. Run the command again to continue."

shown_causes: ContextVar[bool] = ContextVar("shown_causes", default=False)
"""Whether --debug was given."""


class Terminated(BaseException):
    """SIGTERM, for example from `ray job stop`. Unwinds the command as Ctrl-C does, so that its servers and Ray are stopped."""


def raise_on_sigterm() -> None:
    """Raise Terminated on SIGTERM, unless the process already handles that signal."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, on_sigterm)


def exit_code(command: Callable[[], object], *, debug: bool) -> int:
    """Run `command` and return the process's exit code.

    An error becomes one line on standard error and exit code 1. debug: errors are raised instead.
    """
    shown_causes.set(debug)
    try:
        code = command()
        if code == INTERRUPTED:  # Typer turns KeyboardInterrupt into this code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        print(f"Interrupted. {NO_PARTIAL_DATA}", file=sys.stderr)
        return INTERRUPTED
    except (Terminated, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != signal.SIGTERM:  # Ray exits with this code while it starts
            raise
        print(f"Stopped. {NO_PARTIAL_DATA}", file=sys.stderr)
        return TERMINATED
    except Exception as error:
        if debug:
            raise
        if code := _usage_error(error):
            return code
        report(error)
        return 1


def _usage_error(error: Exception) -> int:
    """Print the usage and return the exit code of a command-line usage error; return 0 for any other error."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    return 0


def report(error: BaseException) -> None:
    """Print an error as one line on standard error; with --debug, also the traceback of its cause."""
    print(f"error: {printable(describe(error))}", file=sys.stderr, flush=True)
    if shown_causes.get() and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)


def describe(error: BaseException) -> str:
    """Return an error in one line, with the command that fixes it where there is one."""
    if isinstance(error, ShopSphereError):
        return f"{error} {_remedy(error)}".rstrip()
    if (outage := as_transient_error(error)) is not None:
        return describe(outage)
    first_line = str(error).splitlines()[0][:300] if str(error) else ""
    return f"{type(error).__name__}: {first_line}. Run again with --debug to see the traceback, and please report this error."


def _remedy(error: ShopSphereError) -> str:
    """Return the command that fixes an error, or '' when the message is complete."""
    tables = " ".join(error.remedy_tables) or getattr(error, "table", "TABLE")
    return REMEDIES.get(error.remedy, "").format(table=tables)
