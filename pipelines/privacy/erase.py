"""`python -m app erase`: one person out of the lakehouse, with a receipt. See docs/erasure.md."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem

import pipelines
from app.project import PROJECT
from lakehouse.byte_search import Needles, Searched, search_files
from lakehouse.digest import digest as digest_of
from lakehouse.engine.engine import Engine, conform, stamp
from lakehouse.engine.row_diff import with_mark
from lakehouse.errors import ShopSphereError, SourceError
from lakehouse.iceberg.rewrite import (
    Forgotten,
    Rewritten,
    file_system,
    forget,
    listed,
    replace_rows,
    rewrite,
    rewritten_by,
)
from lakehouse.iceberg.table_handle import Lake
from lakehouse.run_history import OPERATIONS
from lakehouse.table import SEQUENCE, Table
from ml.registry import Registry, RegistryError
from ml.tables import order_features, user_fraud_scores
from pipelines.bronze.tables import EVENTS
from pipelines.bronze.tables import TABLES as BRONZE
from pipelines.gold.sales_daily import SALES_DAILY
from pipelines.privacy import person as people
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.person import SubjectOrder, SubjectQuery
from pipelines.privacy.suppression import (
    FINISHED,
    REQUESTED,
    Erasure,
    Pseudonyms,
    append,
    erasures,
    key_of,
    load_suppression,
    now,
)
from pipelines.settings import settings_of
from pipelines.silver import events_clean
from pipelines.silver.events_clean import EVENTS_CLEAN, parse_events
from pipelines.sources.kafka.source import KafkaSource, delete_sent
from serve.settings import load_serve_settings

Show = Callable[[str, int, int], None]
ORDER = ".order.json"
"""How the names of files end that hold what an erasure looks for."""


@dataclass(frozen=True)
class Sums:
    """gold.sales_daily: its digest, and the sum of each amount."""

    digest: str
    rows: int
    amounts: dict[str, str]


@dataclass(frozen=True)
class Before:
    """What it was when an erasure was requested. stored: the rows of bronze, not after the sums."""

    sums: Sums
    stored: int


@dataclass(frozen=True)
class Receipt:
    """What an erasure did, and the proof. Holds no personal value.

    proved   whether every text was looked for; not when the list of them was lost with the machine that began
    arrived  rows that were stored since it was requested: then the sums need not be what they were
    clean    nothing was found, and the sums are equal, as far as they can be compared
    """

    erasure: str
    requested_at: datetime
    finished_at: datetime
    values: int
    shared: dict[str, int]
    rewritten: tuple[Rewritten, ...]
    forgotten: tuple[Forgotten, ...]
    searched: Searched
    proved: bool
    sums_before: Sums | None
    sums_after: Sums
    arrived: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    @property
    def sums_equal(self) -> bool:
        """Whether sales_daily is what it was, to the last digit."""
        return self.sums_before is None or self.sums_before == self.sums_after

    @property
    def clean(self) -> bool:
        """Whether nothing of the person was found."""
        sums, searched = self.sums_equal or self.arrived > 0, self.searched
        return self.proved and sums and not (searched.matches or searched.unread or self.unreached)


def erase(engine: Engine, asked: SubjectQuery | None, show: Show) -> list[Receipt]:
    """Finish the erasures that are under way, then erase who is asked for. Raises ShopSphereError."""
    receipts = finish_begun(engine, show)
    if asked is not None:
        receipts.append(finish(engine, request(engine, asked, show), show))
    return receipts


def finish_begun(engine: Engine, show: Show) -> list[Receipt]:
    """Finish what an interrupted `erase` has left."""
    _drop_lists(engine.lake)
    return [finish(engine, one, show) for one in erasures(engine.lake) if not one.finished]


def request(engine: Engine, asked: SubjectQuery, show: Show) -> Erasure:
    """Find the person and suppress what is theirs: from then on the erasure is under way, and will be finished."""
    lake = engine.lake
    show("collect", 0, 1)
    _take_in_scores(engine)
    stored = rows_stored(lake)  # what a run stores from here on may be in the sums or not
    bring_up_to_date(engine)
    person = people.find(lake, asked)
    load_suppression(lake)  # no key, or another than before, is an error here; only the first erasure makes one
    key = key_of(settings_of(lake), create=True)
    assert key is not None
    pseudonyms = Pseudonyms(key, settings_of(lake).default_region)
    one = Erasure(secrets.token_hex(8), now(), False)
    order = people.collect(lake, person, pseudonyms, one.id, int(one.at.timestamp() * 1_000_000))
    if not person.records and not _mentioned(order):
        raise ShopSphereError("Nobody is known by that, and no row mentions it: there is nothing to erase.")
    rows = [(REQUESTED, pseudonyms.check), *sorted(order.entries)]
    with _keeping(lake, one, order, Before(sums(lake), stored)):
        engine.retried(lambda: append(lake, one.id, one.at, rows, order.until))
    return one


def _mentioned(order: SubjectOrder) -> bool:
    return any(kind == "mention" for kind, _ in order.entries)


def finish(engine: Engine, one: Erasure, show: Show) -> Receipt:
    """Do what is left to do of an erasure; every stage may be repeated. One process of this machine at a time does it."""
    with _locked(_order_file(engine.lake, one)):
        if any(other.id == one.id and other.finished for other in erasures(engine.lake)):
            return read_receipt(engine.lake, one.id)
        return _finish(engine, one, show)


def _finish(engine: Engine, one: Erasure, show: Show) -> Receipt:
    lake, started = engine.lake, time.monotonic()
    stages: dict[str, float] = {}
    at = started

    def stage(name: str, number: int) -> None:
        nonlocal at
        stages[name] = round(time.monotonic() - at, 3)
        at = time.monotonic()
        show(name, number, 4)

    texts, before, shared = _kept(lake, one)
    show("rewrite", 0, 4)
    rewritten = _rewrite_bronze(engine, one)
    _replace_events(engine, one)
    stage("rewrite", 1)
    bring_up_to_date(engine)
    stage("follow", 2)
    forgotten = tuple(
        engine.retried(partial(forget, lake, table, tombstones=table.keeps_tombstones))
        for table in (*PROJECT.tables.values(), *OPERATIONS.values())
        if lake.exists(table)
    )
    stage("forget", 3)
    needles = Needles(texts or ())
    searched = search_everything(lake, needles)
    models, without = search_models(lake, needles)
    unreached = tuple(filter(None, (empty_topic(lake, one), without)))
    stage("prove", 4)
    receipt = Receipt(
        one.id,
        one.at,
        datetime.now(UTC),
        len(texts or ()),
        shared,
        rewritten,
        forgotten,
        searched + models,
        texts is not None,
        before.sums if before is not None else None,
        sums(lake),
        max(arrived_since(lake, one.at), rows_stored(lake) - before.stored if before is not None else 0),
        round(time.monotonic() - started, 3),
        stages,
        unreached,
    )
    _write_receipt(lake, receipt)
    if receipt.clean or not receipt.proved:
        suppression = load_suppression(lake)
        assert suppression is not None
        done = [(FINISHED, suppression.pseudonyms.check)]
        engine.retried(lambda: append(lake, one.id, one.at, done))
        _order_file(lake, one).unlink(missing_ok=True)
    return receipt


def bring_up_to_date(engine: Engine) -> None:
    """Every table as its upstream has it, the fraud model's too, where they are."""
    for step in pipelines.STEPS:
        engine.refresh(step)
    if not engine.lake.exists(order_features.ORDER_FEATURES):
        return
    registry = Registry(home=engine.lake.settings.home)
    champion = registry.load() if registry.champion() is not None else None
    if champion is None:
        order_features.refresh(engine)
    else:
        order_features.refresh(engine, delay=champion.label_delay)
        user_fraud_scores.refresh(engine, champion)


