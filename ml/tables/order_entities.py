"""silver.order_entities: each order as the fraud features read it: its entities, and when it was reported as fraud."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, row_count_drift
from lakehouse.step import Broadcast, Grouped, Lookup, Step
from lakehouse.table import TIMESTAMP, Table, column
from pipelines.affected_rows import rows_with
from pipelines.parsing.text import comparable_address, trimmed
from pipelines.sales import is_ordered_line
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.products import PRODUCTS
from pipelines.silver.users_scd import USERS_SCD

ORDER_ENTITIES = Table(
    "silver.order_entities",
    doc="Orders as the fraud features read them: values known when the order was placed, and one that was not: when it was "
    "reported as fraud.",
    columns=(
        column("order_id", pa.string(), "Order, as in silver.orders_unified.", required=True),
        column("placed_at", TIMESTAMP, "When it was placed.", required=True),
        column("amount", pa.int64(), "Amount in cents of the base currency, rounded half-even; null when the rate is unknown."),
        column(
            "customer",
            pa.string(),
            "The account ('user:<user_id>'), or a marketplace buyer's e-mail or phone, from the order itself.",
            personal="identifier",
        ),
        column("card", pa.string(), "Card fingerprint.", personal="card"),
        column("device", pa.string(), "Device.", personal="device"),
        column("address", pa.string(), "Shipping address in lower case, punctuation as single spaces.", personal="address"),
        column("ip", pa.string(), "Client address.", personal="ip"),
        column("person", pa.string(), "master_user_id: the person, as the identity graph resolves them now."),
        column("account", pa.int64(), "User account."),
        column("account_created_at", TIMESTAMP, "When the account was opened."),
        column("channel", pa.string(), "web, pos or marketplace."),
        column("payment_method", pa.string(), "How it was paid."),
        column("category", pa.string(), "Category with the largest share of the amount; null when unknown."),
        column("known_at", TIMESTAMP, "When it was first reported as fraud; null when it was not."),
    ),
    key=("order_id",),
    # an order whose entity or time changes affects the later orders of its former entity
    tracked=("placed_at", "customer", "card", "device", "address", "ip", "person", "account", "category", "known_at"),
    sort_by=("placed_at", "order_id"),
    owner="risk",
    expectations=(
        accepted("channel", {"web", "pos", "marketplace"}, severity="warn"),
        row_count_drift(0.5),
    ),
)

ORDER_COLUMNS = (
    "order_id",
    "placed_at",
    "total_base",
    "user_id",
    "customer_record",
    "email",
    "phone",
    "card_fingerprint",
    "device_id",
    "shipping_address",
    "ip_address",
    "master_user_id",
    "channel",
    "payment_method",
)

_NORMALISED = comparable_address("shipping_address")
ADDRESS = pl.when(_NORMALISED != "").then(_NORMALISED).alias("address")
"""An address in normalised spelling."""


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the orders with a time, each with its category, account and first fraud report."""
    orders = frames["orders"].filter(pl.col("placed_at").is_not_null())
    reported = (
        frames["chargebacks"]
        .filter(pl.col("reason") == "fraud")
        .group_by("order_ref")
        .agg(pl.col("reported_at").min().alias("known_at"))
    )
    created = frames["users"].group_by("user_id").agg(pl.col("created_at").min().alias("account_created_at"))
    return (
        orders.join(main_categories(frames["items"], frames["products"]), on="order_id", how="left")
        .join(reported, left_on="order_id", right_on="order_ref", how="left")
        .join(created, on="user_id", how="left")
        .select(
            "order_id",
            "placed_at",
            cents(pl.col("total_base")).alias("amount"),
            pl.coalesce(
                pl.when(pl.col("user_id").is_not_null()).then("customer_record"),
                "email:" + pl.col("email"),
                "phone:" + pl.col("phone"),
            ).alias("customer"),
            trimmed("card_fingerprint").alias("card"),
            trimmed("device_id").alias("device"),
            ADDRESS,
            trimmed("ip_address").alias("ip"),
            pl.col("master_user_id").alias("person"),
            pl.col("user_id").alias("account"),
            "account_created_at",
            "channel",
            "payment_method",
            "category",
            "known_at",
        )
    )


def cents(amount: pl.Expr) -> pl.Expr:
    """Return a decimal amount in cents, rounded half-even; exact."""
    tenths = (amount.cast(pl.Decimal(38, 4)) * pl.lit(10_000, pl.Decimal(38, 0))).cast(pl.Int64)
    whole, rest = tenths.floordiv(100), tenths.mod(100)
    up = (rest > 50) | ((rest == 50) & (whole.mod(2) == 1))
    return whole + up.cast(pl.Int64)


def main_categories(items: pl.DataFrame, products: pl.DataFrame) -> pl.DataFrame:
    """Return per order the category with the largest share of the amount; of equal shares, the first by name.

    Lines of a later return are excluded: they were not known when the order was placed.
    """
    return (
        items.filter(is_ordered_line())
        .unique(["order_id", "line_no"])
        .join(products.select("product_id", "category"), on="product_id")
        .drop_nulls("category")
        .group_by("order_id", "category")
        .agg(pl.col("line_amount").fill_null(0).sum().alias("share"))
        .sort("order_id", "share", "category", descending=[False, True, False])
        .unique("order_id", keep="first", maintain_order=True)
        .select("order_id", "category")
    )


STEP = Step(
    target=ORDER_ENTITIES,
    reads={
        "orders": Grouped(ORDERS_UNIFIED, keys=((pl.col("order_id"),),), columns=ORDER_COLUMNS),
        "items": Grouped(
            ORDER_ITEMS_UNIFIED,
            keys=((pl.col("order_id"),),),
            columns=("order_id", "line_no", "product_id", "quantity", "line_amount"),
        ),
        "products": Broadcast(
            PRODUCTS,
            columns=("product_id", "category"),
            affects=rows_with("product_id"),
            through=ORDER_ITEMS_UNIFIED,
            affected_keys=(pl.col("order_id"),),
        ),
        "chargebacks": Lookup(
            CHARGEBACKS,
            on="order_ref",
            values=lambda frames: frames["orders"]["order_id"],
            columns=("order_ref", "reason", "reported_at"),
            affects=rows_with("order_id", changed="order_ref"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("order_id"),),
        ),
        "users": Lookup(
            USERS_SCD,
            on="user_id",
            values=lambda frames: frames["orders"]["user_id"].drop_nulls(),
            columns=("user_id", "created_at"),
            affects=rows_with("account", changed="user_id"),
        ),
    },
    transform=transform,
)
