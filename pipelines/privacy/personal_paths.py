"""Replaces personal values in JSON objects, by declared paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipelines.privacy.suppression import ACCOUNT

Paths = tuple[tuple[str, str], ...]
"""(path, kind) pairs of a JSON column; see lakehouse.table.Column."""


@dataclass(frozen=True)
class PersonalPaths:
    """The personal values of a JSON object.

    paths            the declared paths
    replace          replace(kind, text) -> the new text
    drop_undeclared  whether values that no path covers are removed
    """

    paths: Paths
    replace: Callable[[str, str], str | None]
    drop_undeclared: bool

    def anonymise(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the object with its personal values replaced."""
        return self._object(document, _kinds_by_field(self.paths))

    def _object(self, document: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in document.items():
            kind = kinds.get(name)
            if kind is None:
                if not self.drop_undeclared:
                    result[name] = value
            elif isinstance(kind, str):
                result[name] = value if kind in ("", ACCOUNT) else self._leaf(kind, value)
            elif isinstance(value, dict):
                result[name] = self._object(value, kind)
            elif isinstance(value, list):
                result[name] = [self._element(item, kind) for item in value]
            elif value is None or not self.drop_undeclared:
                result[name] = value
        return result

    def _element(self, value: Any, kinds: Mapping[str, Any]) -> Any:
        if isinstance(value, dict):
            return self._object(value, kinds)
        return None if self.drop_undeclared else value

    def _leaf(self, kind: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.replace(kind, value)
        if value is None or isinstance(value, bool):
            return value
        text = (" " if kind == "name" else ", ").join(_texts(value))
        new = self.replace(kind, text)
        return value if new == text else new


@cache
def _kinds_by_field(paths: Paths) -> Mapping[str, Any]:
    """Return the paths as nested mappings of field names, with the kinds as leaves."""
    root: dict[str, Any] = {}
    for path, kind in paths:
        *parents, last = path.split(".")
        node = root
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = kind
    return root


def _texts(value: Any) -> Iterator[str]:
    """Yield the scalar values within a JSON value, as text."""
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value is not None:
        yield str(value).strip()
