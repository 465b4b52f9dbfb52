"""Probable matches: the kept query is Splink's own, and weighs pairs as Splink does."""

from __future__ import annotations

import re
from random import Random

import duckdb
import polars as pl
import pytest
from support.identity_world import FIRST, LAST, STREETS, slip

from pipelines.identity import probabilistic

WRITE = 'python -c "from pipelines.identity.probabilistic import keep; keep()"'


def profiles(count: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs of profiles: the same one, one with typing errors, another one; anything may be missing."""
    random = Random(seed)

    def profile() -> dict[str, object]:
        given, last = random.choice(FIRST).lower(), random.choice(LAST).lower()
        local = f"{given}.{last}{random.randrange(90)}"
        return {
            "name": f"{given} {last}",
            "given": given,
            "short": f"{given[0]} {last}",
            "address": f"jalan {random.choice(STREETS).lower()} {random.randrange(400)} bandung",
            "phone": f"+62812{random.randrange(10**7):07d}",
            "email": f"{local}@{random.choice(('x', 'y'))}.com",
            "local": local,
            "devices": [f"device:{random.randrange(5)}"],
        }

    left, right = [], []
    for _ in range(count):
        one, other = profile(), profile()
        for key, value in one.items():
            other[key] = random.choice((value, value, slip(random, value) if isinstance(value, str) else value, other[key], None))
        left.append(one)
        right.append(other)
    schema = {**dict.fromkeys(probabilistic.TEXT, pl.String), "devices": pl.List(pl.String)}
    return pl.DataFrame(left, schema=schema), pl.DataFrame(right, schema=schema)


@pytest.fixture
def anew():
    """The query is looked up again, before and after."""
    probabilistic.query.cache_clear()
    yield
    probabilistic.query.cache_clear()


def test_the_kept_query_is_what_splink_makes_of_the_model():
    head, _, kept = probabilistic.KEPT_QUERY.read_text(encoding="utf-8").partition("\n")
    # Splink lists the columns of one comparison in any order
    ours, splinks = (sorted(re.split(r"[\s,]+", text)) for text in (kept, probabilistic.compiled()))
    assert (head, ours) == (probabilistic._head(), splinks), f"Write it again: {WRITE}"


def test_pairs_weigh_what_splink_says():
    from splink import DuckDBAPI
    from splink.internals.realtime import compare_records

    left, right = profiles(400, seed=8)
    connection = duckdb.connect(":memory:", config={"threads": 1})
    sides = [side.with_row_index("pair").to_arrow() for side in (left, right)]
    found = compare_records(*sides, probabilistic._model(), DuckDBAPI(connection), join_condition="l.pair = r.pair")
    rows = connection.sql(f"select match_weight from {found.physical_name} order by pair_l").fetchall()
    connection.close()
    ours = probabilistic.compare(left, right)
    assert ours["weight"].to_list() == [round(weight, 6) for (weight,) in rows]
    assert 0.1 < (ours["weight"] >= probabilistic.THRESHOLD).mean() < 0.9  # type: ignore[operator]


def test_a_pair_is_weighed_by_itself_whatever_is_compared_beside_it():
    left, right = profiles(60, seed=9)
    together = probabilistic.compare(left, right)
    alone = pl.concat([probabilistic.compare(left[n : n + 1], right[n : n + 1]) for n in reversed(range(left.height))])
    assert alone.reverse().equals(together)
    assert probabilistic.compare(left[:0], right[:0]).height == 0


def test_another_model_is_compiled_anew(anew, monkeypatch):
    left, right = profiles(5, seed=10)
    before = probabilistic.compare(left, right)["weight"]
    probabilistic.query.cache_clear()
    monkeypatch.setattr(probabilistic, "PRIOR", 0.5)
    after = probabilistic.compare(left, right)["weight"]
    assert after.to_list() == pytest.approx((before + 4.247928).to_list(), abs=1e-5)
