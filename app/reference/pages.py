"""The generated pages of docs/reference/: written by `docs`, compared by `docs --check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.reference.command_line import command_line_page
from app.reference.errors import errors_page
from app.reference.features import features_page
from app.reference.metrics import metrics_page
from app.reference.settings import settings_page
from app.reference.star_schema import star_page
from app.reference.tables import tables_page

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = "docs/reference"


def _pages(root: Any) -> dict[str, Callable[[], str]]:
    return {
        f"{DIRECTORY}/tables.md": tables_page,
        f"{DIRECTORY}/star-schema.md": star_page,
        f"{DIRECTORY}/features.md": features_page,
        f"{DIRECTORY}/settings.md": settings_page,
        f"{DIRECTORY}/metrics.md": metrics_page,
        f"{DIRECTORY}/errors.md": errors_page,
        f"{DIRECTORY}/cli.md": lambda: command_line_page(root),
    }


def write_pages(root: Any) -> list[str]:
    """Write the pages and return their names. root: the command that has all others."""
    pages = _pages(root)
    for name, page in pages.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(page(), encoding="utf-8")
    return list(pages)


def stale_pages(root: Any) -> list[str]:
    """Return the names of the pages that differ from what the declarations give."""
    return [
        name
        for name, page in _pages(root).items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != page()
    ]
