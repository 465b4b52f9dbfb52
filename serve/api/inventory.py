"""Inventory over HTTP: stock of a product, of many products, low stock, and a stream of changes."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from starlette.responses import Response, StreamingResponse

from pipelines.silver.inventory_snapshots import as_of
from serve.api.parameters import ID_SCHEMA, is_number, limit_parameter, read_id, read_moment
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest, Endpoint, Parameter, json_response
from serve.http.problems import Problem, bad_field, retry_later
from serve.state.lake_snapshot import StateError
from serve.state.online_state import OnlineState, Subscriber
from serve.state.stock import Pair, StockFigures
from serve.state.topic_follower import TopicFollower

MAX_LOOKUP = 100
"""Maximum number of products, and of stores, in a look-up."""
MAX_LOW_STOCK = 1_000
MAX_ENCODED_BYTES = 64 << 20
"""Maximum size of the levels cached as JSON."""
HEARTBEAT_SECONDS = 15.0

Id = Annotated[str, Meta(min_length=1, max_length=200)]


class Level(msgspec.Struct, frozen=True):
    """The stock of a product in a store, in units."""

    product_id: str
    store_id: str
    on_hand: Annotated[int, Meta(description="Units in the store; negative when more were issued than received.")]
    reserved: Annotated[int, Meta(description="Units reserved for customers.")]
    committed: Annotated[None, Meta(description="Always null: the sources do not distinguish it from `reserved`.")]
    incoming: Annotated[int, Meta(description="Units announced but not yet received.")]
    safety_stock: Annotated[int, Meta(description="Units that must not be promised.")]
    available_to_promise: Annotated[int, Meta(description="on_hand - reserved - safety_stock.")]
    low_stock: Annotated[
        bool | None,
        Meta(
            description="Nothing available to promise, or less than sells in `low_stock_days` at the snapshot's sales rate; "
            "null with ?as_of=."
        ),
    ]
    last_event_at: Annotated[datetime, Meta(description="Time of the last stock event.")]


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """The data behind an answer."""

    as_of: Annotated[datetime, Meta(description="The answer contains everything that was sent before this moment.")]
    source_offset: Annotated[
        dict[str, int],
        Meta(description="Last offset in the answer by 'topic:partition', -1 for none. Accepted by ?min_offset=."),
    ]
    staleness_ms: Annotated[int, Meta(description="Age of `as_of`.", ge=0)]
    snapshots: Annotated[dict[str, int], Meta(description="The Iceberg snapshots from which the state was built.")]


class ProductStock(Basis, frozen=True, kw_only=True):
    """The stock of a product in all stores, or in the requested one."""

    product_id: str
    stores: list[Level]
    at: Annotated[datetime | None, Meta(description="The moment requested with ?as_of=; null: now.")] = None


class Levels(Basis, frozen=True, kw_only=True):
    """The stock of several products and stores."""

    levels: list[Level]
    unknown: Annotated[list[str], Meta(description="Requested products without stock events in these stores.")]


class LowStock(Basis, frozen=True, kw_only=True):
    """Products with low stock, lowest available to promise first."""

    levels: list[Level]
    total: Annotated[int, Meta(description="Total number with low stock; `levels` has at most ?limit= of them.")]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The products and stores to look up."""

    product_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_LOOKUP)]
    store_ids: (
        Annotated[list[Id], Meta(min_length=1, max_length=MAX_LOOKUP, description="Only these stores; default: all.")] | None
    ) = None


def read_offsets(text: str) -> dict[str, int]:
    """Return offsets by 'topic:partition', from text such as 'events:0:17,events:1:4'. Raises ValueError."""
    offsets: dict[str, int] = {}
    for part in text.split(","):
        name, _, offset = part.rpartition(":")
        topic, _, partition = name.rpartition(":")
        if not (topic and ":" not in topic and is_number(partition) and len(partition) < 10 and is_number(offset)):
            raise ValueError("expected topic:partition:offset, or several separated by commas")
        offsets[name] = max(int(offset), offsets.get(name, 0))
    return offsets