def _scores_topic(lake: Lake) -> str:
    """The topic of served scores, '' where none are kept."""
    kafka = settings_of(lake).kafka
    return load_serve_settings().scores_topic if kafka.enabled and kafka.bootstrap_servers else ""


def _take_in_scores(engine: Engine) -> None:
    """Read the scores served until now, so that they may go from their topic. A broker that is away is told of at the end."""
    kafka = settings_of(engine.lake).kafka
    if _scores_topic(engine.lake) in kafka.topics:
        with contextlib.suppress(SourceError):
            engine.ingest(KafkaSource(kafka), pipelines.TABLES)


def empty_topic(lake: Lake, one: Erasure) -> str:
    """Have the broker delete the scores that were served before an erasure: bronze has them, without the person.

    Gives why some of them may still be there, or ''."""
    name = _scores_topic(lake)
    if not name:
        return ""
    position = lake.load(EVENTS).positions.get(KafkaSource.name) or {}
    try:
        left = delete_sent(settings_of(lake).kafka, name, one.at, position)
    except SourceError as error:
        return f"topic {name} could not be emptied: {error}"
    return (
        f"topic {name} has {left:,} scores of before that the lakehouse has not read: `python -m app run` does." if left else ""
    )


def _rewrite_bronze(engine: Engine, one: Erasure) -> tuple[Rewritten, ...]:
    suppression = load_suppression(engine.lake)
    assert suppression is not None
    anonymiser = Anonymiser(suppression)

    def edit(table: Table, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.Series | None]:
        edited = anonymiser(table, rows)
        return edited.rows, edited.changed, edited.keys

    return tuple(engine.retried(partial(rewrite, engine.lake, table, partial(edit, table), one.id)) for table in BRONZE)


