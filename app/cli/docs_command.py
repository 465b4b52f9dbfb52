"""The command docs: reference pages generated from the declarations."""

from __future__ import annotations

from typing import Annotated

import typer

from lakehouse.errors import ShopSphereError


def docs(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Only check that the pages are up to date")] = False,
) -> None:
    """Generate docs/reference/ from the declarations: tables, features, settings, commands, metrics, errors."""
    from app.reference.pages import stale_pages, write_pages

    root = context.find_root().command
    if not check:
        print(f"Wrote {', '.join(write_pages(root))}.")
    elif stale := stale_pages(root):
        raise ShopSphereError(f"{', '.join(stale)} differ from the declarations. Run `make docs` and commit the result.")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(docs)
