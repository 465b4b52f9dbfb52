"""The online state of a replica: the follower that answers, its replacement for a newer snapshot, and subscribers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polars.exceptions import PanicException

from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from pipelines.privacy.anonymise import Anonymiser
from pipelines.privacy.suppression import load_suppression, newest_erasure
from pipelines.settings import BusinessSettings, Settings
from serve.settings import ServeSettings
from serve.state.lake_snapshot import SnapshotChain, StateError, newest_chain, read_lake_snapshot
from serve.state.stock import Pair
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")

CATCH_UP_POLL_SECONDS = 0.05
OFFSET_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Freshness:
    """How fresh an answer is.

    as_of         unix time up to which the state is complete
    offsets       first offset not in the state, by 'topic:partition'
    staleness_ms  age of `as_of`
    """

    as_of: float
    offsets: Mapping[str, int]
    snapshots: Mapping[str, int]
    staleness_ms: int


@dataclass(eq=False)
class Subscriber:
    """Receives the stores and products whose figures changed. A slow subscriber skips intermediate figures."""

    loop: asyncio.AbstractEventLoop
    changed: set[Pair] = field(default_factory=set)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self, pairs: set[Pair]) -> None:
        """Add changes. Thread-safe."""
        self.loop.call_soon_threadsafe(self._add, pairs)

    def _add(self, pairs: set[Pair]) -> None:
        self.changed |= pairs
        self.woken.set()


class OnlineState:
    """Follows the topics from the newest snapshot of the lakehouse.

    A new follower starts from each newer snapshot and replaces the old one when it has caught up. `prepare` is called with it,
    in the state's thread, before it starts to answer.
    """

    def __init__(
        self, settings: Settings, serving: ServeSettings, context: BusinessSettings, prepare: Callable[[TopicFollower], None]
    ) -> None:
        self.settings, self.serving, self.context = settings, serving, context
        self.error: str | None = None
        self.ready = threading.Event()
        self._follower: TopicFollower | None = None
        self._erasure: int | None = None
        self._prepare = prepare
        self._subscribers: set[Subscriber] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        """Start; `ready` is set once there is a follower."""
        self._thread.start()

    def stop(self) -> None:
        """Stop all threads."""
        self._stopping.set()
        self._thread.join(timeout=30)
        if self._follower is not None:
            self._follower.stop()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, or has not been started yet."""
        return self._thread.ident is None or self._thread.is_alive()

    @property
    def follower(self) -> TopicFollower:
        """The follower that answers. Raises StateError before the first one is ready."""
        if self._follower is None:
            raise StateError(self.error or "The online state is being loaded.")
        return self._follower

    def freshness(self, follower: TopicFollower) -> Freshness:
        """Return the freshness of an answer given now."""
        as_of = follower.fresh_at
        age_ms = max(0, round((time.time() - as_of) * 1000))
        return Freshness(as_of, dict(follower.offsets), follower.snapshot.snapshots, age_ms)

    async def wait_for(self, offsets: Mapping[str, int]) -> bool:
        """Wait until the state contains these offsets; return False when `wait_seconds` have passed before."""
        next_offsets = {name: offset + 1 for name, offset in offsets.items()}
        deadline = time.monotonic() + self.serving.wait_seconds
        while not self.follower.has(next_offsets):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(OFFSET_POLL_SECONDS)
        return True

    def subscribe(self) -> Subscriber:
        """Return a subscriber to changes from now on. Call it in the event loop."""
        subscriber = Subscriber(asyncio.get_running_loop())
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop notifying a subscriber."""
        self._subscribers.discard(subscriber)

    def _notify(self, follower: TopicFollower, pairs: set[Pair]) -> None:
        if follower is self._follower and pairs:
            for subscriber in tuple(self._subscribers):
                subscriber.notify(pairs)

    def _run(self) -> None:
        lake = Lake(self.settings)
        while not self._stopping.is_set():
            try:
                self._refresh(lake)
            except ShopSphereError as error:
                self._fail(str(error))
            except (Exception, PanicException) as error:  # a polars panic is not an Exception
                logger.exception("Reading the snapshot failed")
                self._fail(f"The snapshot cannot be read ({type(error).__name__}). See the log.")
            self._stopping.wait(self.serving.refresh_seconds)

    def _fail(self, message: str) -> None:
        if message != self.error:
            logger.error("%s", message)
        self.error = message

    def _refresh(self, lake: Lake) -> None:
        """Replace the follower when there is a newer snapshot, when it has stopped, or after an erasure."""
        chain, old, erasure = newest_chain(lake), self._follower, newest_erasure(lake)
        if old is not None and old.error is None and chain.snapshots == old.snapshot.snapshots and erasure == self._erasure:
            return
        follower = self._start_follower(lake, chain)
        self._wait_until_caught_up(follower, old)
        if follower.error is not None or self._stopping.is_set():
            follower.stop()
            if follower.error is not None:
                raise follower.error
            return
        self._prepare(follower)
        self._follower, self._erasure, self.error = follower, erasure, None
        self.ready.set()
        if old is not None:
            self._notify(follower, _changed_pairs(old, follower))
            old.stop()

    def _start_follower(self, lake: Lake, chain: SnapshotChain) -> TopicFollower:
        suppression = load_suppression(lake)
        follower = TopicFollower(
            snapshot=read_lake_snapshot(chain),
            kafka=self.settings.kafka,
            context=self.context,
            probe_seconds=self.serving.probe_seconds,
            on_change=self._notify,
            anonymiser=Anonymiser(suppression) if suppression is not None else None,
        )
        follower.start()
        return follower

    def _wait_until_caught_up(self, follower: TopicFollower, old: TopicFollower | None) -> None:
        """Wait for the follower to reach the end of the topics or the old follower's offsets."""
        started = time.monotonic()
        while not follower.caught_up.wait(CATCH_UP_POLL_SECONDS):
            timed_out = time.monotonic() - started > self.serving.start_seconds
            # an unreachable broker must not keep a replica from answering from the snapshot alone
            if self._stopping.is_set() or follower.error is not None or (timed_out and old is None):
                return
            if old is not None and follower.has(old.offsets):
                return


def _changed_pairs(old: TopicFollower, new: TopicFollower) -> set[Pair]:
    before: dict[Pair, Any] = dict(old.stock)
    after = dict(new.stock)
    return {pair for pair in before.keys() | after.keys() if before.get(pair) != after.get(pair)}
