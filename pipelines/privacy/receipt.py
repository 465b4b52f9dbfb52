"""The receipt of an erasure: what it did, and the proof that nothing is left. Contains no personal value."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from lakehouse.byte_search import FileSearchResult
from lakehouse.digest import digest
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.rewrite import PurgeResult, RewriteResult
from lakehouse.json_values import to_json_value
from pipelines.bronze.tables import TABLES
from pipelines.gold.sales_daily import SALES_DAILY
from pipelines.privacy.private_files import replace_private_file


@dataclass(frozen=True)
class SalesTotals:
    """The digest and row count of gold.sales_daily, and the sum of each amount column as exact text."""

    digest: str
    rows: int
    amounts: dict[str, str]


@dataclass(frozen=True)
class Baseline:
    """The state when an erasure was requested. stored: number of bronze rows, counted before the sums were taken."""

    sums: SalesTotals
    stored: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The result of an erasure.

    values     how many texts were searched for
    shared     by kind, how many values other people show too: replaced in the person's rows, not searched for elsewhere
    proved     whether every text was searched for: false when the list of them was lost with the machine that stored it
    arrived    bronze rows stored since the request: when there are any, the sums may differ
    unreached  systems that could not be searched or emptied, each with the reason
    """

    erasure: str
    requested_at: datetime
    finished_at: datetime
    values: int
    shared: dict[str, int]
    rewritten: tuple[RewriteResult, ...]
    forgotten: tuple[PurgeResult, ...]
    searched: FileSearchResult
    proved: bool
    sums_before: SalesTotals | None
    sums_after: SalesTotals
    arrived: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    @property
    def sums_equal(self) -> bool:
        """Return whether gold.sales_daily is unchanged to the last digit; true when there is nothing to compare with."""
        return self.sums_before is None or self.sums_before == self.sums_after

    @property
    def clean(self) -> bool:
        """Return whether the proof succeeded: no match, nothing unread or unreached, and unchanged sums where comparable."""
        sums_explained = self.sums_equal or self.arrived > 0
        return self.proved and sums_explained and not (self.searched.matches or self.searched.unread or self.unreached)


def sales_totals(lake: Lake) -> SalesTotals:
    """Return the current totals of gold.sales_daily."""
    handle = lake.load(SALES_DAILY)
    amounts = [column.name for column in SALES_DAILY.columns if str(column.type).startswith("decimal")]
    rows = handle.read(amounts)
    totals = {name: str(rows[name].sum() or Decimal(0)) for name in amounts}
    return SalesTotals(digest(handle), rows.height, totals)


def count_bronze_rows(lake: Lake) -> int:
    """Return the number of bronze rows. Bronze is append-only, and a rewrite keeps every row."""
    return sum(file.rows for table in TABLES if lake.exists(table) for file in lake.load(table).files())


def count_rows_ingested_since(lake: Lake, moment: datetime) -> int:
    """Return how many bronze rows were stored by runs that started after `moment`."""
    late = pl.col("_ingested_at") > moment
    return sum(lake.load(table).read(["_ingested_at"], late).height for table in TABLES if lake.exists(table))


def erasures_directory(lake: Lake) -> Path:
    """Return the directory of receipts and search lists; creates it for its owner alone."""
    directory = Path(lake.settings.home) / "erasures"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def receipt_file(lake: Lake, erasure_id: str) -> Path:
    """Return the path of an erasure's receipt."""
    return erasures_directory(lake) / f"{erasure_id}.receipt.json"


def read_receipt(lake: Lake, erasure_id: str) -> Receipt:
    """Read the receipt of a finished erasure."""
    stored = json.loads(receipt_file(lake, erasure_id).read_text())
    return msgspec.convert({name: value for name, value in stored.items() if name not in ("sums_equal", "clean")}, Receipt)


def write_receipt(lake: Lake, receipt: Receipt) -> None:
    """Store a receipt; replaces an earlier one of the same erasure."""
    content = json.dumps(to_json_value(as_json(receipt)), indent=2).encode()
    replace_private_file(receipt_file(lake, receipt.erasure), content)


def as_json(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt with its computed fields, for JSON output."""
    return {**asdict(receipt), "sums_equal": receipt.sums_equal, "clean": receipt.clean}
