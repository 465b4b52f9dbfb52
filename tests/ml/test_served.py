"""Served scores compared with the lakehouse: equal values, differences and their causes."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from ml.evaluation.served_scores import CAUSES, LATE, ServedScores, compare_served


class Model:
    """A model that scores half of its first feature."""

    features = ("amount", "channel")

    def score(self, frame: pl.DataFrame) -> Any:
        return np.asarray(frame["amount"].fill_null(0.0)) / 2


class Champion:
    model = Model()

    class version:  # noqa: N801
        number = 3


def served(amount: float | None, channel: str, *, version: int = 3, **order: Any) -> dict[str, Any]:
    return {
        "order": {"amount": 1, "person": "p", **order},
        "features": {"amount": amount, "channel": channel},
        "answer": {"score": (amount or 0.0) / 2, "model": {"version": version}},
    }


def offline(**amounts: tuple[float | None, str]) -> pl.DataFrame:
    rows = [(order, *values) for order, values in amounts.items()]
    return pl.DataFrame(rows, schema={"order_id": pl.String, "amount": pl.Float64, "channel": pl.String}, orient="row")


def entities(*ids: str, **changed: Any) -> pl.DataFrame:
    return pl.DataFrame([{"order_id": one, "amount": 1, "person": "p", **changed} for one in ids])


def compared(scores: dict[str, Any], now: pl.DataFrame, of: pl.DataFrame) -> ServedScores:
    return compare_served(scores, 0, now, of, Champion())  # type: ignore[arg-type]


def test_equal_features_are_counted_and_unknown_orders_skipped() -> None:
    scores = {"a": served(0.5, "web"), "b": served(None, "pos"), "gone": served(0.1, "web"), "old": served(0.2, "web", version=2)}
    found = compared(scores, offline(a=(0.5 + 5e-7, "web"), b=(None, "pos"), old=(0.2, "web")), entities("a", "b", "old"))
    assert (found.scored, found.known, found.equal, found.rescored, found.same_score) == (4, 3, 3, 2, 2)
    assert found.largest == pytest.approx(2.5e-7)
    assert found.features == ()


@pytest.mark.parametrize(
    ("changed", "cause"), [({}, LATE), ({"amount": 2}, CAUSES["amount"]), ({"person": "q"}, CAUSES["person"])]
)
def test_a_difference_has_size_and_cause(changed: dict[str, Any], cause: str) -> None:
    scores = {one: served(0.5, "web") for one in "abc"}
    now = offline(a=(0.75, "web"), b=(0.5, "pos"), c=(None, "web"))
    found = compared(scores, now, entities(*"abc", **changed))
    assert found.equal == 0
    assert found.largest == pytest.approx(0.25)
    assert [(one.name, one.orders, one.largest, one.cause) for one in found.features] == [
        ("amount", 2, 0.25, cause),
        ("channel", 1, None, cause),
    ]


def test_no_served_scores_are_explained() -> None:
    assert "SHOPSPHERE_KAFKA__TOPICS=events,fraud_scores" in ServedScores().in_words
