"""Free text of the sources."""

from __future__ import annotations

import polars as pl


def trimmed(name: str) -> pl.Expr:
    """Return a text column without surrounding white space; an empty text is null."""
    text = pl.col(name).str.strip_chars()
    return pl.when(text != "").then(text)


def comparable_address(name: str) -> pl.Expr:
    """Return a column of addresses in lower case, with single spaces for punctuation. Coarser than `normalise_address`."""
    return pl.col(name).str.to_lowercase().str.replace_all(r"\W+", " ").str.strip_chars()
