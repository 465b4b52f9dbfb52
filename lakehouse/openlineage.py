"""OpenLineage events of a run: which step made which table from which others, how many rows, how its expectations came out.

Sent where OpenLineage's own configuration says (OPENLINEAGE_URL, OPENLINEAGE_CONFIG, OPENLINEAGE__..., openlineage.yml);
without any, nothing is sent and the client is not even imported. A receiver that is down neither ends a run nor holds it up:
events are sent beside it, and that it is away is logged once. Events hold names, types, counts and settings, never a value of a
row.
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
from lakehouse.run_history import RunRecord
from lakehouse.step import Grouped, Lookup, Step, root_names, upstream_tables
from lakehouse.table import Table

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import RunEvent

logger = logging.getLogger(__name__)
PRODUCER = "urn:shopsphere:lakehouse"
PATIENCE = 5.0
"""Seconds that the end of a run waits for the next event to be taken."""
PAUSE = 300.0
"""Seconds for which this process sends nothing to a receiver that was away."""


@dataclass
class Receiver:
    """What this process knows of the receiver of its events."""

    paused_until: float = 0.0
    """By the monotonic clock."""
    away: bool = False
    """Whether it has been said that it is away."""

    def lost(self, what: str) -> None:
        """It is away, or cannot be used: said once, and nothing is sent for a while."""
        self.paused_until = time.monotonic() + PAUSE
        if not self.away:
            logger.warning("OpenLineage: %s. It is tried again every %g minutes.", what, PAUSE / 60)
        self.away = True

    def reached(self) -> None:
        """It takes events."""
        if self.away:
            logger.warning("OpenLineage: events are received again.")
        self.away = False


RECEIVER = Receiver()


class Delivery:
    """Sends the events of a run in their order, beside it: a receiver that does not answer holds nothing up."""

    def __init__(self, client: OpenLineageClient) -> None:
        self.client = client
        self.lost = ""
        """The error of the transport, once it could not send."""
        self.sent = 0
        self._events: SimpleQueue[RunEvent | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting, self._since = 0, 0.0
        # not waited for when the process ends: it may be stuck in a request
        self._thread = threading.Thread(target=self._send, name="openlineage", daemon=True)
        self._thread.start()

    def put(self, event: RunEvent | None) -> None:
        """Send an event; None: there is none after it."""
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting += 1
        self._events.put(event)

    def _send(self) -> None:
        try:
            for event in iter(self._events.get, None):
                self.client.emit(event)
                self.sent += 1
                with self._lock:
                    self._waiting -= 1
                    self._since = time.monotonic()
        except Exception as error:  # every transport has errors of its own, and none of them is worth a run
            # nothing of the address: it may hold a key
            self.lost = type(error).__name__
        with contextlib.suppress(Exception):
            self.client.close(timeout=PATIENCE)

    def end(self) -> None:
        """Wait until everything is sent, as long as events are taken."""
        self.put(None)
        while self._thread.is_alive() and (left := self._since + PATIENCE - time.monotonic()) > 0:
            self._thread.join(left)
        if self._thread.is_alive():
            self.lost = f"no answer for {PATIENCE:g} s"


def configured() -> bool:
    """Whether OpenLineage is configured, as its client looks for it."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() == "true":
        return False
    if any(name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG") or name.startswith("OPENLINEAGE__") for name in os.environ):
        return True
    return any(path.is_file() for path in (Path("openlineage.yml"), Path("~/.openlineage/openlineage.yml").expanduser()))


@dataclass(frozen=True)
class Begun:
    """A step that has begun: its run, and the tables it reads as they were then."""

    run_id: str
    step: Step
    upstream: Mapping[str, int | None]


@dataclass
class LineageEvents:
    """The events of one run. Nothing is sent before a step has something to do."""

    delivery: Delivery
    namespace: str
    run: RunRecord
    version: str
    begun: dict[str, Begun] = field(default_factory=dict)
    announced: bool = False
    failed: int = 0
    """Steps that failed, and sources that could not be read."""

    def start(self, step: Step, target: TableHandle, upstream: Mapping[str, TableHandle]) -> None:
        """A step has something to do. Called again for another attempt: it is the same run."""
        if step.target.name in self.begun:
            return
        from openlineage.client.event_v2 import RunState
        from openlineage.client.uuid import generate_new_uuid

        self._announce()
        versions = {name: handle.snapshot.snapshot_id if handle.snapshot else None for name, handle in upstream.items()}
        begun = self.begun[step.target.name] = Begun(str(generate_new_uuid()), step, versions)
        self._emit(lambda: self._event(begun, RunState.START, None, ()))

    def complete(self, report: StepResult) -> None:
        """A step is done; nothing for one that had nothing to do."""
        from openlineage.client.event_v2 import RunState

        if (begun := self.begun.pop(report.table, None)) is not None:
            self._emit(lambda: self._event(begun, RunState.COMPLETE, report, report.results))

    def fail(self, table: str, error: ShopSphereError) -> None:
        """A step has failed."""
        from openlineage.client.event_v2 import RunState

        if (begun := self.begun.pop(table, None)) is not None:
            self.failed += 1
            results = error.results if isinstance(error, ExpectationsFailed) else ()
            self._emit(lambda: self._event(begun, RunState.FAIL, None, results, error))

    def received(self, source: str, report: StepResult, table: Table) -> None:
        """A source was read into a bronze table; nothing when there was nothing new."""
        from openlineage.client.event_v2 import RunState
        from openlineage.client.uuid import generate_new_uuid

        if report.status == "unchanged":
            return
        self._announce()
        run_id = str(generate_new_uuid())
        self._emit(lambda: self._reception(run_id, RunState.START, source, table, None))
        self._emit(lambda: self._reception(run_id, RunState.COMPLETE, source, table, report))

    def end(self, error: BaseException | None) -> None:
        """The whole run is over, and with it every step that it has begun; nothing when no step had anything to do."""
        from openlineage.client.event_v2 import RunState

        state = RunState.FAIL if isinstance(error, Exception) else RunState.ABORT
        for begun in self.begun.values():
            self._emit(partial(self._event, begun, state, None, ()))
        if self.announced:
            self._emit(lambda: self._whole(state if error is not None else RunState.FAIL if self.failed else RunState.COMPLETE))

    def _announce(self) -> None:
        from openlineage.client.event_v2 import RunState

        if not self.announced:
            self.announced = True
            self._emit(lambda: self._whole(RunState.START))

    def _emit(self, make: Callable[[], RunEvent]) -> None:
        try:
            event = make()
        except Exception as error:  # the client's own checks; no event is worth a run
            self.delivery.lost = self.delivery.lost or type(error).__name__
        else:
            self.delivery.put(event)

    def _whole(self, state: Any) -> RunEvent:
        from openlineage.client.event_v2 import Job, RunEvent
        from openlineage.client.event_v2 import Run as OpenLineageRun

        job = Job(namespace=self.namespace, name=self.run.kind, facets=self._job_facets("DAG"))
        run = OpenLineageRun(runId=self.run.id, facets=self._run_facets(parent=False))
        at = self.run.started_at if state.value == "START" else datetime.now(UTC)
        return RunEvent(eventTime=at.isoformat(), run=run, job=job, producer=PRODUCER, eventType=state, inputs=[], outputs=[])

    def _reception(self, run_id: str, state: Any, source: str, table: Table, report: StepResult | None) -> RunEvent:
        from openlineage.client.event_v2 import InputDataset, Job, RunEvent
        from openlineage.client.event_v2 import Run as OpenLineageRun

        return RunEvent(
            eventTime=now(),
            run=OpenLineageRun(runId=run_id, facets=self._run_facets()),
            job=Job(namespace=self.namespace, name=table.name, facets=self._job_facets()),
            producer=PRODUCER,
            eventType=state,
            inputs=[InputDataset(namespace=source, name=table.short_name.rsplit("__", 1)[-1])],
            outputs=[self._output(table, report, (), None)],
        )

    def _event(
        self,
        begun: Begun,
        state: Any,
        report: StepResult | None,
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
        for table in upstream_tables(begun.step):
            described: dict[str, Any] = {"schema": schema_facet(table)}
            if (snapshot := begun.upstream.get(table.name)) is not None:
                described["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(snapshot))
            inputs.append(InputDataset(namespace=self.namespace, name=table.name, facets=described))
        target = begun.step.target
        return RunEvent(
            eventTime=now(),
            run=OpenLineageRun(runId=begun.run_id, facets=facets),
            job=Job(namespace=self.namespace, name=target.name, facets=self._job_facets()),
            producer=PRODUCER,
            eventType=state,
            inputs=inputs,
            outputs=[self._output(target, report, results, begun.step)],
        )

    def _output(self, table: Table, report: StepResult | None, results: tuple[ExpectationResult, ...], step: Step | None) -> Any:
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
        measured: dict[str, Any] = {}
        if report is not None:
            if report.snapshot is not None:
                facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(report.snapshot))
            measured["outputStatistics"] = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=report.rows_written, size=report.bytes_written
            )
        return OutputDataset(namespace=self.namespace, name=table.name, facets=facets, outputFacets=measured)

    def _run_facets(self, parent: bool = True) -> dict[str, Any]:
        from openlineage.client.facet_v2 import parent_run, processing_engine_run

        facets: dict[str, Any] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=self.version, name="ShopSphere")
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
def emit_events(engine: Engine, run: RunRecord, version: Callable[[], str]) -> Iterator[LineageEvents | None]:
    """The events of a run, None where OpenLineage is not configured, or was away a moment ago. version: of the source code,
    asked for only then."""
    if not configured() or time.monotonic() < RECEIVER.paused_until:
        yield None
        return
    from openlineage.client import OpenLineageClient

    try:
        client = OpenLineageClient()
    except Exception as wrong:
        RECEIVER.lost(f"it is configured, but cannot be used ({type(wrong).__name__}): nothing is sent")
        yield None
        return
    delivery = Delivery(client)
    events = LineageEvents(delivery, engine.lake.settings.catalog.name, run, version())
    before, engine.on_start = engine.on_start, events.start
    error: BaseException | None = None
    try:
        yield events
    except BaseException as caught:
        error = caught
        raise
    finally:
        engine.on_start = before
        events.end(error)
        delivery.end()
        if delivery.lost:
            RECEIVER.lost(f"events of this run were lost, the transport failed ({delivery.lost})")
        elif delivery.sent:
            RECEIVER.reached()


