"""Which rows a change elsewhere touches."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl


def rows_with(column: str, *, of: str = "") -> Callable[[pl.DataFrame], pl.Expr]:
    """For `affects`: the rows whose `column` has a value that the changed rows have in `of` (default: the same name)."""

    def affects(changed: pl.DataFrame) -> pl.Expr:
        return pl.col(column).is_in(changed[of or column].drop_nulls().unique().implode())

    return affects
