"""Drift: whether live orders are distributed as the orders that a model was evaluated on, and whether its precision holds.

The reference is computed when a model is trained and stored with it in the registry: per feature, and for the score, the
edges of up to ten bins and the share of orders in each. Live orders are counted in the same bins. The distance is the
population stability index (PSI): below 0.1 the distribution is stable, from 0.25 on it has drifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from lakehouse.errors import SettingsError, ShopSphereError
from ml.features.declarations import Feature

Array = npt.NDArray[Any]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SCORE_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Quantiles that are the edges of the bins. The highest scores have narrower bins: they decide which orders are reviewed."""
SMOOTHING = 0.5
"""Orders added to each bin, so that an empty bin has a finite distance."""

State = Literal["steady", "moved", "drifted"]
STATE_WORDS: Mapping[State, str] = {"steady": "stable", "moved": "shifted", "drifted": "drifted"}
"""States as users read them."""


class MonitorError(ShopSphereError):
    """Live orders cannot be compared with a reference."""


@dataclass(frozen=True)
class DriftSettings:
    """Thresholds of the PSI, and the minimum numbers of orders for a comparison.

    moved    PSI from which on a distribution has shifted
    drifted  PSI from which on it raises an alarm
    """

    moved: float = 0.1
    drifted: float = 0.25
    min_orders: int = 200
    """Minimum number of live orders."""
    min_reviewed: int = 20
    """Minimum number of reviewed orders with a mature label for judging the precision."""

    def __post_init__(self) -> None:
        if not 0 < self.moved <= self.drifted:
            raise SettingsError(
                f"monitor.moved is {self.moved} and monitor.drifted {self.drifted}: "
                "expected 0 < moved <= drifted, e.g. 0.1 and 0.25."
            )


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Distance of a feature, or of the score, from its reference."""

    name: str
    psi: float
    chance: float
    """99.9th percentile of the PSI between samples of this size from one population."""
    state: State
    labels: tuple[str, ...]
    reference: tuple[float, ...]
    live: tuple[float, ...]
    """Share of orders per bin."""


@dataclass(frozen=True)
class DriftWeek:
    """The orders placed in one week."""

    begin: date
    orders: int
    reviewed: int
    """Scored at or above the threshold."""
    frauds: int
    """Frauds reported so far."""
    caught: int
    """Reported frauds that were reviewed."""
    settled: bool
    """Whether the labels of all its orders are mature."""


@dataclass(frozen=True, kw_only=True)
class RealisedPrecision:
    """Precision among reviewed orders with mature labels, compared with the precision measured in training (`promised`)."""

    weeks: tuple[DriftWeek, ...]
    reviewed: int
    caught: int
    promised: float
    low: float
    high: float
    """95% interval (Wilson) of the realised precision."""
    state: State

    @property
    def precision(self) -> float:
        """Share of the reviewed orders that were reported; NaN if none was reviewed."""
        return self.caught / self.reviewed if self.reviewed else float("nan")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Result of a comparison of live orders with a reference."""

    since: datetime
    until: datetime
    orders: int
    score: Distance
    features: tuple[Distance, ...]
    """Largest distance first."""
    realised: RealisedPrecision | None

    @property
    def alarms(self) -> tuple[str, ...]:
        """Descriptions of everything that has drifted."""
        found = [f"score (PSI {self.score.psi:.3f})"] if self.score.state == "drifted" else []
        found += [f"{one.name} (PSI {one.psi:.3f})" for one in self.features if one.state == "drifted"]
        if self.realised is not None and self.realised.state == "drifted":
            found.append(f"precision {self.realised.precision:.3f} where {self.realised.promised:.3f} was expected")
        return tuple(found)


# --- the reference -------------------------------------------------------------------------------------------------


