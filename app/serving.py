"""The application that `serve deploy serve/deploy.yaml` imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.project import PROJECT
from serve import deployment


def build(arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the Ray Serve application; `arguments` are settings of serving and take precedence over the environment."""
    return deployment.build(PROJECT, arguments)
