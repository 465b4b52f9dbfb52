"""Anonymises rows of bronze tables with columns: those read from PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from lakehouse.table import Table
from pipelines.bronze.tables import CHARGEBACKS, EVENTS, MARKETPLACE_ORDERS, ORDER_ITEMS, ORDERS, POSTGRES_KEYS
from pipelines.identity.records import ORDER_PREFIX
from pipelines.parsing.contacts import phone_region
from pipelines.privacy.record_begin import begin_of_rows
from pipelines.privacy.suppression import ACCOUNT, MENTION, RECORD
from pipelines.privacy.value_replacer import ValueReplacer

PLACEHOLDER = "erased"
"""Replaces a document, message or text that cannot be anonymised in parts."""
ORDER_COLUMNS: Mapping[str, str] = {ORDER_ITEMS.name: "order_id", CHARGEBACKS.name: "order_ref"}
"""Tables whose rows belong to the person of an order, and the column with the order's id."""


@dataclass(frozen=True)
class AnonymisedRows:
    """The rows after anonymisation.

    changed  which of them differ from before
    owned    which of them belong to an erased person
    keys     rows with the same key (an event id) describe the same thing; null: no other row does
    """

    rows: pl.DataFrame
    changed: pl.Series
    owned: pl.Series
    keys: pl.Series | None = None


def unchanged(rows: pl.DataFrame) -> AnonymisedRows:
    """Return the rows as they are."""
    nothing = pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True)
    return AnonymisedRows(rows, nothing, nothing)


@dataclass(frozen=True)
class _Attribution:
    """For each row the erasure of its owner, the erasure that it mentions, and when its record began."""

    owners: list[str | None]
    mentions: list[str | None]
    begins: list[int]

    @property
    def concerned(self) -> list[int]:
        """Return the positions of rows that are owned or mention a person."""
        pairs = zip(self.owners, self.mentions, strict=True)
        return [at for at, (owner, mention) in enumerate(pairs) if owner is not None or mention is not None]


def anonymise_rows(replacer: ValueReplacer, table: Table, rows: pl.DataFrame) -> AnonymisedRows:
    """Replace the personal columns; in rows of or about an erased person also drop what no declaration covers."""
    declared = {column.name for column in table.columns}
    kinds = {
        column.name: str(column.personal)
        for column in table.columns
        if column.personal and column.personal != ACCOUNT and column.name in rows.columns
    }
    undeclared = [name for name in rows.columns if name not in declared and not name.startswith("_")]
    if kinds.keys() <= {"_unreadable"} and not undeclared and not _any_unreadable(rows):
        return unchanged(rows)
    attribution = _attribute(replacer, table, rows)
    new_values = _personal_values(replacer, declared, kinds, rows, attribution)
    edited = rows.with_columns(pl.Series(name, values, dtype=rows.schema[name]) for name, values in new_values.items())
    if attribution.concerned:
        edited = _drop_undeclared(edited, attribution.concerned, undeclared, declared - kinds.keys())
    owned = pl.Series([owner is not None for owner in attribution.owners], dtype=pl.Boolean)
    return AnonymisedRows(edited, _differs(rows, edited), owned)


def row_key(table: Table) -> pl.Expr:
    """Return the key of a row of any bronze table, as suppression entries name it: '<table>|<key>'."""
    if table.name == EVENTS.name:
        parts = [pl.concat_str(pl.col("topic"), pl.col("partition"), pl.col("offset"), separator="/")]
    elif table.name == MARKETPLACE_ORDERS.name:
        parts = [pl.col("document_id")]
    else:
        parts = [pl.col(name).cast(pl.String) for name in POSTGRES_KEYS[table.name]]
    return pl.concat_str([pl.lit(table.name), *parts], separator="|")


