"""docs/reference/tables.md: every table with its layout, upstream tables and columns."""

from __future__ import annotations

import pyarrow as pa

from app.project import PROJECT
from app.reference.markdown import GENERATED, table_cell
from lakehouse.step import Delta, Grouped, Lookup, Read, upstream_names
from lakehouse.table import Column, Table


def type_name(type_: pa.DataType) -> str:
    """Return the SQL name of an Arrow type."""
    names = {
        "int64": "bigint",
        "int32": "int",
        "large_string": "string",
        "timestamp[us, tz=UTC]": "timestamp (UTC)",
        "date32[day]": "date",
    }
    text = str(type_)
    return names.get(text, text.replace("decimal128", "decimal"))


def read_name(read: Read) -> str:
    """Describe how a step reads a table."""
    if isinstance(read, Grouped):
        return "all rows of the affected groups"
    if isinstance(read, Delta):
        return "new rows"
    return "rows by key" if isinstance(read, Lookup) else "the whole table"


def table_section(table: Table) -> list[str]:
    """Return the section of one table: description, layout, upstream tables, columns."""
    step = next((s for s in PROJECT.all_steps if s.target.name == table.name), None)
    lines = [f"### {table.name}", "", table.doc, ""]
    facts = [("key", ", ".join(table.key))]
    if table.group != table.key:
        facts.append(("recomputed by", ", ".join(table.group)))
    facts.append(("partitioned by", ", ".join(f"{p.transform}({p.column})" for p in table.partition_by)))
    facts.append(("owner", table.owner))
    if PROJECT.is_on_demand(table.name):
        facts.append(("maintained by", "`train` and `monitor`, not by `run`"))
    lines += [f"- {name}: {value}" for name, value in facts if value]
    lines += [f"- `{r.column}` references `{r.table.name}.{r.to}`" for r in table.references]
    if rules := [f"`{rule}` ({rule.severity})" for rule in table.rules if table.layer != "bronze"]:
        lines.append(f"- expectations: {', '.join(rules)}")
    if step:
        lines += [f"- reads `{read.table.name}`: {read_name(read)}" for read in step.reads.values()]
    lines += ["", "| column | type | meaning |", "|---|---|---|"]
    lines += [f"| `{c.name}` | {type_name(c.type)} | {table_cell(c.doc)}{personal(c)} |" for c in table.columns]
    return [*lines, ""]


def personal(column: Column) -> str:
    """Describe which values of a column `erase` treats as personal."""
    if isinstance(column.personal, str):
        return f" *Personal: {column.personal}.*" if column.personal else ""
    of_kinds = ", ".join(f"`{path}` {kind}" for path, kind in column.personal if kind)
    harmless = ", ".join(f"`{path}`" for path, kind in column.personal if not kind)
    return f" *Personal: {of_kinds}, and everything that is not declared harmless. Declared harmless: {harmless}.*"


def graph() -> list[str]:
    """Return the graph of tables in Mermaid."""
    lines = ["```mermaid", "flowchart LR"]
    for layer in ("bronze", "silver", "gold"):
        lines.append(f"  subgraph {layer}")
        lines += [f"    {t.name.replace('.', '_')}[{t.short_name}]" for t in PROJECT.tables.values() if t.layer == layer]
        lines.append("  end")
    for step in PROJECT.all_steps:
        lines += [f"  {name.replace('.', '_')} --> {step.target.name.replace('.', '_')}" for name in sorted(upstream_names(step))]
    return [*lines, "```", ""]


def tables_page() -> str:
    """Return the page."""
    lines = [GENERATED, "# Tables", "", *graph()]
    for layer in ("bronze", "silver", "gold"):
        lines += [f"## {layer}", ""]
        for table in PROJECT.tables.values():
            if table.layer == layer:
                lines += table_section(table)
    return "\n".join(lines).rstrip() + "\n"
