"""A consistent snapshot of the lakehouse, with the topic offsets that it covers.

Each commit records how far it has read its upstream tables, so the offsets behind the stock figures are found by following
snapshots upstream:
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

from lakehouse.engine.upstream_table import UpstreamTable
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.snapshot_properties import DATA_SEQUENCE, POSITIONS
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.step import Grouped
from lakehouse.table import GROUP_HASH, Table
from pipelines.bronze.tables import EVENTS
from pipelines.gold.inventory_health import INVENTORY_HEALTH
from pipelines.silver import inventory_snapshots
from pipelines.silver.events_clean import EVENTS_CLEAN
from pipelines.silver.inventory_snapshots import EVENT_COLUMNS, INVENTORY_SNAPSHOTS
from pipelines.sources.kafka.positions import TOPIC_EPOCHS, TOPIC_IDS, topic_prefixes
from pipelines.sources.kafka.source import KafkaSource

STOCK_COLUMNS = (
    "store_id",
    "product_id",
    "on_hand",
    "reserved",
    "incoming",
    "safety_stock",
    "available_to_promise",
    "daily_sales",
    "last_event_at",
)


class StateError(ShopSphereError):
    """The online state cannot be built from the lakehouse and the topics."""


@dataclass(frozen=True, kw_only=True)
class LakeSnapshot:
    """The stock figures and events of the lakehouse as of one moment.

    snapshots          Iceberg snapshot ids by table name
    offsets            next offset to read by 'topic:partition'
    stock              figures per store and product (STOCK_COLUMNS)
    events             silver.events_clean as of the snapshot from which the figures were computed
    event_id_hashes    sorted hashes (`_group_hash`) of the ids of these events
    incoming_events    the stock_incoming events among them (EVENT_COLUMNS)
    committed_at       when bronze was committed; None: it is empty. Events sent later may be missing
    position_prefixes  prefix of source positions by topic, for topics that were re-created
    topic_ids          ids by topic, where the broker reports them
    """

    snapshots: Mapping[str, int]
    offsets: Mapping[str, int]
    stock: pl.DataFrame
    events: UpstreamTable
    event_id_hashes: npt.NDArray[np.int32]
    incoming_events: pl.DataFrame
    committed_at: datetime | None
    position_prefixes: Mapping[str, str] = field(default_factory=dict)
    topic_ids: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableAsOf:
    """A table as of one of its snapshots; snapshot_id None: an empty table."""

    handle: TableHandle
    snapshot_id: int | None

    @property
    def rows(self) -> UpstreamTable:
        """The rows of this snapshot."""
        files = self.handle.files(snapshot_id=self.snapshot_id) if self.snapshot_id is not None else []
        return UpstreamTable(self.handle.table, self.handle.reader, tuple(files))

    @property
    def positions(self) -> dict[str, Any]:
        """The positions up to which this snapshot has read each upstream table or source."""
        text = self.handle.snapshot_property(POSITIONS, self.snapshot_id) if self.snapshot_id is not None else None
        positions: dict[str, Any] = json.loads(text or "{}")
        return positions

    def upstream(self, lake: Lake, table: Table) -> TableAsOf:
        """Return the upstream table as of the snapshot that this one has read. Raises StateError when it has expired."""
        handle, position = lake.load(table), self.positions.get(table.name)
        if position is None or position["sequence"] == 0:
            return TableAsOf(handle, None)
        metadata = handle.iceberg_table.metadata
        sequence = str(position["sequence"])
        matching = [one for one in metadata.snapshots if handle.snapshot_property(DATA_SEQUENCE, one.snapshot_id) == sequence]
        if str(metadata.table_uuid) != position["table"] or not matching:
            raise StateError(
                f"The snapshot of {table.name} from which {self.handle.table.name} was computed no longer exists. "
                "Bring the tables up to date: python -m app run."
            )
        return TableAsOf(handle, max(matching, key=lambda one: one.sequence_number or 0).snapshot_id)


def newest(lake: Lake, table: Table) -> TableAsOf:
    """Return a table as of its newest snapshot."""
    handle = lake.load(table)
    return TableAsOf(handle, handle.snapshot.snapshot_id if handle.snapshot else None)


@dataclass(frozen=True)
class SnapshotChain:
    """The tables from the stock figures to the bronze events, each as of the snapshot that its downstream has read."""

    health: TableAsOf
    ledger: TableAsOf
    events: TableAsOf
    bronze: TableAsOf

    @property
    def snapshots(self) -> dict[str, int]:
        """Snapshot ids by table name."""
        tables = (self.health, self.ledger, self.events, self.bronze)
        return {one.handle.table.name: one.snapshot_id for one in tables if one.snapshot_id is not None}

    @property
    def offsets(self) -> dict[str, int]:
        """The next offset to read by 'topic:partition'."""
        return {name: int(offset) for name, offset in self._kafka_position.items() if name not in (TOPIC_IDS, TOPIC_EPOCHS)}

    @property
    def position_prefixes(self) -> dict[str, str]:
        """The prefix of source positions by topic, for topics that were re-created."""
        return topic_prefixes(self._kafka_position)

    @property
    def topic_ids(self) -> dict[str, str]:
        """Ids by topic, where the broker reports them."""
        return dict(self._kafka_position.get(TOPIC_IDS, {}))

    @property
    def _kafka_position(self) -> dict[str, Any]:
        position = self.bronze.positions.get(KafkaSource.name)
        return position if isinstance(position, dict) else {}


def newest_chain(lake: Lake) -> SnapshotChain:
    """Return the chain of the next LakeSnapshot. Cheap: reads no rows. Raises StateError."""
    health = newest(lake, INVENTORY_HEALTH)
    ledger = health.upstream(lake, INVENTORY_SNAPSHOTS)
    events = ledger.upstream(lake, EVENTS_CLEAN)
    return SnapshotChain(health, ledger, events, events.upstream(lake, EVENTS))


def read_lake_snapshot(chain: SnapshotChain) -> LakeSnapshot:
    """Read the rows of a chain."""
    events, bronze = chain.events.rows, chain.bronze
    grouped = inventory_snapshots.STEP.reads["events"]
    assert isinstance(grouped, Grouped)
    hashes = events.read([GROUP_HASH])[GROUP_HASH].to_numpy() if events.files else np.empty(0, np.int32)
    commit = bronze.handle.iceberg_table.metadata.snapshot_by_id(bronze.snapshot_id) if bronze.snapshot_id is not None else None
    return LakeSnapshot(
        snapshots=chain.snapshots,
        offsets=chain.offsets,
        stock=chain.health.rows.read(list(STOCK_COLUMNS)),
        events=events,
        event_id_hashes=np.sort(hashes.astype(np.int32)),
        incoming_events=events.read(EVENT_COLUMNS, grouped.always),
        committed_at=datetime.fromtimestamp(commit.timestamp_ms / 1000, UTC) if commit else None,
        position_prefixes=chain.position_prefixes,
        topic_ids=chain.topic_ids,
    )
