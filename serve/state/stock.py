"""Stock figures: what a snapshot of the lakehouse says, and what events after it change.

The rules are silver's own functions, `events_clean.fill` (an event counts once) and `inventory_snapshots.fill` (figures in the
order in which things happened). Events that are new and later than all that is known of their store and product go on from
the last figures; an event that comes late, or again with other content, has the whole history of what it touches computed anew.
Either way the figures are those that silver has when it has read the same events.
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
from serve.state.lake_snapshot import STOCK, Base

Pair = tuple[str, str]
"""(store_id, product_id)"""

EVENT_TYPES = polars_schema(EVENTS_CLEAN.schema)
LEDGER_TYPES = polars_schema(INVENTORY_SNAPSHOTS.schema)
IS_STOCK = pl.col("event_type").is_in(list(STOCK_EVENTS))
CHUNKS = 64
"""Pieces of the kept events that are joined into one."""


@dataclass(frozen=True, slots=True)
class StockFigures:
    """A product in a store after its last event. Units; the names are those of silver.inventory_snapshots.

    daily_sales is the snapshot's (gold.inventory_health): a rate over weeks, which a few events do not change.
    """

    on_hand: int
    reserved: int
    incoming: int
    safety_stock: int
    available_to_promise: int
    daily_sales: float | None
    last_event_at: datetime

    def is_low(self, days: float) -> bool:
        """Nothing left to promise, or less than sells in `days`: gold.inventory_health's rule."""
        if self.available_to_promise <= 0:
            return True
        return bool(self.daily_sales) and self.available_to_promise / self.daily_sales < days  # type: ignore[operator]


class AccountEvent(NamedTuple):
    """An account event as features count it. at: microseconds since 1970; gone: it turned out to be another."""

    gone: bool
    account: int | None
    device: str | None
    kind: str
    at: int


