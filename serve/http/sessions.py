"""Sessions of browsers: a signed value in a cookie, never the API key itself.

A session is signed with the hash of its key, which only the keys file and the replicas have, so it ends with its key: when
that is revoked, replaced or expired. It also ends after LIFETIME_SECONDS, and when its user signs out.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from lakehouse.local_access import UMASK

COOKIE = "shopsphere_session"
LIFETIME_SECONDS = 12 * 3600
_OWNER_ONLY = 0o666 & ~UMASK


def sign_session(sha256: str, now: float) -> str:
    """Return the value of the cookie for a key, by its hash. now: unix time."""
    content = f"{key_id(sha256)}.{int(now) + LIFETIME_SECONDS}.{secrets.token_urlsafe(16)}"
    return f"{content}.{_signature(sha256, content)}"


def key_id(sha256: str) -> str:
    """Return the public name of a key in its sessions."""
    return hashlib.sha256(f"id:{sha256}".encode()).hexdigest()[:16]


def is_signed_by(session: str, sha256: str, now: float) -> bool:
    """Return whether a session was signed with this hash of a key and has not expired. now: unix time."""
    content, _, signature = session.rpartition(".")
    parts = content.split(".")
    if len(parts) != 3 or not parts[1].isascii() or not parts[1].isdigit():
        return False
    return hmac.compare_digest(_signature(sha256, content), signature) and now < int(parts[1])


def _signature(sha256: str, content: str) -> str:
    return hmac.new(sha256.encode(), content.encode(), hashlib.sha256).hexdigest()


class EndedSessions:
    """The sessions that were ended by signing out. The file is shared by the replicas that have it on their disk."""

    def __init__(self, file: Path | None = None) -> None:
        """file: None: only this process knows."""
        self.file = file
        self._ended: set[str] = set()
        self._read = (0, 0)

    def __contains__(self, session: str) -> bool:
        return _digest(session) in self._ended

    def add(self, session: str) -> None:
        """End a session."""
        self._ended.add(_digest(session))
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _OWNER_ONLY), "w") as stream:
                stream.write(f"{int(time.time())} {_digest(session)}\n")

    def refresh(self) -> None:
        """Read the sessions that other replicas ended, if there are new ones."""
        try:
            status = os.stat(self.file) if self.file is not None else None
            if self.file is None or status is None or (status.st_mtime_ns, status.st_size) == self._read:
                return
            self._ended |= {line.split()[-1] for line in self.file.read_text().splitlines() if line.strip()}
            self._read = (status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            return

    def forget_expired(self, now: float) -> None:
        """Drop sessions from the file that have expired anyway. now: unix time."""
        if self.file is None or not self.file.exists():
            return
        lines = self.file.read_text().splitlines()
        kept = [line for line in lines if line.split(" ")[0].isdigit() and int(line.split(" ")[0]) + LIFETIME_SECONDS > now]
        if len(kept) < len(lines):
            temporary = self.file.with_suffix(".new")
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _OWNER_ONLY), "w") as stream:
                stream.writelines(f"{line}\n" for line in kept)
            temporary.replace(self.file)


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode()).hexdigest()
