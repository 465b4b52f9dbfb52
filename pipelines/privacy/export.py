"""Exports all rows of one person, from all layers and their whole history, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from lakehouse.byte_search import SearchTerms
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.json_values import to_json_value
from lakehouse.table import BOOKKEEPING, Table
from pipelines.bronze.tables import EVENTS, ORDERS
from pipelines.identity.records import ORDER_PREFIX
from pipelines.privacy.person import DataSubject, SubjectQuery, documents_of, find_person
from pipelines.privacy.private_files import open_private
from pipelines.privacy.suppression import ERASURES
from pipelines.silver.events_clean import EVENTS_CLEAN, parse_events
from pipelines.silver.identity_graph import IDENTITY_GRAPH
from pipelines.silver.orders_unified import ORDERS_UNIFIED
from pipelines.silver.quarantine import QUARANTINE

SUBJECT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "masters": ("master_user_id", "person"),
    "accounts": ("user_id", "account"),
    "records": ("record_id", "customer_record"),
    "orders": ("order_id", "order_ref", "last_order_id"),
    "documents": ("document_id",),
    "events": ("event_id",),
}
"""For each kind of identifier the columns, in any table, by which a row belongs to a person."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
CONTACT_TABLES = ("silver.users_scd", "silver.orders_unified")
CONTACT_COLUMNS = ("email", "email_raw", "phone_number", "phone_raw", "phone")


@dataclass(frozen=True)
class Exported:
    """The directory of an export, and the number of rows per table."""

    directory: Path
    rows: Mapping[str, int]


def export_person(lake: Lake, tables: Mapping[str, Table], query: SubjectQuery, directory: Path) -> Exported:
    """Write the rows of a person in `tables` (by name) into a new directory.

    Raises ShopSphereError when no customer matches, or when the directory exists.
    """
    person = find_person(lake, query)
    found = {name: rows for name, rows in rows_of(lake, tables, person).items() if rows.height}
    if not found:
        raise ShopSphereError("No customer matches this identifier. There is nothing to export.")
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise ShopSphereError(
            f"{directory} exists and is not overwritten. Name another directory with --output DIRECTORY."
        ) from None
    content = {
        "exported_at": datetime.now(UTC),
        "person": {name: sorted(values) for name, values in asdict(person).items() if name != "spelled"},
        "tables": {name: {"what": tables[name].doc, "rows": rows.to_dicts()} for name, rows in found.items()},
    }
    _write(directory / "person.json", json.dumps(to_json_value(content), ensure_ascii=False, indent=1))
    for name, rows in found.items():
        _write(directory / f"{name}.csv", _to_csv(rows))
    return Exported(directory, {name: rows.height for name, rows in found.items()})


def rows_of(lake: Lake, tables: Mapping[str, Table], person: DataSubject) -> dict[str, pl.DataFrame]:
    """Return by table the rows of the person and of their orders; from bronze every version."""
    identifiers = _identifiers(lake, person)
    result: dict[str, pl.DataFrame] = {}
    for table in tables.values():
        if not lake.exists(table) or table.name == ERASURES.name:
            continue
        if table.name == EVENTS.name:
            result[table.name] = _messages(lake, identifiers["events"])
        elif table.name == QUARANTINE.name:
            result[table.name] = _quarantined_rows(lake, result)
        elif (predicate := _belongs_to(table, identifiers)) is not None:
            result[table.name] = _read(lake, table, predicate)
    return result


def _identifiers(lake: Lake, person: DataSubject) -> dict[str, list[Any]]:
    """Return the person's identifiers of each kind in SUBJECT_COLUMNS."""
    accounts, records = sorted(person.accounts), sorted(person.records)
    of_account = lake.load(ORDERS).read(["order_id"], pl.col("user_id").is_in(accounts))["order_id"].cast(pl.String)
    of_record = lake.load(ORDERS_UNIFIED).read(["order_id"], pl.col("customer_record").is_in(records))["order_id"]
    orders = {*of_account, *of_record, *(record.removeprefix(ORDER_PREFIX) for record in person.orders)}
    devices = lake.load(IDENTITY_GRAPH).read(["node"], (pl.col("kind") == "device") & pl.col("record_id").is_in(records))
    signed_in = pl.col("user_id").is_in(accounts) | pl.col("order_ref").is_in(list(orders))
    anonymous = pl.col("user_id").is_null() & pl.col("device_id").is_in(devices["node"].str.strip_prefix("device:").implode())
    events = lake.load(EVENTS_CLEAN).read(["event_id"], signed_in | anonymous)["event_id"].unique().to_list()
    return {
        "masters": sorted(person.masters),
        "accounts": accounts,
        "records": records,
        "orders": sorted(orders),
        "documents": documents_of(lake, person),
        "events": events,
    }


def _belongs_to(table: Table, identifiers: Mapping[str, list[Any]]) -> pl.Expr | None:
    """Return the predicate of the person's rows; None when the table has none of SUBJECT_COLUMNS."""
    names = {column.name for column in table.columns}
    found = [
        pl.col(name).cast(pl.String).is_in([str(value) for value in identifiers[kind]]).fill_null(False)
        for kind, columns in SUBJECT_COLUMNS.items()
        for name in columns
        if name in names
    ]
    return pl.any_horizontal(found) if found else None


def _read(lake: Lake, table: Table, predicate: pl.Expr) -> pl.DataFrame:
    handle = lake.load(table)
    return handle.read([name for name in handle.reader.schema.names if name not in BOOKKEEPING], predicate)


def _messages(lake: Lake, events: Iterable[str]) -> pl.DataFrame:
    """Return the messages of events, including repeated deliveries."""
    rows = _read(lake, EVENTS, pl.lit(True))
    parsed = parse_events(rows)
    assert parsed.parsed_positions is not None
    belongs = parsed.rows["event_id"].is_in(list(events))
    return rows.filter(pl.col("_source_position").is_in(parsed.parsed_positions.filter(belongs).implode()))


def _quarantined_rows(lake: Lake, found: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return the quarantined rows at source positions of the person's rows, or that contain their e-mail or phone."""
    rows = _read(lake, QUARANTINE, pl.lit(True))
    if rows.is_empty():
        return rows
    positions = [
        position for frame in found.values() if "_source_position" in frame.columns for position in frame["_source_position"]
    ]
    contacts: set[str] = set()
    for name in CONTACT_TABLES:
        for column in CONTACT_COLUMNS:
            if name in found and column in found[name].columns:
                contacts |= set(found[name][column].drop_nulls())
    texts = pl.Series([(value or b"").decode("utf-8", "replace") for value in rows["original"]], dtype=pl.String)
    return rows.filter(rows["source_position"].is_in(positions) | SearchTerms(tuple(sorted(contacts))).hits(texts))


def _to_csv(rows: pl.DataFrame) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(rows.columns)
    writer.writerows([["" if value is None else _csv_cell(to_json_value(value)) for value in row] for row in rows.iter_rows()])
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    """Return a value that a spreadsheet shows as it is: text that it would take for a formula gets an apostrophe in front
    (OWASP ASVS 5.0, 1.2.10)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) and not _NUMBER.fullmatch(value) else value


def _write(file: Path, text: str) -> None:
    with os.fdopen(open_private(file), "w", encoding="utf-8", newline="") as stream:
        stream.write(text)
