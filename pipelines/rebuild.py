"""Rebuilds chosen tables from everything upstream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError, SourceError
from lakehouse.iceberg.missing_files import find_missing_file, missing_files_error
from lakehouse.project import Project
from lakehouse.step import Delta, Grouped, Step
from pipelines.privacy.suppression import ERASURES
from pipelines.runner import expected_error, recorded, tables_of
from pipelines.silver.quarantine import QUARANTINE


def rebuild_tables(engine: Engine, project: Project, names: Sequence[str]) -> list[StepResult]:
    """Recompute tables from everything upstream; bronze tables: read their source again from the beginning.

    Bronze is first, all tables of a source at once; then each table after those that it reads. Tables of silver and gold that
    lost files are dropped and created again. Raises MissingFilesError when a bronze table lost files: no upstream has them.
    """
    chosen = {project.find_table(name).name: None for name in names}
    with recorded(engine, "rebuild") as results:
        for result in _rebuild(engine, project, chosen):
            results.append(result)
    return results


def _rebuild(engine: Engine, project: Project, chosen: Mapping[str, None]) -> Iterator[StepResult]:
    bronze = {name for name in chosen if project.tables[name].layer == "bronze"}
    _check(engine, project, chosen, bronze)
    for name in chosen.keys() - bronze:
        if find_missing_file(engine.lake, project.tables[name]) is not None:
            engine.lake.drop(project.tables[name])
    yield from _read_sources_again(engine, project, bronze)
    for step in project.ordered_steps:
        fills_quarantine = bool(bronze_reads(step)) or step.target.quarantines
        if step.target.name in chosen or (QUARANTINE.name in chosen and fills_quarantine):
            yield _recompute(engine, project, step)
    yield from (recompute(engine) for name, recompute in project.rebuild_on_demand.items() if name in chosen)


def _check(engine: Engine, project: Project, chosen: Mapping[str, None], bronze: set[str]) -> None:
    """Raise ShopSphereError when a table cannot be rebuilt."""
    if ERASURES.name in chosen:
        raise ShopSphereError(f"{ERASURES.name} cannot be rebuilt. Only `python -m app erase` writes it.")
    enabled = {name for source in project.sources(engine.lake.settings) for name in source.tables}
    if disabled := sorted(bronze - enabled):
        raise SourceError(f"The source of {disabled[0]} is disabled. Enable it in the settings.")
    if (lost := missing_files_error(engine.lake, [project.tables[name] for name in bronze])) is not None:
        raise lost


def _read_sources_again(engine: Engine, project: Project, bronze: set[str]) -> Iterator[StepResult]:
    for source in project.sources(engine.lake.settings):
        if tables := bronze.intersection(source.tables):
            results = engine.ingest(source, project.bronze, resnapshot=frozenset(tables))
            yield from (result for result in results if result.table in tables)


def _recompute(engine: Engine, project: Project, step: Step) -> StepResult:
    try:
        return engine.refresh(step, rebuild=True)
    except FileNotFoundError as error:
        tables = [project.tables[name] for name in tables_of(step)]
        if (missing := expected_error(error, engine.lake, tables)) is None:
            raise
        raise missing from error


def bronze_reads(step: Step) -> set[str]:
    """Return the bronze tables whose unreadable rows a step quarantines."""
    reads = (read for read in step.reads.values() if isinstance(read, Grouped | Delta) and read.parse)
    return {read.table.name for read in reads if read.table.layer == "bronze"}
