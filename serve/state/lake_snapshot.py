"""One consistent snapshot of the lakehouse, and the topic offsets that it stands for.

Each commit says how far it has read its upstream, so the way from figures back to offsets is a walk over snapshots:
gold.inventory_health -> silver.inventory_snapshots -> silver.events_clean -> the bronze events -> {'topic:partition': offset}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.engine.engine import UpstreamTable
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.snapshot_properties import DATA_SEQUENCE, POSITIONS
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.step import Grouped
from lakehouse.table import GROUP_HASH, Table
from pipelines.bronze.tables import EVENTS
from pipelines.gold.inventory_health import INVENTORY_HEALTH
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.inventory_snapshots import EVENT_COLUMNS, INVENTORY_SNAPSHOTS
from pipelines.silver.inventory_snapshots import STEP as LEDGER
from pipelines.sources.kafka.positions import TOPIC_EPOCHS, TOPIC_IDS, topic_prefixes
from pipelines.sources.kafka.source import KafkaSource

STOCK = ("store_id", "product_id", "on_hand", "reserved", "incoming", "safety_stock", "available_to_promise", "daily_sales")


class StateError(ShopSphereError):
    """The online state cannot be made of what the lakehouse and the topics hold."""


@dataclass(frozen=True)
class Base:
    """What the lakehouse knew at one moment.

    offsets  by 'topic:partition' the first offset that it does not know
    stock    the figures per store and product, with `last_event_at`
    events   silver.events_clean as the figures were made from it
    known    the hashes (`_group_hash`) of the ids of these events, sorted
    incoming the stock_incoming events among them, as the ledger reads them
    at       when it read the topics: what was sent later may be missing
    prefixes what positions of messages begin with, by topic, where the topic is not in its first generation
    ids      by topic its id, as far as the broker told
    """

    snapshots: Mapping[str, int]
    offsets: Mapping[str, int]
    stock: pl.DataFrame
    events: UpstreamTable
    known: npt.NDArray[np.int32]
    incoming: pl.DataFrame
    at: datetime | None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableAsOf:
    """A table as of one of its snapshots; None: it was empty."""

    handle: TableHandle
    snapshot_id: int | None

    @property
    def upstream(self) -> UpstreamTable:
        """Its rows."""
        files = self.handle.files(snapshot_id=self.snapshot_id) if self.snapshot_id is not None else []
        return UpstreamTable(self.handle.table, self.handle.reader, tuple(files))

    @property
    def positions(self) -> dict[str, Any]:
        """How far it had read each upstream."""
        told = self.handle.snapshot_property(POSITIONS, self.snapshot_id) if self.snapshot_id is not None else None
        found: dict[str, Any] = json.loads(told or "{}")
        return found

    def above(self, lake: Lake, table: Table) -> TableAsOf:
        """The upstream table as this snapshot had read it. Raises StateError when that snapshot is gone."""
        handle, position = lake.load(table), self.positions.get(table.name)
        if position is None or position["sequence"] == 0:
            return TableAsOf(handle, None)
        metadata = handle.iceberg_table.metadata
        wanted = str(position["sequence"])
        same = [one for one in metadata.snapshots if handle.snapshot_property(DATA_SEQUENCE, one.snapshot_id) == wanted]
        if str(metadata.table_uuid) != position["table"] or not same:
            raise StateError(
                f"The snapshot of {table.name} that {self.handle.table.name} was made from is not there any more. "
                "Bring the tables up to date: python -m app run."
            )
        return TableAsOf(handle, max(same, key=lambda one: one.sequence_number or 0).snapshot_id)


def current(lake: Lake, table: Table) -> TableAsOf:
    """A table as it is now."""
    handle = lake.load(table)
    return TableAsOf(handle, handle.snapshot.snapshot_id if handle.snapshot else None)


@dataclass(frozen=True)
class SnapshotChain:
    """The tables from figures to topics, each as the one before it had read it."""

    health: TableAsOf
    ledger: TableAsOf
    events: TableAsOf
    bronze: TableAsOf

    @property
    def snapshots(self) -> dict[str, int]:
        """Their snapshots by table name."""
        every = (self.health, self.ledger, self.events, self.bronze)
        return {one.handle.table.name: one.snapshot_id for one in every if one.snapshot_id is not None}

    @property
    def offsets(self) -> dict[str, int]:
        """By 'topic:partition' the first offset that the lakehouse has not read."""
        return {name: int(offset) for name, offset in self._read.items() if name not in (TOPIC_IDS, TOPIC_EPOCHS)}

    @property
    def prefixes(self) -> dict[str, str]:
        """What positions of messages begin with, by topic, where the topic is not in its first generation."""
        return topic_prefixes(self._read)

    @property
    def ids(self) -> dict[str, str]:
        """By topic its id, as far as the broker told."""
        return dict(self._read.get(TOPIC_IDS, {}))

    @property
    def _read(self) -> dict[str, Any]:
        read = self.bronze.positions.get(KafkaSource.name)
        return read if isinstance(read, dict) else {}


def newest_chain(lake: Lake) -> SnapshotChain:
    """What the next base would be made of: cheap, reads no rows. Raises StateError."""
    health = current(lake, INVENTORY_HEALTH)
    ledger = health.above(lake, INVENTORY_SNAPSHOTS)
    events = ledger.above(lake, EVENTS_CLEAN)
    return SnapshotChain(health, ledger, events, events.above(lake, EVENTS))


def open_base(chain: SnapshotChain) -> Base:
    """Read a consistent snapshot."""
    read, bronze = chain.events.upstream, chain.bronze
    gathered = LEDGER.reads["events"]
    assert isinstance(gathered, Grouped)
    hashes = read.read([GROUP_HASH])[GROUP_HASH].to_numpy() if read.files else np.empty(0, np.int32)
    taken = bronze.handle.iceberg_table.metadata.snapshot_by_id(bronze.snapshot_id) if bronze.snapshot_id is not None else None
    return Base(
        snapshots=chain.snapshots,
        offsets=chain.offsets,
        stock=chain.health.upstream.read([*STOCK, "last_event_at"]),
        events=read,
        known=np.sort(hashes.astype(np.int32)),
        incoming=read.read(EVENT_COLUMNS, gathered.always),
        at=datetime.fromtimestamp(taken.timestamp_ms / 1000, UTC) if taken else None,
        prefixes=chain.prefixes,
        ids=chain.ids,
    )
