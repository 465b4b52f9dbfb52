"""`python -m app export`: everything that is known of one person, over all layers and all time, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from app.cli.output import plain
from app.project import PROJECT
from lakehouse.byte_search import Needles
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.table_handle import Lake
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import EVENTS, ORDERS
from pipelines.identity.records import ORDER_PREFIX
from pipelines.privacy.person import DataSubject, SubjectQuery, documents_of, find
from pipelines.privacy.suppression import ERASURES
from pipelines.silver.events_clean import EVENTS_CLEAN, parse_events
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.quarantine import QUARANTINE

KEYS: Mapping[str, tuple[str, ...]] = {
    "masters": ("master_user_id", "person"),
    "accounts": ("user_id", "account"),
    "records": ("record_id", "customer_record"),
    "orders": ("order_id", "order_ref", "last_order_id"),
    "documents": ("document_id",),
    "events": ("event_id",),
}
"""Which columns of a table tell whose a row is, whatever the table."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    rows: Mapping[str, int]


def export(lake: Lake, asked: SubjectQuery, directory: Path) -> Exported:
    """Write all that is known of a person into a new directory. Raises ShopSphereError when it is there already."""
    person = find(lake, asked)
    found = {name: rows for name, rows in known_of(lake, person).items() if rows.height}
    if not found:
        raise ShopSphereError("Nobody is known by that: there is nothing to export.")
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise ShopSphereError(f"{directory} is there already and is not overwritten. Name another: --output DIRECTORY.") from None
    told = {
        "exported_at": datetime.now(UTC),
        "person": {name: sorted(values) for name, values in asdict(person).items() if name != "spelled"},
        "tables": {name: {"what": PROJECT.tables[name].doc, "rows": rows.to_dicts()} for name, rows in found.items()},
    }
    _write(directory / "person.json", json.dumps(plain(told), ensure_ascii=False, indent=1))
    for name, rows in found.items():
        _write(directory / f"{name}.csv", _csv(rows))
    return Exported(directory, {name: rows.height for name, rows in found.items()})


def known_of(lake: Lake, person: DataSubject) -> dict[str, pl.DataFrame]:
    """The rows of every table that are the person's, or of their orders; in bronze every version."""
    values = _values(lake, person)
    result: dict[str, pl.DataFrame] = {}
    for table in PROJECT.tables.values():
        if not lake.exists(table) or table.name == ERASURES.name:
            continue
        if table.name == EVENTS.name:
            result[table.name] = _messages(lake, values["events"])
        elif table.name == QUARANTINE.name:
            result[table.name] = _quarantined(lake, result)
        elif (wanted := _theirs(table, values)) is not None:
            result[table.name] = _rows(lake, table, wanted)
    return result


def _values(lake: Lake, person: DataSubject) -> dict[str, list[Any]]:
    """By what the person's rows are told, for each of KEYS."""
    accounts, records = sorted(person.accounts), sorted(person.records)
    of_account = lake.load(ORDERS).read(["order_id"], pl.col("user_id").is_in(accounts))["order_id"].cast(pl.String)
    of_record = lake.load(ORDERS_UNIFIED).read(["order_id"], pl.col("customer_record").is_in(records))["order_id"]
    orders = {*of_account, *of_record, *(one.removeprefix(ORDER_PREFIX) for one in person.orders)}
    devices = lake.load(IDENTITY_GRAPH).read(["node"], (pl.col("kind") == "device") & pl.col("record_id").is_in(records))
    own = pl.col("user_id").is_in(accounts) | pl.col("order_ref").is_in(list(orders))
    unsigned = pl.col("user_id").is_null() & pl.col("device_id").is_in(devices["node"].str.strip_prefix("device:").implode())
    events = lake.load(EVENTS_CLEAN).read(["event_id"], own | unsigned)["event_id"].unique().to_list()
    return {
        "masters": sorted(person.masters),
        "accounts": accounts,
        "records": records,
        "orders": sorted(orders),
        "documents": documents_of(lake, person),
        "events": events,
    }


def _theirs(table: Table, values: Mapping[str, list[Any]]) -> pl.Expr | None:
    """Which rows of a table are the person's; None: no column tells."""
    names = {column.name for column in table.columns}
    found = [
        pl.col(name).cast(pl.String).is_in([str(value) for value in values[key]]).fill_null(False)
        for key, columns in KEYS.items()
        for name in columns
        if name in names
    ]
    return pl.any_horizontal(found) if found else None


def _rows(lake: Lake, table: Table, wanted: pl.Expr) -> pl.DataFrame:
    handle = lake.load(table)
    return handle.read([name for name in handle.reader.schema.names if name not in BOOKKEEPING], wanted)


def _messages(lake: Lake, events: Iterable[str]) -> pl.DataFrame:
    """The messages of events, each time they came."""
    rows = _rows(lake, EVENTS, pl.lit(True))
    parsed = parse_events(rows)
    assert parsed.parsed_positions is not None
    theirs = parsed.rows["event_id"].is_in(list(events))
    return rows.filter(pl.col("_source_position").is_in(parsed.parsed_positions.filter(theirs).implode()))


def _quarantined(lake: Lake, found: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Rows that cannot be read: at the positions of the person's, or that mention their e-mail or phone."""
    rows = _rows(lake, QUARANTINE, pl.lit(True))
    if rows.is_empty():
        return rows
    positions = [
        position for frame in found.values() if "_source_position" in frame.columns for position in frame["_source_position"]
    ]
    contacts: set[str] = set()
    for name in ("silver.users_scd", "silver.orders_unified"):
        for column in ("email", "email_raw", "phone_number", "phone_raw", "phone"):
            if name in found and column in found[name].columns:
                contacts |= set(found[name][column].drop_nulls())
    texts = pl.Series([(value or b"").decode("utf-8", "replace") for value in rows["original"]], dtype=pl.String)
    return rows.filter(rows["source_position"].is_in(positions) | Needles(tuple(sorted(contacts))).hits(texts))


def _csv(rows: pl.DataFrame) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(rows.columns)
    writer.writerows([["" if value is None else plain(value) for value in row] for row in rows.iter_rows()])
    return stream.getvalue()


def _write(file: Path, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
        stream.write(text)
