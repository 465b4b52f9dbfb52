"""Prints results: tables and progress bars on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from lakehouse.json_values import to_json_value

ShowProgress = Callable[[str, int, int], None]
"""show(label, done, total)."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 control characters, and those that change the direction of text."""


def text(value: Any) -> str:
    """Return a value as the text of a table cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, Decimal):
        return f"{value:,f}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds").replace("+00:00", "")
    return printable(str(to_json_value(value)))


def printable(line: str) -> str:
    """Return text with its control characters escaped: in data from outside they could drive the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


@dataclass(frozen=True)
class Output:
    """Prints results on standard output and progress on standard error."""

    as_json: bool = False

    @property
    def interactive(self) -> bool:
        """Whether progress is shown on a terminal."""
        return sys.stderr.isatty() and not self.as_json

    def json(self, value: Any) -> None:
        """Print one JSON value."""
        print(json.dumps(to_json_value(value), ensure_ascii=False), flush=True)

    def say(self, line: str = "") -> None:
        """Print a line; nothing in JSON mode."""
        if not self.as_json:
            print(line, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """Print rows as a table; nothing in JSON mode."""
        if self.as_json:
            return
        if title:
            print(f"\n{title}")
        right_aligned = [all(_is_number(row[n]) or row[n] is None for row in rows) for n in range(len(columns))]
        cells = [[text(value) for value in row] for row in rows]
        if sys.stdout.isatty():
            _print_on_terminal(columns, cells, right_aligned)
        else:
            _print_plain(columns, cells, right_aligned)

    @contextmanager
    def progress(self) -> Iterator[ShowProgress]:
        """Yield a callback that shows progress: bars on a terminal, one line per label elsewhere, nothing in JSON mode."""
        if self.as_json:
            yield lambda label, done, total: None
        elif self.interactive:
            with _progress_bars() as show:
                yield show
        else:
            yield _progress_lines()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _print_on_terminal(columns: Sequence[str], cells: Sequence[Sequence[str]], right_aligned: Sequence[bool]) -> None:
    grid = RichTable(box=None, pad_edge=False, header_style="bold")
    for name, right in zip(columns, right_aligned, strict=True):
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        grid.add_row(*row)
    Console().print(grid, markup=False)


def _print_plain(columns: Sequence[str], cells: Sequence[Sequence[str]], right_aligned: Sequence[bool]) -> None:
    widths = [max([len(name), *(len(row[n]) for row in cells)]) for n, name in enumerate(columns)]
    for line in [columns, *cells]:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, right_aligned, strict=True)
        ]
        print("  ".join(padded).rstrip())
    sys.stdout.flush()


def _progress_lines() -> ShowProgress:
    started: set[str] = set()

    def show(label: str, done: int, total: int) -> None:
        if label not in started:
            started.add(label)
            print(f"  {label} ...", file=sys.stderr, flush=True)

    return show


@contextmanager
def _progress_bars() -> Iterator[ShowProgress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total or 1)
            # hide finished bars: only the current work is of interest
            bars.update(tasks[label], completed=done, total=total or 1, visible=done < (total or 1))

        yield show
