"""The version of the running code, recorded with runs, lineage and models."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def code_version(root: Path = ROOT) -> str:
    """Return the commit and a digest of the source files, which also covers uncommitted changes."""
    hashed = hashlib.sha256()
    for path in sorted(path for package in ("lakehouse", "pipelines", "ml") for path in (root / package).rglob("*.py")):
        hashed.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    sources = f"sources:{hashed.hexdigest()[:16]}"
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return sources
    return f"{head.stdout.strip()[:12]} {sources}"
