"""Files that only their owner can read (mode 0600)."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def replace_private_file(file: Path, content: bytes) -> None:
    """Write a file atomically; replaces an existing one."""
    draft = _write_draft(file, content)
    draft.replace(file)


def create_private_file(file: Path, content: bytes) -> None:
    """Write a file atomically; a file that another process created in the meantime is kept."""
    draft = _write_draft(file, content)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def open_private(file: Path) -> int:
    """Return the descriptor of a new file. Raises FileExistsError."""
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _write_draft(file: Path, content: bytes) -> Path:
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(open_private(draft), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft
