"""The API conforms to /openapi.json, for valid and invalid requests."""

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
from support.scoring_desk import replica, train_model
from support.waiting import wait_for

from ml.registry import Registry
from pipelines.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.timeout(600)]
STREAM = "/v1/inventory/stream"
"""Never ends; tested elsewhere."""
REJECTED = ["4xx", "5xx"]
"""Statuses of invalid requests, including 413 for a body that is also too large. Server errors have their own check."""


@pytest.fixture(scope="module")
def address(filled: Settings) -> Iterator[str]:
    registry = Registry(home=filled.home)
    registry.promote(registry.record(train_model(filled, 41)).number)
    application = replica(filled, scores_topic="")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application.asgi(), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started, seconds=60)
            wait_for(lambda: application.models.current.champion is not None, seconds=60)
            time.sleep(1)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: str(mode.value))
def test_schemathesis_finds_no_violation(address: str, mode: GenerationMode) -> None:
    checks = {"negative_data_rejection": {"expected-statuses": REJECTED}}
    config = schemathesis.Config.from_dict({"checks": checks})
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config)
    requests: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == STREAM:
            continue

        @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def conforms(case: schemathesis.Case) -> None:
            requests[case.operation.label] = requests.get(case.operation.label, 0) + 1
            case.call_and_validate(timeout=20)

        try:
            conforms()
        except Unsatisfiable:
            # a request without query and body cannot be invalid
            definition = operation.definition.raw
            assert "requestBody" not in definition, operation.label
            assert all(one["in"] == "path" for one in definition.get("parameters", ())), operation.label
    print(requests)
    assert {"POST /v1/fraud/score", "POST /v1/fraud/score:batch", "POST /v1/inventory/lookup"} <= requests.keys()
