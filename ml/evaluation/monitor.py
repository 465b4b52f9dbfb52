"""`python -m app monitor`: whether live orders still look like those that the champion was judged on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from app.cli.output import Output
from lakehouse.engine.engine import Engine
from ml.evaluation.drift import Drift, DriftSettings, MonitorError, compare, realise
from ml.evaluation.monitor_report import page
from ml.evaluation.served_scores import ServedScores, served_scores
from ml.features.features import LABEL_DELAY
from ml.registry import CHAMPION, LoadedModel, Registry
from ml.tables import user_fraud_scores
from ml.tables.order_entities import ORDER_ENTITIES
from ml.tables.order_features import ORDER_FEATURES, refresh
from ml.training.training_set import labelled_orders, newest_moment
from pipelines.runner import open_engine, recorded
from pipelines.settings import Settings

DRIFTED = 3
"""Exit code when something drifted."""
SHOWN = 10


@dataclass(frozen=True)
class MonitorSettings:
    """What is compared."""

    days: float = 28.0
    """How many of the newest days count as live."""
    until: datetime | None = None
    """The end of the live days; None: the newest moment that the tables tell of."""
    delay: timedelta = LABEL_DELAY
    drift: DriftSettings = field(default_factory=DriftSettings)


def monitor(output: Output, settings: Settings, options: MonitorSettings | None = None, report: Path | None = None) -> int:
    """Compare, write the report page, print what was found. Gives the exit code: 0, or 3 on drift."""
    options = options or MonitorSettings()
    champion = champion_of(Registry(home=settings.home))
    with open_engine(settings) as engine:
        with output.progress() as show:
            show("features", 0, 1)
            with recorded(engine, "monitor") as reports:
                reports += refresh(engine, delay=options.delay)
                show("features", 1, 1)
                reports.append(user_fraud_scores.refresh(engine, champion))
        drift = watched(engine, champion, options)
        live = served_scores(engine.lake, champion)
    model = f"{champion.version.tags.get('name', 'fraud')} version {champion.version.number}"
    file = report or Path(settings.home) / "reports" / f"monitor-{drift.until:%Y%m%dT%H%M%S}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(drift, options.drift, model, _judged_on(champion), live), encoding="utf-8")
    show_drift(output, drift, model, file, live)
    return DRIFTED if drift.alarms else 0


def champion_of(registry: Registry) -> LoadedModel:
    """The champion. Raises MonitorError when there is none."""
    registry.check()
    if registry.champion() is None:
        raise MonitorError("There is no champion to monitor. Train one: python -m app train.")
    return registry.load(CHAMPION)


def watched(engine: Engine, champion: LoadedModel, options: MonitorSettings) -> Drift:
    """The live orders against the champion's reference."""
    features, entities = engine.lake.load(ORDER_FEATURES), engine.lake.load(ORDER_ENTITIES)
    now = options.until or newest_moment(entities)
    judged_until = champion.reference.get("until")
    begin = now - timedelta(days=options.days)
    since = min(begin, datetime.fromisoformat(judged_until)) if judged_until else begin
    orders = labelled_orders(features, entities, engine.pool, until=now, cutoff=now, since=since)
    score = champion.model.score(orders)
    promised = champion.reference.get("figures", {}).get("precision_at_threshold")
    realised = None
    if judged_until and promised is not None:
        newer = orders["placed_at"] > datetime.fromisoformat(judged_until)
        realised = realise(
            orders.filter(newer),
            score[newer.to_numpy()],
            champion.threshold,
            promised,
            now=now,
            delay=options.delay,
            settings=options.drift,
        )
    live = orders["placed_at"] > begin
    return compare(orders.filter(live), score[live.to_numpy()], champion.reference, options.drift, realised)


def _judged_on(champion: LoadedModel) -> str:
    told = champion.reference
    since, until = str(told.get("since"))[:10], str(told.get("until"))[:10]
    return f"the {told.get('orders', 0):,} orders from {since} to {until} that it was judged on"


def show_drift(output: Output, drift: Drift, model: str, file: Path, live: ServedScores) -> None:
    """What was found."""
    if output.as_json:
        output.json({**_told(drift), "served": asdict(live), "model": model, "report": str(file)})
        return
    output.say(f"{model}: {drift.orders:,} orders from {drift.since:%Y-%m-%d} to {drift.until:%Y-%m-%d}.")
    output.table(
        ("what", "PSI", "by chance up to", "state"),
        [(one.name, f"{one.psi:.3f}", f"{one.chance:.3f}", one.state) for one in (drift.score, *drift.features[:SHOWN])],
    )
    realised = drift.realised
    if realised is not None and realised.reviewed:
        output.say(
            f"Precision of {realised.reviewed:,} reviewed orders with a known label: {realised.precision:.3f} "
            f"({realised.low:.3f} to {realised.high:.3f}), promised {realised.promised:.3f}: {realised.state}."
        )
    output.say(live.in_words)
    if live.features:
        output.table(
            ("served otherwise", "orders", "largest difference", "why"),
            [(one.name, one.orders, one.largest, one.cause) for one in live.features[:SHOWN]],
        )
    output.say("Drift: " + ", ".join(drift.alarms) + "." if drift.alarms else "No drift.")
    output.say(f"Report: {file}")


def _told(drift: Drift) -> dict[str, Any]:
    def short(one: Any) -> dict[str, Any]:
        return {"name": one.name, "psi": one.psi, "chance": one.chance, "state": one.state}

    return {
        "since": drift.since,
        "until": drift.until,
        "orders": drift.orders,
        "score": short(drift.score),
        "features": [short(one) for one in drift.features],
        "realised": asdict(drift.realised) if drift.realised else None,
        "alarms": list(drift.alarms),
    }


__all__ = ["DRIFTED", "MonitorSettings", "monitor", "watched"]
