"""Stock figures: those of a lakehouse snapshot, updated with the events after it.

The rules are silver's own functions: `events_clean.transform` (an event counts once) and `inventory_snapshots.transform`
(figures in event time). Events that are new and later than all known ones of their store and product are applied to the latest
figures. A late event, or a known one with other content, causes the whole history of the affected stores and products to be
recomputed. Either way the figures equal those of silver after it has read the same events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from lakehouse.iceberg.group_hash import group_hash
from lakehouse.iceberg.schema import polars_schema
from lakehouse.table import GROUP_HASH
from ml.tables.order_features import EVENT_READS, account_events
from pipelines.settings import BusinessSettings
from pipelines.silver import events_clean, inventory_snapshots
from pipelines.silver.events_clean import EVENTS_CLEAN, STOCK_EVENTS
from pipelines.silver.inventory_snapshots import EVENT_COLUMNS, INVENTORY_SNAPSHOTS, LEDGER_ORDER, STOCK_LEVELS, STORE_PRODUCT
from serve.state.lake_snapshot import STOCK_COLUMNS, LakeSnapshot

Pair = tuple[str, str]
"""(store_id, product_id)"""

EVENT_TYPES = polars_schema(EVENTS_CLEAN.schema)
LEDGER_TYPES = polars_schema(INVENTORY_SNAPSHOTS.schema)
IS_STOCK = pl.col("event_type").is_in(list(STOCK_EVENTS))
MAX_CHUNKS = 64
"""Chunks of the kept events from which on they are merged into one."""


@dataclass(frozen=True, slots=True)
class StockFigures:
    """A product in a store after its last event, in units. Names as in silver.inventory_snapshots.

    daily_sales  units per day over several weeks, from the snapshot's gold.inventory_health
    """

    on_hand: int
    reserved: int
    incoming: int
    safety_stock: int
    available_to_promise: int
    daily_sales: float | None
    last_event_at: datetime

    def is_low(self, days: float) -> bool:
        """Return whether nothing is available to promise, or less than sells in `days`, as in gold.inventory_health."""
        if self.available_to_promise <= 0:
            return True
        return bool(self.daily_sales) and self.available_to_promise / self.daily_sales < days  # type: ignore[operator]


class AccountEvent(NamedTuple):
    """An account event for the features. at: microseconds since 1970; retracted: it was corrected, so it no longer counts."""

    retracted: bool
    account: int | None
    device: str | None
    kind: str
    at: int


class StockState:
    """The figures of all stores and products. One thread applies events; any thread may read.

    by_product      figures by product and store
    later           the events after the snapshot as silver would store them, one row per event id
    account_events  the account events among them in order of arrival; append-only
    rejected        number of messages that silver would quarantine
    recomputed      number of histories recomputed because of late or corrected events
    """

    def __init__(self, snapshot: LakeSnapshot, context: BusinessSettings) -> None:
        self.snapshot, self.context = snapshot, context
        self.by_product: dict[str, dict[str, StockFigures]] = {}
        for store, product, *figures in snapshot.stock.select(STOCK_COLUMNS).iter_rows():
            self.by_product.setdefault(product, {})[store] = StockFigures(*figures)
        self.later = pl.DataFrame(schema=EVENT_TYPES)
        self.account_events: list[AccountEvent] = []
        self._later_ids: set[str] = set()
        self._corrected_ids: set[str] = set()
        self.rejected = self.recomputed = 0

    def __len__(self) -> int:
        return sum(map(len, self.by_product.values()))

    def __iter__(self) -> Iterator[tuple[Pair, StockFigures]]:
        for product, stores in list(self.by_product.items()):
            for store, figures in list(stores.items()):
                yield (store, product), figures

    def get(self, store: str, product: str) -> StockFigures | None:
        """Return the figures of a product in a store; None without any event."""
        return self.by_product.get(product, {}).get(store)

    def apply(self, bronze: pl.DataFrame) -> set[Pair]:
        """Apply messages in the form of bronze. Return the stores and products whose figures changed."""
        parsed = events_clean.parse_events(bronze)
        self.rejected += parsed.rejected.height if parsed.rejected is not None else 0
        return self._apply_events(events_clean.transform({"events": parsed.rows}, self.context))

    def _apply_events(self, rows: pl.DataFrame) -> set[Pair]:
        if rows.is_empty():
            return set()
        new, corrected, replaced = self._classify(rows)
        self._keep(new, corrected, replaced)
        recompute = _pairs(corrected) | _pairs(replaced)
        first_moments = _first_moments(new.filter(IS_STOCK))
        for pair, first in first_moments.items():
            figures = self.get(*pair)
            if figures is not None and first <= figures.last_event_at:
                recompute.add(pair)
        append = {pair: first for pair, first in first_moments.items() if pair not in recompute}
        changed = self._append(new, append) if append else set()
        if recompute:
            self.recomputed += len(recompute)
            changed |= self._replace(self.history(recompute), recompute)
        return changed

    def _classify(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Return the new events, the corrected events (known with other content), and the versions these replace."""
        hashes = group_hash(rows, ["event_id"]).to_numpy()
        known_hashes = self.snapshot.event_id_hashes
        at = np.searchsorted(known_hashes, hashes)
        in_snapshot = np.zeros(len(hashes), bool)
        inside = at < len(known_hashes)
        in_snapshot[inside] = known_hashes[at[inside]] == hashes[inside]
        is_later = np.fromiter((event_id in self._later_ids for event_id in rows["event_id"]), bool, rows.height)
        maybe_known = rows.filter(pl.Series(in_snapshot | is_later))
        if maybe_known.is_empty():
            return rows, rows.clear(), rows.clear()
        known = self._known_versions(maybe_known, hashes[in_snapshot])
        known_ids = known["event_id"].implode()
        winners = events_clean.transform({"events": maybe_known, "old": known}, self.context).select(rows.columns)
        corrected = winners.filter(pl.col("event_id").is_in(known_ids)).join(known, on=rows.columns, how="anti", nulls_equal=True)
        new = rows.filter(~pl.col("event_id").is_in(known_ids))
        return new, corrected, known.filter(pl.col("event_id").is_in(corrected["event_id"].implode()))

    def _known_versions(self, rows: pl.DataFrame, hashes: np.ndarray) -> pl.DataFrame:
        """Return the known versions of these events. hashes: of the ids that may be in the snapshot; collisions are excluded."""
        ids = rows["event_id"].implode()
        later = self.later.filter(pl.col("event_id").is_in(ids))
        if not len(hashes):
            return later
        candidates = pl.col(GROUP_HASH).is_in(pl.Series(hashes, dtype=pl.Int32).implode()) & pl.col("event_id").is_in(ids)
        stored = self.snapshot.events.read(rows.columns, candidates)
        return pl.concat([stored.filter(~pl.col("event_id").is_in(later["event_id"].implode())), later])

    def _keep(self, new: pl.DataFrame, corrected: pl.DataFrame, replaced: pl.DataFrame) -> None:
        """Add the events to `later` and `account_events`."""
        if corrected.height:
            outdated = corrected["event_id"].implode()
            self.later = pl.concat([self.later.filter(~pl.col("event_id").is_in(outdated)), corrected])
        self.later = pl.concat([self.later, new], rechunk=self.later.n_chunks() >= MAX_CHUNKS)
        self._later_ids.update(new["event_id"], corrected["event_id"])
        self._corrected_ids.update(corrected["event_id"])
        self.account_events += [
            *_account_events(replaced, retracted=True),
            *_account_events(corrected, retracted=False),
            *_account_events(new, retracted=False),
        ]

    def _append(self, new: pl.DataFrame, since: dict[Pair, datetime]) -> set[Pair]:
        """Apply events that are all later than the latest figures. since: the first new event of each pair."""
        groups = pl.DataFrame(
            [(*pair, first) for pair, first in since.items()],
            schema={**dict.fromkeys(STORE_PRODUCT, pl.String), "since": pl.Datetime("us", "UTC")},
            orient="row",
        )
        latest = {pair: figures for pair in since if (figures := self.get(*pair)) is not None}
        opening = pl.DataFrame(
            [(*pair, *(getattr(figures, name) for name in STOCK_LEVELS)) for pair, figures in latest.items()],
            schema={**dict.fromkeys(STORE_PRODUCT, pl.String), **dict.fromkeys(STOCK_LEVELS, pl.Int64)},
            orient="row",
        )
        incoming = self.snapshot.incoming_events.join(groups, on=STORE_PRODUCT, how="semi")
        incoming = incoming.filter(~pl.col("event_id").is_in(list(self._corrected_ids)))
        later_incoming = self.later.filter(pl.col("event_type") == "stock_incoming").select(EVENT_COLUMNS)
        events = pl.concat([new.select(EVENT_COLUMNS), incoming, later_incoming.join(groups, on=STORE_PRODUCT, how="semi")])
        frames = {"events": events, "groups": groups, "opening": opening}
        return self._replace(inventory_snapshots.transform(frames, self.context), set(since))

    def history(self, pairs: Iterable[Pair] = (), product: str = "") -> pl.DataFrame:
        """Return the ledger of these stores and products, or of a product in all stores, with all events known now."""
        groups = pl.DataFrame(list(pairs), schema=dict.fromkeys(STORE_PRODUCT, pl.String), orient="row")
        products = [product] if product else groups["product_id"].unique().to_list()
        of_products = pl.col("product_id").is_in(products) & IS_STOCK
        later = self.later
        stored = self.snapshot.events.read(EVENT_COLUMNS, of_products)
        superseded = stored.filter(pl.col("event_id").is_in(later["event_id"].implode()))["event_id"]
        events = pl.concat(
            [stored.filter(~pl.col("event_id").is_in(superseded.implode())), later.filter(of_products).select(EVENT_COLUMNS)]
        )
        if product:
            both = pl.concat([events.select(STORE_PRODUCT), events.select(store_id="to_store_id", product_id="product_id")])
            groups = both.drop_nulls().unique()
        groups = groups.with_columns(since=pl.lit(None, pl.Datetime("us", "UTC")))
        return inventory_snapshots.transform({"events": events, "groups": groups}, self.context).cast(pl.Schema(LEDGER_TYPES))

    def _replace(self, ledger: pl.DataFrame, pairs: set[Pair]) -> set[Pair]:
        """Replace the figures of these pairs by the last row of each. Return the pairs whose figures changed."""
        last = ledger.sort(*STORE_PRODUCT, *LEDGER_ORDER).unique(STORE_PRODUCT, keep="last", maintain_order=True)
        changed = set()
        rows = last.select(*STORE_PRODUCT, *STOCK_LEVELS, "available_to_promise", "occurred_at")
        for store, product, on_hand, reserved, incoming, safety, available, moment in rows.iter_rows():
            before = self.get(store, product)
            rate = before.daily_sales if before else None
            after = StockFigures(on_hand, reserved, incoming, safety, available, rate, moment)
            pairs.discard((store, product))
            if after != before:
                self.by_product.setdefault(product, {})[store] = after
                changed.add((store, product))
        for store, product in pairs:  # corrections moved all their events to other pairs
            if self.by_product.get(product, {}).pop(store, None) is not None:
                changed.add((store, product))
        return changed


