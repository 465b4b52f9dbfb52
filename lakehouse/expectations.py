"""Declarations: what a table's rows must be like. Frozen values and pure judgement of frames, no I/O.

What of rows (not null, unique, accepted values, range) is judged on the rows of the groups that a run recomputes, while
they are in memory; what of tables (row count, freshness) on what the snapshot says of itself. Nothing is scanned for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from lakehouse.errors import ShopSphereError

Severity = Literal["warn", "quarantine", "fail"]
"""warn: counted, the row is kept; quarantine: the row goes to silver.quarantine instead; fail: the build is not published."""
Bound = int | float | Decimal | datetime | None
EXAMPLES = 3
"""Keys of offending rows that a message names."""
REASON = "__reason"
"""Beside the columns of rows that are held back: a table may have a `reason` of its own."""


@dataclass(frozen=True)
class NotNull:
    """These columns always have a value."""

    columns: tuple[str, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"not_null({', '.join(self.columns)})"

    def violated(self) -> pl.Expr:
        """True for a row that breaks it."""
        return pl.any_horizontal([pl.col(name).is_null() for name in self.columns])


@dataclass(frozen=True)
class Unique:
    """No two rows have the same values here; rows with a null among them are not compared."""

    columns: tuple[str, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"unique({', '.join(self.columns)})"

    def violated(self) -> pl.Expr:
        """True for a row that breaks it."""
        known = pl.all_horizontal([pl.col(name).is_not_null() for name in self.columns])
        return known & pl.struct(self.columns).is_duplicated()


@dataclass(frozen=True)
class Accepted:
    """The column has one of these values, or null."""

    columns: tuple[str, ...]
    values: tuple[str | int | bool, ...]
    severity: Severity = "fail"

    def __str__(self) -> str:
        return f"accepted({self.columns[0]}: {', '.join(map(str, self.values))})"

    def violated(self) -> pl.Expr:
        """True for a row that breaks it."""
        return ~pl.col(self.columns[0]).is_in(list(self.values)).fill_null(True)


@dataclass(frozen=True)
class Within:
    """The column's value lies between two bounds, both included, or is null. A bound of None: there is none."""

    columns: tuple[str, ...]
    least: Bound
    most: Bound
    severity: Severity = "fail"

    def __str__(self) -> str:
        if self.most is None:
            return f"within({self.columns[0]} >= {self.least})"
        return f"within({self.columns[0]} <= {self.most})" if self.least is None else (
            f"within({self.least} <= {self.columns[0]} <= {self.most})"
        )  # fmt: skip

    def violated(self) -> pl.Expr:
        """True for a row that breaks it."""
        value = pl.col(self.columns[0])
        below = value < self.least if self.least is not None else pl.lit(False)
        above = value > self.most if self.most is not None else pl.lit(False)
        if isinstance(self.least if self.least is not None else self.most, int | float | Decimal):
            above |= value.cast(pl.Float64).is_nan()  # no number is in no range; polars has it above all others
        return (below | above).fill_null(False)


@dataclass(frozen=True)
class Fresh:
    """The newest value of a time column is at most so many hours old. Always a warning: what there is stays the newest."""

    columns: tuple[str, ...]
    hours: float
    severity: Severity = "warn"

    def __str__(self) -> str:
        return f"fresh({self.columns[0]}: {self.hours:g} h)"


@dataclass(frozen=True)
class RowCountDrift:
    """One commit changes the number of rows by at most this share of them; tables below `at_least` rows may do as they like."""

    share: float
    at_least: int = 1_000
    severity: Severity = "warn"
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"row_count_drift({self.share:.0%})"


OfRows = NotNull | Unique | Accepted | Within
Expectation = OfRows | Fresh | RowCountDrift


def not_null(*columns: str, severity: Severity = "fail") -> NotNull:
    """These columns always have a value."""
    return NotNull(columns, severity)


def unique(*columns: str, severity: Severity = "fail") -> Unique:
    """No two rows have the same values here. The table's group must be among the columns: rows are judged by group."""
    return Unique(columns, severity)


def accepted(column: str, values: Iterable[str | int | bool], *, severity: Severity = "fail") -> Accepted:
    """The column has one of these values, or null."""
    return Accepted((column,), tuple(sorted(values)), severity)


def within(column: str, least: Bound, most: Bound, *, severity: Severity = "fail") -> Within:
    """The column's value lies between two bounds, both included, or is null. A bound of None: there is none."""
    return Within((column,), least, most, severity)


