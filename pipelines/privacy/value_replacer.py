"""Replaces single personal values by their pseudonyms, as the suppression list demands."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from pipelines.privacy.pseudonyms import Digest, is_pseudonym, normalise_value
from pipelines.privacy.suppression import Suppression


@dataclass(frozen=True)
class PersonalValue:
    """A value in a row of the person. normalised: as silver normalises it, None when it identifies no person."""

    kind: str
    raw: str
    normalised: str | None


@dataclass
class ValueReplacer:
    """Looks up and replaces values; remembers the results.

    collected      collects the values that were replaced in the person's rows; None: they are not collected
    latest_begins  collects by digest when the latest record of other people began in which a value was replaced, in
                   microseconds since 1970; None: it is not collected
    """

    suppression: Suppression
    collected: set[PersonalValue] | None = None
    latest_begins: dict[Digest, int] | None = None
    _replacements: dict[tuple[str, str, str, str], tuple[str, int | None]] = field(default_factory=dict)
    _owners: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def replace(self, kind: str, raw: str, owner: str | None, begin: int, region: str = "", city: str = "") -> str | None:
        """Return what replaces a value, or the value itself.

        owner   the erasure of the person whose row it is; None: a row of another person
        begin   when the record began: in other people's rows only values of earlier records are replaced
        region  of a phone number without a country code
        city    of an address without one
        """
        if owner is None:
            return self._replace_in_other_row(kind, raw, begin, region, city)
        if self.collected is not None and not is_pseudonym(kind, raw):
            self.collected.add(PersonalValue(kind, raw, self._normalise(kind, raw, region, city)))
        if kind == "name":
            return self.suppression.pseudonyms.name(owner)
        if kind in ("city", "text"):
            return None
        return self._replacement(kind, raw, region, city)[0]

    def owner(self, kind: str, value: str) -> str | None:
        """Return the erasure that a suppressed key (an account, record or mention) belongs to."""
        entry = self.suppression.find(kind, value)
        return entry[0] if entry is not None else None

    def cached_owner(self, kind: str, value: str) -> str | None:
        """Return the same; remembers the result, for keys that many messages share."""
        key = (kind, value)
        if key not in self._owners:
            self._owners[key] = self.owner(kind, value)
        return self._owners[key]

    def owners(self, kind: str, values: pl.Series) -> list[str | None]:
        """Return the erasure of each key; looks up each distinct one once."""
        distinct = values.drop_nulls().unique().to_list()
        found = {value: self.owner(kind, value) for value in distinct}
        if not any(found.values()):
            return [None] * len(values)
        return [found.get(value) for value in values.to_list()]

    def _replace_in_other_row(self, kind: str, raw: str, begin: int, region: str, city: str) -> str:
        if kind in ("name", "city", "text"):
            return raw
        replacement, until = self._replacement(kind, raw, region, city)
        if until is None or begin > until:
            return raw
        if self.latest_begins is not None:
            digest = self.suppression.pseudonyms.digest(kind, self._normalise(kind, raw, region, city) or "")
            self.latest_begins[digest] = max(begin, self.latest_begins.get(digest, begin))
        return replacement

    def _replacement(self, kind: str, raw: str, region: str, city: str) -> tuple[str, int | None]:
        """Return the pseudonym, and until when the value is suppressed in other people's rows (None: it is not)."""
        key = (kind, raw, region, city)
        if (found := self._replacements.get(key)) is None:
            found = self._replacements[key] = self._look_up_replacement(*key)
        return found

    def _look_up_replacement(self, kind: str, raw: str, region: str, city: str) -> tuple[str, int | None]:
        pseudonyms = self.suppression.pseudonyms
        if is_pseudonym(kind, raw):
            return raw, None
        normalised = self._normalise(kind, raw, region, city)
        if normalised is None:
            return pseudonyms.pseudonym("text", raw), None
        entry = self.suppression.find(kind, normalised)
        return pseudonyms.pseudonym(kind, normalised), entry[1] if entry is not None else None

    def _normalise(self, kind: str, raw: str, region: str, city: str) -> str | None:
        return normalise_value(kind, raw, region or self.suppression.pseudonyms.region, city)
