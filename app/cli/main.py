"""The command line: `python -m app`."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from app.cli.model_commands import register
from app.cli.output import Output
from app.cli.serving import register as register_serving
from app.project import PROJECT
from lakehouse.errors import ShopSphereError
from lakehouse.format_bytes import format_bytes
from lakehouse.settings import home_directory
from lakehouse.transient_errors import as_transient_error
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from lakehouse.engine.engine import Engine, StepResult

typer.core.HAS_RICH = False
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="ShopSphere: one truth of a retailer's data, from PostgreSQL, MongoDB and Kafka into an Iceberg lakehouse.",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="Real source servers on this machine, with a shop inside.")
app.add_typer(sandbox_app, name="sandbox")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]


@app.callback()
def main_options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors")] = False) -> None:
    """Options for every command."""


@app.command()
def run(
    every: Annotated[
        str, typer.Option(help="Keep going: one pass every so often, e.g. 5s, 2m; SIGTERM ends it cleanly, twice at once")
    ] = "",
    json: Json = False,
) -> None:
    """Read what is new at the sources and bring every table up to date."""
    from lakehouse.run_history import RunHistory
    from pipelines.runner import open_engine, run_once

    output, pause = Output(json), seconds_of(every) if every else None
    settings = load_settings()
    stop = threading.Event()

    previous: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and callable(previous.get(number)):  # what is under way may wait for a server that never answers
            previous[number](number, frame)
        stop.set()

    if pause is not None:
        previous |= {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    failed = False
    try:
        with open_engine(settings) as engine:
            history = RunHistory(engine.lake)
            finished = finish_erasures(engine, output, keep_going=pause is not None)
            while True:
                begun = time.monotonic()
                with output.progress() as show:
                    done = run_once(engine, PROJECT, teller(show), stop.is_set, history)
                print_pass(output, done)
                if not finished and not stop.is_set():
                    # the pass may have read what was corrected
                    finished = finish_erasures(engine, output, keep_going=pause is not None)
                failed = bool(done.errors) or not finished
                for error in done.errors:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                if pause is None or stop.wait(max(0.0, pause - (time.monotonic() - begun))):
                    break
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failed and not stop.is_set():
        raise typer.Exit(1)


def seconds_of(text: str) -> float:
    """'5s', '2m', '1h' or a number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if not found:
        raise ShopSphereError(f"'{text}' is not a time. Write it as 5s, 2m or 1h.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[found[2]]


def teller(show: Callable[[str, int, int], None]) -> Callable[[str, StepResult | None], None]:
    """Progress of a pass: a bar, or a line a table."""

    def tell(name: str, report: StepResult | None) -> None:
        show(name, 1 if report else 0, 1)

    return tell


REPORT_COLUMNS = ("step", "status", "rows read", "rows written", "deleted", "written", "seconds", "cpu s")


def print_pass(output: Output, done: Any) -> None:
    """The reports of a pass: a table, or one JSON object."""
    if output.as_json:
        output.json(
            {
                "steps": [asdict(report) for report in done.reports],
                "errors": [str(error) for error in done.errors],
                "seconds": done.seconds,
                "cpu_seconds": done.cpu_seconds,
            }
        )
        return
    print_reports(output, done.reports)
    for result in [result for report in done.reports for result in report.results if result.outcome != "pass"]:
        output.say(f"{result.outcome}: {result.table}: {result}")
    changed = sum(report.status == "changed" for report in done.reports)  # not those that were only read for
    output.say(f"{changed} of {len(done.reports)} tables changed, in {done.seconds:.1f} s ({done.cpu_seconds:.1f} CPU s).")


def print_reports(output: Output, reports: tuple[StepResult, ...] | list[StepResult]) -> None:
    """What each step did, those that did something."""
    busy = [r for r in reports if r.status != "unchanged"]
    if busy:
        output.table(
            REPORT_COLUMNS,
            [
                (
                    r.table,
                    r.status + (" (Ray)" if r.parallel else ""),
                    r.rows_read,
                    r.rows_written,
                    r.rows_deleted,
                    format_bytes(r.bytes_written),
                    r.seconds,
                    r.cpu_seconds,
                )
                for r in busy
            ],
        )


@app.command()
def rebuild(tables: Annotated[list[str], typer.Argument(help="Tables, e.g. gold.sales_daily")], json: Json = False) -> None:
    """Fill tables again from everything upstream (bronze: read their source again from the beginning)."""
    from pipelines import runner

    output = Output(json)
    with runner.open_engine(load_settings()) as engine:
        reports = runner.rebuild(engine, PROJECT, tables)
    if json:
        output.json([asdict(report) for report in reports])
    else:
        print_reports(output, reports)
        output.say("Done. `python -m app run` carries what changed into the tables after it.")


@app.command()
def replay(
    fix: Annotated[Path | None, typer.Option(help='JSON Lines file of corrections: {"table", "position", "value"}')] = None,
    json: Json = False,
) -> None:
    """Read quarantined rows again, with corrections if given; what can be read now leaves the quarantine."""
    from pipelines import runner

    output = Output(json)
    with runner.open_engine(load_settings()) as engine:
        done = runner.replay(engine, PROJECT, fix)
    if json:
        output.json(asdict(done))
    else:
        print_reports(output, done.reports)
        output.say(f"{done.corrections} corrections stored; {done.before} rows were quarantined, {done.after} are now.")


@app.command()
def publish(table: Annotated[str, typer.Argument(help="Table, e.g. gold.sales_daily")], json: Json = False) -> None:
    """Publish the build of a gold table that its expectations have refused, after a look at it."""
    from pipelines import runner

    output = Output(json)
    with runner.open_engine(load_settings()) as engine:
        snapshot = runner.publish(engine, PROJECT, table)
    if json:
        output.json({"table": table, "snapshot": snapshot})
    else:
        output.say(f"Published. Readers of {table} have snapshot {snapshot} now.")


@app.command()
def status(
    expectations: Annotated[bool, typer.Option("--expectations", help="How every expectation came out last")] = False,
    runs: Annotated[int, typer.Option(min=0, help="So many of the newest runs that did or found something")] = 0,
    json: Json = False,
) -> None:
    """Per table: rows, snapshot, position, lag behind its source, last run, how its expectations came out."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.run_history import last_results, past_runs
    from lakehouse.status import short_position, statuses

    output = Output(json)
    if expectations or runs:
        lake = Lake(load_settings())
        results, past = last_results(lake) if expectations else [], past_runs(lake, runs) if runs else []
        if json:
            output.json({"expectations": [asdict(item) for item in results], "runs": [asdict(item) for item in past]})
            return
        if expectations:
            print_results(output, results)
        if runs:
            print_runs(output, past)
        return
    found = statuses(Lake(load_settings()), PROJECT)
    if json:
        output.json([asdict(item) for item in found])
        return
    output.table(
        ("table", "rows", "snapshot", "lag", "expectations", "last run", "files", "size", "position"),
        [
            (
                s.table,
                s.rows,
                str(s.snapshot or ""),
                s.lag,
                s.expectations,
                s.last_run,
                s.files,
                format_bytes(s.bytes),
                _clipped(short_position(s.position), 60),
            )
            for s in found
        ],
    )


def print_results(output: Output, results: list[Any]) -> None:
    """How every expectation came out when it was judged last."""
    columns = ("table", "expectation", "severity", "outcome", "rows", "violations", "in the table", "what was found")
    rows = [
        (
            r.table,
            _clipped(r.expectation, 60),
            r.severity,
            r.outcome,
            r.rows,
            r.violations,
            r.standing,
            r.detail or "; ".join(r.examples),
        )
        for r in results
    ]
    output.table(columns, rows)


def print_runs(output: Output, runs: list[Any]) -> None:
    """The newest runs, and their errors."""
    output.table(
        ("run", "kind", "started", "seconds", "tables changed", "rows written", "broken expectations", "errors"),
        [(r.run_id, r.kind, r.started_at, r.seconds, r.tables, r.rows_written, r.warnings, len(r.errors)) for r in runs],
    )
    for run in runs:
        for error in run.errors:
            output.say(f"{run.run_id}: {error}")


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


@app.command()
def sql(statement: Annotated[str, typer.Argument(help="One SELECT; tables by layer and name")], json: Json = False) -> None:
    """Run SQL over all tables, e.g. "SELECT * FROM gold.sales_daily FOR TIMESTAMP AS OF '2026-01-31 12:00:00'"."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.query import query
    from lakehouse.run_history import OPERATIONS

    output = Output(json)
    result = query(Lake(load_settings()), {**PROJECT.tables, **OPERATIONS}, statement)
    if json:
        output.json(result.to_pylist())
    else:
        output.table(result.schema.names, [list(row.values()) for row in result.to_pylist()])


@app.command()
def digest(tables: Annotated[list[str] | None, typer.Argument(help="Tables; none: all")] = None, json: Json = False) -> None:
    """A digest of each table's business columns: the same whatever the order of rows, the files or the run."""
    from lakehouse.digest import digest as digest_of
    from lakehouse.iceberg.catalog import Lake
    from pipelines.runner import table_named

    output, lake = Output(json), Lake(load_settings())
    chosen = [table_named(PROJECT, name) for name in tables] if tables else list(PROJECT.tables.values())
    found = {table.name: digest_of(lake.load(table)) for table in chosen}
    if json:
        output.json(found)
    else:
        output.table(("table", "digest"), list(found.items()))


@app.command()
def maintain(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables; none: all")] = None,
    snapshot_hours: Annotated[float | None, typer.Option(help="Expire snapshots older than this many hours")] = None,
    orphan_hours: Annotated[float | None, typer.Option(help="Delete unreferenced files older than this many hours")] = None,
    json: Json = False,
) -> None:
    """Compact files, expire snapshots, delete orphan files; safe beside a running writer."""
    from lakehouse.iceberg.catalog import Lake
    from lakehouse.iceberg.maintenance import maintain as maintain_table
    from lakehouse.run_history import OPERATIONS, forget
    from pipelines.runner import open_engine, table_named

    overrides = {
        name: value
        for name, value in (("snapshot_retention_hours", snapshot_hours), ("orphan_retention_hours", orphan_hours))
        if value is not None
    }
    output, settings = Output(json), load_settings(**overrides)
    with open_engine(settings) as engine:
        finished = finish_erasures(engine, output)
    lake = Lake(settings)
    every = (*PROJECT.tables.values(), *OPERATIONS.values())
    chosen = (
        [OPERATIONS.get(name) or table_named(PROJECT, name) for name in tables]
        if tables
        else [t for t in every if lake.exists(t)]
    )
    if any(table.name in OPERATIONS for table in chosen):
        forget(lake, lake.settings.history_days, datetime.now(UTC))
    done = []
    with output.progress() as show:
        for number, table in enumerate(chosen):
            show("maintain", number, len(chosen))
            done.append(maintain_table(lake, table, datetime.now(UTC)))
    if json:
        output.json([asdict(item) for item in done])
    output.table(
        ("table", "files before", "files after", "delete files merged", "snapshots expired", "orphans deleted", "freed"),
        [
            (
                m.table,
                m.files_before,
                m.files_after,
                m.deletes_merged,
                m.snapshots_expired,
                m.orphans_deleted,
                format_bytes(m.orphan_bytes),
            )
            for m in done
        ],
    )
    if not finished:
        raise typer.Exit(1)


@app.command()
def erase(
    email: Annotated[str | None, typer.Option(help="E-mail address of the person")] = None,
    phone: Annotated[str | None, typer.Option(help="Phone number of the person")] = None,
    loyalty_id: Annotated[str | None, typer.Option(help="Loyalty card of the person")] = None,
    user_id: Annotated[int | None, typer.Option(help="An account of the person")] = None,
    master_user_id: Annotated[str | None, typer.Option(help="The person, as gold.customer_360 names them")] = None,
    json: Json = False,
) -> None:
    """Erase a person from every table, snapshot and file, and prove it; without a person: finish what was begun."""
    from app.cli.erasure_receipt import receipt_lines
    from app.erasure import erasure_context
    from pipelines.privacy import erase as erasure_service
    from pipelines.privacy.receipt import as_json
    from pipelines.runner import open_engine

    output, asked = Output(json), asked_for(email, phone, loyalty_id, user_id, master_user_id)
    with open_engine(load_settings()) as engine, output.progress() as show:
        receipts = erasure_service.erase(erasure_context(engine, show), asked)
    if json:
        output.json([as_json(one) for one in receipts])
    for one in receipts:
        for line in receipt_lines(one):
            output.say(line)
    if not receipts:
        output.say("No erasure was under way.")
    if not all(one.clean for one in receipts):
        raise ShopSphereError("The erasure is not proved: see the receipt above, and run `python -m app erase` again.")


@app.command()
def export(
    email: Annotated[str | None, typer.Option(help="E-mail address of the person")] = None,
    phone: Annotated[str | None, typer.Option(help="Phone number of the person")] = None,
    loyalty_id: Annotated[str | None, typer.Option(help="Loyalty card of the person")] = None,
    user_id: Annotated[int | None, typer.Option(help="An account of the person")] = None,
    master_user_id: Annotated[str | None, typer.Option(help="The person, as gold.customer_360 names them")] = None,
    to: Annotated[Path | None, typer.Option("--output", help="Directory to make; by default ./export-<time>")] = None,
    json: Json = False,
) -> None:
    """Write everything known of a person, in all layers and over all time, as JSON and CSV."""
    from lakehouse.iceberg.catalog import Lake
    from pipelines.privacy.export import export as write_export

    output, asked = Output(json), asked_for(email, phone, loyalty_id, user_id, master_user_id)
    if asked is None:
        raise ShopSphereError("Name the person: --email, --phone, --loyalty-id, --user-id or --master-user-id.")
    directory = to or Path(f"export-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    done = write_export(Lake(load_settings()), PROJECT.tables, asked, directory)
    if json:
        output.json({"directory": str(done.directory), "rows": dict(done.rows)})
        return
    output.table(("table", "rows"), list(done.rows.items()))
    output.say(f"Written to {done.directory}: person.json, and a CSV file for each table. It is personal data: keep it so.")


def finish_erasures(engine: Engine, output: Output, *, keep_going: bool = False) -> bool:
    """Finish what an interrupted `erase` has left, and tell of it. False when rows that break an expectation keep it from
    that: only a pass reads their correction, so that nothing else may wait for the erasure. keep_going: nor for an outage."""
    from app.cli.erasure_receipt import receipt_lines
    from app.erasure import erasure_context
    from lakehouse.errors import CatalogUnreachable
    from lakehouse.expectations import ExpectationsFailed
    from pipelines.privacy import erase as erasure_service

    try:
        with output.progress() as show:
            receipts = erasure_service.finish_pending(erasure_context(engine, show))
    except ExpectationsFailed as error:
        print(f"error: An erasure is under way and cannot be finished yet. {error}", file=sys.stderr, flush=True)
        return False
    except Exception as error:
        away = error if isinstance(error, CatalogUnreachable) else as_transient_error(error)
        if not keep_going or away is None:
            raise
        print(f"error: {away}", file=sys.stderr, flush=True)
        return False
    for one in receipts:
        for line in receipt_lines(one):
            print(line, file=sys.stderr)
    return True


def asked_for(
    email: str | None, phone: str | None, loyalty_id: str | None, user_id: int | None, master_user_id: str | None
) -> Any:
    """Who is meant; None: nobody was named. Raises ShopSphereError when it is said twice."""
    from pipelines.privacy.person import SubjectQuery

    given = [one for one in (email, phone, loyalty_id, user_id, master_user_id) if one is not None]
    if len(given) > 1:
        raise ShopSphereError("Name the person by one of --email, --phone, --loyalty-id, --user-id, --master-user-id.")
    return SubjectQuery(email, phone, loyalty_id, user_id, master_user_id) if given else None


@sandbox_app.command("start")
def sandbox_start(
    orders: Annotated[int, typer.Option(help="Orders of the shop's history")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed: the same seed gives the same shop")] = 7,
    source_file: Annotated[Path | None, typer.Option("--from", help="Parquet file with the columns of UCI Online Retail")] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Schema only: somebody else fills it")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback: for a network of your own")
    ] = "127.0.0.1",
    json: Json = False,
) -> None:
    """Start PostgreSQL, MongoDB and Kafka servers here, fill them, write the settings, print the addresses."""
    from app import sandbox

    output, home = Output(json), home_directory()
    settings = load_settings()
    with output.progress() as show:
        addresses = sandbox.start(
            home,
            orders=orders,
            seed=seed,
            source_file=source_file,
            empty=empty,
            base_currency=settings.base_currency,
            host=host,
            progress=show,
        )
    print_addresses(output, home, asdict(addresses))


def print_addresses(output: Output, home: Path, addresses: dict[str, Any]) -> None:
    """Where the servers listen, and what to do next."""
    if output.as_json:
        output.json({**addresses, "settings": str(home / "shopsphere.toml")})
        return
    for name, value in addresses.items():
        output.say(f"{name:16} {value}")
    output.say(f"{'settings':16} {home / 'shopsphere.toml'}")


@sandbox_app.command("step")
def sandbox_step(orders: Annotated[int, typer.Option(help="Orders that come in")] = 200, json: Json = False) -> None:
    """Let the shop's time go on."""
    from app import sandbox

    output, home = Output(json), home_directory()
    with output.progress() as show:
        addresses = sandbox.step(home, orders, show)
    if json:
        output.json({"orders": orders, **asdict(addresses)})
    else:
        output.say(f"{orders:,} more orders. `python -m app run` carries them into the lakehouse.")


@sandbox_app.command("stop")
def sandbox_stop(json: Json = False) -> None:
    """Stop the servers; their data stays for the next start."""
    from app import sandbox

    output, stopped = Output(json), sandbox.stop(home_directory())
    if json:
        output.json({"stopped": stopped})
    else:
        output.say(f"Stopped {', '.join(stopped)}." if stopped else "No sandbox was running.")


@app.command()
def demo(
    orders: Annotated[int, typer.Option(help="Orders of the shop's history")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the shop")] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the source servers running")] = False,
    json: Json = False,
) -> None:
    """The whole way on a seeded shop: servers, sources, bronze, silver, gold, and what came out."""
    from app.demo.demo import run_demo

    run_demo(Output(json), orders=orders, seed=seed, keep=keep)


