"""Replaces the project that the application's commands work on."""

from __future__ import annotations

import sys

import pytest

# every module that takes the project has to be imported before it is replaced
import app.cli.main
import app.erasure  # noqa: F401
from app.project import PROJECT
from lakehouse.project import Project


def use_project(monkeypatch: pytest.MonkeyPatch, project: Project) -> None:
    """Replace the application's project in every module of `app` that imported it, for the rest of the test."""
    for name, module in list(sys.modules.items()):
        if name.startswith("app.") and getattr(module, "PROJECT", None) is PROJECT:
            monkeypatch.setattr(module, "PROJECT", project)
