"""bronze.erasures: what must not be stored any more, as keyed hashes; the key, and the pseudonyms that stand instead."""

from __future__ import annotations

import contextlib
import os
import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import blake2b
from ipaddress import IPv6Address
from pathlib import Path

import polars as pl
import pyarrow as pa

from lakehouse.errors import SettingsError
from lakehouse.iceberg.table_handle import Lake
from lakehouse.table import SEQUENCE, TIMESTAMP, Table, column
from pipelines.parsing.contacts import normalise_address, normalise_email, normalise_phone
from pipelines.settings import Settings, settings_of

ERASURES = Table(
    "bronze.erasures",
    doc="What was erased, as keyed hashes: what arrives later is compared with it. Append-only; holds no personal value.",
    columns=(
        column("erasure", pa.string(), "Id of the erasure.", required=True),
        column(
            "kind",
            pa.string(),
            "requested or finished: of the erasure itself; account, record, mention: rows that are the person's, or name them; "
            "else the kind of value.",
            required=True,
        ),
        column("digest", pa.string(), "Keyed hash (BLAKE2b) of the kind and the value.", required=True),
        column(
            "at",
            TIMESTAMP,
            "When it was requested (or, of a value shown by rows that claim to begin later, when the last of them does): values "
            "are replaced in records that began before.",
            required=True,
        ),
    ),
    owner="data protection",
)

REQUESTED, FINISHED = "requested", "finished"
ACCOUNT, RECORD, MENTION = "account", "record", "mention"
KEY_FILE = "erasure.key"
SHORTEST_KEY = 32
"""Characters of the shortest key that is taken: whoever has the hashes can try all phone numbers under a weak one."""

Digest = str


def key_of(settings: Settings, *, create: bool = False) -> bytes | None:
    """The secret: of the settings, else of the key file, which is made if asked for. Raises SettingsError when it is weak."""
    file = Path(settings.home) / KEY_FILE
    given = settings.erasure.key.get_secret_value()
    if not given and create and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_new(file, secrets.token_hex(32))
    if not given:
        try:
            given = file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
    if len(given) < SHORTEST_KEY or len(set(given)) < 8:
        raise SettingsError(
            f"The erasure key is too weak: it must have {SHORTEST_KEY} characters or more, at random. Set erasure.key "
            "(SHOPSPHERE_ERASURE__KEY) to a better one before the first erasure."
        )
    return given.encode()


def _write_new(file: Path, text: str) -> None:
    """A file that only its owner reads, whole or not at all; one that another process made meanwhile stays."""
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


@dataclass(frozen=True)
class Pseudonyms:
    """Hashes of values, and what stands instead of them; the same value, however spelled, always gives the same.

    key     the secret
    region  of phone numbers that name none
    """

    key: bytes = field(repr=False)
    region: str

    def digest(self, kind: str, value: str) -> Digest:
        """The hash of a value in its one spelling."""
        return blake2b(f"{kind}\0{value}".encode(), key=self.key[:64], digest_size=16, person=b"suppressed").hexdigest()

    @cached_property
    def check(self) -> Digest:
        """By which one knows that it is the same key."""
        return self.digest("key", "")

    def _drawn(self, kind: str, value: str) -> int:
        return int.from_bytes(
            blake2b(f"{kind}\0{value}".encode(), key=self.key[:64], digest_size=16, person=b"pseudonym").digest(), "big"
        )

    def name(self, erasure: str) -> str:
        """The name of an erased person: two words of letters, the same in all their records."""
        return (
            f"{_letters(self._drawn('first name', erasure), 9).title()} {_letters(self._drawn('last name', erasure), 9).title()}"
        )

    def instead(self, kind: str, value: str) -> str:
        """What stands for a value (in its one spelling): of the same shape, so that what reads it goes on."""
        drawn = self._drawn(kind, value)
        if kind == "email":
            return f"{drawn % 16**16:016x}{EMAIL}"
        if kind == "phone":
            return f"{PHONE}{drawn % 10**11:011d}"
        if kind == "ip":
            return str(IPv6Address((0x20010DB8 << 96) | drawn % 2**96))
        if kind == "address":
            return f"erased {_letters(drawn, 14)}"
        return f"{TEXT}{_letters(drawn, 14)}"


EMAIL = "@erased.invalid"
PHONE = "+8839"
"""A country code of no country, and a range of it that is given to nobody."""
IP = "2001:db8:"
"""The addresses that documentation uses (RFC 3849)."""
TEXT = "erased-"


def _letters(number: int, count: int) -> str:
    letters = []
    for _ in range(count):
        number, rest = divmod(number, 26)
        letters.append(string.ascii_lowercase[rest])
    return "".join(letters)


