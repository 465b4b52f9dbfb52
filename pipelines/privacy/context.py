"""What an erasure needs from outside the pipelines: the models and the served scores, injected by the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lakehouse.byte_search import FileSearchResult, SearchTerms
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project

StageProgress = Callable[[str, int, int], None]
"""on_progress(stage, done, total)."""
ModelSearch = Callable[[Lake, SearchTerms], tuple[FileSearchResult, str]]
"""search_models(lake, needles) -> the search result, and the reason why the models could not be searched ('': they were)."""


@dataclass(frozen=True, kw_only=True)
class ErasureContext:
    """The lakehouse that an erasure works on, and its dependencies.

    project            all tables of the application: each of them is cleaned and searched
    refresh_on_demand  refreshes the tables that a run leaves alone, where they exist
    search_models      searches model artifacts that are stored outside the home directory
    scores_topic       returns the Kafka topic of served scores, '' where scores are not kept
    """

    engine: Engine
    project: Project
    refresh_on_demand: Callable[[Engine], None]
    search_models: ModelSearch
    scores_topic: Callable[[], str]
    on_progress: StageProgress

    @property
    def lake(self) -> Lake:
        """Return the engine's lake."""
        return self.engine.lake
