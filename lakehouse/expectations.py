"""Declarations: the expectations that a table's rows must meet. Frozen values and pure evaluation of frames, no I/O.

Expectations of rows (not null, unique, accepted values, range) are evaluated on the rows of the groups that a run
recomputes, while they are in memory. Expectations of tables (row count, freshness) are evaluated on the snapshot summary
and file statistics. Neither scans the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from lakehouse.errors import ShopSphereError

Severity = Literal["warn", "quarantine", "fail"]
"""warn: the violation is counted, the row is kept. quarantine: the row goes to silver.quarantine instead. fail: the snapshot
is not published."""
Bound = int | float | Decimal | datetime | None
MAX_EXAMPLES = 3
"""Keys of offending rows that a message shows."""
REASON = "__reason"
"""Added to the columns of quarantined rows. Prefixed, because a table may have a `reason` of its own."""


# The repr of these four classes is part of a step's definition fingerprint: renaming a class or a field recomputes every table.
@dataclass(frozen=True)
class NotNull:
    """Expect a value in each of these columns."""

    columns: tuple[str, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"not_null({', '.join(self.columns)})"

    def violated(self) -> pl.Expr:
        """Return an expression that is true for a violating row."""
        return pl.any_horizontal([pl.col(name).is_null() for name in self.columns])


@dataclass(frozen=True)
class Unique:
    """Expect no two rows with the same values in these columns; rows with a null among them are not compared."""

    columns: tuple[str, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"unique({', '.join(self.columns)})"

    def violated(self) -> pl.Expr:
        """Return an expression that is true for a violating row."""
        known = pl.all_horizontal([pl.col(name).is_not_null() for name in self.columns])
        return known & pl.struct(self.columns).is_duplicated()


@dataclass(frozen=True)
class Accepted:
    """Expect one of these values in the column, or null."""

    columns: tuple[str, ...]
    values: tuple[str | int | bool, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"accepted({self.columns[0]}: {', '.join(map(str, self.values))})"

    def violated(self) -> pl.Expr:
        """Return an expression that is true for a violating row."""
        return ~pl.col(self.columns[0]).is_in(list(self.values)).fill_null(True)


@dataclass(frozen=True)
class Within:
    """Expect a value between two bounds, both included, or null. A bound of None is open."""

    columns: tuple[str, ...]
    least: Bound
    most: Bound
    severity: Severity = "fail"

    def __str__(self) -> str:
        column = self.columns[0]
        if self.most is None:
            return f"within({column} >= {self.least})"
        if self.least is None:
            return f"within({column} <= {self.most})"
        return f"within({self.least} <= {column} <= {self.most})"

    def violated(self) -> pl.Expr:
        """Return an expression that is true for a violating row."""
        value = pl.col(self.columns[0])
        below = value < self.least if self.least is not None else pl.lit(False)
        above = value > self.most if self.most is not None else pl.lit(False)
        if isinstance(self.least if self.least is not None else self.most, int | float | Decimal):
            above |= value.cast(pl.Float64).is_nan()  # NaN is in no range, but polars orders it above every number
        return (below | above).fill_null(False)


@dataclass(frozen=True)
class Fresh:
    """Expect the newest value of a time column to be at most so many hours old. Always a warning: there are no newer rows
    to publish instead."""

    columns: tuple[str, ...]
    hours: float
    severity: Severity = "warn"

    def __str__(self) -> str:
        return f"fresh({self.columns[0]}: {self.hours:g} h)"


@dataclass(frozen=True)
class RowCountDrift:
    """Expect one commit to change the number of rows by at most this share. Tables below `at_least` rows are exempt."""

    share: float
    at_least: int = 1_000
    severity: Severity = "warn"
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"row_count_drift({self.share:.0%})"


RowExpectation = NotNull | Unique | Accepted | Within
Expectation = RowExpectation | Fresh | RowCountDrift


def not_null(*columns: str, severity: Severity = "fail") -> NotNull:
    """Expect a value in each of these columns."""
    return NotNull(columns, severity)


def unique(*columns: str, severity: Severity = "fail") -> Unique:
    """Expect no two rows with the same values in these columns, which must include the table's group columns: rows are
    evaluated group by group."""
    return Unique(columns, severity)


def accepted(column: str, values: Iterable[str | int | bool], *, severity: Severity = "fail") -> Accepted:
    """Expect one of these values in the column, or null."""
    return Accepted((column,), tuple(sorted(values)), severity)


def within(column: str, least: Bound, most: Bound, *, severity: Severity = "fail") -> Within:
    """Expect a value between two bounds, both included, or null. A bound of None is open."""
    return Within((column,), least, most, severity)


def fresh(column: str, *, hours: float) -> Fresh:
    """Expect the newest value of a time column to be at most so many hours old; warn when it is older."""
    return Fresh((column,), hours)


def row_count_drift(share: float, *, at_least: int = 1_000, severity: Severity = "warn") -> RowCountDrift:
    """Expect one commit to change the number of rows by at most this share."""
    return RowCountDrift(share, at_least, severity)


def declaration_error(expectation: Expectation, group: Sequence[str], types: Mapping[str, pa.DataType]) -> str:
    """Return the error in an expectation's declaration, or ''. `group` and `types` are the table's group columns and column
    types."""
    if missing := [name for name in expectation.columns if name not in types]:
        return f"{expectation}: no column {missing}. Existing columns: {sorted(types)}"
    if isinstance(expectation, Fresh) and not pa.types.is_temporal(types[expectation.columns[0]]):
        return f"{expectation}: {expectation.columns[0]} is {types[expectation.columns[0]]}; use a date or timestamp column"
    if isinstance(expectation, Unique) and not set(group) <= set(expectation.columns):
        return f"{expectation}: rows are evaluated group by group, so include the table's group columns {list(group)}"
    if isinstance(expectation, RowCountDrift) and expectation.severity == "quarantine":
        return f"{expectation}: a row count cannot be quarantined; use severity warn or fail"
    return ""


@dataclass(frozen=True)
class ExpectationResult:
    """The outcome of one expectation.

    rows              rows evaluated: those of the recomputed groups
    violations        how many of them violate the expectation
    examples          keys of a few offending rows
    detail            replaces the counts in messages
    total_violations  violating rows in the whole table, evaluated now or before; None where they were not counted
    """

    table: str
    expectation: str
    severity: Severity
    outcome: Literal["pass", "warn", "quarantine", "fail"]
    _: KW_ONLY
    rows: int
    violations: int
    examples: tuple[str, ...] = ()
    detail: str = ""
    total_violations: int | None = None

    def __str__(self) -> str:
        shown = f", for example {'; '.join(self.examples)}" if self.examples else ""
        counts = self.detail or f"{self.violations:,} of {self.rows:,} rows violate it"
        total = self.total_violations
        others = f", {total:,} in the whole table" if total and total > self.violations else ""
        return f"{self.expectation}: {counts}{others}{shown}"


@dataclass(frozen=True)
class EvaluatedRows:
    """Rows split by their expectations, and the result of each expectation.

    quarantined  has the extra column `REASON`, which names the violated expectations and never shows a value
    """

    accepted: pl.DataFrame
    quarantined: pl.DataFrame
    results: tuple[ExpectationResult, ...] = ()

    @property
    def failed(self) -> bool:
        """Return whether an expectation of severity fail is violated."""
        return any(result.outcome == "fail" for result in self.results)


def evaluate(table: str, expectations: Sequence[Expectation], rows: pl.DataFrame, shown: Sequence[str]) -> EvaluatedRows:
    """Evaluate the expectations of rows. `shown`: the columns that examples show; none that holds personal data."""
    rules = [rule for rule in expectations if isinstance(rule, RowExpectation)]
    if not rules:
        return EvaluatedRows(rows, _without_reason(rows.clear()))
    violated = rows.select(rule.violated().alias(str(number)) for number, rule in enumerate(rules))
    results = tuple(
        _result(table, rule, rows, violated[str(number)].fill_null(False), shown) for number, rule in enumerate(rules)
    )
    if not any(result.outcome == "quarantine" for result in results):
        return EvaluatedRows(rows, _without_reason(rows.clear()), results)
    quarantining = [(rule, str(number)) for number, rule in enumerate(rules) if rule.severity == "quarantine"]
    bad = violated.select(pl.any_horizontal([name for _, name in quarantining])).to_series()
    texts = [pl.when(pl.col(name)).then(pl.lit(f"breaks {rule}")) for rule, name in quarantining]
    reason = violated.select(pl.concat_str(texts, separator="; ", ignore_nulls=True).alias(REASON))
    return EvaluatedRows(rows.filter(~bad), pl.concat([rows, reason], how="horizontal").filter(bad), results)


def _without_reason(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(pl.lit(None, pl.String).alias(REASON))


def _result(table: str, rule: RowExpectation, rows: pl.DataFrame, violated: pl.Series, shown: Sequence[str]) -> ExpectationResult:
    count = int(violated.sum() or 0)
    # the smallest keys, so that any order of rows shows the same examples
    keys = rows.filter(violated).select(shown).unique().sort(shown).head(MAX_EXAMPLES) if count else rows.clear()
    return ExpectationResult(
        table,
        str(rule),
        rule.severity,
        rule.severity if count else "pass",
        rows=rows.height,
        violations=count,
        examples=tuple(", ".join(f"{name}={value}" for name, value in row.items()) for row in keys.to_dicts()),
    )


def count_violations(expectations: Sequence[Expectation], rows: pl.DataFrame) -> dict[str, int]:
    """Return how many rows violate each expectation of rows that does not quarantine."""
    rules = [rule for rule in expectations if isinstance(rule, RowExpectation) and rule.severity != "quarantine"]
    if not rows.height or not rules:
        return {str(rule): 0 for rule in rules}
    counts = rows.select(rule.violated().sum().alias(str(number)) for number, rule in enumerate(rules)).row(0)
    return {str(rule): int(count or 0) for rule, count in zip(rules, counts, strict=True)}


def total_violations_after(
    before: Mapping[str, int] | None, replaced: Mapping[str, int], results: Iterable[ExpectationResult]
) -> dict[str, int] | None:
    """Return how many rows of the whole table violate each expectation after some groups were recomputed.

    before    the same counts before; None when they are unknown, and then so is the result
    replaced  violations among the rows that these groups had before
    """
    found = {result.expectation: result.violations for result in results if result.severity != "quarantine"}
    if before is None:
        return None
    return dict(before) | {name: before.get(name, 0) - replaced.get(name, 0) + count for name, count in found.items()}


def with_total_violations(result: ExpectationResult, totals: Mapping[str, int] | None) -> ExpectationResult:
    """Add the violations of the whole table to a result. Violating rows outside the recomputed groups cause a warning,
    whatever the severity: they were published before, with a warning or by hand."""
    count = totals.get(result.expectation) if totals is not None else None
    return replace(result, total_violations=count, outcome="warn" if count and result.outcome == "pass" else result.outcome)


def published_by_hand(result: ExpectationResult) -> ExpectationResult:
    """Turn a failure into a warning: the staged snapshot was published by hand."""
    if result.outcome != "fail":
        return result
    detail = f"{result.violations:,} of {result.rows:,} rows violate it, published by hand"
    return replace(result, outcome="warn", detail=detail)


def combine_results(results: Iterable[ExpectationResult]) -> tuple[ExpectationResult, ...]:
    """Combine the results for disjoint parts of a table into those of the whole."""
    found: dict[str, ExpectationResult] = {}
    for part in results:
        before = found.get(part.expectation)
        if before is None:
            found[part.expectation] = part
            continue
        violations = before.violations + part.violations
        found[part.expectation] = ExpectationResult(
            part.table,
            part.expectation,
            part.severity,
            part.severity if violations else "pass",
            rows=before.rows + part.rows,
            violations=violations,
            examples=tuple(sorted({*before.examples, *part.examples})[:MAX_EXAMPLES]),
        )
    return tuple(found.values())


def evaluate_row_count_drift(table: str, rule: RowCountDrift, before: int | None, after: int) -> ExpectationResult:
    """Compare a number of rows with the one before. A table that had no rows, or few, always passes."""
    share = abs(after - before) / before if before else 0.0
    bad = before is not None and max(before, after) >= rule.at_least and share > rule.share
    detail = f"{after:,} rows" if not before else f"{before:,} rows before, {after:,} now ({share:.0%} changed)"
    outcome = rule.severity if bad else "pass"
    return ExpectationResult(table, str(rule), rule.severity, outcome, rows=after, violations=int(bad), detail=detail)


def evaluate_freshness(table: str, rule: Fresh, newest: datetime | None, now: datetime) -> ExpectationResult:
    """Compare the newest value of a time column with the clock."""
    age = (now - newest).total_seconds() / 3600 if newest else None
    bad = age is not None and age > rule.hours
    detail = "no value yet" if newest is None or age is None else f"newest {newest:%Y-%m-%d %H:%M} UTC, {max(age, 0):,.1f} h old"
    outcome: Literal["warn", "pass"] = "warn" if bad else "pass"
    return ExpectationResult(table, str(rule), rule.severity, outcome, rows=0, violations=int(bad), detail=detail)


STORED_TOTAL = "standing"
"""The key of `total_violations` in stored snapshots."""


def results_to_json(results: Sequence[ExpectationResult]) -> str:
    """Serialize results for a snapshot summary."""
    items = [asdict(result) for result in results]
    for item in items:
        item[STORED_TOTAL] = item.pop("total_violations")
    return json.dumps(items, separators=(",", ":"))


def results_from_json(text: str | None) -> tuple[ExpectationResult, ...]:
    """Parse the results that `results_to_json` serialized."""
    items: list[dict[str, Any]] = json.loads(text or "[]")
    for item in items:
        item["examples"] = tuple(item["examples"])
        item["total_violations"] = item.pop(STORED_TOTAL, None)
    return tuple(ExpectationResult(**item) for item in items)


class ExpectationsFailed(ShopSphereError):
    """A snapshot violates an expectation of severity fail and was not published. Readers keep the previous snapshot.

    branch  the branch of the staged snapshot, where it can be inspected and published by hand; '' when none was staged
    """

    def __init__(self, table: str, results: Sequence[ExpectationResult], branch: str = "") -> None:
        self.table, self.results, self.branch = table, tuple(results), branch
        violated = "; ".join(str(result) for result in results if result.outcome == "fail")
        staged = f" The staged snapshot is on branch '{branch}'; if its rows are right, publish it." if branch else ""
        super().__init__(
            f"{table}: not published, readers keep the previous rows. {violated}. "
            f"Correct the rows at their source and run again.{staged}",
            remedy="publish" if branch else "run",
            remedy_tables=(table,),
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ExpectationsFailed, (self.table, self.results, self.branch))