def _attribute(replacer: ValueReplacer, table: Table, rows: pl.DataFrame) -> _Attribution:
    keys = rows.select(row_key(table)).to_series()
    if table.name in ORDER_COLUMNS:
        owners = _order_owners(replacer, rows[ORDER_COLUMNS[table.name]].cast(pl.String))
    else:
        owners = replacer.owners(RECORD, keys)
        for column in table.columns:
            if column.personal == ACCOUNT:
                owners = _first_known(owners, replacer.owners(ACCOUNT, rows[column.name].cast(pl.String)))
    return _Attribution(owners, replacer.owners(MENTION, keys), begin_of_rows(rows))


def _order_owners(replacer: ValueReplacer, order_ids: pl.Series) -> list[str | None]:
    """Return the erasure of each order, of the web shop or of a marketplace."""
    web = replacer.owners(RECORD, pl.select(pl.lit(f"{ORDERS.name}|") + order_ids).to_series())
    marketplace = replacer.owners(RECORD, pl.select(pl.lit(ORDER_PREFIX) + order_ids).to_series())
    return _first_known(web, marketplace)


def _first_known(first: list[str | None], second: list[str | None]) -> list[str | None]:
    return [one if one is not None else other for one, other in zip(first, second, strict=True)]


def _personal_values(
    replacer: ValueReplacer, declared: set[str], kinds: Mapping[str, str], rows: pl.DataFrame, attribution: _Attribution
) -> dict[str, list[Any]]:
    """Return the new values of each personal column."""
    cities = rows["city"].to_list() if "city" in kinds else None
    regions = [phone_region(country) for country in rows["country"].to_list()] if "country" in declared else None
    result: dict[str, list[Any]] = {}
    replaced_addresses: set[int] = set()
    for name, kind in kinds.items():
        if name == "_unreadable":
            continue
        values = rows[name].to_list()
        for at, raw in enumerate(values):
            if raw is None:
                continue
            region = (regions[at] or "") if regions is not None and kind == "phone" else ""
            city = (cities[at] or "") if cities is not None and kind == "address" else ""
            values[at] = replacer.replace(kind, raw, attribution.owners[at], attribution.begins[at], region, city)
            if kind == "address" and attribution.owners[at] is None and values[at] != raw:
                replaced_addresses.add(at)
        result[name] = values
    if cities is not None and replaced_addresses:
        # the pseudonym stands for the address with its city
        result["city"] = [None if at in replaced_addresses else city for at, city in enumerate(result["city"])]
    return result


def _drop_undeclared(rows: pl.DataFrame, concerned: list[int], undeclared: list[str], harmless: set[str]) -> pl.DataFrame:
    """Empty the undeclared columns of the concerned rows, and reduce their `_unreadable` values to harmless columns."""
    is_concerned = pl.Series(range(rows.height)).is_in(concerned)
    rows = rows.with_columns(pl.when(is_concerned).then(None).otherwise(pl.col(name)).alias(name) for name in undeclared)
    if "_unreadable" in rows.columns:
        positions = set(concerned)
        texts = [
            _harmless_only(text, harmless) if at in positions else text for at, text in enumerate(rows["_unreadable"].to_list())
        ]
        rows = rows.with_columns(pl.Series("_unreadable", texts, dtype=pl.String))
    return rows


def _any_unreadable(rows: pl.DataFrame) -> bool:
    return "_unreadable" in rows.columns and rows["_unreadable"].null_count() < rows.height


def _harmless_only(text: str | None, harmless: set[str]) -> str | None:
    """Return an `_unreadable` value with the texts of harmless columns; other columns keep their name only."""
    if not text:
        return text
    values = {name: value if name in harmless else PLACEHOLDER for name, value in json.loads(text).items()}
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


def _differs(before: pl.DataFrame, after: pl.DataFrame) -> pl.Series:
    """Return which rows differ in any column."""
    unlike = [~pl.col(name).eq_missing(pl.col(f"__{name}")) for name in before.columns]
    both = pl.concat([before, after.rename({name: f"__{name}" for name in after.columns})], how="horizontal")
    return both.select(pl.any_horizontal(unlike).alias("changed")).to_series()
