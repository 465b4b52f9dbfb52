"""`python -m app train`: train a model and print the result."""

from __future__ import annotations

from typing import Any

from app import sandbox
from app.cli.output import Output
from ml.training.train import TrainingResult, TrainSettings, train
from pipelines.settings import Settings

UPPER_BOUND = "upper bound (knows every fraud, not which are reported)"
HEADLINE_METRICS = (
    "card_precision_at_100",
    "precision_at_threshold",
    "recall_at_threshold",
    "reviewed_share",
    "cost_saved",
    "ece",
)


def train_and_print(output: Output, settings: Settings, options: TrainSettings | None = None) -> TrainingResult:
    """Train a model, record it, promote it if it passes the gate, and print the result."""
    with output.progress() as progress:
        result = train(settings, options, progress, sandbox.truth(settings.home)["fraud"]["order_id"])
    print_training(output, result)
    return result


def training_json(result: TrainingResult) -> dict[str, Any]:
    """Return the result of a training as JSON values."""
    return {
        "version": result.version.number,
        "aliases": list(result.version.aliases),
        "promoted": result.verdict.passed,
        "refusal": result.verdict.refusal,
        "checks": [{"name": check.name, "passed": check.passed, "text": check.text} for check in result.verdict.checks],
        "metrics": result.evaluation.metrics(),
        "comparison": [
            {
                "name": entry.name,
                "average_precision": entry.average_precision.value,
                "low": entry.average_precision.low,
                "high": entry.average_precision.high,
                "roc_auc": entry.roc_auc,
                "recall_at_capacity": entry.recall_at_capacity,
                "against_truth": entry.against_truth,
            }
            for entry in result.leaderboard
        ],
        "ceiling": result.upper_bound.average_precision if result.upper_bound else None,
        "beats_baselines": result.beats_baselines,
        "rows": dict(result.rows),
        "unlabelled": result.unlabelled,
        "cutoff": result.cutoff,
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "mlflow": result.command,
    }


def print_training(output: Output, result: TrainingResult) -> None:
    """Print the leaderboard, the model's metrics at its threshold, and the gate's checks."""
    if output.as_json:
        output.json(training_json(result))
        return
    rows, metrics = result.rows, result.evaluation.overall
    output.say(
        f"Trained on {rows['known']:,} orders, evaluated on the newest {rows['test']:,} labelled orders "
        f"({metrics.get('frauds', 0):,.0f} reported frauds). The labels of {result.unlabelled:,} orders are not yet mature "
        f"(data as of {result.cutoff:%Y-%m-%d})."
    )
    print_leaderboard(output, result)
    output.table(
        ("metric", "value"),
        [
            ("threshold", f"{result.evaluation.threshold:.4f}"),
            *((name, f"{metrics[name]:,.4f}") for name in HEADLINE_METRICS if name in metrics),
        ],
        title="The model at its threshold",
    )
    output.table(
        ("check", "passed", "measured"),
        [(check.name, check.passed, check.text) for check in result.verdict.checks],
        title="Gate",
    )
    if result.verdict.passed:
        output.say(f"\nVersion {result.version.number} is the champion now ({result.seconds:.0f} s).")
    else:
        output.say(f"\nVersion {result.version.number} stays challenger. Refused by {result.verdict.refusal}.")
    output.say(f"Look at the run: {result.command}")


def print_leaderboard(output: Output, result: TrainingResult) -> None:
    """Print the baselines, the model and the upper bound, over the newest labelled orders."""
    ranked: list[tuple[str, ...]] = [
        (
            entry.name,
            f"{entry.average_precision.value:.3f}",
            f"{entry.average_precision.low:.3f} to {entry.average_precision.high:.3f}",
            f"{entry.roc_auc:.3f}",
            f"{entry.recall_at_capacity:.3f}",
            "" if entry.against_truth is None else f"{entry.against_truth:.3f}",
        )
        for entry in result.leaderboard
    ]
    bound = result.upper_bound
    if bound is not None:
        ranked.append((UPPER_BOUND, f"{bound.average_precision:.3f}", "", "", "", "1.000"))
    columns = ("scoring", "average precision", "95% interval", "ROC AUC", "recall at capacity", "against the truth")
    shown = len(columns) - (bound is None)
    output.table(columns[:shown], [row[:shown] for row in ranked], title="Newest window")
    if bound is not None and result.leaderboard[-1].average_precision.value > bound.average_precision:
        output.say("(The upper bound is an expected value: with few frauds, a scoring can exceed it by chance.)")
