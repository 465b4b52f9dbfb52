"""Scores of a grouping of records against the truth."""

from __future__ import annotations

from itertools import combinations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.demo.identity_scores import b_cubed_scores, pairwise_scores
from pipelines.identity.names import group_names, is_same_name, is_short_form, signature

groupings = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(0, 3), st.integers(0, 3)))


@given(groupings)
def test_pairwise_scores_are_those_of_counting_pairs(records):
    predicted = {record: str(ours) for record, (ours, _) in records.items()}
    truth = {record: str(theirs) for record, (_, theirs) in records.items()}
    pairs = list(combinations(sorted(records), 2))
    joined = {pair for pair in pairs if predicted[pair[0]] == predicted[pair[1]]}
    same_people = {pair for pair in pairs if truth[pair[0]] == truth[pair[1]]}
    scores = pairwise_scores(predicted, truth)
    assert scores.precision == pytest.approx(len(joined & same_people) / len(joined) if joined else 1.0)
    assert scores.recall == pytest.approx(len(joined & same_people) / len(same_people) if same_people else 1.0)


def test_scores_take_frames_and_large_groups():
    size = 200_000
    predicted = pl.DataFrame({"record_id": range(size), "master_user_id": ["all"] * size})
    truth = pl.DataFrame({"record_id": range(size), "person": [n % 2 for n in range(size)]})
    scores = pairwise_scores(predicted, truth)
    assert scores.recall == 1.0
    assert scores.precision == pytest.approx(0.5, abs=1e-4)
    assert b_cubed_scores(predicted, truth).f1 == pytest.approx(2 / 3, abs=1e-4)


def test_perfect_and_empty_groupings_score_one():
    assert pairwise_scores({"a": "x", "b": "x"}, {"a": "p", "b": "p"}).f1 == 1.0
    assert pairwise_scores({}, {}).f1 == 1.0


@pytest.mark.parametrize(
    ("left", "right", "one"),
    [
        ("budi santoso", "santoso budi", True),
        ("budi santoso", "budisantoso", True),
        ("budi santoso", "budi santosso", True),
        ("budi santoso", "siti santoso", False),
        ("adi wijaya", "ani wijaya", False),
    ],
)
def test_spellings_of_one_full_name(left, right, one):
    assert is_same_name(left, right) is one
    assert is_same_name(right, left) is one


def test_a_shortened_name_joins_the_only_person_it_fits():
    assert is_short_form("b santoso", "budi santoso")
    assert not is_short_form("s santoso", "budi santoso")
    assert group_names(["budi santoso", "b santoso", "siti santoso"])["b santoso"] == "budi santoso"
    assert group_names(["budi santoso", "b santoso", "bambang santoso"])["b santoso"] == "b santoso"
    assert signature("budi santoso") == signature("b santosso")
