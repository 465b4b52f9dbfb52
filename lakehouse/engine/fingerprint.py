"""The definition fingerprint of a step."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from lakehouse.expectations import RowExpectation
from lakehouse.step import Context, Step


def definition_fingerprint(step: Step, context: Context) -> str:
    """Return a hash of all that defines a table's rows beside its upstream rows: settings, columns, key, expectations.

    A table whose stored fingerprint differs is recomputed in full. Expectations are part of it because they decide which
    rows are quarantined, and because a new one must be evaluated on every row.
    """
    columns = [(column.name, str(column.type)) for column in step.target.columns]
    layout = [step.target.key, step.target.group, step.target.tracked]
    own: list[Any] = [step.parameters] if step.parameters else []
    own += [str((rule, rule.severity)) for rule in step.target.rules if isinstance(rule, RowExpectation)]
    return hashlib.sha256(repr((asdict(context), columns, layout, *own)).encode()).hexdigest()[:16]
