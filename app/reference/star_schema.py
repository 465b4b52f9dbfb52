"""docs/reference/star-schema.md: foreign keys of gold, as a diagram and a table."""

from __future__ import annotations

from app.project import PROJECT
from app.reference.markdown import GENERATED
from app.reference.tables import type_name
from lakehouse.table import Table


def star_page() -> str:
    """Return the page."""
    pointing = [table for table in PROJECT.tables.values() if table.references]
    pointed = {reference.table.name: reference.table for table in pointing for reference in table.references}
    drawn = {table.name: table for table in (*pointing, *pointed.values())}
    lines = [
        GENERATED,
        "# The star schema of gold",
        "",
        "Join gold tables by these keys, by hand or in a [BI tool](../how-to/connect-bi-tools.md). An unknown key is null, and a "
        "store or product that was deleted at its source is in no dimension: use a `LEFT JOIN`.",
        "",
        "```mermaid",
        "erDiagram",
    ]
    for table in drawn.values():
        keys = list(dict.fromkeys([*table.key, *(r.column for r in table.references), *_pointed_at(table, pointing)]))
        lines.append(f"  {table.short_name} {{")
        types = {c.name: type_name(c.type).split(" ")[0].replace("(", "_").replace(", ", "_").rstrip(")") for c in table.columns}
        for name in keys:
            marks = [
                mark for mark, holds in (("PK", name in table.key), ("FK", name in {r.column for r in table.references})) if holds
            ]
            lines.append(f"    {types[name]} {name} {', '.join(marks) or 'UK'}")
        lines.append("  }")
    for table in pointing:
        for reference in table.references:
            optional = not next(c for c in table.columns if c.name == reference.column).required
            many, one = "o{", "o|" if optional else "||"
            lines.append(f"  {reference.table.short_name} {one}--{many} {table.short_name} : {reference.column}")
    lines += ["```", "", "| table | column | refers to | may be null |", "|---|---|---|---|"]
    for table in pointing:
        required = {c.name for c in table.columns if c.required}
        lines += [
            f"| `{table.name}` | `{r.column}` | `{r.table.name}.{r.to}` | {'no' if r.column in required else 'yes'} |"
            for r in table.references
        ]
    return "\n".join(lines) + "\n"


def _pointed_at(table: Table, pointing: list[Table]) -> list[str]:
    """Return the columns of a table that others reference."""
    return [r.to for other in pointing for r in other.references if r.table.name == table.name]
