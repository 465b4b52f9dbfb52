"""Prometheus metrics of serving. Replicas share one directory, so any of them can report the sum over all."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

if directory := os.environ.get(MULTIPROCESS_VARIABLE):
    # declaring a metric opens its file, and a replica may run on another node than the one that started serving
    Path(directory).mkdir(parents=True, exist_ok=True)

LATENCY = Histogram(
    "shopsphere_request_seconds",
    "Time from the arrival of a request to the end of its response",
    ("route", "status"),
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
STALENESS = Gauge("shopsphere_staleness_seconds", "Age of the online state", multiprocess_mode="livemax")
EVENTS_AFTER_SNAPSHOT = Gauge(
    "shopsphere_events_after_snapshot", "Events held in memory since the snapshot", multiprocess_mode="livemax"
)
REJECTED_MESSAGES = Gauge(
    "shopsphere_rejected_messages", "Messages since the snapshot that are not valid events", multiprocess_mode="livemax"
)
DECISIONS = Counter("shopsphere_decisions", "Scored orders", ("role", "version", "decision"))
LOST_SCORES = Counter("shopsphere_scores_not_kept", "Scores that could not be written to their topic")