def _replace_events(engine: Engine, one: Erasure) -> None:
    """silver.events_clean merges new rows with its own; those of rewritten messages must not speak any more."""

    def attempt() -> None:
        target, bronze = engine.lake.load(EVENTS_CLEAN), engine.lake.load(EVENTS)
        snapshot = rewritten_by(bronze, one.id)
        sequence = snapshot.sequence_number if snapshot is not None else None
        messages = bronze.read(["topic", "value", "_op", "_source_position", "_source_time"], pl.col(SEQUENCE) == sequence)
        rows = conform(events_clean.transform({"events": parse_events(messages).rows}, engine.context), EVENTS_CLEAN)
        if rows.is_empty():
            return
        new = stamp(EVENTS_CLEAN, with_mark(EVENTS_CLEAN, rows, False), target.sequence)
        replace_rows(target, pl.col("event_id").is_in(rows["event_id"].implode()), new)

    engine.retried(attempt)


def sums(lake: Lake) -> Sums:
    """What gold.sales_daily adds up to now."""
    handle = lake.load(SALES_DAILY)
    amounts = [c.name for c in SALES_DAILY.columns if str(c.type).startswith("decimal")]
    rows = handle.read(amounts)
    totals = {name: str(rows[name].sum() or Decimal(0)) for name in amounts}
    return Sums(digest_of(handle), rows.height, totals)


def rows_stored(lake: Lake) -> int:
    """How many rows bronze has; it is append-only, and a rewrite leaves every row in its place."""
    return sum(file.rows for table in BRONZE if lake.exists(table) for file in lake.load(table).files())


def arrived_since(lake: Lake, moment: datetime) -> int:
    """How many rows runs that began after a moment have stored."""
    late = pl.col("_ingested_at") > moment
    return sum(lake.load(table).read(["_ingested_at"], late).height for table in BRONZE if lake.exists(table))


def search_everything(lake: Lake, needles: Needles) -> Searched:
    """Search all files of all tables, and of the home directory: see `_beside`."""
    total = Searched()
    seen: set[str] = set()
    for table in (*PROJECT.tables.values(), *OPERATIONS.values()):
        if lake.exists(table):
            handle = lake.load(table)
            files = listed(handle)
            seen |= {info.path for info in files}
            total += search_files(file_system(handle)[0], files, needles)
    local = [info for info in _beside(Path(lake.settings.home).absolute()) if info.path not in seen]
    return total + search_files(LocalFileSystem(), local, needles)


def search_models(lake: Lake, needles: Needles) -> tuple[Searched, str]:
    """Search what an MLflow server elsewhere has of the fraud model; and why that could not be done, or ''.

    What is kept below the home directory is searched with it."""
    registry = Registry(home=lake.settings.home)
    if registry.local:
        return Searched(), ""
    with tempfile.TemporaryDirectory() as place:
        try:
            registry.copy_to(Path(place))
        except RegistryError as error:
            return Searched(), str(error)
        found = search_files(LocalFileSystem(), _files_below(Path(place)), needles)
        matches, unread = (tuple(path.replace(place, "mlflow", 1) for path in of) for of in (found.matches, found.unread))
        return replace(found, matches=matches, unread=unread), ""


def _beside(home: Path) -> list[FileInfo]:
    """The files of a home directory: a local warehouse, catalog and MLflow, reports, logs. Not the sandbox, which is the source,
    nor other homes, nor what is to be looked for."""
    others = [
        place for place in home.iterdir() if place.is_dir() and (place.name == "sandbox" or (place / "catalog.db").exists())
    ]
    return [
        info
        for info in _files_below(home)
        if not info.path.endswith(ORDER) and not any(Path(info.path).is_relative_to(other) for other in others)
    ]


def _files_below(directory: Path) -> list[FileInfo]:
    found = LocalFileSystem().get_file_info(FileSelector(str(directory), recursive=True))
    return [info for info in found if info.type == FileType.File]


# --- what is kept beside the warehouse until the erasure is done


