"""Table of contents of the retail lakehouse: its sources, and the step of every silver and gold table."""

from __future__ import annotations

from lakehouse.project import Project
from lakehouse.source import Source
from lakehouse.step import Step
from lakehouse.step_list import declared_steps
from lakehouse.table import Table
from pipelines.bronze import tables
from pipelines.privacy.suppression import ERASURES
from pipelines.settings import Settings
from pipelines.silver.quarantine import QUARANTINE
from pipelines.sources.kafka.source import KafkaSource
from pipelines.sources.mongo.source import MongoSource
from pipelines.sources.postgres.source import PostgresSource

SILVER_STEPS: tuple[Step, ...] = declared_steps(
    "pipelines",
    "silver.products",
    "silver.stores",
    "silver.exchange_rates",
    "silver.chargebacks",
    "silver.identity_graph",
    "silver.users_scd",
    "silver.orders_unified",
    "silver.order_items_unified",
    "silver.events_clean",
    "silver.inventory_snapshots",
)

GOLD_STEPS: tuple[Step, ...] = declared_steps(
    "pipelines",
    "gold.fact_orders",
    "gold.dim_users",
    "gold.dim_products",
    "gold.dim_stores",
    "gold.dim_date",
    "gold.customer_360",
    "gold.sales_daily",
    "gold.cohort_retention",
    "gold.inventory_health",
    "gold.inventory_shrinkage",
    "gold.user_risk_scores",
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