def _account_events(rows: pl.DataFrame, *, retracted: bool) -> list[AccountEvent]:
    if rows.is_empty():
        return []
    events = (
        account_events(rows.select(EVENT_READS)).with_columns(pl.col("occurred_at").dt.timestamp("us")).drop_nulls("occurred_at")
    )
    counted = events.filter(pl.col("account").is_not_null() | pl.col("device").is_not_null())
    return [AccountEvent(retracted, *row) for row in counted.select("account", "device", "kind", "occurred_at").iter_rows()]


def _movements(rows: pl.DataFrame) -> pl.DataFrame:
    """Return a row per stock event and affected store and product: two for a transfer."""
    stock = rows.filter(IS_STOCK)
    transfers = stock.filter(pl.col("event_type") == "stock_transferred")
    received = transfers.select("occurred_at", store_id="to_store_id", product_id="product_id")
    return pl.concat([stock.select("occurred_at", *STORE_PRODUCT), received]).drop_nulls(STORE_PRODUCT)


def _pairs(rows: pl.DataFrame) -> set[Pair]:
    return set(_movements(rows).select(STORE_PRODUCT).iter_rows())


def _first_moments(rows: pl.DataFrame) -> dict[Pair, datetime]:
    firsts = _movements(rows).group_by(STORE_PRODUCT).agg(pl.col("occurred_at").min())
    return {(store, product): first for store, product, first in firsts.iter_rows()}
