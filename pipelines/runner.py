"""One pass over everything: sources into bronze, then every step in order; and its relatives rebuild and replay."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from lakehouse.code_version import code_version
from lakehouse.engine.engine import Engine, StepResult
from lakehouse.errors import CatalogUnreachable, SettingsError, ShopSphereError, SourceError
from lakehouse.expectations import by_hand, from_text
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.missing_files import find_missing_file, missing_files_error
from lakehouse.iceberg.snapshot_properties import EXPECTATIONS
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.openlineage import LineageEvents, emit_events
from lakehouse.parallel import TaskPool
from lakehouse.project import Project
from lakehouse.run_history import RunHistory, RunRecord
from lakehouse.step import Delta, Grouped, Parsed, Step, upstream_names
from lakehouse.storage import local_warehouse
from lakehouse.table import BOOKKEEPING, SEQUENCE, Table
from lakehouse.transient_errors import as_transient_error, is_file_missing
from pipelines.bronze.corrections import corrected_row
from pipelines.privacy.anonymise import Anonymiser, OnArrival
from pipelines.privacy.suppression import ERASURES, Suppression, load_suppression
from pipelines.settings import Settings, business_settings
from pipelines.silver.quarantine import QUARANTINE

ProgressCallback = Callable[[str, StepResult | None], None]
"""tell(name, None) when a table is begun, tell(name, report) when it is done."""


@dataclass(frozen=True)
class RunResult:
    """What one pass did, and what it could not do."""

    reports: tuple[StepResult, ...]
    errors: tuple[ShopSphereError, ...]
    seconds: float
    cpu_seconds: float


@contextmanager
def open_engine(settings: Settings) -> Iterator[Engine]:
    """An engine on the lake of the settings; stops Ray at the end if it was started."""
    pool = TaskPool(settings.ray, on_disk=local_warehouse(settings))
    try:
        lake = Lake(settings)
        yield Engine(lake, pool, business_settings(settings), QUARANTINE, arrivals=partial(on_arrival, lake))
    finally:
        pool.close()


def on_arrival(lake: Lake) -> OnArrival | None:
    """What is done with rows before they are stored: whoever was erased does not come back."""
    lake.load(ERASURES)  # made with the others, whether somebody is erased or not
    suppression = load_suppression(lake)
    return OnArrival(Anonymiser(suppression)) if suppression is not None else None


@contextmanager
def recorded(engine: Engine, kind: str) -> Iterator[list[StepResult]]:
    """A run that is not a pass: the reports put into the list it gives are noted and sent as lineage, and so is an error."""
    run, reports = RunRecord(kind), list[StepResult]()
    with emit_events(engine, run, code_version) as events:
        try:
            yield reports
        except BaseException as error:
            if events and isinstance(error, ShopSphereError):
                events.fail(str(getattr(error, "table", "")), error)
            _note_end(RunHistory(engine.lake), engine, run, reports, [], error)
            raise
        finally:
            if events:
                for report in reports:
                    events.complete(report)
    RunHistory(engine.lake).note(engine, run, reports)


def run_once(
    engine: Engine,
    project: Project,
    tell: ProgressCallback,
    stopping: Callable[[], bool] = lambda: False,
    history: RunHistory | None = None,
) -> RunResult:
    """Read what is new at every source, then bring every table up to date. A source that cannot be read, or a table
    that cannot be filled, does not keep the others from going on, nor does an outage; the errors are in the result. What the
    pass did goes to `history` (default: a new one)."""
    run = RunRecord("run")
    started, cpu = time.monotonic(), time.process_time()
    reports: list[StepResult] = []
    errors: list[ShopSphereError] = []
    try:
        with emit_events(engine, run, code_version) as events:
            _pass(engine, project, tell, stopping, events, reports, errors)
    except BaseException as error:
        _note_end(history or RunHistory(engine.lake), engine, run, reports, errors, error)
        raise
    errors = list({str(error): error for error in errors}.values())  # what is wrong upstream is said once
    if not any(isinstance(error, CatalogUnreachable) for error in errors):  # else there is nowhere to note it
        try:
            (history or RunHistory(engine.lake)).note(engine, run, reports, errors)
        except Exception as error:
            errors.append(_expected(error))
    elsewhere = sum(report.worker_cpu_seconds for report in reports)
    return RunResult(tuple(reports), tuple(errors), time.monotonic() - started, time.process_time() - cpu + elsewhere)


def _note_end(
    history: RunHistory,
    engine: Engine,
    run: RunRecord,
    reports: Sequence[StepResult],
    errors: Sequence[ShopSphereError],
    error: BaseException,
) -> None:
    """Note what a run did before it ended early, and why: of an unforeseen error the kind alone, its text may hold values."""
    if isinstance(error, ShopSphereError):
        why = error
    elif (failed := as_transient_error(error)) is not None:
        why = failed
    elif isinstance(error, Exception):
        why = ShopSphereError(
            f"The run ended early with an unforeseen {type(error).__name__}. Run again with --debug to see where."
        )
    else:
        why = ShopSphereError("The run was stopped before its end.")
    if isinstance(why, CatalogUnreachable):
        return  # nowhere to note it
    with suppress(Exception):  # the error that ended the run is the one to be told
        history.note(engine, run, reports, [*errors, why])


def _pass(
    engine: Engine,
    project: Project,
    tell: ProgressCallback,
    stopping: Callable[[], bool],
    events: LineageEvents | None,
    reports: list[StepResult],
    errors: list[ShopSphereError],
) -> None:
    for source in project.sources(engine.lake.settings):
        if stopping():
            break
        tell(source.name, None)
        try:
            done = engine.ingest(source, project.bronze)
        except SettingsError:
            raise  # nothing can go on
        except Exception as error:
            errors.append(_expected(error, engine.lake, [project.tables[name] for name in source.tables]))
            if events:
                events.failed += 1
            if isinstance(errors[-1], CatalogUnreachable):
                break
            continue
        for report in done:
            tell(report.table, report)
            if events:
                events.received(source.name, report, project.bronze[report.table])
        reports += done
    for step in project.ordered_steps:
        if stopping():
            break
        tell(step.target.name, None)
        try:
            report = engine.refresh(step)
        except SettingsError:
            raise  # nothing can go on
        except Exception as error:
            errors.append(_expected(error, engine.lake, [project.tables[name] for name in _touched(step)]))
            if events:
                events.fail(step.target.name, errors[-1])
            if isinstance(errors[-1], CatalogUnreachable):
                break
            continue
        tell(step.target.name, report)
        if events:
            events.complete(report)
        reports.append(report)


def _touched(step: Step) -> tuple[str, ...]:
    return (*sorted(upstream_names(step)), QUARANTINE.name, step.target.name)


def _expected(error: Exception, lake: Lake | None = None, tables: Sequence[Table] = ()) -> ShopSphereError:
    """An error that a pass goes on after; raises any other. tables: those that it may come from."""
    found = error if isinstance(error, ShopSphereError) else as_transient_error(error)
    if found is None and lake is not None and is_file_missing(error):
        found = missing_files_error(lake, tables)
    if found is None:
        raise error
    return found


def table_named(project: Project, name: str) -> Table:
    """The table of that name, with or without its layer. Raises ShopSphereError listing the tables."""
    found = [table for full, table in project.tables.items() if name in (full, table.short_name)]
    if len(found) != 1:
        raise ShopSphereError(f"There is no table '{name}'. Tables: {', '.join(project.tables)}.")
    return found[0]


def rebuild(engine: Engine, project: Project, names: Sequence[str]) -> list[StepResult]:
    """Fill tables again from everything upstream; bronze tables: read their source again from the beginning, those of
    one source all at once. Bronze first, then each table after those that it reads. One that has lost files is made anew.

    Raises DamagedTable when a bronze table has lost files: there is nothing that could fill it."""
    tables = {table_named(project, name).name: None for name in names}
    with recorded(engine, "rebuild") as reports:
        for report in _rebuilt(engine, project, tables):
            reports.append(report)
    return reports


def _rebuilt(engine: Engine, project: Project, tables: Mapping[str, None]) -> Iterator[StepResult]:
    known = project.sources(engine.lake.settings)
    if ERASURES.name in tables:
        raise ShopSphereError(f"{ERASURES.name} is filled by `python -m app erase`, and by nothing else.")
    bronze = {name for name in tables if project.tables[name].layer == "bronze"}
    if off := sorted(bronze - {name for source in known for name in source.tables}):
        raise SourceError(f"The source of {off[0]} is switched off. Switch it on in the settings.")
    if (lost := missing_files_error(engine.lake, [project.tables[name] for name in bronze])) is not None:
        raise lost
    for name in tables.keys() - bronze:
        if find_missing_file(engine.lake, project.tables[name]) is not None:
            engine.lake.drop(project.tables[name])
    for source in known:
        if chosen := bronze.intersection(source.tables):
            done = engine.ingest(source, project.bronze, again=frozenset(chosen))
            yield from (report for report in done if report.table in chosen)
    for step in project.ordered_steps:
        if step.target.name in tables or (QUARANTINE.name in tables and (_bronze_reads(step) or step.target.quarantines)):
            try:
                report = engine.refresh(step, rebuild=True)
            except FileNotFoundError as error:
                raise _expected(error, engine.lake, [project.tables[name] for name in _touched(step)]) from error
            yield report
    yield from (recompute(engine) for name, recompute in project.rebuild_on_demand.items() if name in tables)


def publish(engine: Engine, project: Project, name: str) -> int:
    """Publish the build of a table that its expectations have refused; gives the snapshot. Raises ShopSphereError."""
    table = table_named(project, name)
    handle = engine.lake.load(table, create=False)
    if handle.staged is None:
        others = "" if table.layer == "gold" else " Only gold is built beside what is read: other tables keep the rows of before."
        raise ShopSphereError(f"{table.name} has no build that waits to be published.{others} See `python -m app status`.")
    with recorded(engine, "publish") as reports:
        results = tuple(
            by_hand(result) for result in from_text(handle.snapshot_property(EXPECTATIONS, handle.staged.snapshot_id))
        )
        snapshot = handle.publish()
        reports.append(StepResult(table.name, "published", snapshot=snapshot, results=results))
    return snapshot


def _bronze_reads(step: Step) -> set[str]:
    """The bronze tables whose unreadable rows a step sends to quarantine."""
    return {r.table.name for r in step.reads.values() if isinstance(r, Grouped | Delta) and r.parse and r.table.layer == "bronze"}


@dataclass(frozen=True)
class Replay:
    """What a replay did."""

    corrections: int
    before: int
    after: int
    reports: tuple[StepResult, ...]


def replay(engine: Engine, project: Project, fixes: Path | None) -> Replay:
    """Store corrections, read the quarantined rows again, and take those that can be read now out of quarantine."""
    corrections = store_corrections(engine, project, fixes) if fixes else 0
    quarantined = _quarantined(engine.lake)
    positions: dict[str, tuple[str, ...]] = {
        table: tuple(quarantined.filter(pl.col("source_table") == table)["source_position"].to_list())
        for table in quarantined["source_table"].unique().sort()
        if project.tables[table].layer == "bronze"  # what breaks an expectation leaves when its table is filled anew
    }
    with recorded(engine, "replay") as reports:
        for step in project.ordered_steps:
            reports.append(engine.refresh(step, replay=positions if _bronze_reads(step) & positions.keys() else None))
    return Replay(corrections, quarantined.height, _quarantined(engine.lake).height, tuple(reports))


def _quarantined(lake: Lake) -> pl.DataFrame:
    return lake.load(QUARANTINE).read(["source_table", "source_position"])


def store_corrections(engine: Engine, project: Project, file: Path) -> int:
    """Append the corrections of a JSON Lines file to bronze: {"table", "position", "value" | "value_base64"}."""
    by_table: dict[str, dict[str, bytes]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ShopSphereError(f"{file} cannot be read ({error.strerror}). Give a JSON Lines file of corrections.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            table, position, value = _correction(project, f"{file}:{number}", line)
            by_table.setdefault(table.name, {})[position] = value
    for name, values in by_table.items():
        # nothing is stored of a file with an error in it
        _corrections(project, engine.lake.load(project.bronze[name], create=False), values, load_suppression(engine.lake))
    return sum(
        engine.retried(partial(_append_corrections, engine.lake, project, project.bronze[name], values))
        for name, values in by_table.items()
    )


def _correction(project: Project, where: str, line: str) -> tuple[Table, str, bytes]:
    try:
        item: dict[str, Any] = json.loads(line)
        value = base64.b64decode(item["value_base64"]) if "value_base64" in item else str(item["value"]).encode()
        table, position = table_named(project, str(item["table"])), str(item["position"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShopSphereError(
            f'{where}: not a correction ({type(error).__name__}: {error}). Write {{"table": ..., "position": ..., "value": ...}}.'
        ) from None
    if table not in project.source_tables:
        raise ShopSphereError(f"{where}: {table.name} is not a bronze table. Give the quarantined row's source_table.")
    return table, position, value


def _append_corrections(lake: Lake, project: Project, table: Table, values: Mapping[str, bytes]) -> int:
    """Store those that are not there yet; gives how many."""
    handle = lake.load(table, create=False)
    fixes = _corrections(project, handle, values, load_suppression(lake))
    if fixes.height:
        now = pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
        fixes = fixes.with_columns(now, pl.lit(handle.next_sequence, pl.Int64).alias(SEQUENCE))
        handle.commit(handle.writer.write(fixes), positions=handle.positions)
    return fixes.height


def _corrections(
    project: Project, handle: TableHandle, values: Mapping[str, bytes], suppression: Suppression | None
) -> pl.DataFrame:
    """One new row a correction, at the position of the row that it corrects; none for one that is there already.

    Only of rows that cannot be read: so at most one row at a position speaks, and the tables stay functions of the set
    of bronze rows. Raises ShopSphereError.
    """
    table = handle.table
    columns = [name for name in handle.reader.schema.names if name not in BOOKKEEPING]
    rows = handle.read(columns, pl.col("_source_position").is_in(list(values)))
    received = rows.filter(pl.col("_op") != "fix").sort("_source_position", "_op").unique("_source_position", keep="first")
    if missing := sorted(values.keys() - set(received["_source_position"].to_list())):
        raise ShopSphereError(
            f'{table.name} has no row at position {missing[0]}. See `python -m app sql "SELECT * FROM silver.quarantine"`.'
        )
    fixes = pl.concat(
        corrected_row(table, received[n : n + 1], values[position], handle.arrow_schema)
        for n, position in enumerate(received["_source_position"].to_list())
    )
    if suppression is not None:
        fixes = Anonymiser(suppression)(table, fixes).rows
    content = [name for name in columns if name != "_ingested_at"]
    fixes = fixes.join(rows.select(content), on=content, how="anti", nulls_equal=True)
    about = rows.filter(pl.col("_source_position").is_in(fixes["_source_position"].implode()))
    for parse in _parsers(project, table):
        read = parse(about).parsed_positions
        if read is not None and read.len():
            raise ShopSphereError(
                f"{table.name} at position {read.sort()[0]!s} can be read: only quarantined rows are corrected. "
                "Correct it at its source."
            )
    return fixes


def _parsers(project: Project, table: Table) -> list[Callable[[pl.DataFrame], Parsed]]:
    """What tells of the table's rows which can be read; the first is as good as any."""
    reads = [read for step in project.ordered_steps for read in step.reads.values() if isinstance(read, Grouped | Delta)]
    return [read.parse for read in reads if read.table.name == table.name and read.parse is not None][:1]
