"""bronze.erasures: the suppression list of values that must no longer be stored, as keyed hashes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa

from lakehouse.errors import SettingsError
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import SEQUENCE, TIMESTAMP, Table, column
from pipelines.privacy.pseudonyms import KEY_FILE, Digest, Pseudonyms, erasure_key
from pipelines.settings import settings_of

ERASURES = Table(
    "bronze.erasures",
    doc="Suppression list of erased people as keyed hashes, compared with every arriving row. Append-only; contains no personal "
    "value.",
    columns=(
        column("erasure", pa.string(), "Id of the erasure.", required=True),
        column(
            "kind",
            pa.string(),
            "requested or finished: the state of the erasure; account, record or mention: rows that belong to the person or "
            "mention them; otherwise the kind of value.",
            required=True,
        ),
        column("digest", pa.string(), "Keyed hash (BLAKE2b) of the kind and the value.", required=True),
        column(
            "at",
            TIMESTAMP,
            "Time of the request; for a value in rows that claim to begin later, the begin of the last of them. Values are "
            "replaced in records that began before.",
            required=True,
        ),
    ),
    owner="data protection",
)

REQUESTED, FINISHED = "requested", "finished"
ACCOUNT, RECORD, MENTION = "account", "record", "mention"


@dataclass(frozen=True)
class Suppression:
    """The suppressed values.

    entries  digest -> the erasure's id, and the time (microseconds since 1970) before which a record must have begun for the
             value to be replaced in it
    """

    pseudonyms: Pseudonyms
    entries: Mapping[Digest, tuple[str, int]]

    def find(self, kind: str, value: str) -> tuple[str, int] | None:
        """Return the entry of a normalised value; None when it is not suppressed."""
        return self.entries.get(self.pseudonyms.digest(kind, value))


@dataclass(frozen=True)
class Erasure:
    """A committed erasure."""

    id: str
    requested_at: datetime
    finished: bool


def erasures(lake: Lake) -> list[Erasure]:
    """Return all erasures, the oldest first."""
    if not lake.exists(ERASURES):
        return []
    rows = lake.load(ERASURES).read(["erasure", "kind", "at"], pl.col("kind").is_in([REQUESTED, FINISHED]))
    finished = set(rows.filter(pl.col("kind") == FINISHED)["erasure"])
    requested = rows.filter(pl.col("kind") == REQUESTED).sort("at", "erasure")
    return [Erasure(id_, at, id_ in finished) for id_, at in requested.select("erasure", "at").iter_rows()]


def newest_erasure(lake: Lake) -> int | None:
    """Return the snapshot id of bronze.erasures, which changes with every entry; None when there is no snapshot."""
    snapshot = lake.load(ERASURES).snapshot if lake.exists(ERASURES) else None
    return snapshot.snapshot_id if snapshot is not None else None


def load_suppression(lake: Lake) -> Suppression | None:
    """Read the suppression list; None when it is empty. Raises SettingsError when the key is missing or was changed."""
    if not lake.exists(ERASURES):
        return None
    rows = lake.load(ERASURES).read(["erasure", "kind", "digest", "at"])
    if rows.is_empty():
        return None
    pseudonyms = _checked_pseudonyms(lake, rows)
    values = rows.filter(~pl.col("kind").is_in([REQUESTED, FINISHED])).sort("at", "erasure", descending=True)
    moments = values.with_columns(pl.col("at").dt.epoch("us"))
    # of several erasures of a value, the first gives the person's pseudonym and the last gives the time limit
    latest = dict(moments.group_by("digest").agg(pl.col("at").max()).iter_rows())
    entries = {digest: (erasure, latest[digest]) for digest, erasure in values.select("digest", "erasure").iter_rows()}
    return Suppression(pseudonyms, entries)


def _checked_pseudonyms(lake: Lake, rows: pl.DataFrame) -> Pseudonyms:
    """Return the pseudonyms under the configured key. Raises SettingsError when the erasures were made with another key."""
    key = erasure_key(settings_of(lake))
    if key is None:
        raise SettingsError(
            f"The erasure key is missing, and erased people cannot be recognised without it. Restore {KEY_FILE} in "
            f"{lake.settings.home}, or set erasure.key (SHOPSPHERE_ERASURE__KEY)."
        )
    pseudonyms = Pseudonyms(key, settings_of(lake).default_region)
    if (rows.filter(pl.col("kind") == REQUESTED)["digest"] != pseudonyms.check).any():
        raise SettingsError(
            "The erasure key differs from the one of the earlier erasures, so erased people would not be recognised. "
            f"Restore the former {KEY_FILE}, or set erasure.key (SHOPSPHERE_ERASURE__KEY) to the former key."
        )
    return pseudonyms


def append_digests(
    lake: Lake,
    erasure_id: str,
    at: datetime,
    entries: Iterable[tuple[str, Digest]],
    until: Mapping[Digest, int] | None = None,
) -> None:
    """Store (kind, digest) entries in one commit. Raises CommitConflict.

    until: for some digests a time (microseconds since 1970) to store instead of `at`.
    """
    handle = lake.load(ERASURES)
    later, requested = until or {}, (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    rows = [(kind, digest, later.get(digest, requested)) for kind, digest in entries]
    schema = {"kind": pl.String, "digest": pl.String, "at": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.lit(erasure_id).alias("erasure"),
        pl.col("at").cast(pl.Datetime("us", "UTC")),
        pl.lit(handle.next_sequence, pl.Int64).alias(SEQUENCE),
    )
    handle.commit(handle.writer.write(frame), positions=handle.positions)
