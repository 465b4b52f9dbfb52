"""One pass over everything: sources into bronze, then every step in order; and its relatives rebuild and replay."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

import pipelines
from app.tables import MODEL_TABLES, TABLES, rebuild_model_table
from lakehouse.engine import Engine, Report, Upstream
from lakehouse.errors import ShopSphereError, SourceError
from lakehouse.iceberg import Handle, Lake
from lakehouse.parallel import Pool
from lakehouse.settings import Settings
from lakehouse.step import Changes, Context, Gather, Step
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import EVENTS, MARKETPLACE_ORDERS
from pipelines.silver.quarantine import QUARANTINE

Tell = Callable[[str, Report | None], None]
"""tell(name, None) when a table is begun, tell(name, report) when it is done."""


@dataclass(frozen=True)
class Pass:
    """What one pass did, and which sources it could not read."""

    reports: tuple[Report, ...]
    errors: tuple[SourceError, ...]
    seconds: float
    cpu_seconds: float


def context_of(settings: Settings) -> Context:
    """The settings that shape results."""
    return Context(
        base_currency=settings.base_currency,
        default_region=settings.default_region,
        address_crowd=settings.address_crowd,
        identifier_crowd=settings.identifier_crowd,
        low_stock_days=float(settings.low_stock_days),
    )


@contextmanager
def open_engine(settings: Settings) -> Iterator[Engine]:
    """An engine on the lake of the settings; stops Ray at the end if it was started."""
    pool = Pool(settings.ray)
    try:
        yield Engine(Lake(settings), pool, context_of(settings), QUARANTINE)
    finally:
        pool.close()


def run_pass(engine: Engine, tell: Tell, stopping: Callable[[], bool] = lambda: False) -> Pass:
    """Read what is new at every source, then bring every table up to date. A source that cannot be read does not
    keep the others from going on; its error is in the result."""
    started, cpu = time.monotonic(), time.process_time()
    reports: list[Report] = []
    errors: list[SourceError] = []
    for source in pipelines.sources(engine.lake.settings):
        if stopping():
            break
        tell(source.name, None)
        try:
            done = engine.ingest(source, pipelines.TABLES)
        except SourceError as error:
            errors.append(error)
            continue
        for report in done:
            tell(report.table, report)
        reports += done
    for step in pipelines.STEPS:
        if stopping():
            break
        tell(step.target.name, None)
        report = engine.refresh(step)
        tell(step.target.name, report)
        reports.append(report)
    elsewhere = sum(report.worker_cpu_seconds for report in reports)
    return Pass(tuple(reports), tuple(errors), time.monotonic() - started, time.process_time() - cpu + elsewhere)


def table_named(name: str) -> Table:
    """The table of that name, with or without its layer. Raises ShopSphereError listing the tables."""
    found = [table for full, table in TABLES.items() if name in (full, table.short_name)]
    if len(found) != 1:
        raise ShopSphereError(f"There is no table '{name}'. Tables: {', '.join(TABLES)}.")
    return found[0]


def rebuild(engine: Engine, name: str) -> list[Report]:
    """Fill a table again from everything upstream; a bronze table: read its source again from the beginning."""
    table = table_named(name)
    if table.name == QUARANTINE.name:
        return [engine.refresh(step, rebuild=True) for step in pipelines.STEPS if _bronze_reads(step)]
    if table.layer == "bronze":
        source = next((s for s in pipelines.sources(engine.lake.settings) if table.name in s.tables), None)
        if source is None:
            raise SourceError(f"The source of {table.name} is switched off. Switch it on in the settings.")
        return [r for r in engine.ingest(source, pipelines.TABLES, again=frozenset({table.name})) if r.table == table.name]
    if table.name in MODEL_TABLES:
        return [rebuild_model_table(engine, table)]
    step = next(step for step in pipelines.STEPS if step.target.name == table.name)
    return [engine.refresh(step, rebuild=True)]


def _bronze_reads(step: Step) -> set[str]:
    """The bronze tables whose unreadable rows a step sends to quarantine."""
    return {
        r.table.name for r in step.reads.values() if isinstance(r, Gather | Changes) and r.parse and r.table.layer == "bronze"
    }


@dataclass(frozen=True)
class Replay:
    """What a replay did."""

    corrections: int
    before: int
    after: int
    reports: tuple[Report, ...]


def replay(engine: Engine, fixes: Path | None) -> Replay:
    """Store corrections, read the quarantined rows again, and take those that can be read now out of quarantine."""
    corrections = store_corrections(engine, fixes) if fixes else 0
    quarantined = _quarantined(engine.lake)
    positions: dict[str, tuple[str, ...]] = {
        table: tuple(quarantined.filter(pl.col("source_table") == table)["source_position"].to_list())
        for table in quarantined["source_table"].unique().sort()
    }
    reports = tuple(
        engine.refresh(step, replay=positions if _bronze_reads(step) & positions.keys() else None) for step in pipelines.STEPS
    )
    return Replay(corrections, quarantined.height, _quarantined(engine.lake).height, reports)


def _quarantined(lake: Lake) -> pl.DataFrame:
    return lake.load(QUARANTINE).read(["source_table", "source_position"])


def store_corrections(engine: Engine, file: Path) -> int:
    """Append the corrections of a JSON Lines file to bronze: {"table", "position", "value" | "value_base64"}."""
    by_table: dict[str, dict[str, bytes]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ShopSphereError(f"{file} cannot be read ({error.strerror}). Give a JSON Lines file of corrections.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            table, position, value = _correction(f"{file}:{number}", line)
            by_table.setdefault(table.name, {})[position] = value
    for name, values in by_table.items():
        _append_corrections(engine, engine.lake.load(pipelines.TABLES[name]), values)
    return sum(len(values) for values in by_table.values())


def _correction(where: str, line: str) -> tuple[Table, str, bytes]:
    try:
        item: dict[str, Any] = json.loads(line)
        value = base64.b64decode(item["value_base64"]) if "value_base64" in item else str(item["value"]).encode()
        table, position = table_named(str(item["table"])), str(item["position"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShopSphereError(
            f'{where}: not a correction ({type(error).__name__}: {error}). Write {{"table": ..., "position": ..., "value": ...}}.'
        ) from None
    if table.name not in (EVENTS.name, MARKETPLACE_ORDERS.name):
        raise ShopSphereError(f"{where}: rows of {table.name} are never quarantined; correct them at their source.")
    return table, position, value


def _append_corrections(engine: Engine, handle: Handle, values: Mapping[str, bytes]) -> None:
    """One new row a correction: the original with the new bytes and `_op` 'fix'."""
    upstream = Upstream(handle.table, handle.reader, tuple(handle.files()))
    columns = [name for name in handle.reader.schema.names if name not in BOOKKEEPING]
    rows = upstream.read(columns, pl.col("_source_position").is_in(list(values)))
    rows = rows.filter(pl.col("_op") != "fix").unique("_source_position", maintain_order=True)
    if missing := sorted(values.keys() - set(rows["_source_position"].to_list())):
        raise ShopSphereError(
            f'{handle.table.name} has no row at position {missing[0]}. See `python -m app sql "SELECT * FROM silver.quarantine"`.'
        )
    fresh = [values[position] for position in rows["_source_position"].to_list()]
    if handle.table.name == EVENTS.name:
        rows = rows.with_columns(pl.Series("value", fresh, dtype=pl.Binary))
    else:
        texts = [value.decode("utf-8", "replace") for value in fresh]
        rows = rows.with_columns(
            pl.Series("document", texts),
            *(pl.Series(name, [_named(t, name) for t in texts], dtype=pl.String) for name in ("platform", "mp_order_id")),
        )
    now = pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
    rows = rows.with_columns(pl.lit("fix").alias("_op"), now, pl.lit(handle.sequence, pl.Int64).alias("_seq"))
    handle.commit(handle.writer.write(rows), positions=handle.positions)


def _named(document: str, name: str) -> str | None:
    try:
        value = json.loads(document).get(name)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None
