"""API keys with scopes. The file stores only hashes of the keys."""

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

KeyScope = Literal["score", "inventory", "customers"]
SCOPES: tuple[KeyScope, ...] = ("score", "inventory", "customers")
"""The scope `customers` gives access to personal data."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An API key. sha256: hexadecimal hash of its text."""

    name: str
    scopes: tuple[KeyScope, ...]
    sha256: str


class Keys:
    """The API keys of a file."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self.keys = keys

    @classmethod
    def read(cls, file: Path) -> Keys:
        """Read a file of keys; a missing file has none. Raises SettingsError."""
        try:
            return cls(msgspec.json.decode(file.read_bytes(), type=tuple[Key, ...]))
        except FileNotFoundError:
            return cls()
        except (OSError, msgspec.DecodeError) as error:
            raise SettingsError(
                f"{file} is not a valid file of API keys ({type(error).__name__}). "
                "Create keys with: python -m app api-key NAME --scope SCOPE."
            ) from None

    def add(self, file: Path, name: str, scopes: tuple[KeyScope, ...]) -> str:
        """Write the keys and a new one to the file; a key of the same name is replaced. Return the new key's text,
        which is stored nowhere."""
        text = f"sk_{secrets.token_urlsafe(32)}"
        added = Key(name, scopes, hashlib.sha256(text.encode()).hexdigest())
        others = tuple(key for key in self.keys if key.name != name)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".new")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(msgspec.json.encode((*others, added)))
        temporary.replace(file)
        return text

    def check(self, authorization: str, scope: KeyScope | None) -> str:
        """Return the name of the key in an Authorization header; with scope None any key is accepted. Raises Problem 401
        or 403.

        Takes the same time for every key.
        """
        kind, _, text = authorization.partition(" ")
        sha256 = hashlib.sha256(text.strip().encode()).hexdigest() if kind.lower() == "bearer" else ""
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        if found is None:
            raise Problem(
                401,
                "An API key is required. Send it as: Authorization: Bearer <key>.",
                headers={"WWW-Authenticate": 'Bearer realm="shopsphere"'},
            )
        if scope is not None and scope not in found.scopes:
            raise Problem(403, f"This API key has no scope '{scope}'.")
        return found.name
