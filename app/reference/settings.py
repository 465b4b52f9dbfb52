"""docs/reference/settings.md: the settings of all parts, and the environment variables of others that matter."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.reference.markdown import GENERATED, table_cell
from lakehouse.settings import Section
from pipelines.settings import Settings
from serve.settings import PREFIX, ServeSettings

ENVIRONMENT = (
    ("SHOPSPHERE_HOME", "Directory of everything local; default `.shopsphere`"),
    ("SHOPSPHERE_CONFIG", "The settings file; default `shopsphere.toml` in that directory"),
    ("MLFLOW_TRACKING_URI", "MLflow server; default: SQLite and files in SHOPSPHERE_HOME"),
    ("RAY_ADDRESS", "Ray cluster to join; `ray.address` takes precedence"),
    ("RAY_AUTH_MODE, RAY_AUTH_TOKEN", "Authentication between Ray processes and of `ray job submit`"),
    ("OPENLINEAGE_URL, OPENLINEAGE_CONFIG", "Receiver of lineage events; default: none are sent"),
)


def settings_rows(model: type[BaseModel], prefix: str, path: str) -> list[str]:
    """Return one table row per setting."""
    rows = []
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            rows += settings_rows(annotation, f"{prefix}{name.upper()}__", f"{path}{name}.")
        else:
            rows.append(
                f"| `{path}{name}` | `{prefix}{name.upper()}` | {default_text(field)} | {table_cell(field.description or '')} |"
            )
    return rows


def default_text(field: FieldInfo) -> str:
    """Return the default as a user would write it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    text = value.get_secret_value() if hasattr(value, "get_secret_value") else value
    return f"`{text}`" if text not in ("", {}) else ""


def settings_page() -> str:
    """Return the page."""
    lines = [
        GENERATED,
        "# Settings",
        "",
        "Each setting is read from the environment, then from the TOML file (`SHOPSPHERE_CONFIG`, by default "
        "`$SHOPSPHERE_HOME/shopsphere.toml`), then from the default.",
        "",
        "## Lakehouse and sources",
        "",
        "| in the file | in the environment | default | meaning |",
        "|---|---|---|---|",
        *settings_rows(Settings, "SHOPSPHERE_", ""),
        "",
        "## Serving",
        "",
        "Environment only. `--host`, `--port` and `--replicas` of `serve` take precedence.",
        "",
        "| in the environment | default | meaning |",
        "|---|---|---|",
        *(
            f"| `{PREFIX}{name.upper()}` | {default_text(field)} | {table_cell(field.description or '')} |"
            for name, field in ServeSettings.model_fields.items()
        ),
        "",
        "## Other environment variables",
        "",
        "| variable | meaning |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT),
        "",
    ]
    return "\n".join(lines)
