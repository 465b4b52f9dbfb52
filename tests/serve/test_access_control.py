"""Who gets in: requests of other sites, keys that change while they are used, and the sessions of browsers."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient
from support.scoring_desk import order_body, replica

from app.cli.main import main
from lakehouse.errors import SettingsError
from pipelines.settings import Settings
from serve.application import Application
from serve.http.keys import Key, Keys
from serve.http.problems import MAX_REFLECTED, Problem
from serve.http.sessions import COOKIE, LIFETIME_SECONDS, EndedSessions, sign_session
from serve.settings import ServeSettings

LOCAL: dict[str, Any] = {"client": ("127.0.0.1", 1), "base_url": "http://127.0.0.1"}
SCORE = "/v1/fraud/score"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keyless(filled: Settings) -> TestClient:
    return TestClient(replica(filled).asgi(), follow_redirects=False, **LOCAL)


@pytest.fixture
def keyed(filled: Settings, file: Path) -> tuple[TestClient, Application, str]:
    """Return a client, its application and a key; the state is not loaded, so that a granted request gets 503."""
    key = Keys().add(file, "till", ("inventory", "score", "customers"))
    application = replica(filled, keys_file=file)
    return TestClient(application.asgi(), follow_redirects=False, **LOCAL), application, key


# -- other sites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", [SCORE, "/v1/fraud/score:batch", "/sign-in", "/sign-out", "/customers", "/v1/customers/search"])
def test_a_page_of_another_site_can_post_nothing(keyless: TestClient, headers: dict[str, str], path: str) -> None:
    content = json.dumps(order_body())
    for media_type in ({"Content-Type": "application/json"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        response = keyless.post(path, content=content, headers={**headers, **media_type})
        assert response.status_code == 403
        assert "another site" in response.text


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://127.0.0.1"}, {"Sec-Fetch-Site": "same-origin"}])
def test_own_pages_and_other_programs_can_post(keyless: TestClient, headers: dict[str, str]) -> None:
    assert keyless.post(SCORE, json=order_body(), headers=headers).status_code == 503, "it came as far as the missing model"


def test_a_body_without_a_content_type_is_refused(keyless: TestClient) -> None:
    response = keyless.post(SCORE, content=json.dumps(order_body()))
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["detail"]


def test_answers_are_neither_cached_nor_guessed(keyless: TestClient) -> None:
    for path in ("/v1/customers?email=nobody@example.org", "/v1/inventory/P0001", "/openapi.json", "/v1/missing"):
        headers = keyless.get(path).headers
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff"), path


def test_an_answer_reflects_little_of_a_request(keyless: TestClient) -> None:
    response = keyless.post(SCORE, json={**order_body(), "x" * 60_000: 1})
    assert response.status_code == 400
    assert len(response.content) < 4 * MAX_REFLECTED


# -- keys ------------------------------------------------------------------------------------------------------------


def grants(client: TestClient, key: str) -> int:
    return client.get("/v1/inventory/P0001", headers={"Authorization": f"Bearer {key}"}).status_code


def test_keys_are_added_replaced_and_revoked_without_a_restart(keyed: tuple[TestClient, Application, str], file: Path) -> None:
    client, application, key = keyed
    assert grants(client, key) == 503
    second = Keys.read(file).add(file, "desk", ("inventory",))
    assert grants(client, second) == 401
    application._keys.refresh()
    assert (grants(client, key), grants(client, second)) == (503, 503)
    assert Keys.read(file).revoke(file, "till")
    application._keys.refresh()
    assert (grants(client, key), grants(client, second)) == (401, 503)


def test_revoking_the_last_key_opens_nothing(keyed: tuple[TestClient, Application, str], file: Path) -> None:
    client, application, key = keyed
    Keys.read(file).revoke(file, "till")
    application._keys.refresh()
    assert grants(client, key) == 401
    assert client.get("/v1/inventory/P0001").status_code == 401
    file.unlink()
    application._keys.refresh()
    assert client.get("/v1/inventory/P0001").status_code == 401


def test_the_last_valid_keys_stay_while_the_file_is_unusable(keyed: tuple[TestClient, Application, str], file: Path) -> None:
    client, application, key = keyed
    content = file.read_bytes()
    for broken in (b"[", b'[{"name": "x", "scopes": ["inventory"], "sha256": ""}]'):
        file.write_bytes(broken)
        application._keys.refresh()
        assert grants(client, key) == 503
    file.write_bytes(content)
    application._keys.refresh()
    assert grants(client, key) == 503


def test_a_key_expires(file: Path) -> None:
    key = Keys().add(file, "till", ("inventory",), days=1)
    keys = Keys.read(file)
    assert keys.check(f"Bearer {key}", "inventory") == "till"
    assert keys.keys[0].expires is not None
    aged = Key(**{**msgspec.structs.asdict(keys.keys[0]), "expires": datetime.now(UTC) - timedelta(seconds=1)})
    keys = Keys((aged,))
    with pytest.raises(Problem, match="An API key is required"):
        keys.check(f"Bearer {key}", "inventory")
    assert keys.start_session(key) is None
    with pytest.raises(Problem):
        keys.check_session(sign_session(aged.sha256, time.time()), "inventory")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer  ", "Basic x", "bearer \t"])
def test_an_empty_authorization_matches_no_key(header: str, file: Path) -> None:
    Keys().add(file, "till", ("inventory",))
    with pytest.raises(Problem, match="An API key is required"):
        Keys.read(file).check(header, None)


@pytest.mark.parametrize("digest", ["", "0" * 63, "g" * 64, "A" * 64])
def test_an_invalid_hash_of_a_key_is_refused(file: Path, digest: str) -> None:
    file.write_text(json.dumps([{"name": "till", "scopes": ["inventory"], "sha256": digest}]))
    with pytest.raises(SettingsError, match="not a valid file of API keys"):
        Keys.read(file)


def test_a_named_file_of_keys_must_exist(filled: Settings, file: Path) -> None:
    with pytest.raises(SettingsError, match=r"keys\.json does not exist.*SHOPSPHERE_SERVE_KEYS_FILE"):
        replica(filled, keys_file=file)
    assert ServeSettings(keys_file=file).keys_named


def test_keys_are_created_listed_and_revoked_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path))
    assert main(["api-key", "till", "--scope", "inventory", "--days", "30"]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["api-key", "--list", "--json"]) == 0
    out = capsys.readouterr().out
    (listed,) = json.loads(out)
    assert (listed["name"], listed["scopes"], listed["valid"]) == ("till", "inventory", True)
    assert text not in out
    assert main(["api-key", "till", "--revoke"]) == 0
    assert not Keys.read(tmp_path / "serve_keys.json").keys
    capsys.readouterr()
    for wrong in (["till", "--revoke"], [], ["x"], ["x", "--scope", "score", "--days", "0"]):
        assert main(["api-key", *wrong]) == 1
        assert capsys.readouterr().err.startswith("error: ")


# -- sessions --------------------------------------------------------------------------------------------------------


def sign_in(client: TestClient, key: str) -> str:
    client.cookies.clear()
    response = client.post("/sign-in", data={"key": key, "next": "/freshness"})
    assert response.status_code == 303
    assert f"max-age={LIFETIME_SECONDS}" in response.headers["set-cookie"].lower()
    return str(client.cookies[COOKIE])


def page(client: TestClient, session: str) -> int:
    return client.get("/freshness", headers={"Cookie": f"{COOKIE}={session}"}).status_code


def test_a_session_is_not_the_key_and_ends_when_its_user_signs_out(keyed: tuple[TestClient, Application, str]) -> None:
    client, _, key = keyed
    session = sign_in(client, key)
    assert key not in session
    assert page(client, session) == 200
    client.post("/sign-out")
    client.cookies.clear()
    assert page(client, session) == 401
    assert page(client, sign_in(client, key)) == 200


def test_a_session_ends_with_its_key(keyed: tuple[TestClient, Application, str], file: Path) -> None:
    client, application, key = keyed
    session = sign_in(client, key)
    client.cookies.clear()
    Keys.read(file).add(file, "till", ("inventory",))
    application._keys.refresh()
    assert page(client, session) == 401


def test_a_session_expires_and_cannot_be_changed(keyed: tuple[TestClient, Application, str]) -> None:
    client, application, key = keyed
    sha256 = application._keys.keys[0].sha256
    assert page(client, sign_session(sha256, time.time() - LIFETIME_SECONDS + 60)) == 200
    assert page(client, sign_session(sha256, time.time() - LIFETIME_SECONDS - 1)) == 401
    session = sign_session(sha256, time.time())
    identifier, expires, nonce, signature = session.split(".")
    for changed in (
        f"{identifier}.{int(expires) + 1}.{nonce}.{signature}",
        f"{identifier}.{expires}.{nonce}.{signature[:-1]}0" if signature[-1] != "0" else f"{identifier}.{expires}.{nonce}.0",
        f"{identifier}.{expires}.{nonce}",
        "",
        "....",
        key,
    ):
        assert page(client, changed) == 401


def test_signing_out_at_one_replica_ends_the_session_at_others(tmp_path: Path) -> None:
    first, second = EndedSessions(tmp_path / "ended"), EndedSessions(tmp_path / "ended")
    session = sign_session("a" * 64, time.time())
    first.add(session)
    assert session not in second
    second.refresh()
    assert session in second
    assert oct((tmp_path / "ended").stat().st_mode & 0o777) == "0o600"
    second.forget_expired(time.time())
    assert (tmp_path / "ended").read_text()
    second.forget_expired(time.time() + LIFETIME_SECONDS + 1)
    assert not (tmp_path / "ended").read_text()


# -- metrics, description and log ------------------------------------------------------------------------------------


def test_metrics_need_a_key_and_are_rendered_once_a_second(keyed: tuple[TestClient, Application, str]) -> None:
    client, application, key = keyed
    assert client.get("/-/metrics").status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    first = client.get("/-/metrics", headers=headers)
    assert first.status_code == 200
    application._metrics_text = b"cached"
    assert client.get("/-/metrics", headers=headers).content == b"cached"
    application._metrics_until = 0
    assert client.get("/-/metrics", headers=headers).content != b"cached"
    assert client.get("/openapi.json").content is not None
    assert application._description is application._description


def test_the_access_log_has_the_address_of_the_client(filled: Settings, file: Path, tmp_path: Path) -> None:
    Keys().add(file, "till", ("inventory",))
    application = replica(filled, keys_file=file)
    behind_proxy = TestClient(application.asgi(), **LOCAL)
    behind_proxy.get("/v1/inventory/P0001", headers={"X-Forwarded-For": "1.2.3.4, 203.0.113.7"})
    direct = TestClient(application.asgi(), client=("198.51.100.9", 1), base_url="http://127.0.0.1")
    direct.get("/v1/inventory/P0001", headers={"X-Forwarded-For": "1.2.3.4"})
    application.log.flush()
    log = filled.home / "logs" / f"access-{os.getpid()}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()[-2:]]
    assert [(line["client"], line["status"]) for line in lines] == [("203.0.113.7", 401), ("198.51.100.9", 401)]
