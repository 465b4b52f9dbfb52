"""The commands that write tables: run, rebuild, replay, publish."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.errors import report
from app.cli.options import Json, parse_seconds
from app.cli.output import Output
from app.cli.step_report import print_run, print_steps, step_json, step_progress
from app.cli.unfinished_erasures import finish_erasures
from app.project import PROJECT
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from lakehouse.engine.engine import Engine
    from lakehouse.run_history import RunHistory

EVERY_HELP = "Run every INTERVAL, for example 30s. SIGTERM finishes the current table and exits; a second SIGTERM exits at once."


def run(every: Annotated[str, typer.Option(help=EVERY_HELP)] = "", json: Json = False) -> None:
    """Read new data from the sources and update every table."""
    from pipelines.runner import open_engine

    output, interval = Output(json), parse_seconds(every) if every else None
    settings, stop = load_settings(), threading.Event()
    if interval is None:
        with open_engine(settings) as engine:
            succeeded = _run_until(engine, output, stop, None)
    else:
        with stopped_by_signals(stop), open_engine(settings) as engine:
            succeeded = _run_until(engine, output, stop, interval)
    if not succeeded and not stop.is_set():
        raise typer.Exit(1)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on the first SIGTERM or SIGINT; pass a second one to the previous handler, because the current table may
    be waiting for a server that never answers."""
    previous: dict[signal.Signals, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and callable(handler := previous.get(signal.Signals(number))):
            handler(number, frame)
        stop.set()

    previous |= {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_until(engine: Engine, output: Output, stop: threading.Event, interval: float | None) -> bool:
    """Run once, or every `interval` seconds until `stop` is set. Return whether the last run succeeded."""
    from lakehouse.run_history import RunHistory

    history = RunHistory(engine.lake)
    erased = finish_erasures(engine, output, keep_going=interval is not None)
    while True:
        started = time.monotonic()
        try:
            succeeded = _run(engine, output, stop, history)
        except Exception as error:
            if interval is None:
                raise
            report(error)  # outside of all sources and tables, such as a full disk under the output; the next run tries again
            succeeded = False
        if not erased and not stop.is_set():
            # the run may have read the corrected rows that the erasure waits for
            erased = finish_erasures(engine, output, keep_going=interval is not None)
        if interval is None or stop.wait(max(0.0, interval - (time.monotonic() - started))):
            return erased and succeeded


def _run(engine: Engine, output: Output, stop: threading.Event, history: RunHistory) -> bool:
    """Run once and print the results and errors. Return whether everything succeeded."""
    from pipelines.runner import run_once

    with output.progress() as show:
        result = run_once(engine, PROJECT, step_progress(show), stop.is_set, history)
    print_run(output, result)
    for error in result.errors:
        report(error)
    return not result.errors


def rebuild(tables: Annotated[list[str], typer.Argument(help="Tables, e.g. gold.sales_daily")], json: Json = False) -> None:
    """Recompute tables from all upstream rows; for bronze tables, re-read the source from the beginning."""
    from pipelines.rebuild import rebuild_tables
    from pipelines.runner import open_engine

    output = Output(json)
    with open_engine(load_settings()) as engine:
        results = rebuild_tables(engine, PROJECT, tables)
    if json:
        output.json([step_json(result) for result in results])
    else:
        print_steps(output, results)
        output.say("Done. `python -m app run` applies the changes to the downstream tables.")


def replay(
    fix: Annotated[Path | None, typer.Option(help='JSON Lines file of corrections: {"table", "position", "value"}')] = None,
    json: Json = False,
) -> None:
    """Re-read quarantined rows, with corrections if given. Rows that are now valid leave the quarantine."""
    from pipelines.replay import replay_quarantined
    from pipelines.runner import open_engine

    output = Output(json)
    with open_engine(load_settings()) as engine:
        done = replay_quarantined(engine, PROJECT, fix)
    if json:
        output.json({**asdict(done), "reports": [step_json(result) for result in done.reports]})
    else:
        print_steps(output, done.reports)
        output.say(f"{done.corrections} corrections stored. Quarantined rows: {done.before} before, {done.after} now.")


def publish(table: Annotated[str, typer.Argument(help="Table, e.g. gold.sales_daily")], json: Json = False) -> None:
    """Publish the staged snapshot of a gold table although its expectations failed; inspect it first."""
    from pipelines.publish import publish_staged
    from pipelines.runner import open_engine

    output = Output(json)
    with open_engine(load_settings()) as engine:
        snapshot = publish_staged(engine, PROJECT, table)
    if json:
        output.json({"table": table, "snapshot": snapshot})
    else:
        output.say(f"Published. Readers of {table} now see snapshot {snapshot}.")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (run, rebuild, replay, publish):
        app.command()(command)
