"""What counts as a sale, a return and a purchase: the one definition that all gold tables share."""

from __future__ import annotations

import polars as pl

MONEY = pl.Decimal(20, 4)
NOTHING = pl.lit(0, dtype=MONEY)


def line_revenue() -> list[pl.Expr]:
    """Aggregates over lines (net_base, counts_as_sale): gross_revenue, returns_revenue, net_revenue, unconverted_lines.

    Lines of cancelled orders count for nothing. gross - returns = net, to the last digit.
    """
    # when/then, not filter: it is evaluated once over the whole column, not once per group
    sold, amount = pl.col("counts_as_sale"), pl.col("net_base")
    return [
        pl.when(sold & (amount > NOTHING)).then(amount).sum().cast(MONEY).alias("gross_revenue"),
        pl.when(sold & (amount < NOTHING)).then(-amount).sum().cast(MONEY).alias("returns_revenue"),
        pl.when(sold).then(amount).sum().cast(MONEY).alias("net_revenue"),
        pl.col("net_base").is_null().sum().cast(pl.Int32).alias("unconverted_lines"),
    ]


def is_cancelled() -> pl.Expr:
    """Over orders: the order was cancelled."""
    return (pl.col("status") == "cancelled").fill_null(False)


def is_purchase() -> pl.Expr:
    """Over orders (status, total_amount): bought, neither cancelled nor a credit note (a negative total)."""
    return ~is_cancelled() & (pl.col("total_amount").fill_null(NOTHING) >= NOTHING)