def is_pseudonym(kind: str, value: str) -> bool:
    """Whether this stands for an erased value already."""
    if value.startswith(TEXT):
        return True
    if kind == "email":
        return value.endswith(EMAIL)
    if kind == "phone":
        return value.startswith(PHONE) and len(value) == len(PHONE) + 11
    if kind == "ip":
        return value.startswith(IP)
    return kind == "address" and value.startswith("erased ")


def spelled_once(kind: str, raw: str, region: str, city: str = "") -> str | None:
    """A value in its one spelling, by silver's own rules; None: it says nothing (a masked number, say)."""
    if kind == "email":
        return normalise_email(raw)
    if kind == "phone":
        return normalise_phone(raw, region)
    if kind == "address":
        return normalise_address(f"{raw}, {city}" if city else raw)
    return raw.strip() or None


@dataclass(frozen=True)
class Suppression:
    """What is suppressed.

    entries  digest -> the erasure, and the moment (microseconds since 1970) up to which records that begin are concerned
    """

    pseudonyms: Pseudonyms
    entries: Mapping[Digest, tuple[str, int]]

    def of(self, kind: str, value: str) -> tuple[str, int] | None:
        """The erasure of a value, and its moment; None: it is not suppressed."""
        return self.entries.get(self.pseudonyms.digest(kind, value))


@dataclass(frozen=True)
class Erasure:
    """An erasure, by its own rows."""

    id: str
    at: datetime
    finished: bool


def erasures(lake: Lake) -> list[Erasure]:
    """All erasures, the oldest first."""
    if not lake.exists(ERASURES):
        return []
    rows = lake.load(ERASURES).read(["erasure", "kind", "at"], pl.col("kind").is_in([REQUESTED, FINISHED]))
    done = set(rows.filter(pl.col("kind") == FINISHED)["erasure"])
    requested = rows.filter(pl.col("kind") == REQUESTED).sort("at", "erasure")
    return [Erasure(name, at, name in done) for name, at in requested.select("erasure", "at").iter_rows()]


def newest_erasure(lake: Lake) -> int | None:
    """The snapshot of bronze.erasures, by which one sees that something was added; None: nothing ever was."""
    snapshot = lake.load(ERASURES).snapshot if lake.exists(ERASURES) else None
    return snapshot.snapshot_id if snapshot is not None else None


def load_suppression(lake: Lake) -> Suppression | None:
    """What is suppressed now; None: nothing. Raises SettingsError when the key is missing or another than it was."""
    if not lake.exists(ERASURES):
        return None
    rows = lake.load(ERASURES).read(["erasure", "kind", "digest", "at"])
    if rows.is_empty():
        return None
    key = key_of(settings_of(lake))
    if key is None:
        raise SettingsError(
            f"There are erasures, and the key by which erased people are recognised is missing. Put {KEY_FILE} back into "
            f"{lake.settings.home}, or set erasure.key (SHOPSPHERE_ERASURE__KEY)."
        )
    pseudonyms = Pseudonyms(key, settings_of(lake).default_region)
    if (rows.filter(pl.col("kind") == REQUESTED)["digest"] != pseudonyms.check).any():
        raise SettingsError(
            "The erasure key is another than that of the erasures so far, so erased people would not be recognised. "
            f"Put the former {KEY_FILE} back, or set erasure.key (SHOPSPHERE_ERASURE__KEY) to the former key."
        )
    values = rows.filter(~pl.col("kind").is_in([REQUESTED, FINISHED])).sort("at", "erasure", descending=True)
    moments = values.with_columns(pl.col("at").dt.epoch("us"))
    # of several erasures of one value the first names the person, the last says until when
    latest = dict(moments.group_by("digest").agg(pl.col("at").max()).iter_rows())
    entries = {digest: (erasure, latest[digest]) for digest, erasure in values.select("digest", "erasure").iter_rows()}
    return Suppression(pseudonyms, entries)


def append(
    lake: Lake, erasure: str, at: datetime, rows: Iterable[tuple[str, Digest]], until: Mapping[Digest, int] | None = None
) -> None:
    """Store hashes, in one commit; `until`: of some a moment (microseconds since 1970) instead of `at`. Raises CommitConflict."""
    handle = lake.load(ERASURES)
    later, requested = until or {}, (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    told = [(kind, digest, later.get(digest, requested)) for kind, digest in rows]
    schema = {"kind": pl.String, "digest": pl.String, "at": pl.Int64}
    frame = pl.DataFrame(told, schema=schema, orient="row").with_columns(
        pl.lit(erasure).alias("erasure"),
        pl.col("at").cast(pl.Datetime("us", "UTC")),
        pl.lit(handle.sequence, pl.Int64).alias(SEQUENCE),
    )
    handle.commit(handle.writer.write(frame), positions=handle.positions)


def now() -> datetime:
    """The present moment, UTC."""
    return datetime.now(UTC)
