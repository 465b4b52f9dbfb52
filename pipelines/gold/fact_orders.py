"""gold.fact_orders: one row per order of any channel."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, fresh, row_count_drift, within
from lakehouse.step import Grouped, Lookup, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column, references, year
from pipelines.affected_rows import rows_with
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.dim_date import DIM_DATE, date_key
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.gold.dim_users import DIM_USERS, user_key
from pipelines.sales import ZERO, is_cancelled, is_returned_order, line_revenue, units_sold
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

FACT_ORDERS = Table(
    "gold.fact_orders",
    doc="One row per order of any channel, with the keys of its dimensions, its revenue, and whether it was cancelled, returned "
    "or charged back.",
    columns=(
        column("order_id", pa.string(), "Order id, unique across channels.", required=True),
        column("source_order_id", pa.string(), "Order id in the source system."),
        column("order_date", pa.date32(), "Day on which the order was placed (UTC).", required=True),
        column("date_key", pa.int32(), "order_date as yyyymmdd; refers to dim_date.date_key.", required=True),
        column("placed_at", TIMESTAMP, "When the order was placed (UTC).", required=True),
        column("updated_at", TIMESTAMP, "When the source last changed the order (UTC)."),
        column("channel", pa.string(), "Sales channel: web, pos or marketplace."),
        column("platform", pa.string(), "Name of the marketplace; null in other channels."),
        column("store_id", pa.string(), "Store id; refers to dim_stores.store_id; null for marketplaces."),
        column("user_id", pa.int64(), "User id of the account; null for an order without one."),
        column(
            "user_key",
            pa.string(),
            "Account version at the time of the order; refers to dim_users.user_key. The first version for orders before it, the "
            "last version for orders after the account was closed.",
        ),
        column(
            "master_user_id", pa.string(), "Id of the person; refers to customer_360.master_user_id; null for an anonymous sale."
        ),
        column("country", pa.string(), "Country of the sale, ISO 3166-1 alpha-2 code; null when unknown."),
        column("status", pa.string(), "Status: placed, paid, shipped, delivered, cancelled, returned, or one of a marketplace."),
        column("payment_method", pa.string(), "Payment method; null when unknown."),
        column("currency", pa.string(), "Currency of total_amount, ISO 4217 code."),
        column("total_amount", MONEY, "Order total as stated by the source, in `currency`."),
        column(
            "exchange_rate",
            pa.decimal128(18, 8),
            "Units of the base currency per unit of `currency` on order_date; null when unknown.",
        ),
        column("total_base", MONEY, "total_amount in the base currency; null when the exchange rate is unknown."),
        column("items", pa.int32(), "Number of order lines; 0 when the source lists none.", required=True),
        column("units", pa.int64(), "Pieces sold, returned pieces subtracted; 0 when cancelled.", required=True),
        column("gross_revenue", MONEY, "Sum of the positive lines, base currency; 0 when cancelled.", required=True),
        column(
            "returns_revenue",
            MONEY,
            "Sum of the negative lines as a positive amount, base currency; 0 when cancelled.",
            required=True,
        ),
        column("net_revenue", MONEY, "gross_revenue - returns_revenue, base currency.", required=True),
        column(
            "unconverted_lines",
            pa.int32(),
            "Order lines excluded from revenue because their exchange rate is unknown.",
            required=True,
        ),
        column("is_cancelled", pa.bool_(), "Whether the status is cancelled.", required=True),
        column("is_returned", pa.bool_(), "Whether the status is returned.", required=True),
        column("is_chargeback", pa.bool_(), "Whether at least one chargeback refers to the order.", required=True),
        column("chargebacks", pa.int32(), "Number of chargebacks that refer to the order.", required=True),
        column(
            "chargeback_reason",
            pa.string(),
            "Reason of the first chargeback: fraud, not_received, not_as_described or other; null without one.",
        ),
        column("chargeback_reported_at", TIMESTAMP, "When the first chargeback was reported (UTC); null without one."),
    ),
    key=("order_id",),
    partition_by=(year("order_date"),),
    sort_by=("order_date", "order_id"),
    references=(
        references("date_key", DIM_DATE),
        references("store_id", DIM_STORES),
        references("user_key", DIM_USERS),
        references("master_user_id", CUSTOMER_360),
    ),
    owner="commerce",
    expectations=(
        within("items", 0, None),
        within("gross_revenue", 0, None),
        within("returns_revenue", 0, None),
        accepted("channel", {"web", "pos", "marketplace"}, severity="warn"),
        fresh("placed_at", hours=24),
        row_count_drift(0.5),
    ),
)


def revenue_per_order(lines: pl.DataFrame) -> pl.DataFrame:
    """Return lines, units and revenue of each order."""
    return lines.group_by("order_id").agg(
        pl.len().cast(pl.Int32).alias("items"),
        units_sold(),
        *line_revenue(),
    )


def chargebacks_per_order(chargebacks: pl.DataFrame) -> pl.DataFrame:
    """Return the number of chargebacks of each order, and reason and time of the first."""
    return (
        chargebacks.sort("reported_at", "chargeback_id", nulls_last=True)
        .group_by(pl.col("order_ref").alias("order_id"), maintain_order=True)
        .agg(
            pl.len().cast(pl.Int32).alias("chargebacks"),
            pl.col("reason").first().alias("chargeback_reason"),
            pl.col("reported_at").first().alias("chargeback_reported_at"),
        )
    )


def account_version_per_order(orders: pl.DataFrame, users: pl.DataFrame) -> pl.DataFrame:
    """Return order_id and user_key of the orders with an account: its version at the time of the order."""
    placed = orders.filter(pl.col("user_id").is_not_null()).select("order_id", "user_id", "placed_at").sort("placed_at")
    versions = users.select("user_id", "valid_from", user_key()).sort("valid_from")
    first = versions.unique("user_id", keep="first", maintain_order=True).select("user_id", pl.col("user_key").alias("first_key"))
    return (
        placed.join_asof(
            versions, left_on="placed_at", right_on="valid_from", by="user_id", strategy="backward", check_sortedness=False
        )
        .join(first, on="user_id", how="left")
        .select("order_id", pl.coalesce("user_key", "first_key").alias("user_key"))
    )


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the affected orders with totals of their lines and chargebacks, and their account version."""
    orders = frames["orders"]
    counts, amounts = ("items", "units", "unconverted_lines", "chargebacks"), ("gross_revenue", "returns_revenue", "net_revenue")
    return (
        orders.join(revenue_per_order(frames["lines"]), on="order_id", how="left")
        .join(chargebacks_per_order(frames["chargebacks"]), on="order_id", how="left")
        .join(account_version_per_order(orders, frames["users"]), on="order_id", how="left")
        .with_columns(
            date_key("order_date"),
            is_cancelled().alias("is_cancelled"),
            is_returned_order().alias("is_returned"),
            pl.col("chargebacks").is_not_null().alias("is_chargeback"),
            pl.col(counts).fill_null(0),
            pl.col(amounts).fill_null(ZERO),
        )
        .select(FACT_ORDERS.schema.names)
    )


STEP = Step(
    target=FACT_ORDERS,
    reads={
        "orders": Grouped(
            ORDERS_UNIFIED,
            keys=((pl.col("order_id"),),),
            columns=(
                "order_id",
                "source_order_id",
                "order_date",
                "placed_at",
                "updated_at",
                "channel",
                "platform",
                "store_id",
                "user_id",
                "master_user_id",
                "country",
                "status",
                "payment_method",
                "currency",
                "total_amount",
                "exchange_rate",
                "total_base",
            ),
        ),
        "lines": Grouped(
            ORDER_ITEMS_UNIFIED, keys=((pl.col("order_id"),),), columns=("order_id", "quantity", "net_base", "counts_as_sale")
        ),
        "chargebacks": Grouped(CHARGEBACKS, keys=((pl.col("order_ref"),),)),
        "users": Lookup(
            USERS_SCD,
            on="user_id",
            values=lambda frames: frames["orders"]["user_id"],
            columns=("user_id", "valid_from"),
            affects=rows_with("user_id"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("order_id"),),
        ),
    },
    transform=transform,
)
