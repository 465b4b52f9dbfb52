"""Whether live orders still look like those that a model was judged on, and whether its scores keep their promise.

The reference is taken when a model is trained and stays with it in the registry: per feature, and for the score, the
limits of up to ten bins and the share of orders in each. Live orders are put into the same bins; the distance is the
population stability index (PSI): below .1 nothing moved, from .25 on the population is another one.
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
"""Shares of orders below the limits of the bins. What is done about an order depends on the highest scores."""
HALF = 0.5
"""Orders added to each bin, so that an empty one has a finite distance."""

State = Literal["steady", "moved", "drifted"]


class MonitorError(ShopSphereError):
    """There is nothing to compare."""


@dataclass(frozen=True)
class DriftSettings:
    """When a distance is worth telling, and when it is an alarm."""

    moved: float = 0.1
    drifted: float = 0.25
    min_orders: int = 200
    """Live orders below which nothing can be said."""
    min_reviewed: int = 20
    """Reviewed orders with a known label below which precision is not judged."""

    def __post_init__(self) -> None:
        if not 0 < self.moved <= self.drifted:
            raise SettingsError(
                f"monitor.moved is {self.moved} and monitor.drifted {self.drifted}: "
                "expected 0 < moved <= drifted, e.g. 0.1 and 0.25."
            )


@dataclass(frozen=True)
class Distance:
    """How far a feature, or the score, is from its reference."""

    name: str
    psi: float
    chance: float
    """The PSI that this many orders stay below in 99.9 of 100 cases if nothing moved."""
    state: State
    labels: tuple[str, ...]
    reference: tuple[float, ...]
    live: tuple[float, ...]
    """Shares of orders per bin."""


@dataclass(frozen=True)
class DriftWeek:
    """What became of one week's orders."""

    begin: date
    orders: int
    reviewed: int
    """Scored at or above the threshold."""
    frauds: int
    """Reported so far."""
    caught: int
    """Of them, reviewed."""
    settled: bool
    """Old enough that all reports have come in."""


@dataclass(frozen=True)
class Realised:
    """Precision among reviewed orders whose labels are known, against what the model's training measured."""

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
        """Caught per reviewed; NaN when none was."""
        return self.caught / self.reviewed if self.reviewed else float("nan")


@dataclass(frozen=True)
class Drift:
    """Everything that monitoring found."""

    since: datetime
    until: datetime
    orders: int
    score: Distance
    features: tuple[Distance, ...]
    """The farthest first."""
    realised: Realised | None

    @property
    def alarms(self) -> tuple[str, ...]:
        """What drifted, in words; none: all is well."""
        found = [f"score (PSI {self.score.psi:.3f})"] if self.score.state == "drifted" else []
        found += [f"{one.name} (PSI {one.psi:.3f})" for one in self.features if one.state == "drifted"]
        if self.realised is not None and self.realised.state == "drifted":
            found.append(f"precision {self.realised.precision:.3f} where {self.realised.promised:.3f} was promised")
        return tuple(found)


# --- the reference -------------------------------------------------------------------------------------------------


def reference_of(frame: pl.DataFrame, score: Array, features: Sequence[Feature], figures: Mapping[str, float]) -> dict[str, Any]:
    """What to keep with a model: the bins of the orders it was judged on, and its figures. Plain JSON."""
    return {
        "orders": frame.height,
        "since": frame["placed_at"].min().isoformat() if frame.height else None,  # type: ignore[union-attr]
        "until": frame["placed_at"].max().isoformat() if frame.height else None,  # type: ignore[union-attr]
        "features": {feature.name: binned(frame[feature.name], feature) for feature in features},
        "score": _numbers(score),
        "figures": {name: float(value) for name, value in figures.items() if np.isfinite(value)},
    }


def binned(column: pl.Series, feature: Feature) -> dict[str, Any]:
    """The bins of a feature and the share of orders in each."""
    if feature.type == "category":
        bins: dict[str, Any] = {"categories": list(feature.categories)}
    else:
        bins = {"edges": _edges(_values(column))}
    return {**bins, "shares": _shares(counts(column, bins)), "orders": len(column)}


def _numbers(score: Array) -> dict[str, Any]:
    bins = {"edges": _edges(score, SCORE_SHARES)}
    return {**bins, "shares": _shares(counts(pl.Series(score), bins)), "orders": len(score)}


def _edges(values: Array, shares: Sequence[float] = SHARES) -> list[float]:
    """Upper limits of all bins but the last, below which about these shares of orders lie; a value that many share ends a
    bin."""
    known = values[~np.isnan(values)]
    if not len(known):
        return []
    limits = np.unique(np.quantile(known, shares, method="lower"))
    return [float(limit) for limit in limits if limit < known.max()]


