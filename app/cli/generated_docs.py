"""Documentation that is written from declarations: docs/tables.md, star-schema.md, features.md and settings.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import pipelines
from app.project import PROJECT
from lakehouse.settings import Section
from lakehouse.step import Delta, Grouped, Lookup, Read
from lakehouse.table import Column, Table
from ml.features.features import FEATURE_GROUPS, FEATURES, ORDER
from pipelines.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
NOTE = "<!-- Written by `make docs` from the declarations; edit those. -->\n"


def type_name(type_: pa.DataType) -> str:
    """An Arrow type in the words of SQL."""
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
    """How a step reads a table, in a word."""
    if isinstance(read, Grouped):
        return "all rows of the touched groups"
    if isinstance(read, Delta):
        return "new rows"
    return "the rows it names" if isinstance(read, Lookup) else "the whole table"


def table_section(table: Table) -> list[str]:
    """One table: what it is, how it is laid out and filled, its columns."""
    step = next((s for s in PROJECT.all_steps if s.target.name == table.name), None)
    lines = [f"### {table.name}", "", table.doc, ""]
    facts = [("key", ", ".join(table.key))]
    if table.group != table.key:
        facts.append(("recomputed by", ", ".join(table.group)))
    facts.append(("partitioned by", ", ".join(f"{p.transform}({p.column})" for p in table.partition_by)))
    facts.append(("owner", table.owner))
    if PROJECT.is_on_demand(table.name):
        facts.append(("filled by", "`train` and `monitor`; `run` leaves it as it is"))
    lines += [f"- {name}: {value}" for name, value in facts if value]
    lines += [f"- `{r.column}` refers to `{r.table.name}.{r.to}`" for r in table.references]
    if rules := [f"`{rule}` ({rule.severity})" for rule in table.rules if table.layer != "bronze"]:
        lines.append(f"- expectations: {', '.join(rules)}")
    if step:
        lines += [f"- reads `{read.table.name}`: {read_name(read)}" for read in step.reads.values()]
    lines += ["", "| column | type | meaning |", "|---|---|---|"]
    lines += [f"| `{c.name}` | {type_name(c.type)} | {c.doc.replace('|', chr(92) + '|')}{personal(c)} |" for c in table.columns]
    return [*lines, ""]


def personal(column: Column) -> str:
    """What of a column is personal, as `erase` takes it."""
    if isinstance(column.personal, str):
        return f" *Personal: {column.personal}.*" if column.personal else ""
    of_kinds = ", ".join(f"`{path}` {kind}" for path, kind in column.personal if kind)
    harmless = ", ".join(f"`{path}`" for path, kind in column.personal if not kind)
    return f" *Personal: {of_kinds}; and all that is not known to be harmless. Known to be: {harmless}.*"


def graph() -> list[str]:
    """The graph of tables, for Mermaid."""
    lines = ["```mermaid", "flowchart LR"]
    for layer in ("bronze", "silver", "gold"):
        lines.append(f"  subgraph {layer}")
        lines += [f"    {t.name.replace('.', '_')}[{t.short_name}]" for t in PROJECT.tables.values() if t.layer == layer]
        lines.append("  end")
    for step in PROJECT.all_steps:
        lines += [
            f"  {name.replace('.', '_')} --> {step.target.name.replace('.', '_')}" for name in sorted(pipelines.upstream(step))
        ]
    return [*lines, "```", ""]


def star_page() -> str:
    """docs/star-schema.md."""
    pointing = [table for table in PROJECT.tables.values() if table.references]
    pointed = {reference.table.name: reference.table for table in pointing for reference in table.references}
    drawn = {table.name: table for table in (*pointing, *pointed.values())}
    lines = [
        NOTE,
        "# The star schema of gold",
        "",
        "What to join by, for people and for BI tools ([how](bi.md)). A key is null where nothing is known, and a store",
        "or product that its source deleted is in no dimension any more: join `LEFT`.",
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
    """The columns of a table that others refer to."""
    return [r.to for other in pointing for r in other.references if r.table.name == table.name]


def tables_page() -> str:
    """docs/tables.md."""
    lines = [NOTE, "# Tables", "", *graph()]
    for layer in ("bronze", "silver", "gold"):
        lines += [f"## {layer}", ""]
        for table in PROJECT.tables.values():
            if table.layer == layer:
                lines += table_section(table)
    return "\n".join(lines).rstrip() + "\n"


def settings_rows(model: type[BaseModel], prefix: str, path: str) -> list[str]:
    """One line a setting."""
    rows = []
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            rows += settings_rows(annotation, f"{prefix}{name.upper()}__", f"{path}{name}.")
        else:
            rows.append(f"| `{path}{name}` | `{prefix}{name.upper()}` | {default_text(field)} | {field.description or ''} |")
    return rows


def default_text(field: FieldInfo) -> str:
    """A default, as one would write it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    text = value.get_secret_value() if hasattr(value, "get_secret_value") else value
    return f"`{text}`" if text not in ("", {}) else ""


def settings_page() -> str:
    """docs/settings.md."""
    lines = [
        NOTE,
        "# Settings",
        "",
        "Read from the environment first, then from the TOML file (`SHOPSPHERE_CONFIG`, by default",
        "`$SHOPSPHERE_HOME/shopsphere.toml`), then the default.",
        "",
        "| in the file | in the environment | default | meaning |",
        "|---|---|---|---|",
        *settings_rows(Settings, "SHOPSPHERE_", ""),
        "",
    ]
    return "\n".join(lines)


def features_page() -> str:
    """docs/features.md."""
    lines = [
        NOTE,
        "# Features of the fraud model",
        "",
        f"{len(FEATURES)} features, each as of the moment its order was placed ([how](fraud-model.md)). The last column is what",
        "a reviewer is told. Types: `count` a whole number, `amount` units of the base currency, `ratio` a number without unit,",
        "`minutes` time passed, `flag` 0 or 1, `category` one of the texts listed.",
        "",
    ]
    for part in FEATURE_GROUPS:
        source = "the order itself" if part is ORDER else f"{'account events' if part.events else 'orders'} by `{part.key}`"
        lines += [f"## {part.name}: {source}", "", "| feature | type | window | meaning | reason |", "|---|---|---|---|---|"]
        for feature in part.features:
            texts = f" ({', '.join(feature.categories)})" if feature.categories else ""
            lines.append(
                f"| `{feature.name}` | {feature.type} | {feature.window} | {feature.doc}{texts} | {feature.reason_text} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


PAGES = {
    "docs/tables.md": tables_page,
    "docs/star-schema.md": star_page,
    "docs/features.md": features_page,
    "docs/settings.md": settings_page,
}


def write_pages() -> list[str]:
    """Write the pages; gives their names."""
    for name, page in PAGES.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(page(), encoding="utf-8")
    return list(PAGES)


def stale_pages() -> list[str]:
    """The pages that are not what the declarations give."""
    return [
        name for name, page in PAGES.items() if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != page()
    ]
