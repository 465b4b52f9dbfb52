"""Local files are for the user of this process only: they contain personal data, and credentials of the sandbox."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

UMASK = 0o077
OTHERS = 0o007


def close_to_other_users(home: Path) -> None:
    """Create further files of this process and its children with mode 0600, and close an existing home directory.

    The permissions of a group that was given access to the home directory stay.
    """
    os.umask(UMASK)
    _withdraw(home, OTHERS)
    # Ray creates this one itself, with whatever umask the first program that started it had
    _withdraw(Path("~/.ray/auth_token").expanduser(), UMASK)


def let_others_pass(directory: Path) -> None:
    """Let other users pass through a directory to a file in it that is theirs, without seeing what else it contains."""
    directory.chmod(directory.stat().st_mode | 0o001)


def _withdraw(path: Path, permissions: int) -> None:
    with contextlib.suppress(OSError):  # it does not exist, or is another user's, who decides
        mode = path.stat().st_mode & 0o7777
        if mode & permissions:
            path.chmod(mode & ~permissions)