class StockState:
    """Figures of all stores and products. One thread applies events, any may look.

    by_product   product -> store -> figures
    later        the events after the snapshot as silver would have them, one row per event id
    account_events  the account events among them, as they came: only added to
    rejected     messages that silver would quarantine
    repeated     events that came again or late, and had a history computed anew
    """

    def __init__(self, base: Base, context: BusinessSettings) -> None:
        self.base, self.context = base, context
        self.by_product: dict[str, dict[str, StockFigures]] = {}
        for store, product, *figures in base.stock.select(*STOCK, "last_event_at").iter_rows():
            self.by_product.setdefault(product, {})[store] = StockFigures(*figures)
        self.later = pl.DataFrame(schema=EVENT_TYPES)
        self.account_events: list[AccountEvent] = []
        self._ids: set[str] = set()
        self._corrected: set[str] = set()
        self.rejected = self.repeated = 0

    def __len__(self) -> int:
        return sum(map(len, self.by_product.values()))

    def __iter__(self) -> Iterator[tuple[Pair, StockFigures]]:
        for product, stores in list(self.by_product.items()):
            for store, figures in list(stores.items()):
                yield (store, product), figures

    def of(self, store: str, product: str) -> StockFigures | None:
        """The figures of a product in a store; None where no event ever was."""
        return self.by_product.get(product, {}).get(store)

    def apply(self, bronze: pl.DataFrame) -> set[Pair]:
        """Take in messages as bronze has them. Gives the stores and products whose figures changed."""
        parsed = events_clean.parse_events(bronze)
        self.rejected += parsed.rejected.height if parsed.rejected is not None else 0
        return self._take(events_clean.transform({"events": parsed.rows}, self.context))

    def _take(self, rows: pl.DataFrame) -> set[Pair]:
        if rows.is_empty():
            return set()
        fresh, corrected, former = self._judged(rows)
        if corrected.height:
            gone = corrected["event_id"].implode()
            self.later = pl.concat([self.later.filter(~pl.col("event_id").is_in(gone)), corrected])
        self.later = pl.concat([self.later, fresh], rechunk=self.later.n_chunks() >= CHUNKS)
        self._ids.update(fresh["event_id"], corrected["event_id"])
        self._corrected.update(corrected["event_id"])
        self.account_events += [
            *_account_events(former, True),
            *_account_events(corrected, False),
            *_account_events(fresh, False),
        ]
        anew = _pairs(corrected) | _pairs(former)
        began = _first_moments(fresh.filter(IS_STOCK))
        for pair, first in began.items():
            known = self.of(*pair)
            if known is not None and first <= known.last_event_at:
                anew.add(pair)
        follow = {pair: first for pair, first in began.items() if pair not in anew}
        changed = self._follow(fresh, follow) if follow else set()
        if anew:
            self.repeated += len(anew)
            changed |= self._replace(self.history(anew), anew)
        return changed

    def _judged(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Events that are new; events known otherwise, as they are now; the same as they were."""
        hashes = group_hash(rows, ["event_id"]).to_numpy()
        at = np.searchsorted(self.base.known, hashes)
        stored = np.zeros(len(hashes), bool)
        inside = at < len(self.base.known)
        stored[inside] = self.base.known[at[inside]] == hashes[inside]
        kept = np.fromiter((one in self._ids for one in rows["event_id"]), bool, rows.height)
        maybe = rows.filter(pl.Series(stored | kept))
        if maybe.is_empty():
            return rows, rows.clear(), rows.clear()
        former = self._known_as(maybe, hashes[stored])
        winners = events_clean.transform({"events": maybe, "old": former}, self.context).select(rows.columns)
        corrected = winners.filter(pl.col("event_id").is_in(former["event_id"].implode())).join(
            former, on=rows.columns, how="anti", nulls_equal=True
        )
        fresh = rows.filter(~pl.col("event_id").is_in(former["event_id"].implode()))
        return fresh, corrected, former.filter(pl.col("event_id").is_in(corrected["event_id"].implode()))

    def _known_as(self, rows: pl.DataFrame, hashes: np.ndarray) -> pl.DataFrame:
        """The events of these ids as they are known; an id with an equal hash only is not among them."""
        ids = rows["event_id"].implode()
        later = self.later.filter(pl.col("event_id").is_in(ids))
        if not len(hashes):
            return later
        same = pl.col(GROUP_HASH).is_in(pl.Series(hashes, dtype=pl.Int32).implode()) & pl.col("event_id").is_in(ids)
        stored = self.base.events.read(rows.columns, same)
        return pl.concat([stored.filter(~pl.col("event_id").is_in(later["event_id"].implode())), later])

    def _follow(self, fresh: pl.DataFrame, since: dict[Pair, datetime]) -> set[Pair]:
        """Go on from the last figures with events that are all later."""
        groups = pl.DataFrame(
            [(*pair, first) for pair, first in since.items()],
            schema={**dict.fromkeys(STORE_PRODUCT, pl.String), "since": pl.Datetime("us", "UTC")},
            orient="row",
        )
        opening = pl.DataFrame(
            [
                (*pair, *(getattr(known, name) for name in STOCK_LEVELS))
                for pair in since
                if (known := self.of(*pair)) is not None
            ],
            schema={**dict.fromkeys(STORE_PRODUCT, pl.String), **dict.fromkeys(STOCK_LEVELS, pl.Int64)},
            orient="row",
        )
        announced = self.base.incoming.join(groups, on=STORE_PRODUCT, how="semi").filter(
            ~pl.col("event_id").is_in(list(self._corrected))
        )
        lately = self.later.filter(pl.col("event_type") == "stock_incoming").select(EVENT_COLUMNS)
        events = pl.concat([fresh.select(EVENT_COLUMNS), announced, lately.join(groups, on=STORE_PRODUCT, how="semi")])
        frames = {"events": events, "groups": groups, "opening": opening}
        return self._replace(inventory_snapshots.transform(frames, self.context), set(since))

    def history(self, pairs: Iterable[Pair] = (), product: str = "") -> pl.DataFrame:
        """The ledger of stores and products (or of a product in all stores) with everything that is known now."""
        wanted = pl.DataFrame(list(pairs), schema=dict.fromkeys(STORE_PRODUCT, pl.String), orient="row")
        products = [product] if product else wanted["product_id"].unique().to_list()
        of_products = pl.col("product_id").is_in(products) & IS_STOCK
        later = self.later
        stored = self.base.events.read(EVENT_COLUMNS, of_products)
        superseded = stored.filter(pl.col("event_id").is_in(later["event_id"].implode()))["event_id"]
        events = pl.concat(
            [stored.filter(~pl.col("event_id").is_in(superseded.implode())), later.filter(of_products).select(EVENT_COLUMNS)]
        )
        if product:
            both = pl.concat([events.select(STORE_PRODUCT), events.select(store_id="to_store_id", product_id="product_id")])
            wanted = both.drop_nulls().unique()
        groups = wanted.with_columns(since=pl.lit(None, pl.Datetime("us", "UTC")))
        return inventory_snapshots.transform({"events": events, "groups": groups}, self.context).cast(pl.Schema(LEDGER_TYPES))

    def _replace(self, ledger: pl.DataFrame, pairs: set[Pair]) -> set[Pair]:
        """Take over the last row of each pair. Gives those whose figures changed."""
        last = ledger.sort(*STORE_PRODUCT, *LEDGER_ORDER).unique(STORE_PRODUCT, keep="last", maintain_order=True)
        changed = set()
        rows = last.select(*STORE_PRODUCT, *STOCK_LEVELS, "available_to_promise", "occurred_at")
        for store, product, on_hand, reserved, incoming, safety, available, moment in rows.iter_rows():
            before = self.of(store, product)
            rate = before.daily_sales if before else None
            now = StockFigures(on_hand, reserved, incoming, safety, available, rate, moment)
            pairs.discard((store, product))
            if now != before:
                self.by_product.setdefault(product, {})[store] = now
                changed.add((store, product))
        for store, product in pairs:  # all its events turned out to be others'
            if self.by_product.get(product, {}).pop(store, None) is not None:
                changed.add((store, product))
        return changed


def _account_events(rows: pl.DataFrame, gone: bool) -> list[AccountEvent]:
    if rows.is_empty():
        return []
    found = (
        account_events(rows.select(EVENT_READS)).with_columns(pl.col("occurred_at").dt.timestamp("us")).drop_nulls("occurred_at")
    )
    counted = found.filter(pl.col("account").is_not_null() | pl.col("device").is_not_null())
    return [AccountEvent(gone, *row) for row in counted.select("account", "device", "kind", "occurred_at").iter_rows()]


def _legs(rows: pl.DataFrame) -> pl.DataFrame:
    """A row per stock event and store and product it touches."""
    stock = rows.filter(IS_STOCK)
    moved = stock.filter(pl.col("event_type") == "stock_transferred")
    received = moved.select("occurred_at", store_id="to_store_id", product_id="product_id")
    return pl.concat([stock.select("occurred_at", *STORE_PRODUCT), received]).drop_nulls(STORE_PRODUCT)


def _pairs(rows: pl.DataFrame) -> set[Pair]:
    return set(_legs(rows).select(STORE_PRODUCT).iter_rows())


def _first_moments(rows: pl.DataFrame) -> dict[Pair, datetime]:
    firsts = _legs(rows).group_by(STORE_PRODUCT).agg(pl.col("occurred_at").min())
    return {(store, product): first for store, product, first in firsts.iter_rows()}
