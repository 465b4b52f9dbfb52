"""A source, three tables, and a model of them in plain Python: what readers may see while writers interrupt each other.

Every commit to bronze ends after some event of the source, so bronze is always the events up to one of them, and silver and gold
are always computed from such a prefix.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from support.commit_writers import Killed, Writer
from support.engines import make_engine
from support.sales_lake import NOW, SALES_RECEIVED, transform_totals
from support.sales_lake import SALES as SALES_WITH_EXPECTATIONS
from support.sales_lake import TOTALS as TOTALS_WITH_EXPECTATIONS

from lakehouse.engine.engine import Engine
from lakehouse.errors import CommitConflict, ShopSphereError
from lakehouse.expectations import ExpectationsFailed, within
from lakehouse.iceberg.maintenance import maintain
from lakehouse.iceberg.rewrite import rewrite
from lakehouse.iceberg.table_files import referenced_files
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.project import Project
from lakehouse.retry import retry_commit
from lakehouse.source import Plan, Position, Rows
from lakehouse.step import Grouped, Step
from pipelines.privacy.context import ErasureContext
from pipelines.privacy.history import forget_history, refresh_all
from pipelines.silver.quarantine import QUARANTINE

SALES = replace(SALES_WITH_EXPECTATIONS, expectations=())
TOTALS = replace(TOTALS_WITH_EXPECTATIONS, expectations=(within("amount", 0, None),))
ERASED = "erased"
LATER = timedelta(days=30)
EventRow = tuple[int, str, int, str]
"""id, shop, amount, operation ('u' or 'd')."""
FIRST_EVENTS: tuple[EventRow, ...] = ((0, "north", 5, "u"), (1, "south", 3, "u"), (2, "north", 1, "u"), (3, "south", 2, "u"))
"""The events that the tables of a new world have read."""
State = frozenset[tuple[Any, ...]]


def transform_sales(frames: Mapping[str, pl.DataFrame], context: Any) -> pl.DataFrame:
    """Return the newest version of each sale."""
    rows = frames["rows"].sort("_source_position").unique("id", keep="last", maintain_order=True)
    return rows.filter(pl.col("_op") != "d").select(SALES.schema.names)


SALES_STEP = Step(SALES, {"rows": Grouped(SALES_RECEIVED, keys=((pl.col("id"),),))}, transform_sales)
TOTALS_STEP = Step(TOTALS, {"sales": Grouped(SALES, keys=((pl.col("shop"),),))}, transform_totals)
TABLES = (SALES_RECEIVED, SALES, TOTALS)
PROJECT = Project(
    sources=lambda settings: (), source_tables=(SALES_RECEIVED,), steps=(SALES_STEP, TOTALS_STEP), quarantine=QUARANTINE
)


def mail(number: int) -> str:
    """Return the e-mail address of the buyer of a sale."""
    return f"buyer{number}@example.org"


def sales_after(events: list[EventRow]) -> State:
    """Return the sales that are left after these events: id, shop and amount."""
    newest = {event[0]: event for event in events}
    return frozenset((number, shop, amount) for number, shop, amount, operation in newest.values() if operation != "d")


def totals_after(events: list[EventRow]) -> State:
    """Return the totals after these events: shop, number and amount of its sales."""
    sales = sales_after(events)
    shops = {shop for _, shop, _ in sales}
    parts = {shop: [amount for _, of_shop, amount in sales if of_shop == shop] for shop in shops}
    return frozenset((shop, len(amounts), sum(amounts)) for shop, amounts in parts.items())


def is_refused(totals: State) -> bool:
    """Return whether the expectation of gold is violated."""
    return any(amount < 0 for _, _, amount in totals)


@dataclass
class EventLog:
    """A source that forgets what is acknowledged. forgotten: the number of events that it no longer has."""

    events: list[EventRow] = field(default_factory=list)
    forgotten: int = 0
    name: str = "events"
    tables: tuple[str, ...] = (SALES_RECEIVED.name,)

    def plan(self, positions: Mapping[str, Position | None], schemas: Mapping[str, pa.Schema]) -> Plan:
        """See `lakehouse.source.Source`."""
        start, end = int((positions[SALES_RECEIVED.name] or {}).get("number", 0)), len(self.events)
        assert start >= self.forgotten, f"the position went back to {start}, but {self.forgotten} events are acknowledged"
        if start == end:
            return Plan()
        task = EventTask(tuple(enumerate(self.events))[start:])
        return Plan(tasks=(task,), positions={SALES_RECEIVED.name: {"number": end}})

    def acknowledge(self, plan: Plan) -> None:
        """See `lakehouse.source.Source`."""
        self.forgotten = max(self.forgotten, int(plan.positions[SALES_RECEIVED.name]["number"]))

    def lag(self, positions: Mapping[str, Position | None]) -> Mapping[str, str]:
        """See `lakehouse.source.Source`."""
        return {}


@dataclass(frozen=True)
class EventTask:
    """Reads numbered events."""

    events: tuple[tuple[int, EventRow], ...]

    def read(self) -> Iterator[Rows]:
        """Give the events as bronze rows."""
        rows = [
            {
                "id": number,
                "shop": shop,
                "amount": amount,
                "buyer": mail(number),
                "at": NOW,
                "_op": operation,
                "_source_position": f"{position:06d}",
            }
            for position, (number, shop, amount, operation) in self.events
        ]
        yield Rows(SALES_RECEIVED.name, pa.Table.from_pylist(rows, schema=SALES_RECEIVED.schema))


class CommitWorld:
    """A lakehouse on a memory disk, its source, and the states that its readers have seen."""

    def __init__(self, home: Path) -> None:
        self.home, self.log = home, EventLog(list(FIRST_EVENTS))
        self.erased: set[int] = set()
        self.finished_erasures: set[int] = set()
        self.published_by_hand = False
        self.purges = 0
        self.seen = {SALES.name: 0, TOTALS.name: 0}
        self.lake = self.engine().lake

    def engine(self) -> Engine:
        """Return an engine with a connection of its own, as another process has it."""
        engine = make_engine(self.home, settings={"snapshot_retention_hours": 0}, clock=lambda: NOW)
        engine.load_ingest_transform = lambda: Pseudonymisation(frozenset(self.erased))
        return engine

    def close(self) -> None:
        """Close the connection to the catalog."""
        self.lake.catalog.close()

    # actions

    def run(self, engine: Engine) -> list[str]:
        """Ingest and refresh; return the status of each table."""
        results = engine.ingest(self.log, {SALES_RECEIVED.name: SALES_RECEIVED})
        return [result.status for result in (*results, engine.refresh(SALES_STEP), engine.refresh(TOTALS_STEP))]

    def maintain(self, engine: Engine, later: timedelta = timedelta(0)) -> None:
        """Compact, expire and remove orphans. later: so much time has passed since the files were written."""
        for table in TABLES:
            maintain(engine.lake, table, datetime.now(UTC) + later)

    def erase(self, engine: Engine, number: int) -> None:
        """Erase the buyer of a sale as `erase` does: from the events to come, from bronze, downstream, and from the history."""
        self.erased.add(number)
        of_sale = pl.col("id") == number

        def edit(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, None]:
            changed = rows.select((of_sale & (pl.col("buyer") != ERASED)).fill_null(False)).to_series()
            return rows.with_columns(buyer=pl.when(of_sale).then(pl.lit(ERASED)).otherwise(pl.col("buyer"))), changed, None

        self.purges += 1
        retry_commit(lambda: rewrite(engine.lake, SALES_RECEIVED, edit, f"erase {number}"))
        context = ErasureContext(
            engine=engine,
            project=PROJECT,
            refresh_on_demand=lambda engine: None,
            search_models=lambda lake, needles: (_ for _ in ()).throw(AssertionError),
            scores_topic=lambda: "",
            on_progress=lambda stage, done, total: None,
        )
        refresh_all(context)
        forget_history(context)
        self.finished_erasures.add(number)

    def publish(self, engine: Engine) -> None:
        """Publish the staged build of gold by hand."""
        handle = engine.lake.load(TOTALS)
        if handle.staged is not None and not handle.staged_is_stale:
            self.published_by_hand = True
            handle.publish()

    # observations

    def bronze(self) -> tuple[int, list[EventRow]]:
        """Return the position of bronze and its rows."""
        handle = self.lake.load(SALES_RECEIVED)
        rows = handle.read(["_source_position", "id", "shop", "amount", "_op"]).sort("_source_position")
        position = int(handle.positions.get(self.log.name, {}).get("number", 0))
        return position, rows.select("id", "shop", "amount", "_op").rows()

    def check_tables(self) -> None:
        """Check that each table is what some prefix of the events gives, and none that is older than what was seen before."""
        position, rows = self.bronze()
        assert rows == self.log.events[:position], "bronze is not the events up to its position"
        assert position >= self.log.forgotten
        columns = {SALES.name: ("id", "shop", "amount"), TOTALS.name: ("shop", "sales", "amount")}
        for table, compute in ((SALES, sales_after), (TOTALS, totals_after)):
            handle = self.lake.load(table)
            self._check_state(handle, state_of(handle, columns[table.name]), compute)

    def _check_state(self, handle: TableHandle, found: State, compute: Callable[[list[EventRow]], State]) -> None:
        name = handle.table.name
        prefixes = range(self.seen[name], len(self.log.events) + 1)
        matching = next((number for number in prefixes if compute(self.log.events[:number]) == found), None)
        assert matching is not None, f"{name} has {sorted(found)}, which no events after {self.seen[name]} give"
        self.seen[name] = matching
        if name == TOTALS.name and not self.published_by_hand:
            assert not is_refused(found), f"readers see a build that was refused: {sorted(found)}"

    def settle(self) -> None:
        """Run until nothing changes, and check that nothing is lost, doubled or left of an erasure."""
        for number in self.erased - self.finished_erasures:
            self.alone(lambda engine, number=number: self.erase(engine, number))
        statuses: list[str] = []
        for _ in range(3):
            statuses = self.alone(self.run) or []
            if set(statuses) == {"unchanged"}:
                break
        self.check_tables()
        assert self.bronze() == (len(self.log.events), self.log.events)
        sales, totals = self.lake.load(SALES), self.lake.load(TOTALS)
        assert state_of(sales, ("id", "shop", "amount")) == sales_after(self.log.events)
        wanted = totals_after(self.log.events)
        if not is_refused(wanted):
            assert set(statuses) == {"unchanged"}, f"the runs do not end: {statuses}"
            assert state_of(totals, ("shop", "sales", "amount")) == wanted
        for number, buyer in sales.read(["id", "buyer"]).rows():
            assert buyer == (ERASED if number in self.erased else mail(number))
        self.check_files()

    def alone(self, action: Callable[[Engine], Any]) -> Any:
        """Perform an action that nothing interrupts; only the expectation of gold may end it."""
        engine = self.engine()
        try:
            return action(engine)
        except ExpectationsFailed:
            assert any(is_refused(totals_after(self.log.events[:number])) for number in range(len(self.log.events) + 1))
            return None
        finally:
            engine.lake.catalog.close()

    def check_files(self) -> None:
        """Check that no file is missing that a snapshot of a table needs."""
        for table in TABLES:
            missing = [path for path in referenced_files(self.lake.load(table)) if not local(path).exists()]
            assert not missing, f"{table.name}: {missing}"

    def check_erased_files(self) -> None:
        """Check that no file has the address of an erased buyer."""
        mails = pa.array([mail(number) for number in self.finished_erasures], pa.string())
        for file in self.home.glob("warehouse/*/*/data/**/*.parquet"):
            content = pq.read_table(file, partitioning=None)
            if "buyer" in content.schema.names:
                assert not pc.any(pc.is_in(content["buyer"].cast(pa.string()), mails)).as_py(), f"{file} has an erased buyer"

    def accepts(self, writer: Writer) -> bool:
        """Return whether a writer may end with its error: others were faster too often, or gold refused its rows."""
        error = writer.error
        if error is None or isinstance(error, Killed | CommitConflict | ExpectationsFailed):
            return True
        return isinstance(error, ShopSphereError) and "cannot be removed, because" in str(error)


@dataclass(frozen=True)
class Pseudonymisation:
    """Replaces the buyers of erased sales before they are stored."""

    erased: frozenset[int]

    def __call__(self, table: str, rows: pa.Table) -> pa.Table:
        pairs = zip(rows["id"].to_pylist(), rows["buyer"].to_pylist(), strict=True)
        replaced = [ERASED if number in self.erased else buyer for number, buyer in pairs]
        return rows.set_column(rows.schema.get_field_index("buyer"), "buyer", pa.array(replaced, pa.string()))


def state_of(handle: TableHandle, columns: tuple[str, ...]) -> State:
    """Return the live rows of a table, each of which it must have once."""
    rows = handle.read(list(columns)).rows()
    assert len(set(rows)) == len(rows), f"{handle.table.name} has a row twice: {sorted(rows)}"
    return frozenset(rows)


def local(location: str) -> Path:
    """Return a location as a path."""
    return Path(location.removeprefix("file://"))


@dataclass
class WorldDirectory:
    """A directory in memory that each schedule finds as it was: with tables that have read the first events."""

    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)))

    def __post_init__(self) -> None:
        self.template = self.home.with_name(f"{self.home.name}-template")
        world = CommitWorld(self.home)
        for table in (*TABLES, QUARANTINE):
            world.lake.load(table)
        world.alone(world.run)
        world.close()
        shutil.copytree(self.home, self.template)

    def reset(self) -> CommitWorld:
        """Return the world as it was."""
        shutil.rmtree(self.home)
        shutil.copytree(self.template, self.home)
        world = CommitWorld(self.home)
        world.log.forgotten = len(FIRST_EVENTS)
        return world

    def remove(self) -> None:
        """Remove the directory."""
        for directory in (self.home, self.template):
            shutil.rmtree(directory, ignore_errors=True)
