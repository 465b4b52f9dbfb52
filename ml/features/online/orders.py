"""Orders in memory: requests for features, and an index of the history's orders by id and by entity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ml.features.compute import prepare
from ml.features.declarations import ENTITIES, ORDER_COLUMNS, FeatureError, conform
from ml.features.online.arithmetic import to_microseconds
from ml.features.windows import NEVER, Ints, microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedOrder:
    """An order as histories keep it.

    placed, reported: microseconds since 1970, NEVER if not reported as fraud; amount: cents, None if unknown; entities: id
    by entity kind; ratio: see ORDER_COLUMNS."""

    order_id: str
    placed: int
    amount: int | None
    reported: int
    entities: Mapping[str, str | None]
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRequest:
    """An order whose features are requested: its history columns, and the columns that only its own row needs."""

    order: PlacedOrder
    account: int | None = None
    account_created: int = NEVER
    channel: str | None = None
    payment_method: str | None = None
    category: str | None = None

    @staticmethod
    def of(row: Mapping[str, Any]) -> FeatureRequest:
        """Convert a row with (some of) ORDER_COLUMNS. Raises FeatureError without order_id or placed_at."""
        if row.get("order_id") is None or row.get("placed_at") is None:
            raise FeatureError("An order without order_id or placed_at has no features. Give both.")
        created = row.get("account_created_at")
        order = PlacedOrder(
            order_id=row["order_id"],
            placed=to_microseconds(row["placed_at"]),
            amount=row.get("amount"),
            reported=NEVER if row.get("known_at") is None else to_microseconds(row["known_at"]),
            entities={kind: row.get(kind) for kind in ENTITIES},
            ratio=row.get("ratio"),
        )
        return FeatureRequest(
            order=order,
            account=row.get("account"),
            account_created=NEVER if created is None else to_microseconds(created),
            channel=row.get("channel"),
            payment_method=row.get("payment_method"),
            category=row.get("category"),
        )


@dataclass(frozen=True, kw_only=True)
class OrderIndex:
    """Orders as columns, sorted by (placed_at, order_id), with the rows of each entity. Immutable.

    rows, spans      by entity kind: row numbers grouped by id, and the range of each id in them
    hashes, hashed   sorted hashes of the order ids, and their rows
    """

    order_id: pl.Series
    placed: Ints
    amount: pl.Series
    reported: Ints
    ratio: pl.Series
    entities: Mapping[str, pl.Series]
    rows: Mapping[str, Ints]
    spans: Mapping[str, Mapping[str, tuple[int, int]]]
    hashes: Ints
    hashed: Ints

    @staticmethod
    def of(orders: pl.DataFrame) -> OrderIndex:
        """Index a frame with (some of) ORDER_COLUMNS."""
        known = conform(orders, ORDER_COLUMNS)
        frame = prepare(known.clear(), known)
        rows, spans = {}, {}
        for kind in ENTITIES:
            rows[kind], spans[kind] = rows_by_name(frame[kind])
        hashes = np.fromiter(map(hash, frame["order_id"]), np.int64, frame.height)
        hashed = np.argsort(hashes)
        return OrderIndex(
            order_id=frame["order_id"],
            placed=microseconds(frame["placed_at"]),
            amount=frame["amount"],
            reported=microseconds(frame["known_at"]),
            ratio=frame["ratio"],
            entities={kind: frame[kind] for kind in ENTITIES},
            rows=rows,
            spans=spans,
            hashes=hashes[hashed],
            hashed=hashed,
        )

    def of_id(self, order_id: str) -> PlacedOrder | None:
        """Return the order with an id, if there is one."""
        wanted = hash(order_id)
        for place in range(int(self.hashes.searchsorted(wanted)), len(self.hashes)):
            if self.hashes[place] != wanted:
                break
            (found,) = self._at(self.hashed[place : place + 1])
            if found.order_id == order_id:
                return found
        return None

    def of_entity(self, kind: str, name: str) -> Iterator[PlacedOrder]:
        """Yield the orders of an entity, sorted by (placed, order_id)."""
        start, stop = self.spans[kind].get(name, (0, 0))
        return self._at(self.rows[kind][start:stop])

    def _at(self, rows: Ints) -> Iterator[PlacedOrder]:
        columns = [
            self.order_id.gather(rows).to_list(),
            self.placed[rows].tolist(),
            self.amount.gather(rows).to_list(),
            self.reported[rows].tolist(),
            self.ratio.gather(rows).to_list(),
            *(self.entities[kind].gather(rows).to_list() for kind in ENTITIES),
        ]
        for order_id, placed, amount, reported, ratio, *names in zip(*columns, strict=True):
            yield PlacedOrder(
                order_id=order_id,
                placed=placed,
                amount=amount,
                reported=reported,
                entities=dict(zip(ENTITIES, names, strict=True)),
                ratio=ratio,
            )


def rows_by_name(names: pl.Series) -> tuple[Ints, dict[Any, tuple[int, int]]]:
    """Return the row numbers grouped by name, each group in row order, and the range of each name in them."""
    frame = names.alias("name").to_frame().with_row_index("row").drop_nulls("name").sort("name", "row")
    counts = frame.group_by("name", maintain_order=True).len()
    stops = counts["len"].cum_sum()
    spans = {
        name: (stop - count, stop)
        for name, count, stop in zip(counts["name"].to_list(), counts["len"].to_list(), stops.to_list(), strict=True)
    }
    return frame["row"].to_numpy().astype(np.int64), spans
