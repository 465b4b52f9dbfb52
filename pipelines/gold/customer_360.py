"""gold.customer_360: one row per person, over all their accounts and channels.

Values that depend on the current date are stored as timestamps to compare it with, never as "days since": a row changes
only when its customer does. The predictions use one closed formula, which needs no training and no other customer:

    expected gap (days) = (days from first to last purchase + PRIOR_GAP_DAYS) / purchases

This is the average gap with one additional gap of PRIOR_GAP_DAYS, so it is defined from the first purchase on. An active
customer who buys at this pace stays silent for d days with probability exp(-d / expected gap). The churn probability on
a given day is therefore 1 - exp(-days since last_order_at / expected_gap_days); it reaches 95% at `churn_after`.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from lakehouse.expectations import accepted, row_count_drift, within
from lakehouse.step import Grouped, Lookup, Step
from lakehouse.table import MONEY, TIMESTAMP, Table, column
from pipelines.affected_rows import rows_with
from pipelines.durations import MICROSECONDS_PER_DAY
from pipelines.parsing.amounts import AMOUNT
from pipelines.sales import ZERO, is_cancelled, is_purchase, is_returned_order, line_revenue
from pipelines.settings import BusinessSettings
from pipelines.silver.chargebacks import CHARGEBACKS
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.users_scd import USERS_SCD

PRIOR_GAP_DAYS = 90
HORIZON_DAYS = 365
CHURN_GAPS = 3
"""Expected gaps of silence after which a customer counts as lost: only exp(-3) = 5% of active customers are silent that long."""

FREQUENCY_BINS = (2, 4, 7, 13)
"""Numbers of purchases at which the frequency score becomes 2, 3, 4 and 5."""
MONETARY_BINS = (100, 500, 1_000, 5_000)
"""Net revenue (base currency) at which the monetary score becomes 2, 3, 4 and 5."""

CHANNELS = ("marketplace", "pos", "web")

CUSTOMER_360 = Table(
    "gold.customer_360",
    doc="One row per person (master user): profile, orders, revenue and predictions over all accounts and channels. "
    "A purchase is an order that is neither cancelled nor a credit note. Amounts are in the base currency.",
    columns=(
        column("master_user_id", pa.string(), "Id of the person, from silver.identity_graph.", required=True),
        column(
            "primary_user_id",
            pa.int64(),
            "User id of the primary account: most verified contacts, then last changed; null without an open account.",
        ),
        column("name", pa.string(), "Name of the primary account, else of another account; null when unknown.", personal="name"),
        column(
            "email",
            pa.string(),
            "E-mail address of the primary account, else of another account, else of the last marketplace order.",
            personal="email",
        ),
        column("phone", pa.string(), "Phone number (E.164), chosen like email.", personal="phone"),
        column("city", pa.string(), "City of the primary account, else of another account.", personal="city"),
        column("country", pa.string(), "Country of the primary account, else of another account, else of the last order."),
        column("customer_since", TIMESTAMP, "Earliest record or order of the person in any source (UTC)."),
        column("loyalty_ids", pa.string(), "Loyalty card numbers, comma-separated; null without one.", personal="loyalty"),
        column("accounts", pa.int32(), "Open user accounts.", required=True),
        column("records", pa.int32(), "Source records (accounts and marketplace orders) resolved to the person.", required=True),
        column(
            "apparent_customers",
            pa.int32(),
            "Number of customers that single-channel systems would count: accounts, plus contacts per marketplace.",
            required=True,
        ),
        column("names", pa.int32(), "Distinct names on open accounts.", required=True),
        column("emails", pa.int32(), "Distinct e-mail addresses ever seen.", required=True),
        column("phones", pa.int32(), "Distinct phone numbers ever seen.", required=True),
        column("addresses", pa.int32(), "Distinct addresses ever seen.", required=True),
        column("devices", pa.int32(), "Distinct devices ever seen.", required=True),
        column("cards", pa.int32(), "Distinct payment cards on orders.", required=True),
        column("countries", pa.int32(), "Distinct countries of orders.", required=True),
        column(
            "probable_links", pa.int32(), "Records with a probabilistic match, as opposed to a shared identifier.", required=True
        ),
        column("first_order_at", TIMESTAMP, "First purchase (UTC); null without one."),
        column("last_order_at", TIMESTAMP, "Last purchase (UTC), the recency of RFM; null without one."),
        column("orders", pa.int32(), "Purchases, the frequency of RFM.", required=True),
        column("cancelled_orders", pa.int32(), "Cancelled orders.", required=True),
        column(
            "returned_orders", pa.int32(), "Orders with status returned, including credit notes with that status.", required=True
        ),
        column(
            "gross_revenue", MONEY, "Sum of the positive lines of orders that are not cancelled, base currency.", required=True
        ),
        column(
            "returns_revenue",
            MONEY,
            "Sum of the negative lines of orders that are not cancelled, as a positive amount, base currency.",
            required=True,
        ),
        column(
            "net_revenue",
            MONEY,
            "gross_revenue - returns_revenue, base currency: historic lifetime value and the monetary value of RFM.",
            required=True,
        ),
        column(
            "unconverted_lines",
            pa.int32(),
            "Order lines excluded from revenue because their exchange rate is unknown.",
            required=True,
        ),
        column("average_order_value", MONEY, "net_revenue / orders, base currency; null without a purchase."),
        column("orders_web", pa.int32(), "Purchases in the web shop.", required=True),
        column("orders_pos", pa.int32(), "Purchases in stores.", required=True),
        column("orders_marketplace", pa.int32(), "Purchases on marketplaces.", required=True),
        column("channels", pa.int32(), "Distinct channels of purchases.", required=True),
        column(
            "favourite_channel",
            pa.string(),
            "Channel with the most purchases, the first by name on a tie; null without a purchase.",
        ),
        column("platforms", pa.string(), "Marketplaces with an order, comma-separated; null without one."),
        column(
            "average_days_between_orders",
            pa.float64(),
            "Days from first to last purchase / (purchases - 1); null with fewer than 2 purchases.",
        ),
        column(
            "expected_gap_days",
            pa.float64(),
            f"(Days from first to last purchase + {PRIOR_GAP_DAYS}) / purchases. Churn probability on a day: "
            "1 - exp(-days since last_order_at / expected_gap_days).",
        ),
        column("expected_next_order_at", TIMESTAMP, "last_order_at + expected gap (UTC); null without a purchase."),
        column(
            "churn_after",
            TIMESTAMP,
            f"last_order_at + {CHURN_GAPS} expected gaps (UTC): a customer without a purchase until then is lost with 95% "
            "probability.",
        ),
        column(
            "predicted_lifetime_value",
            MONEY,
            f"net_revenue plus the revenue expected in the {HORIZON_DAYS} days after last_order_at at the same pace: "
            f"net_revenue x (1 + {HORIZON_DAYS} / (days from first to last purchase + {PRIOR_GAP_DAYS})); "
            "valid for a customer before `churn_after`.",
        ),
        column(
            "frequency_score",
            pa.int32(),
            f"RFM frequency score, 1 to 5: 1, plus 1 at each of {FREQUENCY_BINS} purchases; null without a purchase.",
        ),
        column(
            "monetary_score",
            pa.int32(),
            f"RFM monetary score, 1 to 5: 1, plus 1 at each of {MONETARY_BINS} of net_revenue; null without a purchase.",
        ),
        column("chargebacks", pa.int32(), "Chargebacks on the orders of the person.", required=True),
        column("fraud_chargebacks", pa.int32(), "Chargebacks with reason fraud.", required=True),
    ),
    key=("master_user_id",),
    owner="customer",
    expectations=(
        within("orders", 0, None),
        within("gross_revenue", 0, None),
        within("returns_revenue", 0, None),
        accepted("favourite_channel", CHANNELS),
        row_count_drift(0.5),
    ),
)

COUNT_COLUMNS = tuple(item.name for item in CUSTOMER_360.columns if item.required and item.type == pa.int32())
REVENUE_COLUMNS = ("gross_revenue", "returns_revenue", "net_revenue")


def count(expression: pl.Expr, name: str) -> pl.Expr:
    """Return a count as a 32-bit integer column."""
    return expression.cast(pl.Int32).alias(name)


def distinct_values(name: str) -> pl.Expr:
    """Return the number of distinct values, not counting null."""
    return count(pl.col(name).drop_nulls().n_unique(), name)


def score(value: pl.Expr, bins: tuple[int, ...]) -> pl.Expr:
    """Return 1, plus 1 for each bound that is reached."""
    return pl.sum_horizontal(pl.lit(1, dtype=pl.Int32), *((value >= bound).cast(pl.Int32) for bound in bins))


def comma_separated(name: str) -> pl.Expr:
    """Return the distinct values, sorted and comma-separated; null when there is none."""
    values = pl.col(name).drop_nulls().unique().sort()
    return pl.when(values.len() > 0).then(values.str.join(",")).alias(name)


def profiles(users: pl.DataFrame) -> pl.DataFrame:
    """Return per person the primary account, and each attribute from the first account, in order of rank, that has it."""
    verified = pl.col("email_verified", "phone_verified").fill_null(False).cast(pl.Int8)
    ranked = (
        users.filter(pl.col("is_current") & pl.col("master_user_id").is_not_null())
        .with_columns(pl.sum_horizontal(verified).alias("proofs"))
        .sort("proofs", "updated_at", "user_id", descending=[True, True, False], nulls_last=True)
    )
    return ranked.group_by("master_user_id", maintain_order=True).agg(
        pl.col("user_id").first().alias("primary_user_id"),
        *(pl.col(name).drop_nulls().first() for name in ("name", "email", "city", "country")),
        pl.col("phone_number").drop_nulls().first().alias("phone"),
        comma_separated("loyalty_id").alias("loyalty_ids"),
        count(pl.len(), "accounts"),
        count(pl.col("name").drop_nulls().str.to_lowercase().n_unique(), "names"),
    )


def identifiers(graph: pl.DataFrame) -> pl.DataFrame:
    """Return per person the number of records and of identifiers of each kind."""

    def nodes(kind: str, name: str) -> pl.Expr:
        return count(pl.col("node").filter(pl.col("kind") == kind).n_unique(), name)

    probable = (pl.col("kind") == "match") & (pl.col("status") == "linked")
    return graph.group_by("master_user_id").agg(
        count(pl.col("record_id").n_unique(), "records"),
        nodes("email", "emails"),
        nodes("phone", "phones"),
        nodes("address", "addresses"),
        nodes("device", "devices"),
        count(pl.col("record_id").filter(probable).n_unique(), "probable_links"),
        pl.col("first_seen").min(),
    )


def purchases(orders: pl.DataFrame, lines: pl.DataFrame, chargebacks: pl.DataFrame) -> pl.DataFrame:
    """Return per person orders, revenue, channels and chargebacks."""
    revenue = lines.group_by("order_id").agg(line_revenue())
    charged = chargebacks.group_by(pl.col("order_ref").alias("order_id")).agg(
        count(pl.len(), "chargebacks"), count((pl.col("reason") == "fraud").sum(), "fraud_chargebacks")
    )
    bought = pl.col("purchase")
    contact = pl.when(pl.col("channel") == "marketplace").then(
        pl.struct("platform", pl.coalesce("email", "phone", "order_id").alias("contact"))
    )
    return (
        orders.filter(pl.col("master_user_id").is_not_null())
        .join(revenue, on="order_id", how="left")
        .join(charged, on="order_id", how="left")
        .with_columns(is_purchase().alias("purchase"), contact.alias("contact"))
        .sort("placed_at", "order_id", descending=True)
        .group_by("master_user_id", maintain_order=True)
        .agg(
            pl.col("email").drop_nulls().first().alias("order_email"),
            pl.col("phone").drop_nulls().first().alias("order_phone"),
            pl.col("country").drop_nulls().first().alias("order_country"),
            pl.col("placed_at").min().alias("first_placed_at"),
            pl.col("placed_at").filter(bought).min().alias("first_order_at"),
            pl.col("placed_at").filter(bought).max().alias("last_order_at"),
            count(bought.sum(), "orders"),
            count(is_cancelled().sum(), "cancelled_orders"),
            count(is_returned_order().sum(), "returned_orders"),
            *(pl.col(name).sum().cast(AMOUNT) for name in REVENUE_COLUMNS),
            count(pl.col("unconverted_lines").sum(), "unconverted_lines"),
            *(count((bought & (pl.col("channel") == name)).sum(), f"orders_{name}") for name in CHANNELS),
            count(pl.col("channel").filter(bought).n_unique(), "channels"),
            comma_separated("platform").alias("platforms"),
            count(pl.col("contact").drop_nulls().n_unique(), "contacts"),
            distinct_values("card_fingerprint").alias("cards"),
            distinct_values("country").alias("countries"),
            count(pl.col("chargebacks").sum(), "chargebacks"),
            count(pl.col("fraud_chargebacks").sum(), "fraud_chargebacks"),
        )
    )


def favourite_channel() -> pl.Expr:
    """Return the channel with the most purchases. CHANNELS is sorted, so the first by name wins a tie."""
    most = pl.max_horizontal(f"orders_{name}" for name in CHANNELS)
    choice = pl.lit(None, dtype=pl.String)
    for name in reversed(CHANNELS):
        choice = pl.when((most > 0) & (pl.col(f"orders_{name}") == most)).then(pl.lit(name)).otherwise(choice)
    return choice.alias("favourite_channel")


def with_predictions(customers: pl.DataFrame) -> pl.DataFrame:
    """Return the customers with averages, predictions and scores; all null without a purchase."""
    bought = pl.col("orders") > 0
    span = pl.col("last_order_at") - pl.col("first_order_at")
    microseconds, prior = span.dt.total_microseconds(), PRIOR_GAP_DAYS * MICROSECONDS_PER_DAY
    orders = pl.col("orders").cast(pl.Int64)
    gap = ((microseconds + prior) // pl.when(bought).then(orders)).cast(pl.Duration("us"))
    net = pl.col("net_revenue")
    whole_days = span.dt.total_days() + PRIOR_GAP_DAYS
    return customers.with_columns(
        (net / pl.when(bought).then("orders")).cast(AMOUNT).alias("average_order_value"),
        favourite_channel(),
        # one division, by a column: polars divides a float by a literal as x * (1 / literal) unless the frame has one row,
        # so the last digit would depend on the other customers in the frame
        pl.when(orders > 1).then(microseconds / ((orders - 1) * MICROSECONDS_PER_DAY)).alias("average_days_between_orders"),
        pl.when(bought).then((microseconds + prior) / (orders * MICROSECONDS_PER_DAY)).alias("expected_gap_days"),
        (pl.col("last_order_at") + gap).alias("expected_next_order_at"),
        (pl.col("last_order_at") + gap * CHURN_GAPS).alias("churn_after"),
        (net + net * HORIZON_DAYS / whole_days).cast(AMOUNT).alias("predicted_lifetime_value"),
        pl.when(bought).then(score(pl.col("orders"), FREQUENCY_BINS)).alias("frequency_score"),
        pl.when(bought).then(score(net, MONETARY_BINS)).alias("monetary_score"),
    )


def transform(frames: Mapping[str, pl.DataFrame], context: BusinessSettings) -> pl.DataFrame:
    """Return the affected people: those with an open account, an order or a record in the identity graph."""
    parts = (
        identifiers(frames["identity"].filter(pl.col("master_user_id").is_not_null())),
        profiles(frames["users"]),
        purchases(frames["orders"], frames["lines"], frames["chargebacks"]),
    )
    people = pl.concat([part.select("master_user_id") for part in parts]).unique()
    for part, suffix in zip(parts, ("_graph", "_user", "_order"), strict=True):
        people = people.join(part, on="master_user_id", how="left", suffix=suffix)
    people = people.with_columns(
        pl.coalesce("email", "order_email").alias("email"),
        pl.coalesce("phone", "order_phone").alias("phone"),
        pl.coalesce("country", "order_country").alias("country"),
        pl.min_horizontal("first_seen", "first_placed_at").alias("customer_since"),
        pl.sum_horizontal(pl.col("accounts", "contacts").fill_null(0)).cast(pl.Int32).alias("apparent_customers"),
    ).with_columns(pl.col(COUNT_COLUMNS).fill_null(0), pl.col(REVENUE_COLUMNS).fill_null(ZERO))
    return with_predictions(people).select(CUSTOMER_360.schema.names).sort("master_user_id")


STEP = Step(
    target=CUSTOMER_360,
    reads={
        "orders": Grouped(
            ORDERS_UNIFIED,
            keys=((pl.col("master_user_id"),),),
            columns=(
                "order_id",
                "master_user_id",
                "channel",
                "platform",
                "status",
                "country",
                "total_amount",
                "card_fingerprint",
                "email",
                "phone",
                "placed_at",
            ),
        ),
        "users": Grouped(
            USERS_SCD,
            keys=((pl.col("master_user_id"),),),
            columns=(
                "user_id",
                "master_user_id",
                "is_current",
                "name",
                "email",
                "email_verified",
                "phone_number",
                "phone_verified",
                "city",
                "country",
                "loyalty_id",
                "updated_at",
            ),
        ),
        "identity": Grouped(
            IDENTITY_GRAPH,
            keys=((pl.col("master_user_id"),),),
            columns=("record_id", "node", "kind", "status", "master_user_id", "first_seen"),
        ),
        "lines": Lookup(
            ORDER_ITEMS_UNIFIED,
            on="order_id",
            values=lambda frames: frames["orders"]["order_id"],
            columns=("order_id", "net_base", "counts_as_sale"),
            affects=rows_with("order_id"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("master_user_id"),),
        ),
        "chargebacks": Lookup(
            CHARGEBACKS,
            on="order_ref",
            values=lambda frames: frames["orders"]["order_id"],
            columns=("order_ref", "reason"),
            affects=rows_with("order_id", changed="order_ref"),
            through=ORDERS_UNIFIED,
            affected_keys=(pl.col("master_user_id"),),
        ),
    },
    transform=transform,
)
