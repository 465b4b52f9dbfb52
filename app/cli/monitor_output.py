"""`python -m app monitor`: compare live orders with the champion's reference and print the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.cli.output import Output
from ml.evaluation.drift import STATE_WORDS, Distance, Drift
from ml.evaluation.monitor import MonitorResult, MonitorSettings, monitor
from pipelines.settings import Settings

EXIT_DRIFTED = 3
"""Exit code when the scores, a feature or the precision has drifted."""
MAX_FEATURES = 10


def monitor_and_print(
    output: Output, settings: Settings, options: MonitorSettings | None = None, report: Path | None = None
) -> int:
    """Compare, write the report page and print the result. Return the exit code: 0, or EXIT_DRIFTED."""
    with output.progress() as progress:
        result = monitor(settings, options, report, progress)
    print_drift(output, result)
    return EXIT_DRIFTED if result.drift.alarms else 0


def print_drift(output: Output, result: MonitorResult) -> None:
    """Print the largest distances, the realised precision, and the check of the served scores."""
    drift, served = result.drift, result.served
    if output.as_json:
        output.json({**drift_json(drift), "served": asdict(served), "model": result.model, "report": str(result.report)})
        return
    output.say(f"{result.model}: {drift.orders:,} orders from {drift.since:%Y-%m-%d} to {drift.until:%Y-%m-%d}.")
    output.table(
        ("score or feature", "PSI", "largest by chance", "state"),
        [
            (one.name, f"{one.psi:.3f}", f"{one.chance:.3f}", STATE_WORDS[one.state])
            for one in (drift.score, *drift.features[:MAX_FEATURES])
        ],
    )
    realised = drift.realised
    if realised is not None and realised.reviewed:
        output.say(
            f"Precision of {realised.reviewed:,} reviewed orders with a mature label: {realised.precision:.3f} "
            f"({realised.low:.3f} to {realised.high:.3f}), expected {realised.promised:.3f}: {STATE_WORDS[realised.state]}."
        )
    output.say(served.in_words)
    if served.features:
        output.table(
            ("feature served with another value", "orders", "largest difference", "cause"),
            [(one.name, one.orders, one.largest, one.cause) for one in served.features[:MAX_FEATURES]],
        )
    output.say("Drift: " + ", ".join(drift.alarms) + "." if drift.alarms else "No drift.")
    output.say(f"Report: {result.report}")


def drift_json(drift: Drift) -> dict[str, Any]:
    """Return the drift as JSON values."""

    def distance(one: Distance) -> dict[str, Any]:
        return {"name": one.name, "psi": one.psi, "chance": one.chance, "state": one.state}

    return {
        "since": drift.since,
        "until": drift.until,
        "orders": drift.orders,
        "score": distance(drift.score),
        "features": [distance(one) for one in drift.features],
        "realised": asdict(drift.realised) if drift.realised else None,
        "alarms": list(drift.alarms),
    }
