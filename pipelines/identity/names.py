"""Comparison of the names of people. Names are normalised by `contacts.normalise_name`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

_VOWELS = frozenset("aeiouy")
_MIN_TYPO_LENGTH = 4
"""Shorter words have no typing errors: 'adi' and 'ani' are different names."""


def signature(name: str) -> str:
    """Return a short form of a name that most typing errors and abbreviated given names do not change.

    It is the first letter of the first word and the consonants of the last. People at an identifier are counted by it: a
    customer who spells their name in five ways counts once.
    """
    words = name.split()
    family = words[-1]
    skeleton = [family[0]]
    for letter in family[1:]:
        if letter not in _VOWELS and letter != skeleton[-1]:
            skeleton.append(letter)
    return words[0][0] + "." + "".join(skeleton)[:5]


@lru_cache(maxsize=65_536)
def edit_distance(left: str, right: str) -> int:
    """Return the edit distance with transpositions of adjacent letters (optimal string alignment)."""
    row_before: list[int] = []
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        next_row = [i]
        for j, other in enumerate(right, 1):
            cost = min(row[j] + 1, next_row[j - 1] + 1, row[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == right[j - 2] and left[i - 2] == other:
                cost = min(cost, row_before[j - 2] + 1)
            next_row.append(cost)
        row_before, row = row, next_row
    return row[-1]


def _typing_errors(left: str, right: str) -> int | None:
    """Return the edits between two words that can be spellings of one, or None."""
    if left == right:
        return 0
    if min(len(left), len(right)) < _MIN_TYPO_LENGTH or abs(len(left) - len(right)) > 1:
        return None
    edits = edit_distance(left, right)
    return edits if edits <= (1 if min(len(left), len(right)) < 8 else 2) else None


@lru_cache(maxsize=262_144)
def is_same_name(left: str, right: str) -> bool:
    """Return whether two full names are spellings of one: words reordered or joined, or up to two typing errors."""
    if left == right or left.replace(" ", "") == right.replace(" ", ""):
        return True
    left_words, right_words = sorted(left.split()), sorted(right.split())
    if len(left_words) != len(right_words):
        return _typing_errors(left.replace(" ", ""), right.replace(" ", "")) == 1
    if left_words == right_words:
        return True
    left_rest = [word for word in left_words if word not in right_words]
    right_rest = [word for word in right_words if word not in left_words]
    if len(left_rest) != len(right_rest):
        return False
    edits = [_typing_errors(a, b) for a, b in zip(left_rest, right_rest, strict=True)]
    return None not in edits and sum(edit or 0 for edit in edits) <= 2


@lru_cache(maxsize=262_144)
def is_short_form(left: str, right: str) -> bool:
    """Return whether one name can be a short form of the other: initials, or omitted words ('b santoso', 'budi')."""
    short, full = sorted((left.split(), right.split()), key=lambda words: (len(words), sum(map(len, words))))
    if len(short) == 1:
        return short[0] == full[0] or (len(short[0]) == 1 and len(full) == 1 and short[0] == full[0][0])
    remaining = list(full)
    has_whole_word = False
    for word in sorted(short, key=len, reverse=True):
        match = next((other for other in remaining if _is_whole(word, other) or _is_initial(word, other)), None)
        if match is None:
            return False
        has_whole_word |= _is_whole(word, match)
        remaining.remove(match)
    return has_whole_word


def _is_whole(word: str, full: str) -> bool:
    return _typing_errors(word, full) is not None or (len(word) > 2 and full.startswith(word))


def _is_initial(word: str, full: str) -> bool:
    return (len(word) == 1 or len(full) == 1) and word[0] == full[0]


def group_names(names: Iterable[str], together: Iterable[str] = ()) -> dict[str, str]:
    """Group the names at one identifier by person. Return name -> the fullest name of its group.

    Spellings of one full name are a group. A short form joins a group if it fits no other; otherwise it is a group of
    its own. together: names known to belong to one person (each verified the identifier).
    """
    distinct = sorted(set(names))
    leader = {name: name for name in distinct}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for left, right in combinations(distinct, 2):
        if is_same_name(left, right):
            leader[find(right)] = find(left)
    known = sorted(set(together))
    for name in known[1:]:
        leader[find(name)] = find(known[0])
    strict = {name: find(name) for name in distinct}
    for short in sorted(set(strict.values())):
        members = [name for name in distinct if strict[name] == short]
        fullness = max(_letters(name) for name in members)
        fits = {
            strict[other]
            for other in distinct
            if strict[other] != short and _letters(other) > fullness and any(is_short_form(name, other) for name in members)
        }
        if len(fits) == 1:
            leader[find(short)] = find(fits.pop())
    label: dict[str, str] = {}
    for name in distinct:
        root = find(name)
        label[root] = max(label.get(root, ""), name, key=lambda each: (_letters(each), each))
    return {name: label[find(name)] for name in distinct}


def _letters(name: str) -> int:
    return len(name.replace(" ", ""))
