"""Bronze marketplace documents as typed order and item rows, and the documents that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.step import Parsed
from pipelines.bronze.current_rows import one_per_position, since_truncate
from pipelines.parsing import contacts
from pipelines.parsing.amounts import AMOUNT
from pipelines.parsing.extended_json import DocumentUnreadable
from pipelines.parsing.order_document import ORDER_FIELDS, OrderValues, read_document

_TIME = pl.Datetime("us", "UTC")

ORDER_SCHEMA: dict[str, Any] = {
    "order_id": pl.String,
    "document_id": pl.String,
    "platform": pl.String,
    "mp_order_id": pl.String,
    "status": pl.String,
    "currency": pl.String,
    "total_amount": AMOUNT,
    "payment_method": pl.String,
    "card_fingerprint": pl.String,
    "ip_address": pl.String,
    "device_id": pl.String,
    "loyalty_id": pl.String,
    "email_raw": pl.String,
    "phone_raw": pl.String,
    "buyer_name": pl.String,
    "shipping_address": pl.String,
    "placed_at": _TIME,
    "updated_at": _TIME,
    "email": pl.String,
    "phone": pl.String,
    "region": pl.String,
}
"""`email` and `phone` are normalised. `region` is the region of its phone numbers, null when unknown."""

ITEM_SCHEMA: dict[str, Any] = {
    "order_id": pl.String,
    "line_no": pl.Int32,
    "product_id": pl.String,
    "product_name": pl.String,
    "quantity": pl.Int32,
    "unit_price": AMOUNT,
    "variant": pl.String,
}
"""`line_no` starts at 1; `variant` is canonical JSON."""

REJECTED_SCHEMA: dict[str, Any] = {"reason": pl.String, "source_position": pl.String, "original": pl.Binary}


@dataclass(frozen=True)
class Documents:
    """Parsed bronze rows.

    orders            one row per (platform, mp_order_id), columns of ORDER_SCHEMA
    items             their items, columns of ITEM_SCHEMA
    rejected          rows that cannot be read, columns of REJECTED_SCHEMA
    parsed_positions  positions that were read
    """

    orders: pl.DataFrame
    items: pl.DataFrame
    rejected: pl.DataFrame
    parsed_positions: pl.Series


_ParsedDocument = tuple[str, str, OrderValues]
"""Document id, text and values."""

_EffectiveOrder = tuple[str, str, OrderValues]
"""Order id, id of the document that describes it, and its values."""


def find_unreadable_documents(bronze: pl.DataFrame) -> Parsed:
    """Reject the bronze rows that cannot be read; every version is checked. `rows` is the argument."""
    log = _ParseLog()
    for position, document in _one_per_position(bronze).select("_source_position", "document").iter_rows():
        log.parse(position, document)
    return Parsed(rows=bronze, rejected=log.rejected(), parsed_positions=log.parsed_positions())


def parse_documents(bronze: pl.DataFrame, default_region: str) -> Documents:
    """Return the current orders and items of bronze rows of `marketplace_orders`.

    Each document contributes its newest readable version in source order; a deleted document contributes none. If several
    documents describe the same order, the one changed last (`updated_at`, else `order_time`; then by its text) is used.
    default_region: region of phone numbers when neither platform nor currency determines it.
    """
    orders, log = _current_orders(bronze)
    return Documents(
        orders=_order_frame(orders, default_region),
        items=_item_frame(orders),
        rejected=log.rejected(),
        parsed_positions=log.parsed_positions(),
    )


def parse_items(bronze: pl.DataFrame) -> pl.DataFrame:
    """Return the items of `parse_documents` only, without normalising contacts."""
    orders, _ = _current_orders(bronze)
    return _item_frame(orders)


def _current_orders(bronze: pl.DataFrame) -> tuple[list[_EffectiveOrder], _ParseLog]:
    """Return each order as its effective document describes it, and the outcome of parsing."""
    log = _ParseLog()
    rows = _one_per_position(since_truncate(bronze, ("document_id",)))
    newest = rows.filter(pl.col("_source_position") == pl.col("_source_position").max().over("document_id"))
    unreadable = log.parse_rows(newest.filter(pl.col("_op") != "d"))
    if unreadable:
        _parse_older_versions(rows, newest, unreadable, log)
    effective: dict[str, tuple[tuple[int, str], str, OrderValues]] = {}
    for document_id, text, values in log.documents:
        fields, _ = values
        order_id, rank = f"{fields[0]}:{fields[1]}", (fields[-1], text)
        if order_id not in effective or effective[order_id][0] < rank:
            effective[order_id] = (rank, document_id, values)
    return [(order_id, document_id, values) for order_id, (_, document_id, values) in effective.items()], log


def _parse_older_versions(rows: pl.DataFrame, newest: pl.DataFrame, document_ids: list[str], log: _ParseLog) -> None:
    """Parse the older versions of documents, newest first, until one can be read. Versions before a delete are not used."""
    older = rows.join(newest.select("_source_position"), on="_source_position", how="anti")
    older = older.filter(pl.col("document_id").is_in(document_ids), pl.col("_op") != "d")
    deletes = rows.filter(pl.col("_op") == "d").group_by("document_id")
    older = older.join(deletes.agg(pl.col("_source_position").max().alias("_deleted_at")), on="document_id", how="left")
    older = older.filter(pl.col("_deleted_at").is_null() | (pl.col("_source_position") > pl.col("_deleted_at")))
    for _, versions in older.sort("_source_position", descending=True).group_by("document_id", maintain_order=True):
        for document_id, position, document in versions.select("document_id", "_source_position", "document").iter_rows():
            if log.parse(position, document, document_id):
                break


def _one_per_position(bronze: pl.DataFrame) -> pl.DataFrame:
    """Return one effective row per position."""
    columns = ["_source_position", "_op", "document_id", "document"]
    ingested_at = ["_ingested_at"] if "_ingested_at" in bronze.columns else []
    rows = bronze.select(*columns, *ingested_at)
    return one_per_position(rows, ["_source_position"], pl.col("document")).select(columns)


@dataclass
class _ParseLog:
    """Documents that were read, and rows that could not be."""

    documents: list[_ParsedDocument] = field(default_factory=list)
    _parsed: list[str] = field(default_factory=list)
    _rejected: list[tuple[str, str, bytes]] = field(default_factory=list)

    def parse(self, position: str, text: str | None, document_id: str = "") -> bool:
        """Return whether the row has a readable document. A row without text (a delete, or deleted before look-up) has none."""
        if text is None:
            self._parsed.append(position)
            return False
        try:
            values = read_document(text)
        except DocumentUnreadable as error:
            self._rejected.append((str(error), position, text.encode()))
            return False
        self.documents.append((document_id, text, values))
        self._parsed.append(position)
        return True

    def parse_rows(self, rows: pl.DataFrame) -> list[str]:
        """Parse every row. Return the ids of the documents without a readable one."""
        columns = rows.select("_source_position", "document", "document_id")
        return [row[2] for row in columns.iter_rows() if not self.parse(*row)]

    def rejected(self) -> pl.DataFrame:
        """Return the rejected rows, columns of REJECTED_SCHEMA."""
        return pl.DataFrame(self._rejected, schema=REJECTED_SCHEMA, orient="row")

    def parsed_positions(self) -> pl.Series:
        """Return the positions that were read."""
        return pl.Series("source_position", self._parsed, dtype=pl.String)


def _order_frame(orders: list[_EffectiveOrder], default_region: str) -> pl.DataFrame:
    columns = list(zip(*(fields for _, _, (fields, _) in orders), strict=True)) if orders else [()] * len(ORDER_FIELDS)
    data: dict[str, pl.Series] = {
        "order_id": pl.Series([order_id for order_id, _, _ in orders], dtype=pl.String),
        "document_id": pl.Series([document_id for _, document_id, _ in orders], dtype=pl.String),
    }
    for name, values in zip(ORDER_FIELDS, columns, strict=True):
        data[name] = _series(values, ORDER_SCHEMA[name])
    no_country = pl.Series([None] * len(orders), dtype=pl.String)
    region = contacts.phone_regions(no_country, data["currency"], data["platform"])
    data["email"] = contacts.normalise_emails(data["email_raw"])
    data["phone"] = contacts.normalise_phones(data["phone_raw"], region.fill_null(default_region))
    data["region"] = region
    return pl.DataFrame(data, schema=ORDER_SCHEMA).sort("order_id")


def _item_frame(orders: list[_EffectiveOrder]) -> pl.DataFrame:
    names = list(ITEM_SCHEMA)
    rows = [(order_id, *item) for order_id, _, (_, items) in orders for item in items]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    data = {name: _series(values, ITEM_SCHEMA[name]) for name, values in zip(names, columns, strict=True)}
    return pl.DataFrame(data, schema=ITEM_SCHEMA).sort("order_id", "line_no")


def _series(values: Iterable[Any], dtype: Any) -> pl.Series:
    if dtype == AMOUNT:
        return pl.Series(pa.array(values, pa.decimal128(20, 4)), dtype=AMOUNT)
    if dtype == _TIME:
        return pl.Series(values, dtype=pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return pl.Series(values, dtype=dtype)
