"""Errors on the command line: one line, with the command that fixes them."""

from __future__ import annotations

import re
from pathlib import Path

from app.cli.errors import REMEDIES, describe
from lakehouse.errors import ShopSphereError

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_of_a_remedy_is_appended() -> None:
    error = ShopSphereError("gold.sales_daily has lost a file.", remedy="rebuild", remedy_tables=("gold.sales_daily",))
    assert describe(error) == "gold.sales_daily has lost a file. Run `python -m app rebuild gold.sales_daily`."
    assert describe(ShopSphereError("That is all.")) == "That is all."


def test_every_remedy_has_a_command() -> None:
    sources = [
        file.read_text() for package in ("lakehouse", "pipelines", "ml", "serve") for file in (ROOT / package).rglob("*.py")
    ]
    used = {found for text in sources for found in re.findall(r'\bremedy = "(\w+)"|\bremedy="(\w+)"', text)}
    names = {name for pair in used for name in pair if name}
    assert names
    assert names <= REMEDIES.keys()


def test_an_unexpected_error_names_its_type_and_the_first_line() -> None:
    assert describe(ValueError("wrong\nsecond line")).startswith("ValueError: wrong. Run again with --debug")
