"""Finishes interrupted erasures before `run` and `maintain` continue."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from app.cli.errors import describe, report
from app.cli.output import Output
from lakehouse.unforeseen_errors import unforeseen_error

if TYPE_CHECKING:
    from lakehouse.engine.engine import Engine


def finish_erasures(engine: Engine, output: Output, *, keep_going: bool = False) -> bool:
    """Finish the erasures that an interrupted `erase` left behind and print their receipts on standard error.

    Return False when an erasure cannot be finished yet because rows fail an expectation: only a run can read their
    correction, so the caller continues. After an unforeseen exception it continues too.
    keep_going: return False on any other error as well instead of raising it.
    """
    from app.cli.erasure_receipt import receipt_lines
    from app.erasure import erasure_context
    from lakehouse.expectations import ExpectationsFailed
    from pipelines.privacy.erase import finish_pending
    from pipelines.runner import expected_error

    try:
        with output.progress() as show:
            receipts = finish_pending(erasure_context(engine, show))
    except ExpectationsFailed as error:
        print(f"error: An erasure is pending and cannot be finished yet. {describe(error)}", file=sys.stderr, flush=True)
        return False
    except Exception as error:
        expected = expected_error(error)
        if expected is not None and not keep_going:
            raise
        report(expected or unforeseen_error("A pending erasure", error))
        return False
    for receipt in receipts:
        for line in receipt_lines(receipt):
            print(line, file=sys.stderr)
    return True
