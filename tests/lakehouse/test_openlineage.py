"""OpenLineage events of a run, through the client's own classes and transports: their content, and that they never fail a run."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import UUID

import pytest
from openlineage.client.event_v2 import RunState
from support.sales_lake import SALES, SALES_STEP, TOTALS, TOTALS_STEP, receive, sales_engine

from app.project import PROJECT
from lakehouse import openlineage
from lakehouse.engine.engine import Engine
from lakehouse.expectations import ExpectationsFailed
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.openlineage import Receiver, configured, emit_events
from lakehouse.openlineage_facets import column_lineage
from lakehouse.run_history import RunRecord
from lakehouse.step import Grouped, upstream_tables


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove this machine's configuration and the receiver state of earlier tests."""
    monkeypatch.setattr(openlineage, "RECEIVER", Receiver())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return sales_engine(tmp_path / "lake")


@pytest.fixture
def to_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Configure the file transport; return the file of events."""
    config, log = tmp_path / "openlineage.yml", tmp_path / "events.json"
    config.write_text(f"transport:\n  type: file\n  log_file_path: {log}\n  append: true\n")
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(config))
    return log


def events_in(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(engine: Engine) -> RunRecord:
    """Refresh both steps as one run, as the runner does."""
    record = RunRecord("run")
    with emit_events(engine, record, lambda: "abc123") as events:
        for step in (SALES_STEP, TOTALS_STEP):
            try:
                result = engine.refresh(step)
            except ExpectationsFailed as error:
                if events:
                    events.fail(step.target.name, error)
                continue
            if events:
                events.complete(result)
    return record


def test_without_configuration_nothing_is_sent_or_imported(engine, monkeypatch):
    monkeypatch.setattr("openlineage.client.OpenLineageClient.__init__", lambda *_: pytest.fail("a client was created"))
    assert not configured()
    receive(engine, (1, "north", 10))
    with emit_events(engine, RunRecord("run"), lambda: pytest.fail("the version was read")) as events:
        assert events is None
        engine.refresh(SALES_STEP)


def test_each_step_starts_and_completes_within_its_run(engine, to_file):
    receive(engine, (1, "north", 10), (2, "moon", 20))
    record = run(engine)
    events = events_in(to_file)
    assert [(event["eventType"], event["job"]["name"]) for event in events] == [
        ("START", "run"),
        ("START", SALES.name),
        ("COMPLETE", SALES.name),
        ("START", TOTALS.name),
        ("COMPLETE", TOTALS.name),
        ("COMPLETE", "run"),
    ]
    assert {event["eventType"] for event in events} <= {state.value for state in RunState}
    assert all(UUID(event["run"]["runId"]) for event in events)
    whole, *steps, end = events
    assert whole["run"]["runId"] == end["run"]["runId"] == record.id
    assert {event["run"]["facets"]["parent"]["run"]["runId"] for event in steps} == {record.id}
    assert {event["run"]["facets"]["processing_engine"]["version"] for event in events} == {"abc123"}
    started, completed = steps[:2]
    assert started["run"]["runId"] == completed["run"]["runId"] != steps[2]["run"]["runId"]


def test_an_event_contains_tables_counts_columns_and_expectations(engine, to_file):
    receive(engine, (1, "north", 10), (2, "moon", 20))
    run(engine)
    done = [event for event in events_in(to_file) if event["eventType"] == "COMPLETE"]
    sales, totals = done[0], done[1]
    assert [item["name"] for item in sales["inputs"]] == ["bronze.sales"]
    assert [item["name"] for item in totals["inputs"]] == [SALES.name]
    output = sales["outputs"][0]
    assert output["namespace"] == engine.lake.settings.catalog.name
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 2
    assert output["facets"]["version"]["datasetVersion"] == str(engine.lake.load(SALES).snapshot.snapshot_id)
    assert totals["inputs"][0]["facets"]["version"]["datasetVersion"] == output["facets"]["version"]["datasetVersion"]
    assert [column["name"] for column in output["facets"]["schema"]["fields"]] == SALES.schema.names
    lines = output["facets"]["columnLineage"]
    assert [(field["name"], field["field"]) for field in lines["fields"]["id"]["inputFields"]] == [("bronze.sales", "id")]
    assert "amount" not in lines["fields"], "how transform computes it is not declared"
    assert {field["field"] for field in lines["dataset"]} >= {"id", "shop", "amount"}
    assertions = {one["name"]: one["success"] for one in output["facets"]["dataQualityAssertions"]["assertions"]}
    assert assertions == {
        "not_null(id, shop)": True,
        "unique(id)": True,
        "within(-1000 <= amount <= 1000000)": True,
        "accepted(shop: east, north, south)": False,
    }


def test_a_run_with_nothing_new_sends_nothing(engine, to_file):
    receive(engine, (1, "north", 10))
    run(engine)
    before = len(events_in(to_file))
    run(engine)
    assert len(events_in(to_file)) == before


def test_a_failed_audit_is_a_failed_run_without_personal_data(engine, to_file):
    receive(engine, (1, "north", -10))
    run(engine)
    events = events_in(to_file)
    failed = [event for event in events if event["eventType"] == "FAIL"]
    assert [event["job"]["name"] for event in failed] == [TOTALS.name, "run"]
    assert "within(amount >= 0)" in failed[0]["run"]["facets"]["errorMessage"]["message"]
    wrong = [one for one in failed[0]["outputs"][0]["facets"]["dataQualityAssertions"]["assertions"] if not one["success"]]
    assert [one["name"] for one in wrong] == ["within(amount >= 0)"]
    assert "example.org" not in to_file.read_text()


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict], list[int]]]:
    """Yield a server that receives events: its address, the events received, and the status of its responses."""
    received: list[dict] = []
    status = [201]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received, status
    server.shutdown()
    server.server_close()
    thread.join()


def test_events_are_sent_to_a_server(engine, receiver, monkeypatch):
    address, received, _ = receiver
    monkeypatch.setenv("OPENLINEAGE_URL", address)
    receive(engine, (1, "north", 10))
    run(engine)
    assert [event["eventType"] for event in received] == ["START", "START", "COMPLETE", "START", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("failure", ["refuses", "is not there"])
def test_a_receiver_that_is_down_does_not_fail_the_run(engine, receiver, monkeypatch, caplog, failure):
    address, received, status = receiver
    status[0] = 403
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", address if failure == "refuses" else "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
    receive(engine, (1, "north", 10))
    run(engine)
    assert engine.lake.load(TOTALS).read(["amount"])["amount"].to_list() == [10]
    assert len(received) == (1 if failure == "refuses" else 0), "after one failure the run sends nothing"
    assert [record.name for record in caplog.records if "events of this run were lost" in record.message] == [
        openlineage.__name__
    ]


def test_an_unresponsive_receiver_does_not_delay_a_run(engine, monkeypatch, caplog):
    monkeypatch.setattr(openlineage, "SEND_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, but never responds
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        receive(engine, (1, "north", 10))
        started = time.monotonic()
        run(engine)
        receive(engine, (2, "north", 10), position="2")
        run(engine)
        assert time.monotonic() - started < 5, "the client itself gives up after 5 s, six times"
    assert engine.lake.load(TOTALS).read(["amount"])["amount"].to_list() == [20]
    assert caplog.text.count("events of this run were lost") == 1, "the second run neither sends nor logs"


def test_a_recovered_receiver_gets_events_again(engine, receiver, monkeypatch, caplog):
    address, received, status = receiver
    monkeypatch.setenv("OPENLINEAGE_URL", address)
    status[0] = 403
    for number in range(3):
        receive(engine, (number, "north", 10), position=str(number))
        run(engine)
        openlineage.RECEIVER.paused_until = 0.0
    assert len(received) == 3, "each run tries once"
    assert caplog.text.count("events of this run were lost") == 1
    status[0] = 201
    receive(engine, (9, "north", 10), position="9")
    run(engine)
    assert [event["eventType"] for event in received[3:]] == ["START", "START", "COMPLETE", "START", "COMPLETE", "COMPLETE"]
    assert "received again" in caplog.text


@pytest.mark.parametrize(("error", "state"), [(ValueError, "FAIL"), (KeyboardInterrupt, "ABORT")])
def test_an_interrupted_run_ends_the_steps_it_has_started(engine, to_file, error, state):
    receive(engine, (1, "north", 10))

    def transform(frames: object, context: object) -> None:
        raise error("north@example.org")

    with pytest.raises(error), emit_events(engine, RunRecord("run"), lambda: "abc123"):
        engine.refresh(replace(SALES_STEP, transform=transform))
    assert [(event["eventType"], event["job"]["name"]) for event in events_in(to_file)] == [
        ("START", "run"),
        ("START", SALES.name),
        (state, SALES.name),
        (state, "run"),
    ]
    assert "example.org" not in to_file.read_text()


def test_a_snapshot_staged_by_a_killed_run_is_reported_by_the_run_that_publishes_it(engine, to_file, monkeypatch):
    receive(engine, (1, "north", 10))
    engine.refresh(SALES_STEP)

    def interrupt(handle: TableHandle) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TableHandle, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.refresh(TOTALS_STEP)
    run(engine)
    events = events_in(to_file)
    assert [(event["eventType"], event["job"]["name"]) for event in events[1:-1]] == [
        ("START", TOTALS.name),
        ("COMPLETE", TOTALS.name),
    ]
    output = events[-2]["outputs"][0]
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 1
    assert output["facets"]["version"]["datasetVersion"] == str(engine.lake.load(TOTALS).snapshot.snapshot_id)
    assert "fresh(newest: 24 h)" in [one["name"] for one in output["facets"]["dataQualityAssertions"]["assertions"]]


def test_an_invalid_configuration_does_not_fail_the_run(engine, monkeypatch, tmp_path, caplog):
    config = tmp_path / "openlineage.yml"
    config.write_text("transport:\n  type: nonsense\n")
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(config))
    receive(engine, (1, "north", 10))
    run(engine)
    assert engine.lake.load(TOTALS).read(["amount"])["amount"].to_list() == [10]
    assert "nothing is sent" in caplog.text


@pytest.mark.parametrize("step", PROJECT.all_steps, ids=lambda step: step.target.name)
def test_column_lineage_of_every_step_names_columns_that_exist(step):
    columns = {table.name: set(table.schema.names) for table in upstream_tables(step)} | {
        step.target.name: set(step.target.schema.names)
    }
    fields, whole = column_lineage(step, "lake")
    grouped = [read for read in step.reads.values() if isinstance(read, Grouped)]
    assert set(fields) == (set(step.target.group) if grouped else set())
    named = [one for item in fields.values() for one in item.inputFields] + whole
    assert not [(one.name, one.field) for one in named if one.field not in columns[one.name] and not one.field.startswith("_")]
