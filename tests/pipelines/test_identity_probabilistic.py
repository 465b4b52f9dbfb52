"""Probabilistic matches: the cached query is the one that Splink compiles, with the same weights."""

from __future__ import annotations

import re
from random import Random

import duckdb
import polars as pl
import pytest
from support.identity_world import FIRST, LAST, STREETS, with_typing_error

from pipelines.identity import probabilistic

WRITE_COMMAND = 'python -c "from pipelines.identity.probabilistic import write_cached_query; write_cached_query()"'


def profiles(count: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return pairs of profiles: equal, with typing errors, or different. Any value may be missing."""
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
            other[key] = random.choice(
                (value, value, with_typing_error(random, value) if isinstance(value, str) else value, other[key], None)
            )
        left.append(one)
        right.append(other)
    schema = {**dict.fromkeys(probabilistic.TEXT_COLUMNS, pl.String), "devices": pl.List(pl.String)}
    return pl.DataFrame(left, schema=schema), pl.DataFrame(right, schema=schema)


@pytest.fixture
def fresh_query():
    """Clear the query that is cached in memory, before and after the test."""
    probabilistic.match_weight_query.cache_clear()
    yield
    probabilistic.match_weight_query.cache_clear()


def test_cached_query_equals_the_one_compiled_by_splink():
    head, _, cached = probabilistic.CACHED_QUERY.read_text(encoding="utf-8").partition("\n")
    # Splink lists the columns of one comparison in any order
    ours, splinks = (sorted(re.split(r"[\s,]+", text)) for text in (cached, probabilistic.compile_query()))
    assert (head, ours) == (probabilistic._head(), splinks), f"Write it again: {WRITE_COMMAND}"


def test_weights_equal_those_of_splink():
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
    assert 0.1 < (ours["weight"] >= probabilistic.MIN_MATCH_WEIGHT).mean() < 0.9  # type: ignore[operator]


def test_weight_of_a_pair_is_independent_of_other_pairs():
    left, right = profiles(60, seed=9)
    together = probabilistic.compare(left, right)
    alone = pl.concat([probabilistic.compare(left[n : n + 1], right[n : n + 1]) for n in reversed(range(left.height))])
    assert alone.reverse().equals(together)
    assert probabilistic.compare(left[:0], right[:0]).height == 0


def test_changed_model_is_compiled_again(fresh_query, monkeypatch):
    left, right = profiles(5, seed=10)
    before = probabilistic.compare(left, right)["weight"]
    probabilistic.match_weight_query.cache_clear()
    monkeypatch.setattr(probabilistic, "PRIOR", 0.5)
    after = probabilistic.compare(left, right)["weight"]
    assert after.to_list() == pytest.approx((before + 4.247928).to_list(), abs=1e-5)
