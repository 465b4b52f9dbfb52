"""OpenLineage events of a run: for each step its inputs and output, row counts and expectation results.

Events are sent to the receiver of OpenLineage's own configuration (OPENLINEAGE_URL, OPENLINEAGE_CONFIG, OPENLINEAGE__...,
openlineage.yml). Without any, nothing is sent and the client is not imported. Events are sent by a thread of their own, so
that a receiver that is down neither fails a run nor delays it; its failure is logged once. Events contain names, types,
counts and settings, never a value of a row.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lakehouse.engine.engine import Engine
from lakehouse.engine.step_result import StepResult
from lakehouse.errors import ShopSphereError
from lakehouse.expectations import ExpectationResult, ExpectationsFailed
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.openlineage_facets import assertions_facet, column_lineage, schema_facet
from lakehouse.run_history import RunRecord
from lakehouse.step import Step, upstream_tables
from lakehouse.table import Table

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import RunEvent

logger = logging.getLogger(__name__)
PRODUCER = "urn:shopsphere:lakehouse"
SEND_TIMEOUT_SECONDS = 5.0
"""How long the end of a run waits for the next event to be sent."""
RETRY_AFTER_SECONDS = 300.0
"""How long this process sends nothing after the receiver has failed."""


@dataclass
class Receiver:
    """The state of the receiver of this process's events. paused_until: on the monotonic clock."""

    paused_until: float = 0.0
    is_down: bool = False

    def failed(self, reason: str) -> None:
        """Pause sending for a while, and log the reason if the receiver was not down already."""
        self.paused_until = time.monotonic() + RETRY_AFTER_SECONDS
        if not self.is_down:
            logger.warning("OpenLineage: %s. Retried every %g minutes.", reason, RETRY_AFTER_SECONDS / 60)
        self.is_down = True

    def recovered(self) -> None:
        """Log that the receiver accepts events again, if it was down."""
        if self.is_down:
            logger.warning("OpenLineage: events are received again.")
        self.is_down = False


RECEIVER = Receiver()


