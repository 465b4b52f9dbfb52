"""What /openapi.json promises is held, for requests that fit it and for requests that do not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from support.scoring_desk import replica, trained
from support.waiting import wait_for

from ml.registry import Registry
from pipelines.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENDLESS = "/v1/inventory/stream"
"""Has no end, which is tested elsewhere."""
REFUSED = ["4xx", "5xx"]
"""Of a wrong request: also 413, when it is too large before it is wrong. What is no server's error, its own check says."""


@pytest.fixture(scope="module")
def address(filled: Settings) -> Iterator[str]:
    registry = Registry(home=filled.home)
    registry.promote(registry.record(trained(filled, 41)).number)
    application = replica(filled, scores_topic="")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application.asgi(), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_for(lambda: server.started, seconds=60)
            wait_for(lambda: application.models.current.champion is not None, seconds=60)
            time.sleep(1)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: str(mode.value))
def test_schemathesis_finds_nothing(address: str, mode: GenerationMode) -> None:
    checks = {"negative_data_rejection": {"expected-statuses": REFUSED}}
    config = schemathesis.Config.from_dict({"checks": checks})
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config)
    tried: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == ENDLESS:
            continue

        @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def fits(case: schemathesis.Case) -> None:
            tried[case.operation.label] = tried.get(case.operation.label, 0) + 1
            case.call_and_validate(timeout=20)

        try:
            fits()
        except Unsatisfiable:
            # nothing about a request without query and body can be wrong
            asked = operation.definition.raw
            assert "requestBody" not in asked, operation.label
            assert all(one["in"] == "path" for one in asked.get("parameters", ())), operation.label
    print(tried)
    assert {"POST /v1/fraud/score", "POST /v1/fraud/score:batch", "POST /v1/inventory/lookup"} <= tried.keys()
