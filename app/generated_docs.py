"""Documentation that is written from declarations: docs/tables.md, docs/features.md and docs/settings.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import pipelines
from lakehouse.settings import Section, Settings
from lakehouse.step import Changes, Gather, Join, Read
from lakehouse.table import Column, Table
from ml.features import FEATURES, ORDER, PARTS
from ml.tables import DECLARED, MODEL_TABLES, TABLES

ROOT = Path(__file__).resolve().parents[1]
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
    if isinstance(read, Gather):
        return "all rows of the touched groups"
    if isinstance(read, Changes):
        return "new rows"
    return "the rows it names" if isinstance(read, Join) else "the whole table"


def table_section(table: Table) -> list[str]:
    """One table: what it is, how it is laid out and filled, its columns."""
    step = next((s for s in DECLARED if s.target.name == table.name), None)
    lines = [f"### {table.name}", "", table.doc, ""]
    facts = [("key", ", ".join(table.key))]
    if table.group != table.key:
        facts.append(("recomputed by", ", ".join(table.group)))
    facts.append(("partitioned by", ", ".join(f"{p.transform}({p.column})" for p in table.partition_by)))
    facts.append(("owner", table.owner))
    if table.name in MODEL_TABLES:
        facts.append(("filled by", "`train` and `monitor`; `run` leaves it as it is"))
    lines += [f"- {name}: {value}" for name, value in facts if value]
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
        lines += [f"    {t.name.replace('.', '_')}[{t.short_name}]" for t in TABLES.values() if t.layer == layer]
        lines.append("  end")
    for step in DECLARED:
        lines += [
            f"  {name.replace('.', '_')} --> {step.target.name.replace('.', '_')}" for name in sorted(pipelines.upstream(step))
        ]
    return [*lines, "```", ""]


def tables_page() -> str:
    """docs/tables.md."""
    lines = [NOTE, "# Tables", "", *graph()]
    for layer in ("bronze", "silver", "gold"):
        lines += [f"## {layer}", ""]
        for table in TABLES.values():
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
    for part in PARTS:
        source = "the order itself" if part is ORDER else f"{'account events' if part.events else 'orders'} by `{part.key}`"
        lines += [f"## {part.name}: {source}", "", "| feature | type | window | meaning | reason |", "|---|---|---|---|---|"]
        for feature in part.features:
            texts = f" ({', '.join(feature.categories)})" if feature.categories else ""
            lines.append(
                f"| `{feature.name}` | {feature.type} | {feature.window} | {feature.doc}{texts} | {feature.reason_text} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"docs/tables.md": tables_page, "docs/features.md": features_page, "docs/settings.md": settings_page}


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