def fresh(column: str, *, hours: float) -> Fresh:
    """The newest value of a time column is at most so many hours old; a warning when it is not."""
    return Fresh((column,), hours)


def row_count_drift(share: float, *, at_least: int = 1_000, severity: Severity = "warn") -> RowCountDrift:
    """One commit changes the number of rows by at most this share of them."""
    return RowCountDrift(share, at_least, severity)


def mistake(expectation: Expectation, group: Sequence[str], types: Mapping[str, pa.DataType]) -> str:
    """What is wrong with a declaration; '' when nothing is. types: of the table's columns."""
    if missing := [name for name in expectation.columns if name not in types]:
        return f"{expectation}: no column {missing}. Existing columns: {sorted(types)}"
    if isinstance(expectation, Fresh) and not pa.types.is_temporal(types[expectation.columns[0]]):
        return f"{expectation}: {expectation.columns[0]} is {types[expectation.columns[0]]}; give a date or timestamp column"
    if isinstance(expectation, Unique) and not set(group) <= set(expectation.columns):
        return (
            f"{expectation}: rows are judged by group, so the group's columns {list(group)} must be among those that are unique"
        )
    if isinstance(expectation, RowCountDrift) and expectation.severity == "quarantine":
        return f"{expectation}: a number of rows cannot be quarantined; warn or fail"
    return ""


@dataclass(frozen=True)
class Result:
    """How one expectation came out."""

    table: str
    expectation: str
    severity: Severity
    outcome: Literal["pass", "warn", "quarantine", "fail"]
    rows: int
    """Rows that were judged: those of the groups that were recomputed."""
    violations: int
    examples: tuple[str, ...] = ()
    """Keys of a few offending rows."""
    detail: str = ""
    standing: int | None = None
    """Rows of the whole table that break it, judged now or before; None where they were not counted."""

    def __str__(self) -> str:
        shown = f", for example {'; '.join(self.examples)}" if self.examples else ""
        told = self.detail or f"{self.violations:,} of {self.rows:,} rows break it"
        others = f", {self.standing:,} in the whole table" if self.standing and self.standing > self.violations else ""
        return f"{self.expectation}: {told}{others}{shown}"


