"""The edges: nothing that is sent ends in a 5xx or tells of the inside; too much at once is told to come again."""

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
from support.scoring_desk import made, replica, running, trained
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
from serve.settings import ServeSettings, load_serve_settings

ROOT = Path(__file__).resolve().parents[2]
LOOKUP = {"product_ids": ["P0001", "P0002"], "store_ids": ["ST-JKT-1"]}
INSIDE = ("Traceback", 'File "', ".py", "polars", "msgspec", "Error(", "/tmp", "SELECT")
"""What an answer must not hold."""


@pytest.fixture(scope="module")
def client(filled: Settings) -> Iterator[TestClient]:
    registry = Registry(home=filled.home)
    registry.promote(registry.record(trained(filled, 21)).number)
    application = replica(filled, scores_topic="")
    with running(application) as client:
        wait_for(lambda: application.models.current.champion is not None)
        yield client


def mangled(random_: random.Random, value: Any) -> bytes:
    """A body that is nearly right."""
    if random_.random() < 0.5:
        return _bytes_mangled(random_, json.dumps(value).encode())
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
        strange = [
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
            holder[key] = random_.choice(strange)
    return json.dumps(changed).encode()


def _bytes_mangled(random_: random.Random, body: bytes) -> bytes:
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


def shoot(client: TestClient, count: int, seed: int) -> dict[int, int]:
    random_ = random.Random(seed)
    statuses: dict[int, int] = {}
    for number in range(count):
        batch = {"orders": [made(order_id=f"m{seed}-{number}-{n}", user_id=1) for n in range(2)]}
        path, value = random_.choice(
            [
                ("/v1/inventory/lookup", LOOKUP),
                ("/v1/fraud/score", made(order_id=f"m{seed}-{number}", user_id=1, email="a@b.example")),
                ("/v1/fraud/score:batch", batch),
            ]
        )
        body = mangled(random_, value)
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, (path, body[:500], response.text)
        if response.status_code >= 400:
            told = response.json()
            assert told["status"] == response.status_code
            assert not any(word in response.text for word in INSIDE), (body[:500], response.text)
    return statuses


def test_malformed_bodies_are_told_what_is_wrong(client: TestClient) -> None:
    statuses = shoot(client, 600, 1)
    assert statuses[400] > 300


@pytest.mark.slow
def test_ten_thousand_malformed_bodies(client: TestClient) -> None:
    statuses = shoot(client, 10_000, 2)
    print(statuses)
    assert statuses[400] > 5_000


def test_too_many_at_once_are_told_to_come_again() -> None:
    async def crowd() -> list[str]:
        pool, go = BoundedThreadPool("test", 1, 2), threading.Event()
        waiting = [asyncio.create_task(pool.run(go.wait, 10)) for _ in range(5)]
        await asyncio.sleep(0.05)
        go.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        pool.close()
        return [one.headers["Retry-After"] if isinstance(one, Problem) else str(one) for one in done]

    assert asyncio.run(crowd()) == ["True", "True", "True", "1", "1"]


def test_a_panic_of_polars_is_an_error_like_any_other() -> None:
    def panic() -> None:
        raise PanicException("index out of bounds")

    async def run() -> None:
        pool = BoundedThreadPool("test", 1, 1)
        with pytest.raises(RuntimeError, match="panicked"):
            await pool.run(panic)
        pool.close()

    asyncio.run(run())


def test_elsewhere_than_on_loopback_keys_are_required(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    outside = ServeSettings(host="0.0.0.0", port=18_123, keys_file=file)
    with pytest.raises(SettingsError, match="python -m app api-key"):
        check(outside)
    Keys().add(file, "till", ("inventory",))
    check(outside)
    file.write_text("[")
    with pytest.raises(SettingsError, match="not a valid file of API keys"):
        check(outside)


def test_a_key_is_made_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    assert main(["api-key", "till", "--scope", "inventory", "--scope", "score"]) == 0
    text = capsys.readouterr().out.strip()
    keys = Keys.read(tmp_path / "serve_keys.json")
    assert keys.check(f"Bearer {text}", "score") == "till"
    with pytest.raises(Problem):
        keys.check(f"Bearer {text}", "customers")
    assert main(["api-key", "till", "--scope", "everything"]) == 1
    assert "no scope 'everything'" in capsys.readouterr().err


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SettingsError, match="port"):
        load_serve_settings(port=-1)


def test_the_deployment_file_is_one_and_names_real_settings() -> None:
    from ray.serve.schema import ServeDeploySchema

    told = yaml.safe_load((ROOT / "serve" / "deploy.yaml").read_text())
    (application,) = ServeDeploySchema(**told).applications
    module, _, name = str(application.import_path).partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    serving = load_serve_settings(**application.args)
    assert (serving.host, serving.port) == (told["http_options"]["host"], told["http_options"]["port"])


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


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
def test_whatever_is_asked_leads_where_starlette_leads(tmp_path: Path, method: str) -> None:
    def endpoint_app(method: str, path: str) -> EndpointApp:
        async def echo(request: ApiRequest) -> Response:
            return json_response({"method": method, "path": path, "parameters": request.path, "query": request.query})

        endpoint = Endpoint(method=method, path=path, name=path, doc="", handler=echo, answer=dict)
        return EndpointApp(endpoint, Keys(), AccessLog(tmp_path / "access.jsonl"))

    apps = [endpoint_app(method, path) for path, method in ENDPOINTS.items()]
    ours, theirs = TestClient(Router(apps)), TestClient(Starlette(routes=[app.route for app in apps]))
    pieces = ["v1", "things", "low", "look", "score:batch", "a", "a b", "%2F", "%C3%BC", "%0A", "..", "", "-", "healthz"]
    paths = ["/" + "/".join(some) for count in range(1, 5) for some in itertools.product(pieces, repeat=count)]
    random.Random(1).shuffle(paths)
    near = [path for path in paths if path.startswith("/v1/things")]
    statuses = set()
    for path in {*paths[:300], *near}:
        one, other = (client.request(method, path, follow_redirects=False) for client in (ours, theirs))
        assert (one.status_code, one.headers, one.content) == (other.status_code, other.headers, other.content), path
        statuses.add(one.status_code)
    assert statuses >= ({200, 404} if method == "GET" else {404, 405})


def test_every_setting_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    assert [name for name in ServeSettings.model_fields if f"| `{name}` |" not in page] == []
