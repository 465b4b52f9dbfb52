"""The command demo."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output


def demo(
    orders: Annotated[int, typer.Option(help="Number of orders in the generated history")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed of the generated data")] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the source servers running")] = False,
    json: Json = False,
) -> None:
    """End-to-end demo on generated data: servers, sources, bronze, silver, gold, model, answers over HTTP."""
    from app.cli.demo import run_demo

    run_demo(Output(json), orders=orders, seed=seed, keep=keep)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(demo)