@dataclass(frozen=True)
class Judged:
    """Rows that may be written, those to hold back, and how each expectation came out."""

    kept: pl.DataFrame
    held: pl.DataFrame
    """With `REASON`: what is wrong with the row, never a value."""
    results: tuple[Result, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether an expectation of severity fail does not hold."""
        return any(result.outcome == "fail" for result in self.results)


def judge(
    table: str, expectations: Sequence[Expectation], rows: pl.DataFrame, named_by: Sequence[str], *, withhold: bool = True
) -> Judged:
    """Judge rows. named_by: the columns that examples show, so no personal ones. withhold=False: hold no row back."""
    rules = [rule for rule in expectations if isinstance(rule, OfRows)]
    nothing = rows.clear().with_columns(pl.lit(None, pl.String).alias(REASON))
    if not rules:
        return Judged(rows, nothing)
    marks = [f"__{number}" for number in range(len(rules))]
    broken = rows.select(rule.violated().alias(mark) for rule, mark in zip(rules, marks, strict=True))
    counts = broken.sum().row(0) if rows.height else [0] * len(rules)
    results = []
    for rule, mark, count in zip(rules, marks, counts, strict=True):
        violations = int(count or 0)
        # the smallest keys, so that any order of rows names the same
        examples = (
            rows.filter(broken[mark]).select(named_by).unique().sort(named_by).head(EXAMPLES) if violations else rows.clear()
        )
        shown = tuple(", ".join(f"{name}={value}" for name, value in row.items()) for row in examples.to_dicts())
        outcome = rule.severity if violations else "pass"
        results.append(Result(table, str(rule), rule.severity, outcome, rows.height, violations, shown))
    holding = [(rule, mark) for rule, mark in zip(rules, marks, strict=True) if rule.severity == "quarantine"]
    if not (withhold and holding and any(result.outcome == "quarantine" for result in results)):
        return Judged(rows, nothing, tuple(results))
    bad = broken.select(pl.any_horizontal([mark for _, mark in holding])).to_series()
    texts = [pl.when(pl.col(mark)).then(pl.lit(f"breaks {rule}")) for rule, mark in holding]
    reason = broken.select(pl.concat_str(texts, separator="; ", ignore_nulls=True).alias(REASON))
    return Judged(rows.filter(~bad), pl.concat([rows, reason], how="horizontal").filter(bad), tuple(results))


def violations(expectations: Sequence[Expectation], rows: pl.DataFrame) -> dict[str, int]:
    """How many rows break each expectation of rows that are kept nevertheless."""
    rules = [rule for rule in expectations if isinstance(rule, OfRows) and rule.severity != "quarantine"]
    if not rows.height or not rules:
        return {str(rule): 0 for rule in rules}
    counts = rows.select(rule.violated().sum().alias(str(number)) for number, rule in enumerate(rules)).row(0)
    return {str(rule): int(count or 0) for rule, count in zip(rules, counts, strict=True)}


def standing_after(before: Mapping[str, int] | None, gone: Mapping[str, int], results: Iterable[Result]) -> dict[str, int] | None:
    """Rows of a table that break each expectation after some of its groups were judged; None when nobody knows how many did
    before. gone: of the rows that these groups had."""
    found = {result.expectation: result.violations for result in results if result.severity != "quarantine"}
    if before is None:
        return None
    return dict(before) | {name: before.get(name, 0) - gone.get(name, 0) + count for name, count in found.items()}


def with_standing(result: Result, standing: Mapping[str, int] | None) -> Result:
    """A result with what breaks it in the whole table. Rows that were not judged now are warned of, whatever the severity:
    they were published before, by a warning or by hand."""
    count = standing.get(result.expectation) if standing is not None else None
    return replace(result, standing=count, outcome="warn" if count and result.outcome == "pass" else result.outcome)


def by_hand(result: Result) -> Result:
    """A result that has refused a build, when the build was published all the same."""
    if result.outcome != "fail":
        return result
    return replace(result, outcome="warn", detail=f"{result.violations:,} of {result.rows:,} rows break it, published by hand")


def joined(results: Iterable[Result]) -> tuple[Result, ...]:
    """The results of several parts of a table as those of the whole."""
    found: dict[str, Result] = {}
    for part in results:
        before = found.get(part.expectation)
        if before is None:
            found[part.expectation] = part
            continue
        violations = before.violations + part.violations
        found[part.expectation] = Result(
            part.table,
            part.expectation,
            part.severity,
            part.severity if violations else "pass",
            before.rows + part.rows,
            violations,
            tuple(sorted({*before.examples, *part.examples})[:EXAMPLES]),
        )
    return tuple(found.values())


def drift(table: str, rule: RowCountDrift, before: int | None, after: int) -> Result:
    """Judge a number of rows against the one before; a table that had none, or few, has nothing to be compared with."""
    share = abs(after - before) / before if before else 0.0
    bad = before is not None and max(before, after) >= rule.at_least and share > rule.share
    told = f"{after:,} rows" if not before else f"{before:,} rows before, {after:,} now ({share:.0%} changed)"
    return Result(table, str(rule), rule.severity, rule.severity if bad else "pass", after, int(bad), (), told)


def freshness(table: str, rule: Fresh, newest: datetime | None, now: datetime) -> Result:
    """Judge the newest value of a column against a clock."""
    age = (now - newest).total_seconds() / 3600 if newest else None
    bad = age is not None and age > rule.hours
    told = "no value yet" if newest is None or age is None else f"newest {newest:%Y-%m-%d %H:%M} UTC, {max(age, 0):,.1f} h old"
    return Result(table, str(rule), rule.severity, "warn" if bad else "pass", 0, int(bad), (), told)


def as_text(results: Sequence[Result]) -> str:
    """Results as JSON, for a snapshot's summary."""
    return json.dumps([asdict(result) for result in results], separators=(",", ":"))


def from_text(text: str | None) -> tuple[Result, ...]:
    """What `as_text` wrote."""
    found: list[dict[str, Any]] = json.loads(text or "[]")
    return tuple(Result(**{**item, "examples": tuple(item["examples"])}) for item in found)


class ExpectationsFailed(ShopSphereError):
    """A build broke an expectation of severity fail and was not published; readers still have the one before."""

    def __init__(self, table: str, results: Sequence[Result], branch: str = "") -> None:
        self.table, self.results, self.branch = table, tuple(results), branch
        broken = "; ".join(str(result) for result in results if result.outcome == "fail")
        look = f"Look at the build: python -m app sql \"SELECT * FROM {table} FOR VERSION AS OF '{branch}'\". " if branch else ""
        accept = f", or, if the build is right, `python -m app publish {table}`" if branch else ""
        super().__init__(
            f"{table}: not published, readers keep the rows of before. {broken}. {look}"
            f"Correct the rows at their source and run again{accept}."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ExpectationsFailed, (self.table, self.results, self.branch))
