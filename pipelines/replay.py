"""Replays quarantined rows, with corrections: rows that can be read now leave the quarantine."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.retry import retry_commit
from lakehouse.step import Delta, Grouped, Parsed
from lakehouse.table import BOOKKEEPING, SEQUENCE, Table
from pipelines.bronze.corrections import corrected_row
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.suppression import Suppression, load_suppression
from pipelines.rebuild import bronze_reads
from pipelines.runner import recorded
from pipelines.silver.quarantine import QUARANTINE


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    corrections  how many were stored
    before       quarantined rows before the replay
    after        quarantined rows after it
    """

    corrections: int
    before: int
    after: int
    reports: tuple[StepResult, ...]


def replay_quarantined(engine: Engine, project: Project, fixes: Path | None) -> Replay:
    """Store the corrections of a JSON Lines file, if given, then read the quarantined rows again."""
    corrections = store_corrections(engine, project, fixes) if fixes else 0
    quarantined = _quarantined(engine.lake)
    positions: dict[str, tuple[str, ...]] = {
        table: tuple(quarantined.filter(pl.col("source_table") == table)["source_position"].to_list())
        for table in quarantined["source_table"].unique().sort()
        if project.tables[table].layer == "bronze"  # rows that break an expectation leave when their table is refreshed
    }
    with recorded(engine, "replay") as results:
        for step in project.ordered_steps:
            results.append(engine.refresh(step, replay=positions if bronze_reads(step) & positions.keys() else None))
    return Replay(corrections, quarantined.height, _quarantined(engine.lake).height, tuple(results))


def _quarantined(lake: Lake) -> pl.DataFrame:
    return lake.load(QUARANTINE).read(["source_table", "source_position"])


def store_corrections(engine: Engine, project: Project, file: Path) -> int:
    """Append the corrections of a JSON Lines file to bronze; return how many are new.

    Each line is {"table", "position", "value" or "value_base64"}. Raises ShopSphereError, and stores nothing, when a line is
    wrong.
    """
    values_by_table = _read_corrections(project, file)
    for name, values in values_by_table.items():
        # check all tables before the first commit
        _correction_rows(project, engine.lake.load(project.bronze[name], create=False), values, load_suppression(engine.lake))
    return sum(
        retry_commit(partial(_append_corrections, engine.lake, project, project.bronze[name], values))
        for name, values in values_by_table.items()
    )


def _read_corrections(project: Project, file: Path) -> dict[str, dict[str, bytes]]:
    """Return by table the corrected value of each position."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ShopSphereError(f"{file} cannot be read ({error.strerror}). Expected a JSON Lines file of corrections.") from None
    by_table: dict[str, dict[str, bytes]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            table, position, value = _parse_correction(project, f"{file}:{number}", line)
            by_table.setdefault(table.name, {})[position] = value
    return by_table


def _parse_correction(project: Project, where: str, line: str) -> tuple[Table, str, bytes]:
    try:
        item: dict[str, Any] = json.loads(line)
        value = base64.b64decode(item["value_base64"]) if "value_base64" in item else str(item["value"]).encode()
        table, position = project.find_table(str(item["table"])), str(item["position"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShopSphereError(
            f"{where}: invalid correction ({type(error).__name__}: {error}). "
            'Expected {"table": ..., "position": ..., "value": ...}.'
        ) from None
    if table not in project.source_tables:
        raise ShopSphereError(f"{where}: {table.name} is not a bronze table. Give the source_table of the quarantined row.")
    return table, position, value


def _append_corrections(lake: Lake, project: Project, table: Table, values: Mapping[str, bytes]) -> int:
    """Store the corrections that are not stored yet; return how many. Raises CommitConflict."""
    handle = lake.load(table, create=False)
    fixes = _correction_rows(project, handle, values, load_suppression(lake))
    if fixes.height:
        now = pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
        fixes = fixes.with_columns(now, pl.lit(handle.next_sequence, pl.Int64).alias(SEQUENCE))
        handle.commit(handle.writer.write(fixes), positions=handle.positions)
    return fixes.height


def _correction_rows(
    project: Project, handle: TableHandle, values: Mapping[str, bytes], suppression: Suppression | None
) -> pl.DataFrame:
    """Return one new row for each correction, at the position of the row it corrects; none for a stored one.

    Only unreadable rows can be corrected. So there is one effective row per position, and tables remain functions of the set
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
    _check_unreadable(project, table, rows.filter(pl.col("_source_position").is_in(fixes["_source_position"].implode())))
    return fixes


def _check_unreadable(project: Project, table: Table, rows: pl.DataFrame) -> None:
    """Raise ShopSphereError when one of the rows can be read."""
    parse = _parser(project, table)
    readable = parse(rows).parsed_positions if parse is not None else None
    if readable is not None and readable.len():
        raise ShopSphereError(
            f"{table.name}: the row at position {readable.sort()[0]!s} is readable, and only quarantined rows can be corrected. "
            "Correct it at its source."
        )


def _parser(project: Project, table: Table) -> Callable[[pl.DataFrame], Parsed] | None:
    """Return the function that parses the table's rows; all steps agree on which of them are readable."""
    reads = (read for step in project.ordered_steps for read in step.reads.values() if isinstance(read, Grouped | Delta))
    return next((read.parse for read in reads if read.table.name == table.name and read.parse is not None), None)