MIN_OFFSET = Parameter(
    "min_offset",
    "Wait until the state contains this offset: topic:partition:offset, or several separated by commas.",
    read_offsets,
    {"type": "string", "pattern": r"^[^:,]+:[0-9]{1,9}:[0-9]{1,18}(,[^:,]+:[0-9]{1,9}:[0-9]{1,18})*$"},
)
STORE = Parameter("store_id", "Only this store.", read_id, ID_SCHEMA)
PRODUCT = Parameter("product_id", "Only this product.", read_id, ID_SCHEMA)
LIMIT = limit_parameter(MAX_LOW_STOCK, "Maximum number of products and stores")
AS_OF = Parameter(
    "as_of",
    "Stock at this moment (ISO 8601, UTC by default), from all events known now that occurred until then.",
    read_moment,
    {"type": "string", "format": "date-time"},
)

EXAMPLE_MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)
EXAMPLE_LEVEL = Level("P0001", "ST-JKT-1", 12, 3, None, 24, 2, 7, False, EXAMPLE_MOMENT)
EXAMPLE_BASIS: dict[str, Any] = {
    "as_of": EXAMPLE_MOMENT,
    "source_offset": {"events:0": 1041},
    "staleness_ms": 130,
    "snapshots": {"gold.inventory_health": 4051},
}


class EncodedLevels(NamedTuple):
    """A product's levels in all stores as JSON, and the figures that they were encoded from."""

    figures: tuple[StockFigures, ...]
    levels: msgspec.Raw


