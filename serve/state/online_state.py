"""The online state of a replica: the line that answers, the change to a newer snapshot's, and who waits for what."""

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
from serve.state.lake_snapshot import StateError, newest_chain, open_base
from serve.state.stock import Pair
from serve.state.topic_follower import TopicFollower

logger = logging.getLogger("shopsphere.serve")


@dataclass(frozen=True, slots=True)
class Freshness:
    """What an answer is based on.

    as_of         unix time until which nothing is missing
    offsets       by 'topic:partition' the first offset that is not in it
    staleness_ms  how long ago `as_of` is
    """

    as_of: float
    offsets: Mapping[str, int]
    snapshots: Mapping[str, int]
    staleness_ms: int


@dataclass(eq=False)
class Subscriber:
    """Somebody who wants to hear which figures changed: only the newest of each are kept for a slow one."""

    loop: asyncio.AbstractEventLoop
    dirty: set[Pair] = field(default_factory=set)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, pairs: set[Pair]) -> None:
        """Called by any thread."""
        self.loop.call_soon_threadsafe(self._add, pairs)

    def _add(self, pairs: set[Pair]) -> None:
        self.dirty |= pairs
        self.woken.set()


class OnlineState:
    """Follows the topics from the newest snapshot, and changes to a newer one's line when that has come as far.

    on_line(line) is called, in the state's own thread, before a line begins to answer.
    """

    def __init__(
        self, settings: Settings, serving: ServeSettings, context: BusinessSettings, on_line: Callable[[TopicFollower], None]
    ) -> None:
        self.settings, self.serving, self.context = settings, serving, context
        self.error: str | None = None
        self.ready = threading.Event()
        self._line: TopicFollower | None = None
        self._erased: int | None = None
        self._on_line = on_line
        self._subscribers: set[Subscriber] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        """Begin; `ready` is set when there is something to answer with."""
        self._thread.start()

    def stop(self) -> None:
        """End all threads."""
        self._stopping.set()
        self._thread.join(timeout=30)
        if self._line is not None:
            self._line.stop()

    @property
    def alive(self) -> bool:
        """Whether newer snapshots are looked for; before the start too."""
        return self._thread.ident is None or self._thread.is_alive()

    @property
    def line(self) -> TopicFollower:
        """The line that answers. Raises StateError while there is none."""
        if self._line is None:
            raise StateError(self.error or "The state is being read.")
        return self._line

    def freshness(self, line: TopicFollower) -> Freshness:
        """What an answer from this line is based on, now."""
        fresh = line.fresh_at
        return Freshness(fresh, dict(line.offsets), line.base.snapshots, max(0, round((time.time() - fresh) * 1000)))

    async def reached(self, offsets: Mapping[str, int]) -> bool:
        """Wait, not for ever, until everything up to and with these offsets is in the state."""
        wanted = {name: offset + 1 for name, offset in offsets.items()}
        until = time.monotonic() + self.serving.wait_seconds
        while not self.line.has(wanted):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.01)
        return True

    def subscribe(self) -> Subscriber:
        """Hear of changes from now on; to be called in the event loop."""
        subscriber = Subscriber(asyncio.get_running_loop())
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Hear no more."""
        self._subscribers.discard(subscriber)

    def _tell(self, line: TopicFollower, pairs: set[Pair]) -> None:
        if line is self._line and pairs:
            for subscriber in tuple(self._subscribers):
                subscriber.tell(pairs)

    def _run(self) -> None:
        lake = Lake(self.settings)
        while not self._stopping.is_set():
            try:
                self._look(lake)
            except ShopSphereError as error:
                self._fail(str(error))
            except (Exception, PanicException) as error:  # a panic of polars is no Exception
                logger.exception("reading the snapshot failed")
                self._fail(f"The snapshot cannot be read ({type(error).__name__}). See the log.")
            self._stopping.wait(self.serving.refresh_seconds)

    def _fail(self, why: str) -> None:
        if why != self.error:
            logger.error("%s", why)
        self.error = why

    def _look(self, lake: Lake) -> None:
        """Take up a newer snapshot; also the same one again, if its line ended or somebody was erased."""
        chain, old, erased = newest_chain(lake), self._line, newest_erasure(lake)
        if old is not None and old.error is None and chain.snapshots == old.base.snapshots and erased == self._erased:
            return
        suppression = load_suppression(lake)
        anonymiser = Anonymiser(suppression) if suppression is not None else None
        line = TopicFollower(
            open_base(chain), self.settings.kafka, self.context, self.serving.probe_seconds, self._tell, anonymiser
        )
        line.start()
        began = time.monotonic()
        while not line.caught_up.wait(0.05):
            waited = time.monotonic() - began > self.serving.start_seconds
            # a broker that is away must not keep a replica from answering with what there is
            if self._stopping.is_set() or line.error is not None or (waited and old is None):
                break
            if old is not None and line.has(old.offsets):
                break
        if line.error is not None or self._stopping.is_set():
            line.stop()
            if line.error is not None:
                raise line.error
            return
        self._on_line(line)
        self._line, self._erased, self.error = line, erased, None
        self.ready.set()
        if old is not None:
            self._tell(line, _differences(old, line))
            old.stop()


def _differences(old: TopicFollower, new: TopicFollower) -> set[Pair]:
    before: dict[Pair, Any] = dict(old.stock)
    now = dict(new.stock)
    return {pair for pair in before.keys() | now.keys() if before.get(pair) != now.get(pair)}
