"""Monitor the champion: compare live orders with the orders that it was evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from lakehouse.engine.engine import Engine
from ml.evaluation.drift import Drift, DriftSettings, MonitorError, compare, realised_precision
from ml.evaluation.monitor_report import page
from ml.evaluation.served_scores import ServedScores, served_scores
from ml.features.declarations import LABEL_DELAY
from ml.registry import CHAMPION, LoadedModel, Registry
from ml.stages import StageCallback, ignore_progress, stage
from ml.tables import user_fraud_scores
from ml.tables.feature_tables import refresh
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES
from ml.training.training_set import labelled_orders, newest_moment
from pipelines.runner import open_engine, recorded
from pipelines.settings import Settings


@dataclass(frozen=True)
class MonitorSettings:
    """Settings of a comparison."""

    days: float = 28.0
    """Days before `until` that count as live."""
    until: datetime | None = None
    """The end of the live days; None: the newest order or fraud report."""
    delay: timedelta = LABEL_DELAY
    drift: DriftSettings = field(default_factory=DriftSettings)


@dataclass(frozen=True)
class MonitorResult:
    """Drift of the live orders, a check of the served scores, and the report page that shows both."""

    model: str
    """Name and version of the champion."""
    drift: Drift
    served: ServedScores
    report: Path


def monitor(
    settings: Settings,
    options: MonitorSettings | None = None,
    report: Path | None = None,
    progress: StageCallback = ignore_progress,
) -> MonitorResult:
    """Compare the live orders with the champion's reference and write the report page.

    report: the file to write; None: under `<home>/reports`. Raises MonitorError when there is no champion."""
    options = options or MonitorSettings()
    champion = champion_of(Registry(home=settings.home))
    with open_engine(settings) as engine:
        with recorded(engine, "monitor") as results:
            with stage(progress, "features"):
                results += refresh(engine, delay=options.delay)
            results.append(user_fraud_scores.refresh(engine, champion))
        drift = measure_drift(engine, champion, options)
        served = served_scores(engine.lake, champion)
    model = f"{champion.version.tags.get('name', 'fraud')} version {champion.version.number}"
    file = report or Path(settings.home) / "reports" / f"monitor-{drift.until:%Y%m%dT%H%M%S}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(drift, options.drift, model, _reference_in_words(champion), served), encoding="utf-8")
    return MonitorResult(model, drift, served, file)


def champion_of(registry: Registry) -> LoadedModel:
    """Return the champion. Raises MonitorError when there is none."""
    registry.check()
    if registry.champion() is None:
        raise MonitorError("There is no champion to monitor. Train one: python -m app train.")
    return registry.load(CHAMPION)


def measure_drift(engine: Engine, champion: LoadedModel, options: MonitorSettings) -> Drift:
    """Compare the live orders with the champion's reference."""
    features, entities = engine.lake.load(ORDER_FEATURES), engine.lake.load(ORDER_ENTITIES)
    now = options.until or newest_moment(entities)
    evaluated_until = champion.reference.get("until")
    begin = now - timedelta(days=options.days)
    since = min(begin, datetime.fromisoformat(evaluated_until)) if evaluated_until else begin
    orders = labelled_orders(features, entities, engine.pool, until=now, cutoff=now, since=since)
    score = champion.model.score(orders)
    expected = champion.reference.get("figures", {}).get("precision_at_threshold")
    realised = None
    if evaluated_until and expected is not None:
        newer = orders["placed_at"] > datetime.fromisoformat(evaluated_until)
        realised = realised_precision(
            orders.filter(newer),
            score[newer.to_numpy()],
            champion.threshold,
            expected,
            now=now,
            delay=options.delay,
            settings=options.drift,
        )
    live = orders["placed_at"] > begin
    return compare(orders.filter(live), score[live.to_numpy()], champion.reference, options.drift, realised)


def _reference_in_words(champion: LoadedModel) -> str:
    reference = champion.reference
    since, until = str(reference.get("since"))[:10], str(reference.get("until"))[:10]
    return f"the {reference.get('orders', 0):,} orders from {since} to {until} that it was evaluated on"
