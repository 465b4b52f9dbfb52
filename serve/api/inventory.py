"""Stock over HTTP: of a product, of many, what is low, what changes."""

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
from serve.http.edges import ApiRequest, Endpoint, Gate, Parameter, answer
from serve.http.problems import Problem, Wrong, busy
from serve.state.lake_snapshot import StateError
from serve.state.online_state import OnlineState
from serve.state.stock import Pair, StockFigures
from serve.state.topic_follower import TopicFollower

MOST = 100
"""Products, and stores, of a look-up."""
MOST_LISTED = 1_000
ENCODED_BYTES = 64 << 20
"""Of levels that are kept as JSON."""
HEARTBEAT_SECONDS = 15.0

Id = Annotated[str, Meta(min_length=1, max_length=200)]


class Level(msgspec.Struct, frozen=True):
    """A product in a store. Units."""

    product_id: str
    store_id: str
    on_hand: Annotated[int, Meta(description="Units in the store; negative when more left than ever came.")]
    reserved: Annotated[int, Meta(description="Units promised to customers.")]
    committed: Annotated[None, Meta(description="Always null: the sources do not tell it apart from `reserved`.")]
    incoming: Annotated[int, Meta(description="Units announced and not received.")]
    safety_stock: Annotated[int, Meta(description="Units that are not to be promised.")]
    available_to_promise: Annotated[int, Meta(description="on_hand - reserved - safety_stock.")]
    low_stock: Annotated[
        bool | None,
        Meta(
            description="Nothing left to promise, or less than sells in `low_stock_days` at the snapshot's rate of sale; "
            "null with ?as_of=."
        ),
    ]
    last_event_at: Annotated[datetime, Meta(description="The last stock event.")]


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer is based on."""

    as_of: Annotated[datetime, Meta(description="The answer holds for this moment: nothing that was sent before is missing.")]
    source_offset: Annotated[
        dict[str, int],
        Meta(description="By 'topic:partition' the last offset that is in the answer; -1: none. Give it back as ?min_offset=."),
    ]
    staleness_ms: Annotated[int, Meta(description="How long ago `as_of` is.", ge=0)]
    snapshots: Annotated[dict[str, int], Meta(description="The Iceberg snapshots that the state began with.")]


class ProductStock(Basis, frozen=True, kw_only=True):
    """A product in all its stores, or in the one asked for."""

    product_id: str
    stores: list[Level]
    at: Annotated[datetime | None, Meta(description="The moment asked for with ?as_of=; null: now.")] = None


class Levels(Basis, frozen=True, kw_only=True):
    """Levels of several products and stores."""

    levels: list[Level]
    unknown: Annotated[list[str], Meta(description="Products asked for that no stock event names in these stores.")]


class LowStock(Basis, frozen=True, kw_only=True):
    """What is low, least to promise first."""

    levels: list[Level]
    total: Annotated[int, Meta(description="How many are low in all; `levels` has at most ?limit= of them.")]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look up."""

    product_ids: Annotated[list[Id], Meta(min_length=1, max_length=MOST)]
    store_ids: (
        Annotated[list[Id], Meta(min_length=1, max_length=MOST, description="Only in these stores; absent: in all.")] | None
    ) = None


def read_offsets(text: str) -> dict[str, int]:
    """'events:0:17,events:1:4' -> {'events:0': 17, 'events:1': 4}."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, offset = part.rpartition(":")
        topic, _, partition = name.rpartition(":")
        if not (topic and ":" not in topic and _is_number(partition) and len(partition) < 10 and _is_number(offset)):
            raise ValueError("expected topic:partition:offset, several with commas between")
        found[name] = max(int(offset), found.get(name, 0))
    return found


def read_moment(text: str) -> datetime:
    """An ISO 8601 moment; without an offset UTC."""
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("expected an ISO 8601 moment, such as 2026-01-31T12:00:00Z") from None
    return moment


def read_id(text: str) -> str:
    """An id."""
    if not 1 <= len(text) <= 200:
        raise ValueError("expected 1 to 200 characters")
    return text


def read_limit(most: int, text: str) -> int:
    """A whole number from 1 to `most`."""
    if not (_is_number(text) and 1 <= int(text) <= most):
        raise ValueError(f"expected a whole number from 1 to {most}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


MIN_OFFSET = Parameter(
    "min_offset",
    "Wait until the state contains this offset: topic:partition:offset, several with commas between.",
    read_offsets,
    {"type": "string", "pattern": r"^[^:,]+:[0-9]{1,9}:[0-9]{1,18}(,[^:,]+:[0-9]{1,9}:[0-9]{1,18})*$"},
)
ID = {"type": "string", "minLength": 1, "maxLength": 200}
STORE = Parameter("store_id", "Only this store.", read_id, ID)
PRODUCT = Parameter("product_id", "Only this product.", read_id, ID)
LIMIT = Parameter(
    "limit",
    f"How many at most: 1 to {MOST_LISTED}; 100 when absent.",
    lambda text: read_limit(MOST_LISTED, text),
    {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 100},
)
AS_OF = Parameter(
    "as_of",
    "Stock at this moment, with all that is known now of what happened until then (ISO 8601; without an offset UTC).",
    read_moment,
    {"type": "string", "format": "date-time"},
)


class Encoded(NamedTuple):
    """A product's levels in all its stores as JSON, and the figures that they were made from."""

    figures: tuple[StockFigures, ...]
    levels: msgspec.Raw


