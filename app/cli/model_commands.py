"""The commands of the fraud model: train, monitor, models, benchmark."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output
from lakehouse.errors import ShopSphereError
from pipelines.settings import load_settings

Days = Annotated[float, typer.Option(help="Days until a fraud is reported; labels of younger orders are not yet mature")]
DELAY_DAYS = 45.0


class ThresholdBy(StrEnum):
    """How the review threshold is chosen."""

    capacity = "capacity"
    costs = "costs"


BY_CAPACITY = ThresholdBy.capacity


def train(
    cutoff: Annotated[
        str, typer.Option(help="Train as of this time, e.g. 2026-01-31 or 2026-01-31T12:00; by default the newest one")
    ] = "",
    label_delay: Days = DELAY_DAYS,
    trials: Annotated[int, typer.Option(help="Trials of the hyperparameter search; 0: no search")] = 8,
    seconds: Annotated[float, typer.Option(help="Time limit of the hyperparameter search in seconds")] = 300.0,
    rounds: Annotated[int, typer.Option(help="Maximum number of trees")] = 600,
    workers: Annotated[int, typer.Option(help="Ray Train workers; the model's bytes depend on the number")] = 1,
    threads: Annotated[int, typer.Option(help="CPUs per worker")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed: the same data and seed give the same model")] = 7,
    threshold: Annotated[ThresholdBy, typer.Option(help="Choose the threshold by review capacity or by costs")] = BY_CAPACITY,
    capacity: Annotated[float, typer.Option(help="Share of orders that can be reviewed")] = 0.02,
    review_cost: Annotated[float, typer.Option(help="Cost of a review, in the base currency")] = 3.0,
    loss_share: Annotated[float, typer.Option(help="Share of a fraudulent order's amount that is lost")] = 1.0,
    json: Json = False,
) -> None:
    """Train a fraud model, record it in MLflow and promote it if it is better than the champion."""
    from app.cli.train_output import train_and_print
    from ml.evaluation.metrics import ThresholdSettings
    from ml.training.search import SearchSettings
    from ml.training.settings import TrainingSettings
    from ml.training.train import TrainSettings
    from ml.training.training_set import SplitSettings

    options = TrainSettings(
        cutoff=_moment(cutoff) if cutoff else None,
        split=SplitSettings(delay=timedelta(days=label_delay)),
        search=SearchSettings(trials=trials, seconds=seconds, seed=seed),
        training=TrainingSettings(rounds=rounds, workers=workers, threads=threads, seed=seed),
        thresholds=ThresholdSettings(threshold.value, capacity, review_cost, loss_share),
    )
    train_and_print(Output(json), load_settings(), options)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ShopSphereError(f"'{text}' is not a date or time. Write it as 2026-01-31 or 2026-01-31T12:00.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def monitor(
    days: Annotated[float, typer.Option(help="Compare the newest N days with the champion's evaluation data")] = 28.0,
    label_delay: Days = DELAY_DAYS,
    moved: Annotated[float, typer.Option(help="PSI from which a feature counts as shifted")] = 0.1,
    drifted: Annotated[float, typer.Option(help="PSI from which a feature counts as drifted")] = 0.25,
    report: Annotated[Path | None, typer.Option(help="File of the report page; by default under SHOPSPHERE_HOME/reports")] = None,
    json: Json = False,
) -> None:
    """Compare live features and scores with training, write a report page; exit code 3 on drift."""
    from app.cli.monitor_output import monitor_and_print
    from ml.evaluation.drift import DriftSettings
    from ml.evaluation.monitor import MonitorSettings

    options = MonitorSettings(days=days, delay=timedelta(days=label_delay), drift=DriftSettings(moved=moved, drifted=drifted))
    if code := monitor_and_print(Output(json), load_settings(), options, report):
        raise typer.Exit(code)


def models_list(json: Json = False) -> None:
    """List all versions, newest first."""
    from app.cli.models import show_models

    show_models(Output(json), load_settings())


def models_compare(
    first: Annotated[str, typer.Argument(help="Version or alias")] = "champion",
    second: Annotated[str, typer.Argument(help="Version or alias")] = "challenger",
    recorded: Annotated[bool, typer.Option("--recorded", help="Compare the metrics recorded at training time")] = False,
    label_delay: Days = DELAY_DAYS,
    json: Json = False,
) -> None:
    """Compare two versions on the newest labelled orders."""
    from app.cli.models import show_comparison

    show_comparison(Output(json), load_settings(), first, second, recorded=recorded, delay=timedelta(days=label_delay))


def models_promote(
    version: Annotated[str, typer.Argument(help="Version or alias")] = "challenger",
    force: Annotated[bool, typer.Option("--force", help="Override the promotion gate")] = False,
    json: Json = False,
) -> None:
    """Make a version the champion."""
    from app.cli.models import promote

    promote(Output(json), load_settings(), version, force=force)


def models_rollback(json: Json = False) -> None:
    """Make the champion's predecessor the champion again."""
    from app.cli.models import rollback

    rollback(Output(json), load_settings())


def benchmark_handbook(
    data: Annotated[Path, typer.Option(help="Directory with handbook.parquet, or the file itself")], json: Json = False
) -> None:
    """Run the Fraud Detection Handbook's protocol with our features and training, next to the published results."""
    from app.cli.handbook_report import run_handbook

    run_handbook(Output(json), data)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("train")(train)
    app.command("monitor")(monitor)
    models = typer.Typer(no_args_is_help=True, help="Manage versions of the fraud model.")
    for name, command in (
        ("list", models_list),
        ("compare", models_compare),
        ("promote", models_promote),
        ("rollback", models_rollback),
    ):
        models.command(name)(command)
    app.add_typer(models, name="models")
    benchmarks = typer.Typer(no_args_is_help=True, help="Compare with published results.")
    benchmarks.callback()(lambda: None)
    benchmarks.command("handbook")(benchmark_handbook)
    app.add_typer(benchmarks, name="benchmark")
