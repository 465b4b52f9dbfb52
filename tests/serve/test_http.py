"""The HTTP layer: malformed requests, back-pressure, API keys, routing and settings."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from polars.exceptions import PanicException
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.testclient import TestClient
from support.scoring_desk import order_body, replica, running, train_model
from support.waiting import wait_for

from app.cli.main import main
from lakehouse.errors import SettingsError
from ml.registry import Registry
from pipelines.settings import Settings
from serve.deployment import check
from serve.http.access_log import AccessLog
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest, Endpoint, json_response
from serve.http.keys import Keys
from serve.http.problems import Problem
from serve.http.router import EndpointApp, Router
from serve.settings import PREFIX, ServeSettings, load_serve_settings

ROOT = Path(__file__).resolve().parents[2]
LOOKUP = {"product_ids": ["P0001", "P0002"], "store_ids": ["ST-JKT-1"]}
INTERNALS = ("Traceback", 'File "', ".py", "polars", "msgspec", "Error(", "/tmp", "SELECT")
"""Text that an answer must not contain."""


@pytest.fixture(scope="module")
def client(filled: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a replica with a model in its own registry, since other tests need a sandbox without a model."""
    registry = Registry(home=tmp_path_factory.mktemp("registry"))
    registry.promote(registry.record(train_model(filled, 21)).number)
    application = replica(filled, scores_topic="")
    application.models.registry = registry
    with running(application) as client:
        wait_for(lambda: application.models.current.champion is not None)
        yield client


def mangle(random_: random.Random, value: Any) -> bytes:
    """Return a body that is nearly valid."""
    if random_.random() < 0.5:
        return _mangle_bytes(random_, json.dumps(value).encode())
    changed = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key in one if isinstance(one, dict) else range(len(one)):
            places.append((one, key))
            if isinstance(one[key], dict | list):
                walk(one[key])

    walk(changed)
    for _ in range(random_.randint(1, 2)):
        holder, key = random_.choice(places)
        unexpected = [
            None,
            True,
            -1,
            0,
            2**70,
            1e308,
            "",
            "\u0000",
            "a" * 3000,
            [],
            {},
            [[]],
            "1e999",
            "-0",
            "NaN",
            -1e-9,
            "٣",
            "9" * 40,
        ]
        if isinstance(holder, dict) and random_.random() < 0.2:
            holder.pop(key, None)
        elif isinstance(holder, dict) or key < len(holder):
            holder[key] = random_.choice(unexpected)
    return json.dumps(changed).encode()


def _mangle_bytes(random_: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data))
        match random_.randrange(4):
            case 0:
                data[at] = random_.randrange(256)
            case 1:
                del data[at : at + random_.randint(1, 20)]
                data = data or bytearray(b" ")
            case 2:
                data[at:at] = bytes(random_.randrange(256) for _ in range(random_.randint(1, 5)))
            case _:
                data[at:at] = random_.choice([b"[" * 2000, b'{"a":' * 2000, b"\xff\xfe", b"\x00", b'"'])
    return bytes(data)


def send_malformed(client: TestClient, count: int, seed: int) -> dict[int, int]:
    """Send malformed bodies; none may cause a server error or reveal internals. Return the number of answers by status."""
    random_ = random.Random(seed)
    statuses: dict[int, int] = {}
    for number in range(count):
        batch = {"orders": [order_body(order_id=f"m{seed}-{number}-{n}", user_id=1) for n in range(2)]}
        path, value = random_.choice(
            [
                ("/v1/inventory/lookup", LOOKUP),
                ("/v1/fraud/score", order_body(order_id=f"m{seed}-{number}", user_id=1, email="a@b.example")),
                ("/v1/fraud/score:batch", batch),
            ]
        )
        body = mangle(random_, value)
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, (path, body[:500], response.text)
        if response.status_code >= 400:
            problem = response.json()
            assert problem["status"] == response.status_code
            assert not any(word in response.text for word in INTERNALS), (body[:500], response.text)
    return statuses


def test_malformed_bodies_are_rejected(client: TestClient) -> None:
    statuses = send_malformed(client, 600, 1)
    assert statuses[400] > 300


@pytest.mark.slow
@pytest.mark.serial
def test_ten_thousand_malformed_bodies(client: TestClient) -> None:
    statuses = send_malformed(client, 10_000, 2)
    print(statuses)
    assert statuses[400] > 5_000