def now() -> str:
    """The time, as events have it."""
    return datetime.now(UTC).isoformat()


def schema_facet(table: Table) -> Any:
    """The declared columns with what they mean."""
    from openlineage.client.facet_v2 import schema_dataset

    return schema_dataset.SchemaDatasetFacet(
        fields=[
            schema_dataset.SchemaDatasetFacetFields(name=c.name, type=str(c.type), description=c.doc, ordinal_position=n)
            for n, c in enumerate(table.columns, start=1)
        ]
    )


def column_lineage(step: Step, namespace: str) -> tuple[dict[str, Any], list[Any]]:
    """What the declarations tell: group columns come from the expressions of `keys`; every column that is read shapes the
    table somehow. How `transform` makes the other columns is code, not declared, and nothing is guessed."""
    from openlineage.client.facet_v2 import column_lineage_dataset as facet

    def input_field(table: Table, name: str, kind: str, subtype: str) -> Any:
        return facet.InputField(
            namespace=namespace,
            name=table.name,
            field=name,
            transformations=[facet.Transformation(type=kind, subtype=subtype)],
        )

    fields: dict[str, Any] = {}
    whole: dict[tuple[str, str], Any] = {}
    for read in step.reads.values():
        if isinstance(read, Grouped):
            for keys in read.keys:
                for name, expression in zip(step.target.group, keys, strict=True):
                    plain = expression.meta.is_column()
                    inputs = [
                        input_field(read.table, root, "DIRECT", "IDENTITY" if plain else "TRANSFORMATION")
                        for root in root_names(expression)
                    ]
                    known = fields.setdefault(name, facet.Fields(inputFields=[])).inputFields
                    known += [one for one in inputs if one not in known]
        columns = read.columns or tuple(column.name for column in read.table.columns)
        subtype = "JOIN" if isinstance(read, Lookup) else "GROUP_BY" if isinstance(read, Grouped) else "CONDITIONAL"
        for name in (*columns, *((read.on,) if isinstance(read, Lookup) else ())):
            whole.setdefault((read.table.name, name), input_field(read.table, name, "INDIRECT", subtype))
    return fields, list(whole.values())


def assertions_facet(results: tuple[ExpectationResult, ...]) -> Any:
    """How expectations came out."""
    from openlineage.client.facet_v2 import data_quality_assertions_dataset as facet

    return facet.DataQualityAssertionsDatasetFacet(
        assertions=[
            facet.Assertion(
                assertion=result.expectation.partition("(")[0],
                success=result.outcome == "pass",
                severity="error" if result.severity == "fail" else "warn",
                name=result.expectation,
                actual=result.detail or f"{result.violations} of {result.rows} rows",
            )
            for result in results
        ]
    )
