"""`python -m app models`: list, compare, promote, roll back."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import polars as pl

from app.cli.output import Output
from ml.evaluation.gate import Comparison, compare_models, compare_recorded, list_models, promote_model, rollback_model
from ml.features.declarations import LABEL_DELAY
from ml.registry import Registry, Version
from ml.tables.order_features import refresh
from ml.training.training_set import SplitSettings, training_set
from pipelines.runner import open_engine
from pipelines.settings import Settings

LIST_COLUMNS = ("version", "aliases", "trained", "average precision", "ROC AUC", "threshold", "gate")


def show_models(output: Output, settings: Settings) -> None:
    """All versions, the newest first."""
    found = list_models(Registry(home=settings.home))
    if output.as_json:
        output.json(found)
    elif not found:
        output.say("No model yet. Train one: python -m app train.")
    else:
        output.table(
            LIST_COLUMNS,
            [
                (
                    str(one["version"]),
                    ", ".join(one["aliases"]),
                    one["created"],
                    _figure(one["average_precision"]),
                    _figure(one["roc_auc"]),
                    _figure(one["threshold"]),
                    one["gate"],
                )
                for one in found
            ],
        )


def show_comparison(
    output: Output, settings: Settings, first: str, second: str, *, recorded: bool, delay: timedelta = LABEL_DELAY
) -> None:
    """Two versions side by side: on the newest labelled window, or by what their trainings recorded."""
    registry = Registry(home=settings.home)
    if recorded:
        figures = compare_recorded(registry, first, second)
        gain, told = None, {"over": "each its own window"}
    else:
        compared, window = _on_newest(registry, settings, first, second, delay)
        figures, gain = compared.figures, compared.gain
        since, until = (str(moment)[:10] for moment in (window["placed_at"].min(), window["placed_at"].max()))
        told = {"over": f"{window.height:,} orders from {since} to {until}"}
    if output.as_json:
        output.json({**told, "first": first, "second": second, "figures": figures, "gain": asdict(gain) if gain else None})
        return
    output.table(
        ("figure", first, second, "difference"),
        [
            (name, _figure(one), _figure(two), f"{two - one:+.4f}" if one is not None and two is not None else "")
            for name, (one, two) in figures.items()
        ],
        title=f"Over {told['over']}",
    )
    if gain is not None:
        output.say(
            f"Average precision of {second} over {first}: {gain.value:+.4f} (interval {gain.low:+.4f} to {gain.high:+.4f})."
        )


def _on_newest(
    registry: Registry, settings: Settings, first: str, second: str, delay: timedelta
) -> tuple[Comparison, pl.DataFrame]:
    registry.check()
    for which in (first, second):
        registry.version(which)
    with open_engine(settings) as engine:
        refresh(engine, delay=delay)
        window = training_set(engine.lake, engine.pool, None, SplitSettings(delay=delay)).test
    return compare_models(registry, first, second, window), window


def promote(output: Output, settings: Settings, which: str, *, force: bool) -> None:
    """Make a version the champion."""
    _told(output, promote_model(Registry(home=settings.home), which, force=force))


def rollback(output: Output, settings: Settings) -> None:
    """Make the champion's predecessor the champion again."""
    _told(output, rollback_model(Registry(home=settings.home)))


def _told(output: Output, version: Version) -> None:
    if output.as_json:
        output.json({"version": version.number, "aliases": list(version.aliases)})
    else:
        output.say(f"Version {version.number} is the champion now.")


def _figure(value: Any) -> str:
    return "" if value is None else f"{float(value):.4f}"
