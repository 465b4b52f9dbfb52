"""The command maintain: compaction, expired snapshots, orphan files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.errors import report
from app.cli.options import Json
from app.cli.output import Output
from app.cli.unfinished_erasures import finish_erasures
from app.project import PROJECT
from lakehouse.format_bytes import format_bytes
from lakehouse.unforeseen_errors import unforeseen_error
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.iceberg.maintenance import MaintenanceResult
    from lakehouse.table import Table

COLUMNS = ("table", "files before", "files after", "delete files merged", "snapshots expired", "orphans deleted", "freed")


def maintain(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables; all by default")] = None,
    snapshot_hours: Annotated[float | None, typer.Option(help="Expire snapshots older than this many hours")] = None,
    orphan_hours: Annotated[float | None, typer.Option(help="Delete unreferenced files older than this many hours")] = None,
    json: Json = False,
) -> None:
    """Compact files, expire snapshots and delete orphan files; safe while a writer is running."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.iceberg.maintenance import maintain as maintain_table
    from lakehouse.run_history import OPERATIONS, delete_old_days
    from pipelines.runner import expected_error, open_engine

    given = {"snapshot_retention_hours": snapshot_hours, "orphan_retention_hours": orphan_hours}
    output, settings = Output(json), load_settings(**{name: hours for name, hours in given.items() if hours is not None})
    with open_engine(settings) as engine:
        erased = finish_erasures(engine, output)
    lake = Lake(settings)
    chosen = _chosen_tables(lake, tables)
    if any(table.name in OPERATIONS for table in chosen):
        delete_old_days(lake, settings.history_days, datetime.now(UTC))
    maintained, errors = [], []
    with output.progress() as show:
        for number, table in enumerate(chosen):
            show("maintain", number, len(chosen))
            try:
                maintained.append(maintain_table(lake, table, datetime.now(UTC)))
            except Exception as error:
                errors.append(expected_error(error, lake, [table]) or unforeseen_error(table.name, error))
    if json:
        output.json([asdict(table) for table in maintained])
    else:
        print_maintained(output, maintained)
    for problem in {str(error): error for error in errors}.values():
        report(problem)
    if errors or not erased:
        raise typer.Exit(1)


def _chosen_tables(lake: Lake, names: Sequence[str] | None) -> list[Table]:
    """Return the named tables, or all tables that exist. The run history's own tables are included."""
    from lakehouse.run_history import OPERATIONS

    if names:
        return [OPERATIONS.get(name) or PROJECT.find_table(name) for name in names]
    return [table for table in (*PROJECT.tables.values(), *OPERATIONS.values()) if lake.exists(table)]


def print_maintained(output: Output, maintained: Sequence[MaintenanceResult]) -> None:
    """Print one line per table."""
    output.table(
        COLUMNS,
        [
            (
                table.table,
                table.files_before,
                table.files_after,
                table.deletes_merged,
                table.snapshots_expired,
                table.orphans_deleted,
                format_bytes(table.orphan_bytes),
            )
            for table in maintained
        ],
    )


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(maintain)