def counts(column: pl.Series, bins: Mapping[str, Any]) -> Array:
    """Orders per bin; the last bin counts missing values, and categories that were not declared."""
    if "categories" in bins:
        found = dict(column.cast(pl.String).value_counts().iter_rows())
        named = [int(found.pop(category, 0)) for category in bins["categories"]]
        return np.array([*named, sum(found.values())])
    values, edges = _values(column), np.array(bins["edges"], dtype=np.float64)
    missing = np.isnan(values)
    places = np.searchsorted(edges, values[~missing], side="left")
    return np.append(np.bincount(places, minlength=len(edges) + 1), missing.sum())


def bin_labels(bins: Mapping[str, Any]) -> tuple[str, ...]:
    """The bins in words."""
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
    """How far live values are from their reference."""
    count, total = counts(column, bins), int(bins["orders"])
    before = np.array(bins["shares"]) * total
    used = (before + count) > 0
    psi = psi_of(before[used], count[used])
    chance = expected_by_chance(int(used.sum()), total, len(column))
    state: State = "steady"
    if psi >= settings.moved and psi > chance:
        state = "drifted" if psi >= settings.drifted else "moved"
    return Distance(name, psi, chance, state, bin_labels(bins), tuple(bins["shares"]), tuple(_shares(count)))


def psi_of(before: Array, now: Array) -> float:
    """The population stability index of two counts over the same bins."""
    first, second = (before + HALF) / (before + HALF).sum(), (now + HALF) / (now + HALF).sum()
    return float(np.sum((second - first) * np.log(second / first)))


def expected_by_chance(bins: int, before: int, now: int) -> float:
    """The PSI that two samples of one population stay below in 99.9 of 100 cases: it is spread like chi-square with
    `bins` - 1 degrees of freedom, times (1 / before + 1 / now)."""
    freedom = bins - 1
    if freedom < 1 or not before or not now:
        return 0.0
    spread = 2 / (9 * freedom)
    # Wilson and Hilferty's approximation of the chi-square quantile; 3.09: the normal one
    quantile = freedom * (1 - spread + 3.09 * spread**0.5) ** 3
    return float(quantile * (1 / before + 1 / now))


def compare(
    live: pl.DataFrame, score: Array, reference: Mapping[str, Any], settings: DriftSettings, realised: Realised | None = None
) -> Drift:
    """Compare live orders (features, `placed_at`) and their scores with a model's reference. Raises MonitorError."""
    if not reference.get("features") or not reference.get("score"):
        raise MonitorError("The champion was recorded without a reference to compare with. Train again: python -m app train.")
    if live.height < settings.min_orders:
        raise MonitorError(
            f"There are {live.height} live orders, {settings.min_orders} are needed to compare. Take more days (--days)."
        )
    lacking = sorted(reference["features"].keys() - set(live.columns))
    if lacking:
        raise MonitorError(
            f"The champion knows the feature {lacking[0]}, which live orders lack. Train again: python -m app train."
        )
    found = [distance(name, live[name], bins, settings) for name, bins in reference["features"].items()]
    since, until = live["placed_at"].min(), live["placed_at"].max()
    assert isinstance(since, datetime)
    assert isinstance(until, datetime)
    return Drift(
        since,
        until,
        live.height,
        distance("score", pl.Series(score), reference["score"], settings),
        tuple(sorted(found, key=lambda one: (-one.psi, one.name))),
        realised,
    )


def realise(
    orders: pl.DataFrame,
    score: Array,
    threshold: float,
    promised: float,
    *,
    now: datetime,
    delay: timedelta,
    settings: DriftSettings,
) -> Realised:
    """Precision as frauds come to be known. orders: `placed_at`, `label` (1: reported until now), placed after those that
    the model was judged on. Only weeks that are wholly older than the delay are judged; younger ones are shown."""
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
    limit = (now - delay).date()
    weeks = tuple(DriftWeek(**row, settled=row["begin"] + timedelta(days=7) <= limit) for row in weekly.iter_rows(named=True))
    reviewed = sum(week.reviewed for week in weeks if week.settled)
    caught = sum(week.caught for week in weeks if week.settled)
    low, high = wilson(caught, reviewed)
    state: State = "steady"
    if reviewed >= settings.min_reviewed and high < promised:
        state = "drifted"
    return Realised(weeks, reviewed, caught, promised, low, high, state)


def wilson(found: int, of: int) -> tuple[float, float]:
    """95% interval of a share; 0 to 1 when nothing was drawn."""
    if not of:
        return 0.0, 1.0
    z, share = 1.96, found / of
    middle = share + z * z / (2 * of)
    spread = z * float(np.sqrt(share * (1 - share) / of + z * z / (4 * of * of)))
    return max(0.0, (middle - spread) / (1 + z * z / of)), min(1.0, (middle + spread) / (1 + z * z / of))
