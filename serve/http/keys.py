"""API keys with scopes. The file stores only hashes of the keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lakehouse.errors import SettingsError
from serve.http.problems import Problem
from serve.http.sessions import EndedSessions, is_signed_by, sign_session

logger = logging.getLogger("shopsphere.serve")

KeyScope = Literal["score", "inventory", "customers"]
SCOPES: tuple[KeyScope, ...] = ("score", "inventory", "customers")
"""The scope `customers` gives access to personal data."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An API key. sha256: hexadecimal hash of its text."""

    name: Annotated[str, Meta(min_length=1)]
    scopes: tuple[KeyScope, ...]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    created: datetime | None = None
    expires: datetime | None = None

    def is_valid(self, now: float) -> bool:
        """Return whether the key has not expired. now: unix time."""
        return self.expires is None or now < self.expires.timestamp()


class Keys:
    """The API keys of a file, which can change while they are used.

    keys      the keys
    required  whether requests need a key: there are keys, or there were, or the file was named in the settings
    """

    def __init__(self, keys: tuple[Key, ...] = (), file: Path | None = None, *, required: bool = False) -> None:
        """file: where the keys were read from; watched by `refresh`."""
        self.keys, self.file = keys, file
        self.required = required or bool(keys)
        self.ended = EndedSessions()
        self._stamp = _stamp(file)

    @classmethod
    def read(cls, file: Path, *, named: bool = False) -> Keys:
        """Read a file of keys. named: the settings name it, so it must exist; otherwise a missing file has no keys.

        Raises SettingsError."""
        try:
            return cls(_decode(file), file, required=named)
        except FileNotFoundError:
            if named:
                raise SettingsError(
                    f"The file of API keys {file} does not exist. Create a key with: python -m app api-key NAME --scope SCOPE, "
                    "or correct SHOPSPHERE_SERVE_KEYS_FILE."
                ) from None
            return cls(file=file)

    def share_ended_sessions(self, file: Path) -> None:
        """Share the sessions that are ended by signing out with other replicas, in a file."""
        self.ended = EndedSessions(file)
        self.ended.forget_expired(time.time())
        self.ended.refresh()

    def refresh(self) -> None:
        """Take over changes of the file: new, replaced and revoked keys. The last valid keys stay while the file is unusable."""
        self.ended.refresh()
        if self.file is None or (stamp := _stamp(self.file)) == self._stamp or stamp is None:
            return
        self._stamp = stamp
        try:
            self.keys = _decode(self.file)
        except (SettingsError, FileNotFoundError) as error:
            logger.error("The changed API keys are not used: %s", error)
            return
        self.required = self.required or bool(self.keys)
        logger.info("%d API keys were read from %s", len(self.keys), self.file)

    def add(self, file: Path, name: str, scopes: tuple[KeyScope, ...], days: float | None = None) -> str:
        """Write the keys and a new one to the file; a key of the same name is replaced. Return the new key's text,
        which is stored nowhere.

        days  how long the key is valid; None: until it is revoked
        """
        text = f"sk_{secrets.token_urlsafe(32)}"
        now = datetime.now(UTC).replace(microsecond=0)
        expires = now + timedelta(days=days) if days is not None else None
        added = Key(name, scopes, _sha256(text), now, expires)
        _write(file, (*(key for key in self.keys if key.name != name), added))
        return text

    def revoke(self, file: Path, name: str) -> bool:
        """Write the keys without the one of that name to the file. Return whether there was one."""
        kept = tuple(key for key in self.keys if key.name != name)
        if len(kept) == len(self.keys):
            return False
        _write(file, kept)
        return True

    def check(self, authorization: str, scope: KeyScope | None) -> str:
        """Return the name of the key in an Authorization header; with scope None any key is accepted. Raises Problem 401
        or 403.

        Takes the same time for every key.
        """
        kind, _, text = authorization.partition(" ")
        text = text.strip()
        return self._granted(self._find(text) if kind.lower() == "bearer" and text else None, scope)

    def check_session(self, session: str, scope: KeyScope | None) -> str:
        """Return the name of the key of a browser's session; with scope None any key is accepted. Raises Problem 401 or 403."""
        found: Key | None = None
        now = time.time()
        for key in self.keys:
            if is_signed_by(session, key.sha256, now) and key.is_valid(now) and session not in self.ended:
                found = key
        return self._granted(found, scope)

    def start_session(self, text: str) -> str | None:
        """Return the session of a key, by its text; None when the key is not valid."""
        key = self._find(text)
        return sign_session(key.sha256, time.time()) if key is not None else None

    def _find(self, text: str) -> Key | None:
        sha256, now = _sha256(text), time.time()
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, sha256) and key.is_valid(now):
                found = key
        return found

    def _granted(self, key: Key | None, scope: KeyScope | None) -> str:
        if key is None:
            raise Problem(
                401,
                "An API key is required. Send it as: Authorization: Bearer <key>.",
                headers={"WWW-Authenticate": 'Bearer realm="shopsphere"'},
            )
        if scope is not None and scope not in key.scopes:
            raise Problem(403, f"This API key has no scope '{scope}'.")
        return key.name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(file: Path) -> tuple[Key, ...]:
    """Return the keys of a file. Raises FileNotFoundError, SettingsError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=tuple[Key, ...])
    except FileNotFoundError:
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(
            f"{file} is not a valid file of API keys ({type(error).__name__}). "
            "Create keys with: python -m app api-key NAME --scope SCOPE."
        ) from None


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """Return what changes with a file; None when it does not exist or is not on this node."""
    try:
        status = os.stat(file) if file is not None else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size) if status is not None else None


def _write(file: Path, keys: tuple[Key, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(msgspec.json.encode(keys))
    temporary.replace(file)
