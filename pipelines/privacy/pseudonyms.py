"""Keyed hashes of personal values, and the pseudonyms that replace them."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from ipaddress import IPv6Address
from pathlib import Path

from lakehouse.errors import SettingsError
from pipelines.parsing.contacts import normalise_address, normalise_email, normalise_phone
from pipelines.privacy.private_files import create_private_file
from pipelines.settings import Settings

KEY_FILE = "erasure.key"
MIN_KEY_LENGTH = 32
"""Characters. With a weak key, anybody who has the hashes could try all phone numbers."""
MIN_KEY_CHARACTERS = 8
"""Different characters that a key must have."""

EMAIL_DOMAIN = "@erased.invalid"
PHONE_PREFIX = "+8839"
"""The country code belongs to no country, and no number of this range is assigned."""
IP_PREFIX = "2001:db8:"
"""Addresses reserved for documentation (RFC 3849)."""
TEXT_PREFIX = "erased-"
ADDRESS_PREFIX = "erased "

Digest = str


def erasure_key(settings: Settings, *, create: bool = False) -> bytes | None:
    """Return the secret key: of the settings, else of the key file, which `create` creates when it is missing.

    Raises SettingsError when the key is too weak.
    """
    file = Path(settings.home) / KEY_FILE
    key = settings.erasure.key.get_secret_value()
    if not key and create and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        create_private_file(file, secrets.token_hex(32).encode())
    if not key:
        try:
            key = file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
    if len(key) < MIN_KEY_LENGTH or len(set(key)) < MIN_KEY_CHARACTERS:
        raise SettingsError(
            f"The erasure key is too weak, expected at least {MIN_KEY_LENGTH} random characters. Set erasure.key "
            "(SHOPSPHERE_ERASURE__KEY) to a stronger one before the first erasure."
        )
    return key.encode()


@dataclass(frozen=True)
class Pseudonyms:
    """Hashes and pseudonyms under one key. All spellings of a value, once normalised, have the same hash and pseudonym.

    key     the secret
    region  of phone numbers without a country code
    """

    key: bytes = field(repr=False)
    region: str

    def digest(self, kind: str, value: str) -> Digest:
        """Return the hash of a normalised value."""
        return blake2b(f"{kind}\0{value}".encode(), key=self.key[:64], digest_size=16, person=b"suppressed").hexdigest()

    @cached_property
    def check(self) -> Digest:
        """Return the digest by which a changed key is detected."""
        return self.digest("key", "")

    def name(self, erasure_id: str) -> str:
        """Return the name of an erased person: two words of letters, the same in all their records."""
        first, last = (_letters(self._number(kind, erasure_id), 9).title() for kind in ("first name", "last name"))
        return f"{first} {last}"

    def pseudonym(self, kind: str, value: str) -> str:
        """Return the replacement of a normalised value, in the format of its kind, so that readers can parse it."""
        number = self._number(kind, value)
        if kind == "email":
            return f"{number % 16**16:016x}{EMAIL_DOMAIN}"
        if kind == "phone":
            return f"{PHONE_PREFIX}{number % 10**11:011d}"
        if kind == "ip":
            return str(IPv6Address((0x20010DB8 << 96) | number % 2**96))
        if kind == "address":
            return f"{ADDRESS_PREFIX}{_letters(number, 14)}"
        return f"{TEXT_PREFIX}{_letters(number, 14)}"

    def _number(self, kind: str, value: str) -> int:
        """Return a pseudo-random 128-bit number, always the same for a value."""
        return int.from_bytes(
            blake2b(f"{kind}\0{value}".encode(), key=self.key[:64], digest_size=16, person=b"pseudonym").digest(), "big"
        )


def _letters(number: int, count: int) -> str:
    letters = []
    for _ in range(count):
        number, rest = divmod(number, 26)
        letters.append(string.ascii_lowercase[rest])
    return "".join(letters)


def is_pseudonym(kind: str, value: str) -> bool:
    """Return whether a value is the pseudonym of an erased one."""
    if value.startswith(TEXT_PREFIX):
        return True
    if kind == "email":
        return value.endswith(EMAIL_DOMAIN)
    if kind == "phone":
        return value.startswith(PHONE_PREFIX) and len(value) == len(PHONE_PREFIX) + 11
    if kind == "ip":
        return value.startswith(IP_PREFIX)
    return kind == "address" and value.startswith(ADDRESS_PREFIX)


def normalise_value(kind: str, raw: str, region: str, city: str = "") -> str | None:
    """Return a value as silver normalises it; None when it identifies no person (a masked number, for example)."""
    if kind == "email":
        return normalise_email(raw)
    if kind == "phone":
        return normalise_phone(raw, region)
    if kind == "address":
        return normalise_address(f"{raw}, {city}" if city else raw)
    return raw.strip() or None
