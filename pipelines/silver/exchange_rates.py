"""silver.exchange_rates: exchange rates to the base currency by day, and the look-up of the rate of a day."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import Table, column
from pipelines.bronze import tables
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.settings import BusinessSettings

EXCHANGE_RATES = Table(
    "silver.exchange_rates",
    doc="Exchange rates to the base currency. A rate is valid until the next one of the same currency.",
    columns=(
        column("rate_date", pa.date32(), "First day (UTC) on which the rate is valid.", required=True),
        column("currency", pa.string(), "Currency, ISO 4217 code in upper case.", required=True),
        column("to_base", pa.decimal128(18, 8), "Units of the base currency per unit of `currency`."),
    ),
    key=tables.EXCHANGE_RATES_KEY,
    owner="finance",
    expectations=(within("to_base", Decimal("0.00000001"), None, severity="quarantine"),),
)

_RATE = pl.Decimal(18, 8)
_CODE = pl.col("currency").str.strip_chars().str.to_uppercase()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the newest live row per day and currency."""
    return (
        current_rows(frames["rates"], tables.EXCHANGE_RATES_KEY)
        .with_columns(_CODE)
        .sort("_source_position")
        .unique(tables.EXCHANGE_RATES_KEY, keep="last")
        .select(EXCHANGE_RATES.schema.names)
    )


def with_rates(orders: pl.DataFrame, rates: pl.DataFrame, base_currency: str) -> pl.DataFrame:
    """Return the orders with `exchange_rate`: the last rate of `currency` on or before `order_date`.

    The rate of the base currency is 1; it is null when there is none. The order of rows is preserved.
    """
    needed = orders.select("currency", "order_date").unique().drop_nulls().sort("order_date")
    known = rates.select("currency", pl.col("rate_date").alias("order_date"), pl.col("to_base").alias("exchange_rate"))
    known = known.drop_nulls().sort("order_date")
    found = needed.join_asof(known, on="order_date", by="currency", strategy="backward", check_sortedness=False)
    joined = orders.join(found, on=["currency", "order_date"], how="left", maintain_order="left")
    is_base = pl.col("currency") == base_currency
    rate = pl.when(is_base).then(pl.lit(1).cast(_RATE)).otherwise(pl.col("exchange_rate").cast(_RATE))
    return joined.with_columns(rate.alias("exchange_rate"))


STEP = Step(
    target=EXCHANGE_RATES,
    reads={"rates": Grouped(tables.EXCHANGE_RATES, keys=((pl.col("rate_date"), _CODE),), parse=unreadable_rows)},
    transform=transform,
)
