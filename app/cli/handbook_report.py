"""Runs the Fraud Detection Handbook's protocol and prints its results next to the published ones."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from app.cli.output import Output
from ml.evaluation import handbook

FILE = "handbook.parquet"


def run_handbook(output: Output, data: Path) -> handbook.HandbookResult:
    """Run the protocol on `data` (the file, or its directory) and print the results."""
    started = time.monotonic()
    path = data / FILE if data.is_dir() else data
    with output.progress() as show:
        total = len(handbook.TEST_WEEKS)
        done: list[handbook.HandbookWeek] = []

        def seen(week: handbook.HandbookWeek) -> None:
            done.append(week)
            show("test weeks", len(done), total)

        show("test weeks", 0, total)
        outcome = handbook.run(path, on_week=seen)
    if output.as_json:
        summary = {"mean": asdict(outcome.mean), "short_of_target": outcome.short_of_target, "gate": outcome.verdict.summary()}
        output.json({**asdict(outcome), **summary, "seconds": time.monotonic() - started})
        return outcome
    output.table(handbook.HEADINGS, handbook.table(outcome))
    intervals = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in outcome.spread.items())
    output.say(f"\n95% interval of the mean over the weeks, transactions resampled: {intervals}.")
    comparison = "beaten on all three metrics" if outcome.beats_published else "NOT beaten on all three metrics"
    output.say(f"The book's XGBoost is {comparison}.")
    if outcome.reaches_target:
        output.say("The target is reached.")
    else:
        gaps = ", ".join(f"{name} by {gap:.3f}" for name, gap in outcome.short_of_target.items())
        output.say(f"The target is NOT reached: short in {gaps}.")
    if outcome.suggests_leak:
        output.say("Average precision is above that of an oracle that knows the simulator: look for a leak.")
    output.table(
        ("check", "passed", "measured"),
        [(check.name, check.passed, check.text) for check in outcome.verdict.checks],
        title="Promotion gate, last week's model",
    )
    output.say(f"\nDone in {time.monotonic() - started:.0f} s.")
    return outcome