class Inventory:
    """The inventory endpoints."""

    def __init__(self, state: OnlineState, pool: BoundedThreadPool) -> None:
        self.state, self.pool = state, pool
        self.low_stock_days = state.context.low_stock_days
        self._encoded: dict[str, EncodedLevels] = {}
        self._encoded_bytes = 0

    async def product(self, request: ApiRequest) -> Response:
        """Answer GET /v1/inventory/{product_id}."""
        product, query = request.path["product_id"], request.query
        if "store_id" in query or "as_of" in query:
            return json_response(await self.stock_of(product, request))
        follower = await self.follower(request)
        basis, levels = self.basis(follower), self._encoded_levels(follower, product)
        if levels is None:
            raise _no_events()
        return json_response(ProductStock(product_id=product, stores=levels, **basis))  # type: ignore[arg-type]

    async def stock_of(self, product: str, request: ApiRequest) -> ProductStock:
        """Return a product's levels with the query's filters. Raises Problem 404, 429, 503."""
        follower, store = await self.follower(request), request.query.get("store_id")
        basis = self.basis(follower)
        if moment := request.query.get("as_of"):
            if moment > datetime.now(UTC):
                raise bad_field("as_of", "is in the future", 404)
            every = await self.pool.run(self._levels_at, follower, product, moment)
            levels = [level for level in every if store in (None, level.store_id)]
        else:
            stores = sorted(follower.stock.by_product.get(product, {}).items())
            levels = [self._level((name, product), figures) for name, figures in stores if store in (None, name)]
        if not levels:
            raise _no_events(store)
        return ProductStock(product_id=product, stores=levels, at=request.query.get("as_of"), **basis)

    async def lookup(self, request: ApiRequest) -> Response:
        """Answer POST /v1/inventory/lookup."""
        follower, wanted = await self.follower(request), request.body
        basis = self.basis(follower)
        levels, unknown = [], []
        for product in dict.fromkeys(wanted.product_ids):
            stores = follower.stock.by_product.get(product, {})
            names = sorted(stores) if wanted.store_ids is None else dict.fromkeys(wanted.store_ids)
            found = [self._level((name, product), figures) for name in names if (figures := stores.get(name)) is not None]
            levels += found
            if not found:
                unknown.append(product)
        return json_response(Levels(levels=levels, unknown=unknown, **basis))

    async def low_stock(self, request: ApiRequest) -> Response:
        """Answer GET /v1/inventory/low-stock."""
        return json_response(await self.low(request))

    async def low(self, request: ApiRequest) -> LowStock:
        """Return the products with low stock. Raises Problem 429, 503."""
        follower = await self.follower(request)
        basis, store, limit = self.basis(follower), request.query.get("store_id"), request.query.get("limit", 100)
        found = await self.pool.run(self._low, follower, store)
        levels = [self._level(pair, figures) for pair, figures in found[:limit]]
        return LowStock(levels=levels, total=len(found), **basis)

    async def stream(self, request: ApiRequest) -> Response:
        """Answer GET /v1/inventory/stream."""
        await self.follower(request)
        events = self._events(request.query.get("product_id"), request.query.get("store_id"))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def follower(self, request: ApiRequest) -> TopicFollower:
        """Return the follower to answer from, once it has reached ?min_offset=. Raises Problem 404, 503."""
        try:
            if (offsets := request.query.get("min_offset")) is not None:
                followed = self.state.follower.offsets
                if unknown := [name for name in offsets if name not in followed]:
                    raise bad_field("min_offset", f"partition {unknown[0][:100]} is not followed", 404)
                if not await self.state.wait_for(offsets):
                    raise retry_later(503, f"The state did not reach min_offset within {self.state.serving.wait_seconds:g} s.")
            return self.state.follower
        except StateError as error:
            raise retry_later(503, str(error), 5) from None

    def basis(self, follower: TopicFollower) -> dict[str, Any]:
        """Return the fields of Basis. Call it before reading levels, so that an answer never claims more than it contains."""
        now = self.state.freshness(follower)
        return {
            "as_of": datetime.fromtimestamp(now.as_of, UTC),
            "source_offset": {name: offset - 1 for name, offset in now.offsets.items()},
            "staleness_ms": now.staleness_ms,
            "snapshots": now.snapshots,
        }

    def _encoded_levels(self, follower: TopicFollower, product: str) -> msgspec.Raw | None:
        """Return a product's levels as JSON, cached while its figures are unchanged; None without any event."""
        stores = follower.stock.by_product.get(product)
        if not stores:
            return None
        # read the figures before encoding: if one changes meanwhile, the next comparison detects it
        figures = tuple(stores.values())
        entry = self._encoded.get(product)
        if entry is None or len(entry.figures) != len(figures) or not all(map(operator.is_, entry.figures, figures)):
            levels = [self._level((name, product), one) for name, one in sorted(stores.items())]
            encoded = msgspec.json.encode(levels)
            self._encoded_bytes += len(encoded) - (len(entry.levels) if entry is not None else 0)
            if self._encoded_bytes > MAX_ENCODED_BYTES:
                self._encoded, self._encoded_bytes = {}, len(encoded)
            entry = self._encoded[product] = EncodedLevels(figures, msgspec.Raw(encoded))
        return entry.levels

    def _level(self, pair: Pair, figures: StockFigures) -> Level:
        store, product = pair
        return Level(
            product,
            store,
            figures.on_hand,
            figures.reserved,
            None,
            figures.incoming,
            figures.safety_stock,
            figures.available_to_promise,
            figures.is_low(self.low_stock_days),
            figures.last_event_at,
        )

    def _levels_at(self, follower: TopicFollower, product: str, moment: datetime) -> list[Level]:
        names = ("store_id", "on_hand", "reserved", "incoming", "safety_stock", "available_to_promise", "occurred_at")
        last = as_of(follower.stock.history(product=product), moment).sort("store_id").select(names)
        return [Level(product, s, on, res, None, inc, safe, atp, None, at) for s, on, res, inc, safe, atp, at in last.iter_rows()]

    def _low(self, follower: TopicFollower, store: str | None) -> list[tuple[Pair, StockFigures]]:
        every: Iterable[tuple[Pair, StockFigures]] = follower.stock
        low = [(pair, one) for pair, one in every if (store is None or pair[0] == store) and one.is_low(self.low_stock_days)]
        return sorted(low, key=lambda item: (item[1].available_to_promise, item[0]))

    async def _events(self, product: str | None, store: str | None) -> AsyncIterator[bytes]:
        subscriber = self.state.subscribe()
        try:
            yield b": stock levels follow as they change\n\n"
            while True:
                try:
                    await asyncio.wait_for(subscriber.woken.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b": heartbeat\n\n"
                    continue
                basis, levels = self._changed_levels(subscriber, product, store)
                for level in levels:
                    data = msgspec.json.encode({"level": level, **basis})
                    yield b"event: stock\ndata: " + data + b"\n\n"
        finally:
            self.state.unsubscribe(subscriber)

    def _changed_levels(
        self, subscriber: Subscriber, product: str | None, store: str | None
    ) -> tuple[dict[str, Any], list[Level | dict[str, Any]]]:
        """Take a subscriber's changes. Return the basis and the matching levels; on_hand None: no events are left."""
        subscriber.woken.clear()
        pairs, subscriber.changed = subscriber.changed, set()
        follower = self.state.follower
        levels: list[Level | dict[str, Any]] = []
        basis = self.basis(follower)
        for pair in sorted(pairs):
            if (product is None or pair[1] == product) and (store is None or pair[0] == store):
                figures = follower.stock.get(*pair)
                removed = {"product_id": pair[1], "store_id": pair[0], "on_hand": None}
                levels.append(self._level(pair, figures) if figures else removed)
        return basis, levels

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The inventory endpoints, most specific path first."""
        return (self._low_stock_endpoint, self._stream_endpoint, self._lookup_endpoint, self._product_endpoint)

    @property
    def _low_stock_endpoint(self) -> Endpoint:
        return Endpoint(
            method="GET",
            path="/v1/inventory/low-stock",
            name="low_stock",
            doc="Products with low stock, lowest available to promise first.",
            handler=self.low_stock,
            answer=LowStock,
            scope="inventory",
            parameters=(STORE, LIMIT, MIN_OFFSET),
            answer_example=LowStock(levels=[EXAMPLE_LEVEL], total=1, **EXAMPLE_BASIS),
            statuses=(404, 429, 503),
        )

    @property
    def _stream_endpoint(self) -> Endpoint:
        return Endpoint(
            method="GET",
            path="/v1/inventory/stream",
            name="stock_stream",
            doc="Changed levels as server-sent events. A slow client skips intermediate levels but always gets the latest.",
            handler=self.stream,
            answer=Level,
            scope="inventory",
            parameters=(PRODUCT, STORE),
            media_type="text/event-stream",
            statuses=(503,),
            cookie_auth=True,
        )

    @property
    def _lookup_endpoint(self) -> Endpoint:
        return Endpoint(
            method="POST",
            path="/v1/inventory/lookup",
            name="stock_lookup",
            doc=f"Levels of up to {MAX_LOOKUP} products in up to {MAX_LOOKUP} stores.",
            handler=self.lookup,
            answer=Levels,
            scope="inventory",
            parameters=(MIN_OFFSET,),
            body=Wanted,
            body_limit=self.state.serving.body_bytes,
            body_example=Wanted(["P0001", "P0002"], ["ST-JKT-1"]),
            answer_example=Levels(levels=[EXAMPLE_LEVEL], unknown=["P0002"], **EXAMPLE_BASIS),
            statuses=(404, 503),
        )

    @property
    def _product_endpoint(self) -> Endpoint:
        return Endpoint(
            method="GET",
            path="/v1/inventory/{product_id}",
            name="product_stock",
            doc="Levels of a product in all stores.",
            handler=self.product,
            answer=ProductStock,
            scope="inventory",
            parameters=(STORE, AS_OF, MIN_OFFSET),
            path_example={"product_id": "P0001"},
            answer_example=ProductStock(product_id="P0001", stores=[EXAMPLE_LEVEL], **EXAMPLE_BASIS),
            statuses=(404, 429, 503),
        )


def _no_events(store: str | None = None) -> Problem:
    return Problem(404, "There are no stock events for this product" + (" in this store." if store else "."))
