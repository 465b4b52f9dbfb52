"""Engines on lakes of their own, in a directory of the test."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lakehouse.engine.engine import Engine
from lakehouse.iceberg.catalog import Lake
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings
from lakehouse.table import Table
from pipelines.settings import BusinessSettings, Settings
from pipelines.silver.quarantine import QUARANTINE


def make_engine(
    home: Path,
    *,
    settings: dict[str, Any] | None = None,
    context: BusinessSettings | None = None,
    quarantine: Table = QUARANTINE,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    **ray: Any,
) -> Engine:
    """Return an engine whose lake is below `home`.

    settings  overrides of the settings
    context   business settings (default: the defaults)
    ray       overrides of the settings of Ray; by default everything runs in this process
    """
    configured = Settings(home=home, ray=RaySettings(**{"inline_rows": 10**9, **ray}), **(settings or {}))
    return Engine(Lake(configured), TaskPool(configured.ray), context or BusinessSettings(), quarantine, clock=clock)
