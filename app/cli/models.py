"""Prints model versions and their comparison; promotes and rolls back."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import polars as pl

from app.cli.output import Output
from ml.evaluation.gate import Comparison, compare_models, compare_recorded, list_models, promote_model, rollback_model
from ml.features.declarations import LABEL_DELAY
from ml.registry import Registry, Version
from ml.tables.feature_tables import refresh
from ml.training.training_set import SplitSettings, training_set
from pipelines.runner import open_engine
from pipelines.settings import Settings

LIST_COLUMNS = ("version", "aliases", "trained", "average precision", "ROC AUC", "threshold", "gate")


def show_models(output: Output, settings: Settings) -> None:
    """Print all versions, newest first."""
    versions = list_models(Registry(home=settings.home))
    if output.as_json:
        output.json(versions)
    elif not versions:
        output.say("No model yet. Train one: python -m app train.")
    else:
        output.table(
            LIST_COLUMNS,
            [
                (
                    str(version["version"]),
                    ", ".join(version["aliases"]),
                    version["created"],
                    _metric(version["average_precision"]),
                    _metric(version["roc_auc"]),
                    _metric(version["threshold"]),
                    version["gate"],
                )
                for version in versions
            ],
        )


def show_comparison(
    output: Output, settings: Settings, first: str, second: str, *, recorded: bool, delay: timedelta = LABEL_DELAY
) -> None:
    """Print two versions side by side: on the newest labelled window, or as recorded at training time."""
    registry = Registry(home=settings.home)
    if recorded:
        metrics = compare_recorded(registry, first, second)
        gain, over = None, "each its own window"
    else:
        comparison, window = _compare_on_newest(registry, settings, first, second, delay)
        metrics, gain = comparison.figures, comparison.gain
        since, until = (str(moment)[:10] for moment in (window["placed_at"].min(), window["placed_at"].max()))
        over = f"{window.height:,} orders from {since} to {until}"
    if output.as_json:
        gain_json = asdict(gain) if gain else None
        output.json({"over": over, "first": first, "second": second, "figures": metrics, "gain": gain_json})
        return
    output.table(
        ("metric", first, second, "difference"),
        [
            (name, _metric(one), _metric(two), f"{two - one:+.4f}" if one is not None and two is not None else "")
            for name, (one, two) in metrics.items()
        ],
        title=f"Over {over}",
    )
    if gain is not None:
        output.say(
            f"Average precision of {second} minus {first}: {gain.value:+.4f} (interval {gain.low:+.4f} to {gain.high:+.4f})."
        )


def _compare_on_newest(
    registry: Registry, settings: Settings, first: str, second: str, delay: timedelta
) -> tuple[Comparison, pl.DataFrame]:
    """Return the comparison on the newest labelled window, and the window. Raises RegistryError on an unknown version."""
    registry.check()
    for version in (first, second):
        registry.version(version)
    with open_engine(settings) as engine:
        refresh(engine, delay=delay)
        window = training_set(engine.lake, engine.pool, None, SplitSettings(delay=delay)).test
    return compare_models(registry, first, second, window), window


def promote(output: Output, settings: Settings, version: str, *, force: bool) -> None:
    """Make a version the champion. force: even if the gate refused it."""
    _say_champion(output, promote_model(Registry(home=settings.home), version, force=force))


def rollback(output: Output, settings: Settings) -> None:
    """Make the champion's predecessor the champion again."""
    _say_champion(output, rollback_model(Registry(home=settings.home)))


def _say_champion(output: Output, version: Version) -> None:
    if output.as_json:
        output.json({"version": version.number, "aliases": list(version.aliases)})
    else:
        output.say(f"Version {version.number} is the champion now.")


def _metric(value: Any) -> str:
    return "" if value is None else f"{float(value):.4f}"
