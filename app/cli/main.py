"""The command line: `python -m app`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer
import typer.core

from app.cli import (
    demo_command,
    docs_command,
    maintain_command,
    model_commands,
    privacy_commands,
    run_commands,
    sandbox_commands,
    serve_commands,
    table_commands,
)
from app.cli.errors import exit_code, raise_on_sigterm
from lakehouse.local_access import close_to_other_users
from lakehouse.settings import home_directory

typer.core.HAS_RICH = False
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="ShopSphere turns a retailer's data in PostgreSQL, MongoDB and Kafka into an Apache Iceberg lakehouse.",
)
COMMANDS = (
    run_commands,
    table_commands,
    maintain_command,
    privacy_commands,
    demo_command,
    docs_command,
    sandbox_commands,
    model_commands,
    serve_commands,
)
"""In the order of `--help`."""


@app.callback()
def main_options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors")] = False) -> None:
    """Options for every command."""


for module in COMMANDS:
    module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    raise_on_sigterm()
    close_to_other_users(home_directory())
    command = partial(app, args=[a for a in arguments if a != "--debug"], prog_name="python -m app", standalone_mode=False)
    return exit_code(command, debug="--debug" in arguments)