class EventSender:
    """Sends the events of a run in order, in a thread of its own, so that an unresponsive receiver delays nothing.

    error  the kind of the transport's error, '' if there was none
    sent   the number of events sent
    """

    def __init__(self, client: OpenLineageClient) -> None:
        self.client = client
        self.error = ""
        self.sent = 0
        self._events: SimpleQueue[RunEvent | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._queued, self._last_progress = 0, 0.0
        # a daemon, since it may be stuck in a request when the process ends
        self._thread = threading.Thread(target=self._send, name="openlineage", daemon=True)
        self._thread.start()

    def put(self, event: RunEvent | None) -> None:
        """Queue an event; None ends the thread after the events before it."""
        with self._lock:
            if not self._queued:
                self._last_progress = time.monotonic()
            self._queued += 1
        self._events.put(event)

    def _send(self) -> None:
        try:
            for event in iter(self._events.get, None):
                self.client.emit(event)
                self.sent += 1
                with self._lock:
                    self._queued -= 1
                    self._last_progress = time.monotonic()
        except Exception as error:  # each transport raises its own errors, and none may fail a run
            # without the text, which may contain the address with a key
            self.error = type(error).__name__
        with contextlib.suppress(Exception):
            self.client.close(timeout=SEND_TIMEOUT_SECONDS)

    def finish(self) -> None:
        """Wait until all events are sent, as long as the receiver accepts one every SEND_TIMEOUT_SECONDS."""
        self.put(None)
        while self._thread.is_alive() and (left := self._last_progress + SEND_TIMEOUT_SECONDS - time.monotonic()) > 0:
            self._thread.join(left)
        if self._thread.is_alive():
            self.error = f"no response for {SEND_TIMEOUT_SECONDS:g} s"


def configured() -> bool:
    """Return whether OpenLineage is configured, in any of the places where its client looks."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() == "true":
        return False
    if any(name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG") or name.startswith("OPENLINEAGE__") for name in os.environ):
        return True
    return any(path.is_file() for path in (Path("openlineage.yml"), Path("~/.openlineage/openlineage.yml").expanduser()))


@dataclass(frozen=True)
class StartedStep:
    """A step that has started: its run id, and the snapshot of each table that it reads."""

    run_id: str
    step: Step
    upstream_snapshots: Mapping[str, int | None]


@dataclass
class LineageEvents:
    """The events of one run. None is sent before a step has work to do.

    code_version  of the running code
    failures      number of failed steps, and of sources that could not be read
    """

    sender: EventSender
    namespace: str
    run: RunRecord
    code_version: str
    started_steps: dict[str, StartedStep] = field(default_factory=dict, init=False)
    run_started: bool = field(default=False, init=False)
    failures: int = field(default=0, init=False)

    def start(self, step: Step, target: TableHandle, upstream: Mapping[str, TableHandle]) -> None:
        """Send that a step starts. A retry of the step belongs to the same run, so that it sends nothing."""
        if step.target.name in self.started_steps:
            return
        from openlineage.client.event_v2 import RunState
        from openlineage.client.uuid import generate_new_uuid

        self._start_run()
        snapshots = {name: handle.snapshot.snapshot_id if handle.snapshot else None for name, handle in upstream.items()}
        started = self.started_steps[step.target.name] = StartedStep(str(generate_new_uuid()), step, snapshots)
        self._emit(lambda: self._step_event(started, RunState.START, None, ()))

    def complete(self, result: StepResult) -> None:
        """Send that a step has completed; nothing if it had no work to do."""
        from openlineage.client.event_v2 import RunState

        if (started := self.started_steps.pop(result.table, None)) is not None:
            self._emit(lambda: self._step_event(started, RunState.COMPLETE, result, result.results))

    def fail(self, table: str, error: ShopSphereError) -> None:
        """Send that a step has failed."""
        from openlineage.client.event_v2 import RunState

        if (started := self.started_steps.pop(table, None)) is not None:
            self.failures += 1
            results = error.results if isinstance(error, ExpectationsFailed) else ()
            self._emit(lambda: self._step_event(started, RunState.FAIL, None, results, error))

    def ingested(self, source: str, result: StepResult, table: Table) -> None:
        """Send that a source was read into a bronze table; nothing if there was nothing new."""
        from openlineage.client.event_v2 import RunState
        from openlineage.client.uuid import generate_new_uuid

        if result.status == "unchanged":
            return
        self._start_run()
        run_id = str(generate_new_uuid())
        self._emit(lambda: self._ingest_event(run_id, RunState.START, source, table, None))
        self._emit(lambda: self._ingest_event(run_id, RunState.COMPLETE, source, table, result))

    def end(self, error: BaseException | None) -> None:
        """Send that the run has ended, and with it each step that has started; nothing if no step had work to do."""
        from openlineage.client.event_v2 import RunState

        state = RunState.FAIL if isinstance(error, Exception) else RunState.ABORT
        for started in self.started_steps.values():
            self._emit(partial(self._step_event, started, state, None, ()))
        if self.run_started:
            completed = RunState.FAIL if self.failures else RunState.COMPLETE
            self._emit(lambda: self._run_event(state if error is not None else completed))

    def _start_run(self) -> None:
        from openlineage.client.event_v2 import RunState

        if not self.run_started:
            self.run_started = True
            self._emit(lambda: self._run_event(RunState.START))

    def _emit(self, make_event: Callable[[], RunEvent]) -> None:
        try:
            event = make_event()
        except Exception as error:  # the client validates events; an invalid one must not fail the run
            self.sender.error = self.sender.error or type(error).__name__
        else:
            self.sender.put(event)

    def _run_event(self, state: Any) -> RunEvent:
        from openlineage.client.event_v2 import Job, RunEvent
        from openlineage.client.event_v2 import Run as OpenLineageRun

        job = Job(namespace=self.namespace, name=self.run.kind, facets=self._job_facets("DAG"))
        run = OpenLineageRun(runId=self.run.id, facets=self._run_facets(parent=False))
        at = self.run.started_at if state.value == "START" else datetime.now(UTC)
        return RunEvent(eventTime=at.isoformat(), run=run, job=job, producer=PRODUCER, eventType=state, inputs=[], outputs=[])

    def _ingest_event(self, run_id: str, state: Any, source: str, table: Table, result: StepResult | None) -> RunEvent:
        from openlineage.client.event_v2 import InputDataset, Job, RunEvent
        from openlineage.client.event_v2 import Run as OpenLineageRun

        return RunEvent(
            eventTime=now(),
            run=OpenLineageRun(runId=run_id, facets=self._run_facets()),
            job=Job(namespace=self.namespace, name=table.name, facets=self._job_facets()),
            producer=PRODUCER,
            eventType=state,
            inputs=[InputDataset(namespace=source, name=table.short_name.rsplit("__", 1)[-1])],
            outputs=[self._output(table, result, (), None)],
        )

    def _step_event(
        self,
        started: StartedStep,
        state: Any,
        result: StepResult | None,
        results: tuple[ExpectationResult, ...],
        error: ShopSphereError | None = None,
    ) -> RunEvent:
        from openlineage.client.event_v2 import InputDataset, Job, RunEvent
        from openlineage.client.event_v2 import Run as OpenLineageRun
        from openlineage.client.facet_v2 import dataset_version_dataset, error_message_run

        facets = self._run_facets()
        if error is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message=str(error), programmingLanguage="python")
        inputs = []
        for table in upstream_tables(started.step):
            facets_of_input: dict[str, Any] = {"schema": schema_facet(table)}
            if (snapshot := started.upstream_snapshots.get(table.name)) is not None:
                facets_of_input["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(snapshot))
            inputs.append(InputDataset(namespace=self.namespace, name=table.name, facets=facets_of_input))
        target = started.step.target
        return RunEvent(
            eventTime=now(),
            run=OpenLineageRun(runId=started.run_id, facets=facets),
            job=Job(namespace=self.namespace, name=target.name, facets=self._job_facets()),
            producer=PRODUCER,
            eventType=state,
            inputs=inputs,
            outputs=[self._output(target, result, results, started.step)],
        )

    def _output(self, table: Table, result: StepResult | None, results: tuple[ExpectationResult, ...], step: Step | None) -> Any:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import (
            column_lineage_dataset,
            dataset_version_dataset,
            output_statistics_output_dataset,
        )

        facets: dict[str, Any] = {"schema": schema_facet(table)}
        if step is not None:
            fields, whole = column_lineage(step, self.namespace)
            facets["columnLineage"] = column_lineage_dataset.ColumnLineageDatasetFacet(fields=fields, dataset=whole)
        if results:
            facets["dataQualityAssertions"] = assertions_facet(results)
        statistics: dict[str, Any] = {}
        if result is not None:
            if result.snapshot is not None:
                facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(result.snapshot))
            statistics["outputStatistics"] = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=result.rows_written, size=result.bytes_written
            )
        return OutputDataset(namespace=self.namespace, name=table.name, facets=facets, outputFacets=statistics)

    def _run_facets(self, parent: bool = True) -> dict[str, Any]:
        from openlineage.client.facet_v2 import parent_run, processing_engine_run

        facets: dict[str, Any] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=self.code_version, name="ShopSphere")
        }
        if parent:
            facets["parent"] = parent_run.ParentRunFacet(
                run=parent_run.Run(runId=self.run.id), job=parent_run.Job(namespace=self.namespace, name=self.run.kind)
            )
        return facets

    def _job_facets(self, kind: str = "TASK") -> dict[str, Any]:
        from openlineage.client.facet_v2 import job_type_job

        return {"jobType": job_type_job.JobTypeJobFacet(processingType="BATCH", integration="SHOPSPHERE", jobType=kind)}


@contextmanager
def emit_events(engine: Engine, run: RunRecord, code_version: Callable[[], str]) -> Iterator[LineageEvents | None]:
    """Send the events of a run. Yields None if OpenLineage is not configured, or its receiver has failed recently.

    code_version: called only if events are sent.
    """
    if not configured() or time.monotonic() < RECEIVER.paused_until:
        yield None
        return
    from openlineage.client import OpenLineageClient

    try:
        client = OpenLineageClient()
    except Exception as error:  # an invalid configuration must not fail the run
        RECEIVER.failed(f"the configuration cannot be used ({type(error).__name__}): nothing is sent")
        yield None
        return
    sender = EventSender(client)
    events = LineageEvents(sender, engine.lake.settings.catalog.name, run, code_version())
    before, engine.on_start = engine.on_start, events.start
    raised: BaseException | None = None
    try:
        yield events
    except BaseException as error:
        raised = error
        raise
    finally:
        engine.on_start = before
        events.end(raised)
        sender.finish()
        if sender.error:
            RECEIVER.failed(f"events of this run were lost, because the transport failed ({sender.error})")
        elif sender.sent:
            RECEIVER.recovered()


def now() -> str:
    """Return the current time in the format of events."""
    return datetime.now(UTC).isoformat()
