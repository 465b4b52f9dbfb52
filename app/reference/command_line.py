"""docs/reference/cli.md: every command with its options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.reference.markdown import GENERATED, table_cell


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command (Click's, as Typer builds it) with the words that call it."""
    if subcommands := getattr(command, "commands", None):
        for name, subcommand in subcommands.items():
            yield from commands(subcommand, f"{path} {name}")
    else:
        yield path, command


def _section(path: str, command: Any) -> list[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    lines = [f"## {path.removeprefix('python -m app ')}", "", " ".join((command.help or "").split()), ""]
    lines += ["```", " ".join([path, *command.collect_usage_pieces(context)]), "```", ""]
    records = [record for item in command.get_params(context) if (record := item.get_help_record(context)) is not None]
    if records:
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{table_cell(names)}` | {table_cell(text)} |" for names, text in records]
        lines.append("")
    return lines


def command_line_page(root: Any) -> str:
    """Return the page."""
    lines = [
        GENERATED,
        "# Command line",
        "",
        "Call a command with `python -m app COMMAND`. Every command has `--help`. Exit codes: 0 success, 1 an error, which is "
        "one line on standard error (`--debug` before the command shows the traceback), 2 wrong arguments, 3 drift (`monitor`).",
        "",
    ]
    for path, command in commands(root, "python -m app"):
        lines += _section(path, command)
    return "\n".join(lines).rstrip() + "\n"
