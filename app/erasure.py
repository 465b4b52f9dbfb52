"""Wires erasure and export to the application's tables, models and served scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pyarrow.fs import LocalFileSystem

from app.project import PROJECT
from lakehouse.byte_search import FileSearchResult, SearchTerms, search_files
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.catalog import Lake
from ml.registry import Registry, RegistryError
from ml.tables import feature_tables, user_fraud_scores
from ml.tables.order_features import ORDER_FEATURES
from pipelines.privacy.context import ErasureContext
from pipelines.privacy.leftovers import files_below
from pipelines.settings import settings_of
from serve.settings import load_serve_settings


def erasure_context(engine: Engine, on_progress: Callable[[str, int, int], None]) -> ErasureContext:
    """Return the context of erasures in the engine's lakehouse."""
    return ErasureContext(
        engine=engine,
        project=PROJECT,
        refresh_on_demand=refresh_model_tables,
        search_models=search_models,
        scores_topic=partial(scores_topic, engine.lake),
        on_progress=on_progress,
    )


def refresh_model_tables(engine: Engine) -> None:
    """Bring the fraud model's tables up to date, where they exist; the scores by the champion."""
    if not engine.lake.exists(ORDER_FEATURES):
        return
    registry = Registry(home=engine.lake.settings.home)
    champion = registry.load() if registry.champion() is not None else None
    if champion is None:
        feature_tables.refresh(engine)
    else:
        feature_tables.refresh(engine, delay=champion.label_delay)
        user_fraud_scores.refresh(engine, champion)


def scores_topic(lake: Lake) -> str:
    """Return the topic of served scores, '' where none are kept."""
    kafka = settings_of(lake).kafka
    return load_serve_settings().scores_topic if kafka.enabled and kafka.bootstrap_servers else ""


def search_models(lake: Lake, needles: SearchTerms) -> tuple[FileSearchResult, str]:
    """Search the artifacts of the fraud model on a remote MLflow server; also return the reason why it failed, or ''.

    A local MLflow store is searched with the home directory.
    """
    registry = Registry(home=lake.settings.home)
    if registry.local:
        return FileSearchResult(), ""
    with tempfile.TemporaryDirectory() as directory:
        try:
            registry.copy_to(Path(directory))
        except RegistryError as error:
            return FileSearchResult(), str(error)
        found = search_files(LocalFileSystem(), files_below(Path(directory)), needles)
        matches, unread = (
            tuple(path.replace(directory, "mlflow", 1) for path in paths) for paths in (found.matches, found.unread)
        )
        return replace(found, matches=matches, unread=unread), ""
