"""Runs the pipeline once: sources into bronze, then every step in dependency order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from polars.exceptions import PanicException

from lakehouse.code_version import code_version
from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import CatalogUnreachable, ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.missing_files import missing_files_error
from lakehouse.openlineage import LineageEvents, emit_events
from lakehouse.parallel import TaskPool
from lakehouse.project import Project
from lakehouse.run_history import RunHistory, RunRecord
from lakehouse.source import Source
from lakehouse.step import Step, upstream_names
from lakehouse.storage import local_warehouse
from lakehouse.table import Table
from lakehouse.transient_errors import as_transient_error, is_file_missing
from lakehouse.unforeseen_errors import unforeseen_error
from pipelines.privacy.anonymise import Anonymiser, OnArrival
from pipelines.privacy.suppression import ERASURES, load_suppression
from pipelines.settings import Settings, business_settings
from pipelines.silver.quarantine import QUARANTINE

ProgressCallback = Callable[[str, StepResult | None], None]
"""on_progress(name, None) when a source or table starts, on_progress(name, result) when a table is done."""


@dataclass(frozen=True)
class RunResult:
    """The results of a run's tables, and the errors of those that failed.

    seconds      elapsed time
    cpu_seconds  CPU time of this process and of the Ray workers
    """

    results: tuple[StepResult, ...]
    errors: tuple[ShopSphereError, ...]
    seconds: float
    cpu_seconds: float


@contextmanager
def open_engine(settings: Settings) -> Iterator[Engine]:
    """Open an engine on the lake of the settings; on exit, stop Ray if it was started."""
    pool = TaskPool(settings.ray, on_disk=local_warehouse(settings))
    try:
        lake = Lake(settings)
        yield Engine(lake, pool, business_settings(settings), QUARANTINE, load_ingest_transform=partial(on_arrival, lake))
    finally:
        pool.close()


def on_arrival(lake: Lake) -> OnArrival | None:
    """Return the function that anonymises rows of erased people before they are stored; None when no one was erased."""
    lake.load(ERASURES)  # create the table with the others, even before the first erasure
    suppression = load_suppression(lake)
    return OnArrival(Anonymiser(suppression)) if suppression is not None else None


@contextmanager
def recorded(engine: Engine, kind: str) -> Iterator[list[StepResult]]:
    """Record other work than a run (a rebuild, a training) in the run history and as lineage.

    The body appends its results to the yielded list; an error is recorded and raised.
    """
    run, results = RunRecord(kind), list[StepResult]()
    with emit_events(engine, run, code_version) as events:
        try:
            yield results
        except BaseException as error:
            if events and isinstance(error, ShopSphereError):
                events.fail(str(getattr(error, "table", "")), error)
            _record_failure(RunHistory(engine.lake), engine, run, results, [], error)
            raise
        finally:
            if events:
                for result in results:
                    events.complete(result)
    RunHistory(engine.lake).record(run, results)


def run_once(
    engine: Engine,
    project: Project,
    on_progress: ProgressCallback,
    stop_requested: Callable[[], bool] = lambda: False,
    history: RunHistory | None = None,
) -> RunResult:
    """Read the changes of every source, then bring every table up to date.

    A source that cannot be read or a table that cannot be refreshed does not stop the others, whatever the exception: the
    result has their errors.

    stop_requested  checked before each source and table
    history         where the run is recorded; default: a new one
    """
    history = history or RunHistory(engine.lake)
    run = RunRecord("run")
    started, cpu = time.monotonic(), time.process_time()
    outcome = _Outcome()
    try:
        with emit_events(engine, run, code_version) as events:
            _Runner(engine, project, on_progress=on_progress, stop_requested=stop_requested, events=events, outcome=outcome).run()
    except BaseException as error:
        _record_failure(history, engine, run, outcome.results, outcome.errors, error)
        raise
    errors = list({str(error): error for error in outcome.errors}.values())  # one upstream error can fail several tables
    if not any(isinstance(error, CatalogUnreachable) for error in errors):  # the history is in the catalog too
        try:
            history.record(run, outcome.results, errors)
        except Exception as error:
            errors.append(expected_error(error) or unforeseen_error("operations.runs", error))
    worker_cpu = sum(result.worker_cpu_seconds for result in outcome.results)
    return RunResult(tuple(outcome.results), tuple(errors), time.monotonic() - started, time.process_time() - cpu + worker_cpu)


def _record_failure(
    history: RunHistory,
    engine: Engine,
    run: RunRecord,
    results: Sequence[StepResult],
    errors: Sequence[ShopSphereError],
    error: BaseException,
) -> None:
    """Record the results of a run that ended early, and the reason."""
    reason = _reason(error)
    if isinstance(reason, CatalogUnreachable):
        return  # the history is in the catalog too
    with suppress(Exception):  # the error that ended the run is the one to raise
        history.record(run, results, [*errors, reason])


def _reason(error: BaseException) -> ShopSphereError:
    """Return the error to record for an exception that ended a run."""
    if isinstance(error, Exception):
        unforeseen = unforeseen_error("", error)
        return expected_error(error) or ShopSphereError(
            f"The run ended early: unforeseen {unforeseen.kind} at {unforeseen.place or 'an unknown place'}.", remedy="debug"
        )
    return ShopSphereError("The run was stopped before its end.")


@dataclass
class _Outcome:
    """The results and errors so far."""

    results: list[StepResult] = field(default_factory=list)
    errors: list[ShopSphereError] = field(default_factory=list)


class _CatalogAway(Exception):
    """Ends a phase of the run: without the catalog, none of its other tables can be read."""


@dataclass
class _Runner:
    """One run over all sources and steps."""

    engine: Engine
    project: Project
    on_progress: ProgressCallback = field(kw_only=True)
    stop_requested: Callable[[], bool] = field(kw_only=True)
    events: LineageEvents | None = field(kw_only=True)
    outcome: _Outcome = field(kw_only=True)

    def run(self) -> None:
        """Ingest all sources, then refresh all steps. Stops early when that is requested."""
        with suppress(_CatalogAway):
            for source in self.project.sources(self.engine.lake.settings):
                if self.stop_requested():
                    break
                self._ingest(source)
        with suppress(_CatalogAway):
            for step in self.project.ordered_steps:
                if self.stop_requested():
                    break
                self._refresh(step)

    def _ingest(self, source: Source) -> None:
        self.on_progress(source.name, None)
        try:
            results = self.engine.ingest(source, self.project.bronze)
        except (Exception, PanicException) as error:
            recorded_error = self._record_error(source.name, error, source.tables)
            if self.events:
                self.events.failures += 1
            _end_phase_without_catalog(recorded_error)
            return
        for result in results:
            self.on_progress(result.table, result)
            if self.events:
                self.events.ingested(source.name, result, self.project.bronze[result.table])
        self.outcome.results += results

    def _refresh(self, step: Step) -> None:
        name = step.target.name
        self.on_progress(name, None)
        try:
            result = self.engine.refresh(step)
        except (Exception, PanicException) as error:
            recorded_error = self._record_error(name, error, tables_of(step))
            if self.events:
                self.events.fail(name, recorded_error)
            _end_phase_without_catalog(recorded_error)
            return
        self.on_progress(name, result)
        if self.events:
            self.events.complete(result)
        self.outcome.results.append(result)

    def _record_error(self, name: str, error: BaseException, tables: Sequence[str]) -> ShopSphereError:
        """Record the error of a source or table; the run continues."""
        found = expected_error(error, self.engine.lake, [self.project.tables[table] for table in tables])
        self.outcome.errors.append(found := found or unforeseen_error(name, error))
        return found


def _end_phase_without_catalog(error: ShopSphereError) -> None:
    if isinstance(error, CatalogUnreachable):
        raise _CatalogAway


def tables_of(step: Step) -> tuple[str, ...]:
    """Return the names of the tables that a step reads or writes."""
    return (*sorted(upstream_names(step)), QUARANTINE.name, step.target.name)


def expected_error(error: BaseException, lake: Lake | None = None, tables: Sequence[Table] = ()) -> ShopSphereError | None:
    """Return an exception as one of this project's errors; None if it is unforeseen. tables: where a missing file may be."""
    found = error if isinstance(error, ShopSphereError) else as_transient_error(error)
    if found is None and lake is not None and is_file_missing(error):
        with suppress(Exception):  # the search for the file meets the same fault
            return missing_files_error(lake, tables)
    return found