def _directory(lake: Lake) -> Path:
    place = Path(lake.settings.home) / "erasures"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def _order_file(lake: Lake, one: Erasure) -> Path:
    return _directory(lake) / f"{one.id}{ORDER}"


@contextmanager
def _keeping(lake: Lake, one: Erasure, order: SubjectOrder, before: Before) -> Iterator[None]:
    """Write what is to be looked for, for its owner alone: only these texts can prove that they are gone.

    Locked until the erasure is stored: what is not locked and belongs to no erasure was left by one that never began."""
    told = {"texts": order.texts, "shared": dict(order.shared), **asdict(before)}
    file = _order_file(lake, one)
    draft = file.with_name(f".{one.id}.draft")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        draft.rename(file)  # not there by its name without the lock
        stream.write(json.dumps(told).encode())
        stream.flush()
        os.fsync(stream.fileno())
        yield


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """With the file for oneself; a file that is not there is nobody's."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _drop_lists(lake: Lake) -> None:
    """Delete the lists of erasures that never began, and of finished ones: of a process that was killed before it could."""
    for file in _directory(lake).glob("*" + ORDER):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.name.split(".")[0] not in {one.id for one in erasures(lake) if not one.finished}:
                file.unlink()


def _kept(lake: Lake, one: Erasure) -> tuple[tuple[str, ...] | None, Before | None, dict[str, int]]:
    try:
        told: dict[str, Any] = json.loads(_order_file(lake, one).read_text())
    except FileNotFoundError:
        return None, None, {}
    return tuple(told["texts"]), Before(Sums(**told["sums"]), told["stored"]), told["shared"]


def write_private(file: Path, content: bytes) -> None:
    """A file that only its owner reads, whole or not at all."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def receipt_file(lake: Lake, erasure: str) -> Path:
    """Where the receipt of an erasure is."""
    return _directory(lake) / f"{erasure}.receipt.json"


def read_receipt(lake: Lake, erasure: str) -> Receipt:
    """The receipt of a finished erasure."""
    told = json.loads(receipt_file(lake, erasure).read_text())
    return msgspec.convert({name: value for name, value in told.items() if name not in ("sums_equal", "clean")}, Receipt)


def as_json(receipt: Receipt) -> dict[str, Any]:
    """A receipt, as JSON has it."""
    return {**asdict(receipt), "sums_equal": receipt.sums_equal, "clean": receipt.clean}


def _write_receipt(lake: Lake, receipt: Receipt) -> None:
    from app.cli.output import plain

    write_private(receipt_file(lake, receipt.erasure), json.dumps(plain(as_json(receipt)), indent=2).encode())


def in_words(receipt: Receipt) -> Iterable[str]:
    """A receipt for people, line by line."""
    rewritten = [one for one in receipt.rewritten if one.rows]
    rows, files = sum(one.rows for one in rewritten), sum(one.files for one in rewritten)
    past = receipt.forgotten
    expired, deleted = sum(one.snapshots_expired for one in past), sum(one.files_deleted for one in past)
    yield f"Erasure {receipt.erasure}, requested {receipt.requested_at:%Y-%m-%d %H:%M:%S} UTC"
    yield f"  rewritten   {rows:,} bronze rows in {files:,} files of {len(rewritten)} tables"
    yield (
        f"  forgotten   {expired:,} snapshots, {deleted:,} files ({sum(one.bytes_deleted for one in past):,} bytes), "
        f"{sum(one.tombstones for one in past):,} tombstones"
    )
    found = receipt.searched
    yield (
        f"  searched    {found.files:,} files, {found.bytes_decoded:,} bytes decoded, for {receipt.values} texts: "
        f"{len(found.matches)} files hold one"
        if receipt.proved
        else "  searched    no: the list of what to look for is not on this machine"
    )
    for path in found.matches:
        yield f"              {path}"
    if found.unread:
        yield f"  unread      {len(found.unread)} files cannot be decoded and may hold one; delete them if nothing needs them:"
    for path in found.unread:
        yield f"              {path}"
    if receipt.shared:
        told = ", ".join(f"{number} {kind}" for kind, number in sorted(receipt.shared.items()))
        yield f"  not alone   {told}: others show the same; gone from the person's rows, not looked for in theirs"
    for what in receipt.unreached:
        yield f"  not reached {what}"
    if receipt.sums_equal:
        yield "  sales_daily equal to the last digit"
    elif receipt.arrived:
        yield f"  sales_daily not compared: {receipt.arrived:,} rows arrived meanwhile"
    else:
        yield "  sales_daily NOT EQUAL, though no row arrived"
    yield f"  {receipt.seconds:.1f} s"
