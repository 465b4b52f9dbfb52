"""docs/reference/metrics.md: the Prometheus metrics of serving."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from prometheus_client import REGISTRY

import serve
from app.reference.markdown import GENERATED, table_cell

PREFIX = "shopsphere_"


def _collectors() -> list[Any]:
    """Return the collectors that importing the package `serve` registers."""
    for module in pkgutil.walk_packages(serve.__path__, f"{serve.__name__}."):
        importlib.import_module(module.name)
    found = {id(one): one for one in REGISTRY._collector_to_names if getattr(one, "_name", "").startswith(PREFIX)}
    return sorted(found.values(), key=lambda one: str(one._name))


def metrics_page() -> str:
    """Return the page."""
    rows = []
    for one in _collectors():
        name = f"{one._name}_total" if one._type == "counter" else one._name
        labels = ", ".join(f"`{label}`" for label in one._labelnames)
        rows.append(f"| `{name}` | {one._type} | {labels} | {table_cell(one._documentation)} |")
    lines = [
        GENERATED,
        "# Metrics",
        "",
        "`GET /-/metrics` of serving returns these in Prometheus' text format, aggregated over the replicas of one node. "
        "[Operate](../how-to/operate.md#what-to-watch) says which of them to alert on.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
