"""The tutorials "add a table" and "add a feature", followed in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the repository's files, committed in a new repository of its own."""
    target = tmp_path / "repository"
    target.mkdir()
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "--message", "copy")
    return target


def apply_hunk(file: Path, hunk: str) -> None:
    """Replace the context lines of a hunk, which must occur once, by context and added lines."""
    lines = hunk.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file.name} does not contain once:\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


def follow(directory: Path, tutorial: str) -> None:
    """Do what the titled code blocks of a tutorial say."""
    for kind, name, code in BLOCK.findall((TUTORIALS / tutorial).read_text(encoding="utf-8")):
        if kind == "python":
            assert not (directory / name).exists()
            (directory / name).write_text(code, encoding="utf-8")
        else:
            apply_hunk(directory / name, code)


def run(directory: Path, *arguments: str) -> str:
    environment = {**os.environ, "SHOPSPHERE_HOME": str(directory / ".shopsphere")}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def query(directory: Path, statement: str) -> list[dict[str, Any]]:
    rows = json.loads(run(directory, "app", "sql", "--json", statement))
    return rows if isinstance(rows, list) else rows["rows"]


def changed_files(directory: Path) -> set[str]:
    return {line[3:] for line in git(directory, "status", "--porcelain").splitlines()}


def test_add_a_table(copy: Path) -> None:
    follow(copy, "add-a-table.md")
    run(copy, "app", "docs")
    run(copy, "app", "docs", "--check")
    tests = ("tests/pipelines/test_payment_success_daily.py", "tests/pipelines/test_personal_columns.py")
    run(copy, "pytest", "-q", "-p", "no:cacheprovider", *tests)
    run(copy, "ruff", "check", ".")
    run(copy, "ruff", "format", "--check", ".")
    assert changed_files(copy) == {
        "pipelines/silver/payment_attempts.py",
        "pipelines/gold/payment_success_daily.py",
        "pipelines/__init__.py",
        "tests/pipelines/test_payment_success_daily.py",
        "CHANGELOG.md",
        "docs/reference/tables.md",
    }


def test_the_added_tables_are_maintained(copy: Path) -> None:
    follow(copy, "add-a-table.md")
    run(copy, "app", "sandbox", "start", "--orders", "300")
    try:
        run(copy, "app", "run")
        run(copy, "app", "sandbox", "step", "--orders", "30")
        run(copy, "app", "run")
        counted = query(copy, "SELECT CAST(sum(attempts) AS BIGINT) AS n FROM gold.payment_success_daily")
        expected = query(copy, "SELECT count(*) AS n FROM silver.events_clean WHERE event_type = 'payment_attempted'")
        assert counted == expected
        assert counted[0]["n"] > 0
    finally:
        run(copy, "app", "sandbox", "stop")


def test_add_a_feature(copy: Path) -> None:
    follow(copy, "add-a-feature.md")
    run(copy, "app", "docs")
    run(copy, "pytest", "-q", "-p", "no:cacheprovider", "tests/ml/test_online_features.py")
    run(copy, "ruff", "check", ".")
    run(copy, "ruff", "format", "--check", ".")
    assert changed_files(copy) == {
        "ml/features/groups/order.py",
        "ml/features/compute.py",
        "ml/features/online/online_features.py",
        "CHANGELOG.md",
        "docs/reference/features.md",
        "docs/reference/tables.md",
    }