@app.command()
def docs(check: Annotated[bool, typer.Option("--check", help="Only check that the pages are up to date")] = False) -> None:
    """Generate docs/reference/ from the declarations: tables, features, settings, commands, metrics, errors."""
    from app.reference.pages import stale_pages, write_pages

    root = typer.main.get_command(app)
    if not check:
        print(f"Wrote {', '.join(write_pages(root))}.")
    elif stale := stale_pages(root):
        raise ShopSphereError(f"{', '.join(stale)} differ from the declarations. Run `make docs` and commit the result.")


register(app)
register_serving(app)


INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""


class Terminated(BaseException):
    """SIGTERM, as `ray job stop` sends it: ends a command as Ctrl-C does, so that what it started is ended too."""


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an expected error is one line and exit code 1, a traceback only with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="python -m app", standalone_mode=False)
        if code == INTERRUPTED:  # Typer has made that of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except ShopSphereError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted; nothing half-written is visible. Run again to go on.", file=sys.stderr)
        return INTERRUPTED
    except (Terminated, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != signal.SIGTERM:  # that is what Ray makes of it while it starts
            raise
        print("stopped; nothing half-written is visible. Run again to go on.", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        if debug:
            raise
        if code := usage_error(error):
            return code
        print(f"error: {described(error)}", file=sys.stderr)
        return 1


def usage_error(error: Exception) -> int:
    """Wrong use of the command line: shows what is right; 0 for any other error."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    return 0


def described(error: BaseException) -> str:
    """An unforeseen error in one line, with a way out."""
    if (failed := as_transient_error(error)) is not None:
        return str(failed)
    first = str(error).splitlines()[0][:300] if str(error) else ""
    return f"{type(error).__name__}: {first}. Run again with --debug to see where, and please report it."
