"""Do two names mean one person? Names are in the spelling of `contacts.normalise_name`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

_VOWELS = frozenset("aeiouy")
_TYPO_FROM = 4
"""Words shorter than this are compared letter by letter: 'adi' and 'ani' are two names."""


def signature(name: str) -> str:
    """A short form that survives most typos, abbreviation of given names, and the order of 'given family'.

    The first letter of the first word and the consonants of the last. By it people at an identifier are counted:
    a customer who writes his name in five ways counts once.
    """
    words = name.split()
    family = words[-1]
    skeleton = [family[0]]
    for letter in family[1:]:
        if letter not in _VOWELS and letter != skeleton[-1]:
            skeleton.append(letter)
    return words[0][0] + "." + "".join(skeleton)[:5]


@lru_cache(maxsize=65_536)
def distance(left: str, right: str) -> int:
    """Edit distance with transpositions of neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        now = [i]
        for j, other in enumerate(right, 1):
            cost = min(row[j] + 1, now[j - 1] + 1, row[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == right[j - 2] and left[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            now.append(cost)
        before, row = row, now
    return row[-1]


def _typo(left: str, right: str) -> int | None:
    """The edits between two words that could be one word mistyped, or None."""
    if left == right:
        return 0
    if min(len(left), len(right)) < _TYPO_FROM or abs(len(left) - len(right)) > 1:
        return None
    edits = distance(left, right)
    return edits if edits <= (1 if min(len(left), len(right)) < 8 else 2) else None


@lru_cache(maxsize=262_144)
def same(left: str, right: str) -> bool:
    """One full name in two spellings: words in another order, written together, or up to two typing errors."""
    if left == right or left.replace(" ", "") == right.replace(" ", ""):
        return True
    ours, theirs = sorted(left.split()), sorted(right.split())
    if len(ours) != len(theirs):
        return _typo(left.replace(" ", ""), right.replace(" ", "")) == 1
    if ours == theirs:
        return True
    rest_ours = [word for word in ours if word not in theirs]
    rest_theirs = [word for word in theirs if word not in ours]
    if len(rest_ours) != len(rest_theirs):
        return False
    edits = [_typo(a, b) for a, b in zip(rest_ours, rest_theirs, strict=True)]
    return None not in edits and sum(edit or 0 for edit in edits) <= 2


@lru_cache(maxsize=262_144)
def shortened(left: str, right: str) -> bool:
    """One of the names could be the other in short: initials, or words left out ('b santoso', 'budi')."""
    short, full = sorted((left.split(), right.split()), key=lambda words: (len(words), sum(map(len, words))))
    if len(short) == 1:
        return short[0] == full[0] or (len(short[0]) == 1 and len(full) == 1 and short[0] == full[0][0])
    remaining = list(full)
    whole = False
    for word in sorted(short, key=len, reverse=True):
        meant = next((other for other in remaining if _is_whole(word, other) or _is_initial(word, other)), None)
        if meant is None:
            return False
        whole |= _is_whole(word, meant)
        remaining.remove(meant)
    return whole


def _is_whole(word: str, full: str) -> bool:
    return _typo(word, full) is not None or (len(word) > 2 and full.startswith(word))


def _is_initial(word: str, full: str) -> bool:
    return (len(word) == 1 or len(full) == 1) and word[0] == full[0]


def groups(names: Iterable[str], together: Iterable[str] = ()) -> dict[str, str]:
    """The names of one identifier, by person: name -> the group's fullest name.

    Spellings of one full name are a group; a shortened name joins the only group that it fits, and is its own
    where it fits several. `together`: names known to be of one person (both proved the identifier theirs).
    """
    distinct = sorted(set(names))
    leader = {name: name for name in distinct}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for left, right in combinations(distinct, 2):
        if same(left, right):
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
            if strict[other] != short and _letters(other) > fullness and any(shortened(name, other) for name in members)
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
