"""Table of contents: the sources, and every step in the order of what it reads."""

from __future__ import annotations

from lakehouse.project import Project
from lakehouse.source import Source
from lakehouse.step import Step
from lakehouse.step_list import declared_steps
from lakehouse.table import Table
from pipelines.bronze import tables as bronze
from pipelines.privacy.suppression import ERASURES
from pipelines.settings import Settings
from pipelines.silver.quarantine import QUARANTINE
from pipelines.sources.kafka.source import KafkaSource
from pipelines.sources.mongo.source import MongoSource
from pipelines.sources.postgres.source import PostgresSource

DECLARED: tuple[Step, ...] = declared_steps(
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
"""Every step, by the table that it maintains: `pipelines/silver/products.py` declares the step of silver.products."""


def sources(settings: Settings) -> tuple[Source, ...]:
    """The sources that are switched on."""
    found: list[Source] = []
    if settings.postgres.enabled:
        found.append(PostgresSource(settings.postgres))
    if settings.mongo.enabled:
        found.append(MongoSource(settings.mongo))
    if settings.kafka.enabled:
        found.append(KafkaSource(settings.kafka))
    return tuple(found)


PROJECT = Project(
    sources=sources,
    source_tables=bronze.TABLES,
    steps=DECLARED,
    quarantine=QUARANTINE,
    other_tables=(ERASURES,),
)
"""Sources, tables and steps of the retail lakehouse, without the fraud model's."""
STEPS: tuple[Step, ...] = PROJECT.ordered_steps
BRONZE: tuple[Table, ...] = PROJECT.source_tables
TABLES: dict[str, Table] = PROJECT.tables
