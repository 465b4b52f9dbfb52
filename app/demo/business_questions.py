"""The business questions that the demo answers with SQL over gold tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BusinessQuestion:
    """A question, the SQL (DuckDB) that answers it, and an explanation of the result."""

    title: str
    sql: str
    explanation: str


REVENUE = BusinessQuestion(
    "Where does the money come from, and is it growing?",
    """
    WITH months AS (
        SELECT date_trunc('month', order_date)::DATE AS month,
               sum(net_revenue) FILTER (channel = 'web') AS web,
               sum(net_revenue) FILTER (channel = 'pos') AS pos,
               sum(net_revenue) FILTER (channel = 'marketplace') AS marketplace,
               sum(net_revenue) AS total,
               count(DISTINCT order_date) AS days
        FROM gold.sales_daily
        GROUP BY ALL
    ), trend AS (
        SELECT *, total / days AS daily, lag(total / days) OVER (ORDER BY month) AS daily_before FROM months
    )
    SELECT strftime(month, '%Y-%m') AS month, days,
           round(coalesce(web, 0), 2) AS web, round(coalesce(pos, 0), 2) AS pos,
           round(coalesce(marketplace, 0), 2) AS marketplace, round(total, 2) AS total,
           round(100 * (daily - daily_before) / nullif(daily_before, 0), 1) AS trend_percent
    FROM trend
    ORDER BY month DESC
    LIMIT 6
    """,
    "Net revenue in the base currency, newest month first. The trend compares revenue per day with sales against the month "
    "before, so an incomplete month is comparable.",
)

BEST_CUSTOMERS = BusinessQuestion(
    "Which of the best customers look like several people to systems that see one channel each?",
    """
    WITH per_channel AS (
        SELECT master_user_id, channel, sum(net_revenue) AS revenue
        FROM gold.fact_orders
        WHERE master_user_id IS NOT NULL
        GROUP BY ALL
    ), best_view AS (
        SELECT master_user_id, max(revenue) AS revenue FROM per_channel GROUP BY ALL
    )
    SELECT customers.master_user_id AS customer, customers.apparent_customers AS looks_like, customers.orders_web AS web,
           customers.orders_pos AS pos, customers.orders_marketplace AS marketplace,
           round(customers.net_revenue, 2) AS net_revenue, round(best_view.revenue, 2) AS best_single_view,
           round(100 * greatest(customers.net_revenue - best_view.revenue, 0) / nullif(customers.net_revenue, 0), 0)::INTEGER
               AS unseen_percent
    FROM gold.customer_360 AS customers
    JOIN best_view USING (master_user_id)
    WHERE customers.apparent_customers > 1 AND customers.channels > 1
    ORDER BY customers.net_revenue DESC, customer
    LIMIT 8
    """,
    "Each line is one person. `looks_like` is the number of customers that the separate systems have for this person, and "
    "`unseen_percent` the share of their revenue that the best single channel does not see.",
)

SHRINKAGE = BusinessQuestion(
    "Where does stock leak?",
    """
    SELECT counts.store_id AS store, any_value(stores.city) AS city, count(*) AS counts,
           sum(counts.expected_units)::BIGINT AS expected, sum(counts.shrinkage_units)::BIGINT AS missing,
           round(100 * sum(counts.shrinkage_units) / nullif(sum(counts.expected_units), 0), 2) AS missing_percent,
           round(sum(counts.shrinkage_value_base), 2) AS value_lost,
           arg_max(counts.product_id, counts.shrinkage_units) AS worst_product
    FROM gold.inventory_shrinkage AS counts
    LEFT JOIN gold.dim_stores AS stores USING (store_id)
    GROUP BY counts.store_id
    ORDER BY value_lost DESC NULLS LAST, missing DESC, store
    LIMIT 8
    """,
    "Units that stock counts found missing after all sales, returns, transfers and known losses, at list price in the base "
    "currency. Investigate a store far above the others.",
)

RETENTION = BusinessQuestion(
    "Do new customers come back?",
    """
    SELECT strftime(cohort_month, '%Y-%m') AS cohort, max(customers) AS customers,
           round(100 * max(retention) FILTER (months_since = 1), 1) AS month_1,
           round(100 * max(retention) FILTER (months_since = 2), 1) AS month_2,
           round(100 * max(retention) FILTER (months_since = 3), 1) AS month_3,
           round(100 * max(retention) FILTER (months_since = 6), 1) AS month_6
    FROM gold.cohort_retention
    GROUP BY cohort_month
    ORDER BY cohort_month DESC
    LIMIT 8
    """,
    "Percent of the customers acquired in a month who bought again 1, 2, 3 and 6 months later, over all channels. Empty: that "
    "month has not started yet; the newest one may be incomplete.",
)

CHURNING = BusinessQuestion(
    "Which valuable customers are about to be lost?",
    """
    WITH today AS (SELECT max(last_order_at) AS moment FROM gold.customer_360)
    SELECT master_user_id AS customer, favourite_channel, orders, round(net_revenue, 2) AS net_revenue,
           last_order_at::DATE AS last_order, expected_next_order_at::DATE AS expected,
           round(100 * (1 - exp(-date_diff('second', last_order_at, moment) / 86400.0 / expected_gap_days)), 0)::INTEGER
               AS churn_percent
    FROM gold.customer_360, today
    WHERE orders >= 3 AND expected_next_order_at < moment AND churn_after > moment
    ORDER BY net_revenue DESC, customer
    LIMIT 8
    """,
    "Good customers whose next order is overdue but who do not count as churned yet. `churn_percent` is the probability that "
    "they have left, as of the newest order.",
)

QUESTIONS = (REVENUE, BEST_CUSTOMERS, SHRINKAGE, RETENTION, CHURNING)
"""In the order in which the demo prints them."""
