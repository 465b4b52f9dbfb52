"""Inventory over HTTP on a real lakehouse and a real broker: consistency, freshness, validation and access."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from starlette.testclient import TestClient
from support.engines import make_engine
from support.serve_world import T0, figures_of, ingest

from app.project import PROJECT
from lakehouse.engine.engine import Engine
from pipelines.bronze.tables import EVENTS
from pipelines.settings import KafkaSettings, Settings, business_settings
from pipelines.silver.inventory_snapshots import INVENTORY_SNAPSHOTS
from pipelines.sources.kafka.source import KafkaSource
from serve.application import Application
from serve.http.keys import Keys
from serve.settings import ServeSettings
from serve.state.online_state import OnlineState
from serve.state.topic_follower import TopicFollower

TABLES = {EVENTS.name: EVENTS}


@dataclass
class InventoryWorld:
    """A lakehouse, its topic, and an application that serves both."""

    engine: Engine
    settings: Settings
    topic: str
    application: Application
    client: TestClient
    producer: Producer
    sent: int = field(default=0)

    def send(self, kind: str, product: str = "P1", store: str = "S1", *, key: str = "", **metadata: Any) -> str:
        """Produce a stock event and return its 'topic:partition:offset'."""
        self.sent += 1
        event = {
            "event_id": key or f"{self.topic}-{self.sent}",
            "event_type": kind,
            "timestamp": datetime.now(UTC).isoformat(),
            "metadata": {"store_id": store, "product_id": product, "quantity": 1} | metadata,
        }
        delivered: list[str] = []
        self.producer.produce(
            self.topic,
            json.dumps(event).encode(),
            key=f"{store}|{product}".encode(),
            on_delivery=lambda error, one: delivered.append(f"{one.topic()}:{one.partition()}:{one.offset()}"),
        )
        self.producer.flush(10)
        return delivered[0]

    def run(self) -> None:
        """Ingest the topic and refresh the steps, like `run`."""
        self.engine.ingest(KafkaSource(self.settings.kafka), TABLES)
        ingest(self.engine, [])

    def get(self, path: str, **query: Any) -> Any:
        response = self.client.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def shop(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InventoryWorld]:
    home: Path = tmp_path_factory.mktemp("serving")
    topic = f"stock{time.time_ns():x}"
    admin = AdminClient({"bootstrap.servers": servers.kafka_bootstrap})
    admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(10)
    engine = make_engine(home)
    kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap, topics=(topic,))  # type: ignore[call-arg]
    settings = Settings(home=home, kafka=kafka)
    serving = ServeSettings(refresh_seconds=0.3, probe_seconds=0.05, wait_seconds=1.0)
    application = Application(settings, serving, business_settings(settings), Keys(), project=PROJECT)
    producer = Producer({"bootstrap.servers": servers.kafka_bootstrap, "linger.ms": 0})
    shop = InventoryWorld(engine, settings, topic, application, None, producer)  # type: ignore[arg-type]
    for number in range(40):
        shop.send("stock_received", f"P{number % 4}", f"S{number % 3}", quantity=number + 1)
    shop.run()
    with TestClient(application.asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1") as client:
        shop.client = client
        assert application.state.ready.wait(30), application.state.error
        yield shop


def level(shop: InventoryWorld, product: str = "P1", store: str = "S1", **query: Any) -> Any:
    return shop.get(f"/v1/inventory/{product}", store_id=store, **query)["stores"][0]


def test_min_offset_returns_the_produced_event(shop: InventoryWorld) -> None:
    before = level(shop)
    at = shop.send("stock_sold", quantity=3)
    after = level(shop, min_offset=at)
    assert after["on_hand"] == before["on_hand"] - 3
    answer = shop.get("/v1/inventory/P1")
    name, _, offset = at.rpartition(":")
    assert answer["source_offset"][name] >= int(offset)
    offsets = ",".join(f"{name}:{offset}" for name, offset in answer["source_offset"].items() if offset >= 0)
    assert level(shop, min_offset=offsets) == after


def test_change_in_one_store_is_in_the_answer_for_all_stores(shop: InventoryWorld) -> None:
    for store in ("S0", "S2", "S9", "S0"):
        before = {one["store_id"]: one["on_hand"] for one in shop.get("/v1/inventory/P1")["stores"]}
        assert shop.get("/v1/inventory/P1")["stores"] == shop.get("/v1/inventory/P1")["stores"]
        at = shop.send("stock_received", store=store, quantity=2)
        levels = shop.get("/v1/inventory/P1", min_offset=at)["stores"]
        assert {one["store_id"]: one["on_hand"] for one in levels} == {**before, store: before.get(store, 0) + 2}
        body = {"product_ids": ["P1"]}
        assert levels == shop.client.post("/v1/inventory/lookup", json=body, params={"min_offset": at}).json()["levels"]


def test_json_cache_is_bounded(shop: InventoryWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, products = shop.application.inventory, [f"P{number}" for number in range(4)]
    answer = {product: shop.get(f"/v1/inventory/{product}")["stores"] for product in products}
    monkeypatch.setattr("serve.api.inventory.MAX_ENCODED_BYTES", 2 * max(len(one.levels) for one in inventory._encoded.values()))
    for _ in range(3):
        for product in products:
            shop.send("stock_received", product)
            at = shop.send("stock_sold", product)
            assert len(shop.get(f"/v1/inventory/{product}", min_offset=at)["stores"]) == len(answer[product])
            kept = sum(len(one.levels) for one in inventory._encoded.values())
            assert kept == inventory._encoded_bytes
            assert len(inventory._encoded) <= 2


@pytest.mark.parametrize("path", ["/v1/inventory/P2?as_of={now}", "/v1/inventory/low-stock", "/v1/inventory/P2?store_id=S2"])
def test_answer_claims_no_more_than_it_contains(shop: InventoryWorld, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that arrive while levels are read may be missing in them, so their offsets must not be in the answer."""
    inventory, at = shop.application.inventory, ""

    def send_during(inner: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal at
            found = inner(*arguments)
            if not at:
                at = shop.send("view_product", "P2")
                name, _, offset = at.rpartition(":")
                deadline = time.monotonic() + 10
                while shop.application.state.follower.offsets[name] <= int(offset):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            return found

        return run

    for name in ("_levels_at", "_low", "_level"):
        monkeypatch.setattr(inventory, name, send_during(getattr(inventory, name)))
    response = shop.client.get(path.format(now=datetime.now(UTC).isoformat()[:19]))
    name, _, offset = at.rpartition(":")
    assert response.json()["source_offset"][name] < int(offset)


def test_unreached_min_offset_times_out(shop: InventoryWorld) -> None:
    began = time.monotonic()
    response = shop.client.get("/v1/inventory/P1", params={"min_offset": f"{shop.topic}:0:999999"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert 0.9 < time.monotonic() - began < 5


def test_answer_states_its_freshness(shop: InventoryWorld) -> None:
    time.sleep(0.5)
    answer = shop.get("/v1/inventory/P1")
    assert 0 <= answer["staleness_ms"] < 2_000
    age = datetime.now(UTC) - datetime.fromisoformat(answer["as_of"])
    assert age.total_seconds() * 1000 >= answer["staleness_ms"]
    assert answer["snapshots"].keys() >= {"gold.inventory_health", EVENTS.name}


def test_levels_equal_silver_before_and_after_a_run(shop: InventoryWorld) -> None:
    for number in range(60):
        at = shop.send("stock_sold" if number % 3 else "stock_transferred", f"P{number % 5}", f"S{number % 3}", to_store_id="S9")
    shop.send("stock_reserved", key=f"{shop.topic}-1", quantity=9)
    at = shop.send("stock_reserved", "P0", "S0", quantity=2)
    level(shop, "P0", "S0", min_offset=at)
    online = all_levels(shop)
    shop.run()
    silver = shop.engine.lake.load(INVENTORY_SNAPSHOTS).read(INVENTORY_SNAPSHOTS.schema.names)
    assert online == figures_of(silver)
    old = shop.application.state.follower
    while shop.application.state.follower is old:
        time.sleep(0.05)
    assert shop.application.state.follower.stock.later.is_empty()
    assert all_levels(shop) == online


def all_levels(shop: InventoryWorld) -> dict[tuple[str, str], tuple[int, ...]]:
    names = ("on_hand", "reserved", "incoming", "safety_stock", "available_to_promise")
    products = [f"P{number}" for number in range(6)]
    answer = shop.client.post("/v1/inventory/lookup", json={"product_ids": products}).json()
    return {(one["store_id"], one["product_id"]): tuple(one[name] for name in names) for one in answer["levels"]}


def test_as_of_returns_past_levels(shop: InventoryWorld) -> None:
    before, moment = level(shop), datetime.now(UTC)
    level(shop, min_offset=shop.send("stock_sold", quantity=4))
    assert level(shop, as_of=moment.isoformat())["on_hand"] == before["on_hand"]
    assert shop.client.get("/v1/inventory/P1", params={"as_of": T0.isoformat()}).status_code == 404


def test_low_stock_is_listed_until_replenished(shop: InventoryWorld) -> None:
    level(shop, "P2", "S2", min_offset=shop.send("stock_counted", "P2", "S2", quantity=0))
    low = shop.get("/v1/inventory/low-stock", store_id="S2", limit=1000)
    assert ("P2", "S2") in {(one["product_id"], one["store_id"]) for one in low["levels"]}
    assert low["total"] == len(low["levels"])
    level(shop, "P2", "S2", min_offset=shop.send("stock_received", "P2", "S2", quantity=500))
    low = shop.get("/v1/inventory/low-stock", limit=1000)
    assert ("P2", "S2") not in {(one["product_id"], one["store_id"]) for one in low["levels"]}


def test_lookup_returns_levels_and_unknown_products(shop: InventoryWorld) -> None:
    body = {"product_ids": ["P0", "P0", "nothing"], "store_ids": ["S0", "S1", "nowhere"]}
    answer = shop.client.post("/v1/inventory/lookup", json=body).json()
    assert {(one["product_id"], one["store_id"]) for one in answer["levels"]} == {("P0", "S0"), ("P0", "S1")}
    assert answer["unknown"] == ["nothing"]


def test_stream_delivers_the_latest_change(shop: InventoryWorld) -> None:
    """Uses the generator behind the route, since the test client waits for the end of a response."""
    inventory, sold = shop.application.inventory, 5

    async def listen() -> dict[str, Any]:
        events = inventory._events("P1", None)
        assert (await anext(events)).startswith(b":")
        for _ in range(sold):
            at = await asyncio.to_thread(shop.send, "stock_sold")
        name, _, offset = at.rpartition(":")
        while True:
            answer = json.loads((await anext(events)).split(b"data: ")[1])
            if answer["source_offset"][name] >= int(offset):
                await events.aclose()  # type: ignore[attr-defined]
                return answer

    before = level(shop)
    answer = asyncio.run(listen())
    assert answer["level"] == level(shop)
    assert answer["level"]["on_hand"] == before["on_hand"] - sold
    assert not shop.application.state._subscribers


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("GET", "/v1/inventory/P1?as_of=yesterday", None, 400, "as_of"),
        ("GET", "/v1/inventory/P1?as_of=2999-01-01", None, 404, "as_of"),
        ("GET", "/v1/inventory/P1?min_offset=1", None, 400, "min_offset"),
        ("GET", "/v1/inventory/P1?min_offset=other:0:1", None, 404, "min_offset"),
        ("GET", "/v1/inventory/P1?store_id=S1&store_id=S2", None, 400, "store_id"),
        ("GET", "/v1/inventory/P1?stor=S1", None, 400, "query"),
        ("GET", "/v1/inventory/low-stock?limit=0", None, 400, "limit"),
        ("GET", "/v1/inventory/nothing", None, 404, None),
        ("GET", "/v1/inventory", None, 404, None),
        ("DELETE", "/v1/inventory/P1", None, 405, None),
        ("POST", "/v1/inventory/lookup", b"{", 400, "body"),
        ("POST", "/v1/inventory/lookup", b"\xff", 400, "body"),
        ("POST", "/v1/inventory/lookup", b"[]", 400, "body"),
        ("POST", "/v1/inventory/lookup", b"{}", 400, "product_ids"),
        ("POST", "/v1/inventory/lookup", b'{"product_ids": [1]}', 400, "product_ids[0]"),
        ("POST", "/v1/inventory/lookup", b'{"product_ids": ["P1"], "stores": []}', 400, "stores"),
        ("POST", "/v1/inventory/lookup", json.dumps({"product_ids": ["P"] * 101}).encode(), 400, "product_ids"),
        ("POST", "/v1/inventory/lookup", b" " * 70_000, 413, None),
    ],
)
def test_invalid_input_is_a_problem_that_names_the_field(
    shop: InventoryWorld, method: str, path: str, body: bytes | None, status: int, field: str | None
) -> None:
    response = shop.client.request(method, path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    answer = response.json()
    assert answer["status"] == status
    assert answer["detail"]
    assert [one["field"] for one in answer.get("errors", ())] == ([field] if field else [])


def test_keys_grant_only_their_scopes(shop: InventoryWorld, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    granted = Keys.read(file).add(file, "till", ("inventory",))
    denied = Keys.read(file).add(file, "desk", ("customers",))
    assert granted not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    application = Application(shop.settings, ServeSettings(keys_file=file), shop.engine.context, project=PROJECT)
    application.state = shop.application.state
    application.inventory.state = shop.application.state
    client = TestClient(application.asgi(), client=("203.0.113.9", 1), base_url="http://127.0.0.1")

    def status(key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return client.get("/v1/inventory/P1", headers=headers).status_code

    assert [status(key) for key in (granted, denied, "sk_guess", "", None)] == [200, 403, 401, 401, 401]
    assert client.get("/-/healthz").status_code == 200


def test_without_keys_remote_clients_are_rejected(shop: InventoryWorld) -> None:
    remote = TestClient(shop.application.asgi(), client=("203.0.113.9", 1), base_url="http://127.0.0.1")
    assert remote.get("/v1/inventory/P1").status_code == 403


def test_metrics_and_access_log_contain_no_path(shop: InventoryWorld) -> None:
    shop.client.get("/v1/inventory/secret-product-name")
    shop.application.log.flush()
    log = next((Path(shop.settings.home) / "logs").glob("access-*.jsonl")).read_text()
    assert '"route":"/v1/inventory/{product_id}","status":404' in log
    assert "secret-product-name" not in log
    metrics = shop.client.get("/-/metrics").text
    assert 'shopsphere_request_seconds_count{route="/v1/inventory/{product_id}",status="404"}' in metrics
    assert "secret-product-name" not in metrics


def test_openapi_lists_every_route_with_its_responses(shop: InventoryWorld) -> None:
    answer = shop.get("/openapi.json")
    assert set(answer["paths"]) == {one.path for one in shop.application.endpoints}
    lookup = answer["paths"]["/v1/inventory/lookup"]["post"]
    assert lookup["requestBody"]["content"]["application/json"]["example"]["product_ids"]
    assert {"200", "400", "401", "403", "413", "503"} <= lookup["responses"].keys()


def test_without_a_broker_the_snapshot_answers_with_its_age(shop: InventoryWorld) -> None:
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1", topics=(shop.topic,))  # type: ignore[call-arg]
    settings = Settings(home=shop.settings.home, kafka=kafka)
    serving = ServeSettings(start_seconds=0.5, refresh_seconds=60)
    followers: list[TopicFollower] = []
    state = OnlineState(settings, serving, shop.engine.context, followers.append)
    state.start()
    try:
        assert state.ready.wait(20), state.error
        assert len(state.follower.stock) > 0
        assert state.freshness(state.follower).as_of == state.follower.snapshot.committed_at.timestamp()  # type: ignore[union-attr]
    finally:
        state.stop()


def test_without_keys_other_host_names_are_rejected(shop: InventoryWorld) -> None:
    rejected = dict.fromkeys(("evil.example", "evil.example:8000", "[evil"), 403)
    for host, status in {**rejected, "localhost:8000": 200, "[::1]": 200, "": 200}.items():
        assert shop.client.get("/v1/inventory/low-stock", headers={"host": host}).status_code == status, host