class Inventory:
    """The answers about stock."""

    def __init__(self, state: OnlineState, gate: Gate) -> None:
        self.state, self.gate = state, gate
        self.days = state.context.low_stock_days
        self._encoded: dict[str, Encoded] = {}
        self._encoded_bytes = 0

    async def product(self, asked: ApiRequest) -> Response:
        """GET /v1/inventory/{product_id}"""
        product, query = asked.path["product_id"], asked.query
        if "store_id" in query or "as_of" in query:
            return answer(await self.stock_of(product, asked))
        line = await self.line(asked)
        basis, levels = self.basis(line), self._levels_encoded(line, product)
        if levels is None:
            raise Problem(404, "No stock event names this product.")
        return answer(ProductStock(product_id=product, stores=levels, **basis))  # type: ignore[arg-type]

    async def stock_of(self, product: str, asked: ApiRequest) -> ProductStock:
        """A product's levels, as the query asks. Raises Problem 404, 429, 503."""
        line, store = await self.line(asked), asked.query.get("store_id")
        basis = self.basis(line)
        if moment := asked.query.get("as_of"):
            if moment > datetime.now(UTC):
                raise Problem(404, "as_of: lies in the future", errors=(Wrong("as_of", "lies in the future"),))
            every = await self.gate.run(self._levels_at, line, product, moment)
            levels = [level for level in every if store in (None, level.store_id)]
        else:
            stores = sorted(line.stock.by_product.get(product, {}).items())
            levels = [self._level((name, product), one) for name, one in stores if store in (None, name)]
        if not levels:
            raise Problem(404, "No stock event names this product" + (" in this store." if store else "."))
        return ProductStock(product_id=product, stores=levels, at=asked.query.get("as_of"), **basis)

    async def lookup(self, asked: ApiRequest) -> Response:
        """POST /v1/inventory/lookup"""
        line, wanted = await self.line(asked), asked.body
        basis = self.basis(line)
        levels, unknown = [], []
        for product in dict.fromkeys(wanted.product_ids):
            stores = line.stock.by_product.get(product, {})
            names = sorted(stores) if wanted.store_ids is None else dict.fromkeys(wanted.store_ids)
            found = [self._level((name, product), one) for name in names if (one := stores.get(name)) is not None]
            levels += found
            if not found:
                unknown.append(product)
        return answer(Levels(levels=levels, unknown=unknown, **basis))

    async def low_stock(self, asked: ApiRequest) -> Response:
        """GET /v1/inventory/low-stock"""
        return answer(await self.low(asked))

    async def low(self, asked: ApiRequest) -> LowStock:
        """What is low, as the query asks. Raises Problem 429, 503."""
        line = await self.line(asked)
        basis, store, limit = self.basis(line), asked.query.get("store_id"), asked.query.get("limit", 100)
        found = await self.gate.run(self._low, line, store)
        levels = [self._level(pair, one) for pair, one in found[:limit]]
        return LowStock(levels=levels, total=len(found), **basis)

    async def stream(self, asked: ApiRequest) -> Response:
        """GET /v1/inventory/stream"""
        await self.line(asked)
        events = self._events(asked.query.get("product_id"), asked.query.get("store_id"))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def line(self, asked: ApiRequest) -> TopicFollower:
        """The line that answers, once it has what the request asks for. Raises Problem 503."""
        try:
            if (offsets := asked.query.get("min_offset")) is not None:
                known = self.state.line.offsets
                if unknown := [name for name in offsets if name not in known]:
                    detail = f"no partition {unknown[0][:100]} is followed here"
                    raise Problem(404, f"min_offset: {detail}", errors=(Wrong("min_offset", detail),))
                if not await self.state.reached(offsets):
                    raise busy(503, f"The state has not come so far within {self.state.serving.wait_seconds:g} s.")
            return self.state.line
        except StateError as error:
            raise busy(503, str(error), 5) from None

    def basis(self, line: TopicFollower) -> dict[str, Any]:
        """What an answer from this line is based on. To be asked before the levels: what comes between is in them, not said."""
        now = self.state.freshness(line)
        return {
            "as_of": datetime.fromtimestamp(now.as_of, UTC),
            "source_offset": {name: offset - 1 for name, offset in now.offsets.items()},
            "staleness_ms": now.staleness_ms,
            "snapshots": now.snapshots,
        }

    def _levels_encoded(self, line: TopicFollower, product: str) -> msgspec.Raw | None:
        """A product's levels, encoded again only when one of its figures is another; None where no event ever was."""
        stores = line.stock.by_product.get(product)
        if not stores:
            return None
        # figures before what is made of them: those that change meanwhile are other ones at the next look
        figures = tuple(stores.values())
        known = self._encoded.get(product)
        if known is None or len(known.figures) != len(figures) or not all(map(operator.is_, known.figures, figures)):
            levels = [self._level((name, product), one) for name, one in sorted(stores.items())]
            encoded = msgspec.json.encode(levels)
            self._encoded_bytes += len(encoded) - (len(known.levels) if known is not None else 0)
            if self._encoded_bytes > ENCODED_BYTES:
                self._encoded, self._encoded_bytes = {}, len(encoded)
            known = self._encoded[product] = Encoded(figures, msgspec.Raw(encoded))
        return known.levels

    def _level(self, pair: Pair, one: StockFigures) -> Level:
        store, product = pair
        return Level(
            product,
            store,
            one.on_hand,
            one.reserved,
            None,
            one.incoming,
            one.safety_stock,
            one.available_to_promise,
            one.is_low(self.days),
            one.last_event_at,
        )

    def _levels_at(self, line: TopicFollower, product: str, moment: datetime) -> list[Level]:
        names = ("store_id", "on_hand", "reserved", "incoming", "safety_stock", "available_to_promise", "occurred_at")
        last = as_of(line.stock.history(product=product), moment).sort("store_id").select(names)
        return [Level(product, s, on, res, None, inc, safe, atp, None, at) for s, on, res, inc, safe, atp, at in last.iter_rows()]

    def _low(self, line: TopicFollower, store: str | None) -> list[tuple[Pair, StockFigures]]:
        every: Iterable[tuple[Pair, StockFigures]] = line.stock
        low = [(pair, one) for pair, one in every if (store is None or pair[0] == store) and one.is_low(self.days)]
        return sorted(low, key=lambda item: (item[1].available_to_promise, item[0]))

    async def _events(self, product: str | None, store: str | None) -> AsyncIterator[bytes]:
        subscriber = self.state.subscribe()
        try:
            yield b": stock levels follow as they change\n\n"
            while True:
                try:
                    await asyncio.wait_for(subscriber.woken.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                subscriber.woken.clear()
                pairs, subscriber.dirty = subscriber.dirty, set()
                line = self.state.line
                told, basis = [], self.basis(line)
                for pair in sorted(pairs):
                    if (product is None or pair[1] == product) and (store is None or pair[0] == store):
                        one = line.stock.of(*pair)
                        level = self._level(pair, one) if one else {"product_id": pair[1], "store_id": pair[0], "on_hand": None}
                        told.append(level)
                for level in told:
                    data = msgspec.json.encode({"level": level, **basis})
                    yield b"event: stock\ndata: " + data + b"\n\n"
        finally:
            self.state.unsubscribe(subscriber)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What can be asked."""
        moment = datetime(2026, 1, 31, 12, tzinfo=UTC)
        level = Level("P0001", "ST-JKT-1", 12, 3, None, 24, 2, 7, False, moment)
        basis: dict[str, Any] = {
            "as_of": moment,
            "source_offset": {"events:0": 1041},
            "staleness_ms": 130,
            "snapshots": {"gold.inventory_health": 4051},
        }
        return (
            Endpoint(
                "GET",
                "/v1/inventory/low-stock",
                "low_stock",
                "Products that are low, least to promise first.",
                self.low_stock,
                LowStock,
                "inventory",
                (STORE, LIMIT, MIN_OFFSET),
                answer_example=LowStock(levels=[level], total=1, **basis),
                statuses=(404, 429, 503),
            ),
            Endpoint(
                "GET",
                "/v1/inventory/stream",
                "stock_stream",
                "Levels as they change, as server-sent events. A slow reader misses levels that were overtaken, never the last.",
                self.stream,
                Level,
                "inventory",
                (PRODUCT, STORE),
                media_type="text/event-stream",
                statuses=(503,),
                browser=True,
            ),
            Endpoint(
                "POST",
                "/v1/inventory/lookup",
                "stock_lookup",
                f"Levels of up to {MOST} products in up to {MOST} stores.",
                self.lookup,
                Levels,
                "inventory",
                (MIN_OFFSET,),
                body=Wanted,
                limit=self.state.serving.body_bytes,
                body_example=Wanted(["P0001", "P0002"], ["ST-JKT-1"]),
                answer_example=Levels(levels=[level], unknown=["P0002"], **basis),
                statuses=(404, 503),
            ),
            Endpoint(
                "GET",
                "/v1/inventory/{product_id}",
                "product_stock",
                "A product in all its stores.",
                self.product,
                ProductStock,
                "inventory",
                (STORE, AS_OF, MIN_OFFSET),
                {"product_id": "P0001"},
                answer_example=ProductStock(product_id="P0001", stores=[level], **basis),
                statuses=(404, 429, 503),
            ),
        )
