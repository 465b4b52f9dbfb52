"""Access to pages: API keys, scopes, the cookie, and the access log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.html_page import parse_page
from support.page_client import search
from support.scoring_desk import order_body, replica

from pipelines.settings import Settings
from serve.http.access_log import AccessLog
from serve.http.keys import SCOPES, Keys
from serve.http.sessions import COOKIE


@pytest.fixture
def keyed_client(filled: Settings, tmp_path: Path) -> tuple[TestClient, dict[str, str]]:
    file = tmp_path / "keys.json"
    scopes = {"stock": ("inventory",), "people": ("customers",), "checkout": ("score",), "all": SCOPES}
    keys = {name: Keys.read(file).add(file, name, of) for name, of in scopes.items()}  # type: ignore[arg-type]
    return TestClient(replica(filled, keys_file=file).asgi(), follow_redirects=False), keys


def sign_in(client: TestClient, key: str, to: str = "/freshness") -> Any:
    client.cookies.clear()
    return client.post("/sign-in", data={"key": key, "next": to})


def test_each_scope_grants_only_its_pages(keyed_client: tuple[TestClient, dict[str, str]], merged_customer: str) -> None:
    client, keys = keyed_client
    paths = ("/", f"/customers/{merged_customer}", "/fraud", "/freshness")

    def statuses() -> list[int]:
        return [client.get(path).status_code for path in paths] + [search(client, "nobody@nowhere.example").status_code]

    assert statuses() == [401] * 5
    expected = {"stock": [403, 403, 403, 200, 403], "people": [200, 200, 403, 200, 200], "checkout": [403, 403, 200, 200, 403]}
    for name, granted in expected.items():
        assert sign_in(client, keys[name]).headers["location"] == "/freshness"
        assert statuses() == granted, name
    assert "requires a key with the scope" in client.get("/fraud").text
    sign_in(client, keys["stock"])
    assert "no scope 'customers'" in parse_page(client.get("/").text).text
    # without an online state, an authorised request gets 503
    assert client.get("/stock").status_code == client.get("/v1/inventory/stream").status_code == 503


def test_cookie_grants_only_pages(keyed_client: tuple[TestClient, dict[str, str]], merged_customer: str) -> None:
    client, keys = keyed_client
    cookie = sign_in(client, keys["all"]).headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in cookie.split(";")}
    assert client.get(f"/v1/customers/{merged_customer}").status_code == 401
    assert client.post("/v1/fraud/score", json=order_body()).status_code == 401
    assert client.get("/v1/inventory/P0001").status_code == 401
    signed_out = client.post("/sign-out")
    assert signed_out.headers["location"] == "/"
    assert client.get("/").status_code == 401


def test_failed_sign_in_is_explained(keyed_client: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = keyed_client
    wrong = sign_in(client, "sk_none")
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert "not valid" in parse_page(wrong.text).text
    assert "sk_none" not in wrong.text
    assert client.post("/sign-in", data={"key": keys["all"]}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/sign-in", json={"key": keys["all"]}).status_code == 415
    assert client.post("/sign-in", data={"key": "x" * 5000}).status_code == 413
    assert sign_in(client, keys["all"], "https://elsewhere.example/").headers["location"] == "/"
    assert COOKIE in client.cookies


def test_access_log_contains_no_personal_data(filled: Settings, merged_customer: str, tmp_path: Path) -> None:
    application = replica(filled)
    application.log = AccessLog(tmp_path / "access.jsonl")
    client = TestClient(application.asgi(), client=("127.0.0.1", 1), base_url="http://127.0.0.1")
    assert client.get(f"/customers/{merged_customer}").status_code == 200
    assert search(client, "siti.hidayat@nowhere.example").status_code == 200
    application.log.flush()
    written = (tmp_path / "access.jsonl").read_text()
    assert [json.loads(line)["route"] for line in written.splitlines()] == ["/customers/{master_user_id}", "/customers"]
    assert merged_customer not in written
    assert "siti" not in written