def test_requests_beyond_the_queue_get_retry_after() -> None:
    async def overload() -> list[str]:
        pool, go = BoundedThreadPool("test", 1, 2), threading.Event()
        waiting = [asyncio.create_task(pool.run(go.wait, 10)) for _ in range(5)]
        await asyncio.sleep(0.05)
        go.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        pool.close()
        return [one.headers["Retry-After"] if isinstance(one, Problem) else str(one) for one in done]

    assert asyncio.run(overload()) == ["True", "True", "True", "1", "1"]


def test_polars_panic_becomes_an_error() -> None:
    def panic() -> None:
        raise PanicException("index out of bounds")

    async def run() -> None:
        pool = BoundedThreadPool("test", 1, 1)
        with pytest.raises(RuntimeError, match="panicked"):
            await pool.run(panic)
        pool.close()

    asyncio.run(run())


def test_other_addresses_than_loopback_require_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    public = ServeSettings(host="0.0.0.0", port=18_123, keys_file=file)
    with pytest.raises(SettingsError, match="python -m app api-key"):
        check(public)
    Keys().add(file, "till", ("inventory",))
    check(public)
    file.write_text("[")
    with pytest.raises(SettingsError, match="not a valid file of API keys"):
        check(public)


def test_api_key_command_creates_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    assert main(["api-key", "till", "--scope", "inventory", "--scope", "score"]) == 0
    text = capsys.readouterr().out.strip()
    keys = Keys.read(tmp_path / "serve_keys.json")
    assert keys.check(f"Bearer {text}", "score") == "till"
    with pytest.raises(Problem):
        keys.check(f"Bearer {text}", "customers")
    assert main(["api-key", "till", "--scope", "everything"]) == 1
    assert "Scope 'everything' does not exist" in capsys.readouterr().err


def test_invalid_settings_are_named() -> None:
    with pytest.raises(SettingsError, match="port"):
        load_serve_settings(port=-1)


def test_deployment_file_is_valid_and_names_existing_settings() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load((ROOT / "serve" / "deploy.yaml").read_text())
    (application,) = ServeDeploySchema(**document).applications
    module, _, name = str(application.import_path).partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    serving = load_serve_settings(**application.args)
    assert (serving.host, serving.port) == (document["http_options"]["host"], document["http_options"]["port"])


ENDPOINTS = {
    "/v1/things": "GET",
    "/v1/things/low": "GET",
    "/v1/things/look": "POST",
    "/v1/things/{thing_id}": "GET",
    "/v1/things/{thing_id}/parts": "GET",
    "/v1/score:batch": "POST",
    "/{other}": "GET",
    "/-/healthz": "GET",
}


@pytest.mark.parametrize("sample", [60, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
def test_router_answers_like_starlette(tmp_path: Path, method: str, sample: int) -> None:
    def endpoint_app(method: str, path: str) -> EndpointApp:
        async def echo(request: ApiRequest) -> Response:
            return json_response({"method": method, "path": path, "parameters": request.path, "query": request.query})

        endpoint = Endpoint(method=method, path=path, name=path, doc="", handler=echo, answer=dict)
        return EndpointApp(endpoint, Keys(), AccessLog(tmp_path / "access.jsonl"))

    apps = [endpoint_app(method, path) for path, method in ENDPOINTS.items()]
    router, starlette = TestClient(Router(apps)), TestClient(Starlette(routes=[app.route for app in apps]))
    segments = ["v1", "things", "low", "look", "score:batch", "a", "a b", "%2F", "%C3%BC", "%0A", "..", "", "-", "healthz"]
    paths = ["/" + "/".join(chosen) for count in range(1, 5) for chosen in itertools.product(segments, repeat=count)]
    random.Random(1).shuffle(paths)
    similar = [path for path in paths if path.startswith("/v1/things")]
    statuses = set()
    for path in {*paths[:sample], *similar[:sample]}:
        one, other = (client.request(method, path, follow_redirects=False) for client in (router, starlette))
        assert (one.status_code, one.headers, one.content) == (other.status_code, other.headers, other.content), path
        statuses.add(one.status_code)
    assert statuses >= ({200, 404} if method == "GET" else {404, 405})


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert [name for name in ServeSettings.model_fields if f"| `{PREFIX}{name.upper()}` |" not in page] == []
