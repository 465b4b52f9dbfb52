"""Table of contents: the sources, and every step in the order of what it reads."""

from __future__ import annotations

from graphlib import TopologicalSorter

from lakehouse.source import Source
from lakehouse.step import Broadcast, Lookup, Step
from lakehouse.table import Table
from pipelines.bronze import tables as bronze
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

DECLARED: tuple[Step, ...] = (
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


def upstream(step: Step) -> set[str]:
    """The names of the tables that a step reads."""
    reads = step.reads.values()
    through = {read.through.name for read in reads if isinstance(read, Broadcast | Lookup) and read.through}
    return ({read.table.name for read in reads} | through) - {step.target.name}


def in_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps, each after all that it reads."""
    by_name = {step.target.name: step for step in steps}
    graph = {name: upstream(step) & by_name.keys() for name, step in by_name.items()}
    return tuple(by_name[name] for name in TopologicalSorter(graph).static_order())


STEPS: tuple[Step, ...] = in_order(DECLARED)
BRONZE: tuple[Table, ...] = bronze.TABLES
TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        *(*BRONZE, ERASURES),
        *(*(step.target for step in DECLARED if step.target.layer == "silver"), QUARANTINE),
        *(step.target for step in DECLARED if step.target.layer == "gold"),
    )
}


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
