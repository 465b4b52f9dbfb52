"""Monitoring: drift is detected, chance is not, and the page reports both."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.errors import SettingsError
from ml.evaluation.drift import (
    DriftSettings,
    MonitorError,
    RealisedPrecision,
    binned,
    compare,
    counts,
    distance,
    expected_by_chance,
    psi_of,
    realised_precision,
    reference_of,
    wilson,
)
from ml.evaluation.monitor_report import page
from ml.features.declarations import Feature

START = datetime(2026, 1, 1, tzinfo=UTC)
AMOUNT = Feature(name="amount", type="amount", window="now", doc="Amount.", reason_text="{value}")
CHANNEL = Feature(
    name="channel", type="category", window="now", doc="Channel.", reason_text="{value}", categories=("web", "pos", "missing")
)
SOMETIMES = Feature(name="sometimes", type="minutes", window="ever", doc="A value that is often missing.", reason_text="{value}")
FEATURES = (AMOUNT, CHANNEL, SOMETIMES)
SETTINGS = DriftSettings()


def orders(
    rows: int, seed: int, *, larger: float = 1.0, marketplace: bool = False, missing: float = 0.5
) -> tuple[pl.DataFrame, Any]:
    random = np.random.default_rng(seed)
    channel = random.choice(["web", "pos"], rows, p=[0.7, 0.3])
    if marketplace:
        channel[: rows // 2] = "marketplace"
    frame = pl.DataFrame(
        {
            "amount": np.exp(random.normal(3, 1, rows)) * larger,
            "channel": channel,
            "sometimes": np.where(random.random(rows) < missing, np.nan, random.random(rows)),
            "placed_at": [START + timedelta(minutes=n) for n in range(rows)],
        }
    ).with_columns(pl.col("sometimes").fill_nan(None))
    return frame, random.beta(1, 30, rows) * min(larger, 5)


def reference() -> dict[str, Any]:
    frame, score = orders(5000, 1)
    return reference_of(frame, score, FEATURES, {"precision_at_threshold": 0.5, "roc_auc": float("nan")})


def test_samples_of_one_population_are_stable() -> None:
    drift = compare(*orders(3000, 2), reference(), SETTINGS)
    assert drift.alarms == ()
    assert {one.state for one in (drift.score, *drift.features)} == {"steady"}
    assert drift.orders == 3000


@pytest.mark.parametrize(
    ("changes", "alarms"),
    [({"larger": 3.0}, ["score", "amount"]), ({"marketplace": True}, ["channel"]), ({"missing": 0.05}, ["sometimes"])],
)
def test_a_changed_population_drifts(changes: dict[str, Any], alarms: list[str]) -> None:
    drift = compare(*orders(3000, 2, **changes), reference(), SETTINGS)
    assert sorted(alarm.split(" ")[0] for alarm in drift.alarms) == sorted(alarms)
    assert drift.features[0].psi >= drift.features[-1].psi


def test_small_samples_raise_no_alarm() -> None:
    """A distance within the range of chance is stable, however large."""
    states = [compare(*orders(200, seed), reference(), SETTINGS).alarms for seed in range(10, 30)]
    assert states == [()] * 20


def test_reference_is_json_serialisable() -> None:
    import json

    made = reference()
    assert json.loads(json.dumps(made)) == made
    assert "roc_auc" not in made["figures"]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=200))
def test_every_order_is_in_one_bin_and_a_sample_has_distance_zero_to_itself(values: list[float | None]) -> None:
    column = pl.Series("amount", values, dtype=pl.Float64)
    bins = binned(column, AMOUNT)
    assert counts(column, bins).sum() == len(values)
    assert sum(bins["shares"]) == pytest.approx(1)
    assert distance("amount", column, bins, SETTINGS).psi == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=12))
def test_psi_is_never_negative_and_symmetric(pairs: list[tuple[int, int]]) -> None:
    before, now = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    assert psi_of(before, now) >= -1e-12
    assert psi_of(before, now) == pytest.approx(psi_of(now, before))


def test_psi_of_equal_distributions_stays_within_the_expected_range() -> None:
    random = np.random.default_rng(1)
    shares, beyond = np.full(10, 0.1), 0
    for _ in range(2000):
        psi = psi_of(random.multinomial(3000, shares), random.multinomial(800, shares))
        beyond += psi > expected_by_chance(10, 3000, 800)
    assert beyond <= 10


def settled(precision: float, rows: int = 600) -> RealisedPrecision:
    random = np.random.default_rng(1)
    score = np.where(np.arange(rows) % 3 == 0, 0.9, 0.1)
    label = ((score > 0.5) & (random.random(rows) < precision)).astype(np.int8)
    frame = pl.DataFrame({"placed_at": [START + timedelta(hours=n) for n in range(rows)], "label": label})
    now = START + timedelta(days=45 + 14)
    return realised_precision(frame, score, 0.5, 0.6, now=now, delay=timedelta(days=45), settings=SETTINGS)


def test_stable_and_fallen_precision() -> None:
    assert settled(0.6).state == "steady"
    fallen = settled(0.2)
    assert fallen.state == "drifted"
    assert fallen.high < fallen.promised
    assert fallen.low <= fallen.precision <= fallen.high


def test_only_weeks_with_mature_labels_are_judged() -> None:
    found = settled(0.6)
    # orders of 25 days from Thursday 1 January on; labels are whole for those up to 15 January
    assert [(str(week.begin), week.settled) for week in found.weeks] == [
        ("2025-12-29", True),
        ("2026-01-05", True),
        ("2026-01-12", False),
        ("2026-01-19", False),
    ]
    assert found.reviewed == sum(week.reviewed for week in found.weeks[:2])
    assert sum(week.orders for week in found.weeks) == 600


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))


def test_page_is_self_contained_and_escaped() -> None:
    frame, score = orders(1000, 3, larger=3.0)
    drift = compare(frame, score, reference(), SETTINGS, settled(0.2))
    html = page(drift, SETTINGS, "fraud <version> 2", "the 5,000 orders")
    assert "fraud &lt;version&gt; 2" in html
    assert "<version>" not in html
    assert html.count("data:image/png;base64,") == 3 + len(FEATURES)
    assert "http" not in html
    assert "amount (PSI" in html
    assert "precision 0." in html


def test_impossible_comparisons_are_errors() -> None:
    frame, score = orders(1000, 3)
    with pytest.raises(MonitorError, match="200 are needed"):
        compare(frame.head(10), score[:10], reference(), SETTINGS)
    with pytest.raises(MonitorError, match="without a reference"):
        compare(frame, score, {}, SETTINGS)
    with pytest.raises(MonitorError, match="feature amount"):
        compare(frame.drop("amount"), score, reference(), SETTINGS)
    with pytest.raises(SettingsError, match="moved"):
        DriftSettings(moved=0.5, drifted=0.25)
