"""docs/reference/errors.md: every error that the product raises on purpose."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import lakehouse
import ml
import pipelines
import serve
from app.reference.markdown import GENERATED, table_cell
from lakehouse.errors import ShopSphereError


def _import_all() -> None:
    for package in (lakehouse, pipelines, ml, serve):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _tree(error: type[Exception], depth: int) -> Iterator[tuple[int, type[Exception]]]:
    yield depth, error
    for child in sorted(error.__subclasses__(), key=lambda one: one.__name__):
        if child.__module__.split(".")[0] in {"lakehouse", "pipelines", "ml", "serve"}:
            yield from _tree(child, depth + 1)


def errors_page() -> str:
    """Return the page."""
    _import_all()
    rows = []
    for depth, error in _tree(ShopSphereError, 0):
        summary = (error.__doc__ or "").split("\n\n")[0]
        rows.append(f"| {'&nbsp;&nbsp;' * depth}`{error.__name__}` | `{error.__module__}` | {table_cell(summary)} |")
    lines = [
        GENERATED,
        "# Errors",
        "",
        "An error message names what failed, the value involved, what was expected and how to fix it. Commands print it as one "
        "line and exit with 1. Indented errors are special cases of the one above.",
        "",
        "| error | module | meaning |",
        "|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
