"""The commands of the sandbox: start, step, stop."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output
from lakehouse.settings import home_directory
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from app.sandbox.servers import Addresses


def start(
    orders: Annotated[int, typer.Option(help="Number of orders in the generated history")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed generates the same data")] = 7,
    source_file: Annotated[Path | None, typer.Option("--from", help="Parquet file with the columns of UCI Online Retail")] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Start empty servers: create the tables only")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; use one other than loopback on a private network only")
    ] = "127.0.0.1",
    json: Json = False,
) -> None:
    """Start PostgreSQL, MongoDB and Kafka servers, load data, write the settings file, print the addresses."""
    from app import sandbox

    output, home, settings = Output(json), home_directory(), load_settings()
    with output.progress() as show:
        addresses = sandbox.start(
            home,
            orders=orders,
            seed=seed,
            source_file=source_file,
            empty=empty,
            base_currency=settings.base_currency,
            host=host,
            progress=show,
        )
    shown = {**_without_password(addresses), "settings": str(home / "shopsphere.toml")}
    if json:
        output.json(shown)
    for name, value in shown.items():
        output.say(f"{name:16} {value}")


def step(orders: Annotated[int, typer.Option(help="Number of new orders")] = 200, json: Json = False) -> None:
    """Simulate N more orders."""
    from app import sandbox

    output = Output(json)
    with output.progress() as show:
        addresses = sandbox.step(home_directory(), orders, show)
    if json:
        output.json({"orders": orders, **_without_password(addresses)})
    else:
        output.say(f"{orders:,} more orders. `python -m app run` reads them into the lakehouse.")


def stop(json: Json = False) -> None:
    """Stop the servers; their data is kept for the next start."""
    from app import sandbox

    output, stopped = Output(json), sandbox.stop(home_directory())
    if json:
        output.json({"stopped": stopped})
    else:
        output.say(f"Stopped {', '.join(stopped)}." if stopped else "No sandbox was running.")


def _without_password(addresses: Addresses) -> dict[str, str]:
    """Return the addresses to show. The password, which is a superuser's, is in the settings file."""
    return {name: re.sub(r"(?<=:)[^:@/]+(?=@)", "***", address) for name, address in asdict(addresses).items()}


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Source servers with generated retail data on this machine.")
    for command in (start, step, stop):
        group.command()(command)
    app.add_typer(group, name="sandbox")
