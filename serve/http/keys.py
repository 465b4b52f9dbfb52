"""API keys with scopes. The file holds hashes: who reads it cannot call."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Literal

import msgspec

from lakehouse.errors import SettingsError
from serve.http.problems import Problem

Scope = Literal["score", "inventory", "customers"]
SCOPES: tuple[Scope, ...] = ("score", "inventory", "customers")
"""customers: personal data."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key: its name, what it opens, the SHA-256 of its text."""

    name: str
    scopes: tuple[Scope, ...]
    sha256: str


class Keys:
    """The keys of a file."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self.keys = keys

    @classmethod
    def read(cls, file: Path) -> Keys:
        """The keys of a file; none when it is not there. Raises SettingsError."""
        try:
            return cls(msgspec.json.decode(file.read_bytes(), type=tuple[Key, ...]))
        except FileNotFoundError:
            return cls()
        except (OSError, msgspec.DecodeError) as error:
            raise SettingsError(
                f"{file} holds no API keys ({type(error).__name__}). Make keys with: python -m app api-key NAME --scope SCOPE."
            ) from None

    def add(self, file: Path, name: str, scopes: tuple[Scope, ...]) -> str:
        """Add a key to the file, in the place of one of that name. Gives its text, which is stored nowhere."""
        text = f"sk_{secrets.token_urlsafe(32)}"
        key = Key(name, scopes, hashlib.sha256(text.encode()).hexdigest())
        kept = tuple(one for one in self.keys if one.name != name)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(msgspec.json.encode((*kept, key)))
        beside.replace(file)
        return text

    def check(self, authorization: str, scope: Scope | None) -> str:
        """The name of the key that a request shows; any key will do when scope is None. Raises Problem 401 or 403.

        Takes the same time whichever key it is.
        """
        kind, _, text = authorization.partition(" ")
        shown = hashlib.sha256(text.strip().encode()).hexdigest() if kind.lower() == "bearer" else ""
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, shown):
                found = key
        if found is None:
            raise Problem(
                401,
                "An API key is needed: Authorization: Bearer <key>.",
                headers={"WWW-Authenticate": 'Bearer realm="shopsphere"'},
            )
        if scope is not None and scope not in found.scopes:
            raise Problem(403, f"The key has no scope '{scope}'.")
        return found.name
