"""Predicates for `Broadcast.affects` and `Lookup.affects`: which rows a change in another table affects."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

Affects = Callable[[pl.DataFrame], pl.Expr]
"""affects(changed rows) -> predicate over the rows that they affect."""


def rows_with(column: str, *, changed: str = "") -> Affects:
    """Return a predicate for the rows whose `column` has a value of the changed rows.

    changed: name of the column in the changed rows, when it differs.
    """

    def affects(changed_rows: pl.DataFrame) -> pl.Expr:
        return pl.col(column).is_in(changed_rows[changed or column].drop_nulls().unique().implode())

    return affects


def rows_priced_since(day: pl.Expr) -> Affects:
    """Return a predicate for the rows that a changed exchange rate converts.

    These have the rate's `currency`, and a `day` on or after the first changed `rate_date`: a rate holds until the next one.
    """

    def affects(changed_rows: pl.DataFrame) -> pl.Expr:
        known = changed_rows.drop_nulls(["currency", "rate_date"])
        first_days = known.group_by("currency").agg(pl.col("rate_date").min()).sort("currency")
        later = [(pl.col("currency") == code) & (day >= first) for code, first in first_days.iter_rows()]
        return pl.any_horizontal(later) if later else pl.lit(False)

    return affects
