"""Sale, return and purchase: the only definitions, used by every table of silver, gold and the fraud model.

A **sale line** belongs to a known order that is not cancelled (`counts_as_sale`). Only sale lines add to revenue and units.

A **purchase** is an order that is neither cancelled nor a credit note (`is_purchase`). It is the unit of frequency,
retention and customer value.

"Return" has three meanings that differ in their results, because sources record returns in three ways:

- a **return line** (`is_return_line`) is a sale line with a negative amount: it lowers net revenue. A returned item that cost
  nothing is none.
- a **returned order** (`is_returned_order`) has the status 'returned'. Its lines may all be positive: the source then states
  the fact, not the amount.
- a **credit note** (`is_credit_note`) is an order with a negative total, whatever its status: a return booked as an
  order of its own.

What was ordered in the first place, before any return, are the lines with a positive quantity (`is_ordered_line`).
"""

from __future__ import annotations

import polars as pl

from pipelines.parsing.amounts import AMOUNT

ZERO = pl.lit(0, dtype=AMOUNT)


def is_cancelled() -> pl.Expr:
    """Return whether an order is cancelled, over `status`; never null."""
    return (pl.col("status") == "cancelled").fill_null(False)


def is_returned_order() -> pl.Expr:
    """Return whether an order has the status 'returned', over `status`; never null."""
    return (pl.col("status") == "returned").fill_null(False)


def is_credit_note() -> pl.Expr:
    """Return whether an order's total is negative, over `total_amount`; an unknown total is none."""
    return pl.col("total_amount").fill_null(ZERO) < ZERO


def is_purchase() -> pl.Expr:
    """Return whether an order is neither cancelled nor a credit note, over `status` and `total_amount`."""
    return ~is_cancelled() & ~is_credit_note()


def is_return_line() -> pl.Expr:
    """Return whether a line is a sale line with a negative amount, over `counts_as_sale` and `net_base`."""
    return pl.col("counts_as_sale") & (pl.col("net_base") < ZERO)


def is_ordered_line() -> pl.Expr:
    """Return whether a line has a positive quantity, over `quantity`."""
    return pl.col("quantity") > 0


def line_revenue() -> list[pl.Expr]:
    """Return aggregates over lines: gross_revenue, returns_revenue, net_revenue, unconverted_lines.

    The lines have `net_base` and `counts_as_sale`. gross - returns = net, to the last digit. Lines without an exchange rate
    are counted in unconverted_lines and add nothing.
    """
    # when/then, not filter: it is evaluated once over the whole column, not once per group
    is_sale, amount = pl.col("counts_as_sale"), pl.col("net_base")
    return [
        pl.when(is_sale & (amount > ZERO)).then(amount).sum().cast(AMOUNT).alias("gross_revenue"),
        pl.when(is_return_line()).then(-amount).sum().cast(AMOUNT).alias("returns_revenue"),
        pl.when(is_sale).then(amount).sum().cast(AMOUNT).alias("net_revenue"),
        amount.is_null().sum().cast(pl.Int32).alias("unconverted_lines"),
    ]


def units_sold() -> pl.Expr:
    """Return the aggregate `units` over lines: pieces on sale lines, returned pieces subtracted."""
    return pl.when("counts_as_sale").then(pl.col("quantity").cast(pl.Int64)).sum().alias("units")
