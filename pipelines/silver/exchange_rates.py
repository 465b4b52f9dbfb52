"""silver.exchange_rates: the rate to the base currency of every day and currency, and how a day's rate is found."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import polars as pl
import pyarrow as pa

from lakehouse.expectations import within
from lakehouse.step import Grouped, Step
from lakehouse.table import Table, column
from pipelines.bronze.current_rows import current_rows, unreadable_rows
from pipelines.bronze.tables import EXCHANGE_RATES as BRONZE_EXCHANGE_RATES
from pipelines.bronze.tables import EXCHANGE_RATES_KEY
from pipelines.settings import BusinessSettings

EXCHANGE_RATES = Table(
    "silver.exchange_rates",
    doc="Exchange rates to the base currency. A day without a rate has the last one before it.",
    columns=(
        column("rate_date", pa.date32(), "Day (UTC) from which on the rate holds.", required=True),
        column("currency", pa.string(), "Currency, ISO 4217, upper case.", required=True),
        column("to_base", pa.decimal128(18, 8), "Units of the base currency per unit."),
    ),
    key=EXCHANGE_RATES_KEY,
    owner="finance",
    expectations=(within("to_base", Decimal("0.00000001"), None, severity="quarantine"),),
)

RATE = pl.Decimal(18, 8)
_CODE = pl.col("currency").str.strip_chars().str.to_uppercase()


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """The newest row per day and currency; deleted ones are gone."""
    return (
        current_rows(frames["rates"], EXCHANGE_RATES_KEY)
        .with_columns(_CODE)
        .sort("_source_position")
        .unique(EXCHANGE_RATES_KEY, keep="last")
        .select(EXCHANGE_RATES.schema.names)
    )


def with_rates(orders: pl.DataFrame, rates: pl.DataFrame, base_currency: str) -> pl.DataFrame:
    """`orders` with `exchange_rate`: the last rate of `currency` on or before `order_date`; 1 for the base currency;
    null when there is none. The order of rows stays."""
    asked = orders.select("currency", "order_date").unique().drop_nulls().sort("order_date")
    known = rates.select("currency", pl.col("rate_date").alias("order_date"), pl.col("to_base").alias("exchange_rate"))
    known = known.drop_nulls().sort("order_date")
    found = asked.join_asof(known, on="order_date", by="currency", strategy="backward", check_sortedness=False)
    joined = orders.join(found, on=["currency", "order_date"], how="left", maintain_order="left")
    is_base = pl.col("currency") == base_currency
    rate = pl.when(is_base).then(pl.lit(1).cast(RATE)).otherwise(pl.col("exchange_rate").cast(RATE))
    return joined.with_columns(rate.alias("exchange_rate"))


STEP = Step(
    target=EXCHANGE_RATES,
    reads={"rates": Grouped(BRONZE_EXCHANGE_RATES, keys=((pl.col("rate_date"), _CODE),), parse=unreadable_rows)},
    transform=transform,
)
