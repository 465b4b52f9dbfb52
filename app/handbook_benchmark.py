"""`python -m app benchmark handbook`: the published protocol, with our figures beside the published ones."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from app.output import Output
from ml import handbook

FILE = "handbook.parquet"


def run_handbook(output: Output, data: Path) -> handbook.Outcome:
    """Run the protocol on `data` (the file, or the directory that has it), and print the figures."""
    started = time.monotonic()
    path = data / FILE if data.is_dir() else data
    with output.progress() as show:
        total = len(handbook.TEST_WEEKS)
        done: list[handbook.Week] = []

        def seen(week: handbook.Week) -> None:
            done.append(week)
            show("test weeks", len(done), total)

        show("test weeks", 0, total)
        outcome = handbook.run(path, seen=seen)
    if output.as_json:
        output.json({**asdict(outcome), "seconds": time.monotonic() - started})
        return outcome
    output.table(handbook.HEADINGS, handbook.table(outcome))
    output.say(f"\nDone in {time.monotonic() - started:.0f} s.")
    return outcome
