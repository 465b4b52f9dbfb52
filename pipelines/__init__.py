"""Table of contents of the retail lakehouse: its sources, and the step of every silver and gold table."""

from __future__ import annotations

from lakehouse.project import Project
from lakehouse.source import Source
from lakehouse.step import Step
from lakehouse.table import Table
from pipelines.bronze import tables
from pipelines.gold import (
    cohort_retention,
    customer_360,
    dim_date,
    dim_products,
    dim_stores,
    dim_users,
    fact_orders,
    inventory_health,
    inventory_shrinkage,
    sales_daily,
    user_risk_scores,
)
from pipelines.privacy.suppression import ERASURES
from pipelines.settings import Settings
from pipelines.silver import (
    chargebacks,
    events_clean,
    exchange_rates,
    identity_graph,
    inventory_snapshots,
    order_items_unified,
    orders_unified,
    products,
    stores,
    users_scd,
)
from pipelines.silver.quarantine import QUARANTINE
from pipelines.sources.kafka.source import KafkaSource
from pipelines.sources.mongo.source import MongoSource
from pipelines.sources.postgres.source import PostgresSource

SILVER_STEPS: tuple[Step, ...] = (
    products.STEP,
    stores.STEP,
    exchange_rates.STEP,
    chargebacks.STEP,
    identity_graph.STEP,
    users_scd.STEP,
    orders_unified.STEP,
    order_items_unified.STEP,
    events_clean.STEP,
    inventory_snapshots.STEP,
)

GOLD_STEPS: tuple[Step, ...] = (
    fact_orders.STEP,
    dim_users.STEP,
    dim_products.STEP,
    dim_stores.STEP,
    dim_date.STEP,
    customer_360.STEP,
    sales_daily.STEP,
    cohort_retention.STEP,
    inventory_health.STEP,
    inventory_shrinkage.STEP,
    user_risk_scores.STEP,
)


def enabled_sources(settings: Settings) -> tuple[Source, ...]:
    """Return the enabled sources."""
    enabled: list[Source] = []
    if settings.postgres.enabled:
        enabled.append(PostgresSource(settings.postgres))
    if settings.mongo.enabled:
        enabled.append(MongoSource(settings.mongo))
    if settings.kafka.enabled:
        enabled.append(KafkaSource(settings.kafka))
    return tuple(enabled)


PROJECT = Project(
    sources=enabled_sources,
    source_tables=tables.TABLES,
    steps=(*SILVER_STEPS, *GOLD_STEPS),
    quarantine=QUARANTINE,
    other_tables=(ERASURES,),
)
"""Sources, tables and steps of the retail lakehouse, without those of the fraud model."""

STEPS: tuple[Step, ...] = PROJECT.ordered_steps
BRONZE: tuple[Table, ...] = PROJECT.source_tables
TABLES: dict[str, Table] = PROJECT.tables
