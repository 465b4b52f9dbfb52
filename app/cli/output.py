"""What people and programs see: tables and progress on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
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


def text(value: Any) -> str:
    """A value in a cell."""
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
    return str(to_json_value(value))


@dataclass(frozen=True)
class Output:
    """Where results go: standard output; progress goes to standard error."""

    as_json: bool = False

    @property
    def interactive(self) -> bool:
        """Whether a person watches."""
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
        numeric = [
            all((isinstance(row[n], int | float | Decimal) and not isinstance(row[n], bool)) or row[n] is None for row in rows)
            for n in range(len(columns))
        ]
        if sys.stdout.isatty():
            grid = RichTable(box=None, pad_edge=False, header_style="bold")
            for name, right in zip(columns, numeric, strict=True):
                grid.add_column(name, justify="right" if right else "left", overflow="fold")
            for row in rows:
                grid.add_row(*(text(value) for value in row))
            Console().print(grid, markup=False)
            return
        cells = [[text(value) for value in row] for row in rows]
        widths = [max([len(name), *(len(row[n]) for row in cells)]) for n, name in enumerate(columns)]
        for line in [list(columns), *cells]:
            print(
                "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)).rstrip()
            )
        sys.stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """progress(what, done, total): bars on a terminal, a line for each beginning elsewhere, nothing in JSON mode."""
        if self.as_json:
            yield lambda what, done, total: None
        elif not self.interactive:
            begun: set[str] = set()

            def line(what: str, done: int, total: int) -> None:
                if what not in begun:
                    begun.add(what)
                    print(f"  {what} ...", file=sys.stderr, flush=True)

            yield line
        else:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
                tasks: dict[str, Any] = {}

                def bar(what: str, done: int, total: int) -> None:
                    if what not in tasks:
                        tasks[what] = bars.add_task(what, total=total or 1)
                    # what is done leaves the screen: what is under way is of interest
                    bars.update(tasks[what], completed=done, total=total or 1, visible=done < (total or 1))

                yield bar