def reference_of(frame: pl.DataFrame, score: Array, features: Sequence[Feature], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the reference of a model as JSON values: the bins of the orders it was evaluated on, and its metrics."""
    return {
        "orders": frame.height,
        "since": frame["placed_at"].min().isoformat() if frame.height else None,  # type: ignore[union-attr]
        "until": frame["placed_at"].max().isoformat() if frame.height else None,  # type: ignore[union-attr]
        "features": {feature.name: binned(frame[feature.name], feature) for feature in features},
        "score": _score_bins(score),
        "figures": {name: float(value) for name, value in metrics.items() if np.isfinite(value)},
    }


def binned(column: pl.Series, feature: Feature) -> dict[str, Any]:
    """Return the bins of a feature and the share of orders in each."""
    if feature.type == "category":
        bins: dict[str, Any] = {"categories": list(feature.categories)}
    else:
        bins = {"edges": _edges(_values(column))}
    return {**bins, "shares": _shares(counts(column, bins)), "orders": len(column)}


def _score_bins(score: Array) -> dict[str, Any]:
    bins = {"edges": _edges(score, SCORE_SHARES)}
    return {**bins, "shares": _shares(counts(pl.Series(score), bins)), "orders": len(score)}


def _edges(values: Array, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the upper edges of all bins but the last, at the quantiles `shares`. A frequent value is the edge of one bin."""
    known = values[~np.isnan(values)]
    if not len(known):
        return []
    quantiles = np.unique(np.quantile(known, shares, method="lower"))
    return [float(edge) for edge in quantiles if edge < known.max()]


def counts(column: pl.Series, bins: Mapping[str, Any]) -> Array:
    """Return the orders per bin. The last bin counts missing values, or undeclared categories."""
    if "categories" in bins:
        found = dict(column.cast(pl.String).value_counts().iter_rows())
        named = [int(found.pop(category, 0)) for category in bins["categories"]]
        return np.array([*named, sum(found.values())])
    values, edges = _values(column), np.array(bins["edges"], dtype=np.float64)
    missing = np.isnan(values)
    places = np.searchsorted(edges, values[~missing], side="left")
    return np.append(np.bincount(places, minlength=len(edges) + 1), missing.sum())


def bin_labels(bins: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a label for each bin."""
    if "categories" in bins:
        return (*bins["categories"], "undeclared")
    edges = [float(edge) for edge in bins["edges"]]
    if not edges:
        return ("any", "missing")
    between = [f"to {_short(high)}" for high in edges]
    return (*between, f"over {_short(edges[-1])}", "missing")


def _short(edge: float) -> str:
    return f"{edge:,.0f}" if abs(edge) >= 1000 else f"{edge:.4g}"


def _values(column: pl.Series) -> Array:
    return column.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _shares(count: Array) -> list[float]:
    return [float(share) for share in count / max(int(count.sum()), 1)]


# --- the comparison ------------------------------------------------------------------------------------------------


def distance(name: str, column: pl.Series, bins: Mapping[str, Any], settings: DriftSettings) -> Distance:
    """Return the distance of live values from their reference."""
    count, total = counts(column, bins), int(bins["orders"])
    before = np.array(bins["shares"]) * total
    used = (before + count) > 0
    psi = psi_of(before[used], count[used])
    chance = expected_by_chance(int(used.sum()), total, len(column))
    state: State = "steady"
    if psi >= settings.moved and psi > chance:
        state = "drifted" if psi >= settings.drifted else "moved"
    return Distance(
        name=name,
        psi=psi,
        chance=chance,
        state=state,
        labels=bin_labels(bins),
        reference=tuple(bins["shares"]),
        live=tuple(_shares(count)),
    )


def psi_of(before: Array, now: Array) -> float:
    """Return the population stability index of two counts over the same bins."""
    first, second = (before + SMOOTHING) / (before + SMOOTHING).sum(), (now + SMOOTHING) / (now + SMOOTHING).sum()
    return float(np.sum((second - first) * np.log(second / first)))


def expected_by_chance(bins: int, before: int, now: int) -> float:
    """Return the 99.9th percentile of the PSI between two samples of one population, of the sizes `before` and `now`.

    The PSI is distributed like chi-square with `bins` - 1 degrees of freedom, times (1 / before + 1 / now)."""
    freedom = bins - 1
    if freedom < 1 or not before or not now:
        return 0.0
    spread = 2 / (9 * freedom)
    # Wilson and Hilferty's approximation of the chi-square quantile; 3.09 is the normal quantile
    quantile = freedom * (1 - spread + 3.09 * spread**0.5) ** 3
    return float(quantile * (1 / before + 1 / now))


def compare(
    live: pl.DataFrame,
    score: Array,
    reference: Mapping[str, Any],
    settings: DriftSettings,
    realised: RealisedPrecision | None = None,
) -> Drift:
    """Compare live orders (features, `placed_at`) and their scores with a model's reference. Raises MonitorError."""
    if not reference.get("features") or not reference.get("score"):
        raise MonitorError("The champion was recorded without a reference to compare with. Train again: python -m app train.")
    if live.height < settings.min_orders:
        raise MonitorError(
            f"There are {live.height} live orders, {settings.min_orders} are needed to compare. Use more days (--days)."
        )
    missing = sorted(reference["features"].keys() - set(live.columns))
    if missing:
        raise MonitorError(
            f"The champion needs the feature {missing[0]}, which live orders do not have. Train again: python -m app train."
        )
    found = [distance(name, live[name], bins, settings) for name, bins in reference["features"].items()]
    since, until = live["placed_at"].min(), live["placed_at"].max()
    assert isinstance(since, datetime)
    assert isinstance(until, datetime)
    return Drift(
        since=since,
        until=until,
        orders=live.height,
        score=distance("score", pl.Series(score), reference["score"], settings),
        features=tuple(sorted(found, key=lambda one: (-one.psi, one.name))),
        realised=realised,
    )


def realised_precision(
    orders: pl.DataFrame,
    score: Array,
    threshold: float,
    promised: float,
    *,
    now: datetime,
    delay: timedelta,
    settings: DriftSettings,
) -> RealisedPrecision:
    """Return the precision per week and over all weeks with mature labels.

    orders: `placed_at` and `label` (1: reported until now), of orders placed after those that the model was evaluated on.
    A week counts once all its orders are older than the delay."""
    weekly = (
        orders.select(pl.col("placed_at").dt.truncate("1w").dt.date().alias("begin"), pl.col("label").cast(pl.Int64))
        .with_columns(reviewed=pl.Series(score >= threshold).cast(pl.Int64))
        .group_by("begin")
        .agg(
            pl.len().alias("orders"),
            pl.col("reviewed").sum(),
            pl.col("label").sum().alias("frauds"),
            (pl.col("label") * pl.col("reviewed")).sum().alias("caught"),
        )
        .sort("begin")
    )
    mature_before = (now - delay).date()
    weeks = tuple(
        DriftWeek(**row, settled=row["begin"] + timedelta(days=7) <= mature_before) for row in weekly.iter_rows(named=True)
    )
    reviewed = sum(week.reviewed for week in weeks if week.settled)
    caught = sum(week.caught for week in weeks if week.settled)
    low, high = wilson(caught, reviewed)
    state: State = "steady"
    if reviewed >= settings.min_reviewed and high < promised:
        state = "drifted"
    return RealisedPrecision(weeks=weeks, reviewed=reviewed, caught=caught, promised=promised, low=low, high=high, state=state)


def wilson(found: int, of: int) -> tuple[float, float]:
    """Return the 95% interval (Wilson) of the share found / of; 0 to 1 if `of` is 0."""
    if not of:
        return 0.0, 1.0
    z, share = 1.96, found / of
    middle = share + z * z / (2 * of)
    spread = z * float(np.sqrt(share * (1 - share) / of + z * z / (4 * of * of)))
    return max(0.0, (middle - spread) / (1 + z * z / of)), min(1.0, (middle + spread) / (1 + z * z / of))
