"""Pictures of a model over one window: ranking, review, calibration, effects of its features. PNG bytes, by file name."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ml.evaluation.metrics import Array, average_precision, calibration_error, precision_recall, reliability, roc_auc
from ml.training.model import FittedModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, HUE, FAINT = "#2a2a2a", "#1f6fb4", "#b5b5b5"
SHOWN_FEATURES = 20
SHAP_ORDERS = 2000


def pictures(frame: pl.DataFrame, score: Array, threshold: float, model: FittedModel | None = None) -> dict[str, bytes]:
    """Return the pictures of scores over orders with `label`; with the model, also the effects of its features.

    A window without frauds, or without honest orders, has no curves: only the confusion matrix."""
    label = frame.get_column("label").cast(pl.Int64).to_numpy()
    drawn = {"confusion.png": _drawn(lambda axes: _confusion(axes, label, score >= threshold), (4.6, 4.2))}
    if 0 < label.sum() < len(label):
        drawn |= {
            "pr_curve.png": _drawn(lambda axes: _precision_recall(axes, label, score, threshold)),
            "roc_curve.png": _drawn(lambda axes: _roc(axes, label, score)),
            "calibration.png": _drawn(lambda axes: _calibration(axes, label, score)),
            "gain.png": _drawn(lambda axes: _gain(axes, label, score, threshold)),
        }
    if model is not None and len(frame):
        drawn["shap_summary.png"] = shap_summary(model, frame)
    return drawn


def shap_summary(model: FittedModel, frame: pl.DataFrame) -> bytes:
    """Return a picture of the features with the largest effects: one dot per order, to the right if it raises the odds."""
    sample = frame
    if len(frame) > SHAP_ORDERS:
        sample = frame.gather(np.sort(np.random.default_rng(0).choice(len(frame), SHAP_ORDERS, replace=False)).tolist())
    values = model.matrix(sample)
    effects = model.contributions(sample)[:, :-1]
    strength = np.abs(effects).mean(axis=0)
    shown = [int(place) for place in np.argsort(-strength, kind="stable")[:SHOWN_FEATURES]]
    random = np.random.default_rng(0)

    def draw(axes: Axes) -> None:
        for row, place in enumerate(reversed(shown)):
            value, effect = values[:, place], effects[:, place]
            known = ~np.isnan(value)
            rank = np.full(len(value), np.nan)
            if known.any():
                levels, inverse = np.unique(value[known], return_inverse=True)
                rank[known] = inverse / max(len(levels) - 1, 1)
            height = row + random.uniform(-0.28, 0.28, len(effect))
            axes.scatter(effect[~known], height[~known], s=5, color=FAINT, linewidths=0, rasterized=True)
            dots = axes.scatter(
                effect[known], height[known], s=5, c=rank[known], cmap="coolwarm", vmin=0, vmax=1, linewidths=0, rasterized=True
            )
        axes.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(shown)), [model.features[place] for place in reversed(shown)], fontsize=8)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set(xlabel="effect on the log-odds of fraud", title="Effects of features on the score (strongest first)")
        if shown and axes.figure is not None:
            bar = axes.figure.colorbar(dots, ax=axes, ticks=[0, 1], fraction=0.03, pad=0.02)
            bar.ax.set_yticklabels(["low", "high"])
            bar.set_label("feature's value (grey: missing)", fontsize=8)

    return _drawn(draw, (8.0, 1.6 + 0.27 * len(shown)))


def _precision_recall(axes: Axes, label: Array, score: Array, threshold: float) -> None:
    precision, recall, at = precision_recall(label, score)
    # precision is undefined before the first fraud: start from the first value
    axes.step(np.insert(recall, 0, 0.0), np.insert(precision, 0, precision[0]), where="pre", color=HUE)
    rate = label.mean()
    axes.axhline(rate, color=FAINT, linestyle="--", linewidth=1, label=f"chance ({rate:.3f})")
    taken = np.flatnonzero(at >= threshold)
    if len(taken):
        axes.plot(recall[taken[-1]], precision[taken[-1]], "o", color=INK, label=f"threshold {threshold:.3g}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    axes.set_title(f"Precision and recall (average precision {average_precision(label, score):.3f})")
    axes.legend(frameon=False)


def _roc(axes: Axes, label: Array, score: Array) -> None:
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    found = np.cumsum(label[order])[ends]
    wrong = ends + 1 - found
    axes.plot(np.insert(wrong / max(wrong[-1], 1), 0, 0), np.insert(found / max(found[-1], 1), 0, 0), color=HUE)
    # frauds are rare: only the first hundredth of the honest orders matters, hence the log scale
    axes.plot(shares := np.geomspace(1 / max(wrong[-1], 1), 1, 200), shares, color=FAINT, linestyle="--", linewidth=1)
    axes.set(xlabel="honest orders flagged (log)", ylabel="frauds flagged", xscale="log", xlim=(shares[0], 1), ylim=(0, 1.02))
    axes.set_title(f"ROC (area {roc_auc(label, score):.3f})")


def _calibration(axes: Axes, label: Array, score: Array) -> None:
    predicted, observed, count = reliability(label, score, weight=score)
    error = 1.96 * np.sqrt(np.maximum(observed * (1 - observed), 1e-9) / count)
    known = (predicted > 0) & (observed > 0)
    floor = float(min(predicted[predicted > 0].min(initial=1), observed[observed > 0].min(initial=1))) / 2
    axes.plot([floor, 1], [floor, 1], color=FAINT, linestyle="--", linewidth=1)
    low = np.minimum(error, observed - floor).clip(min=0)
    axes.errorbar(predicted[known], observed[known], yerr=[low[known], error[known]], fmt="o", color=HUE, capsize=2)
    empty = ~known
    axes.plot(np.maximum(predicted[empty], floor), np.full(empty.sum(), floor), "v", color=FAINT, label="no frauds")
    axes.set(xscale="log", yscale="log", xlabel="mean score", ylabel="share of frauds")
    axes.set_title(f"Calibration, bins with equally many expected frauds (error {calibration_error(label, score):.4f})")
    if empty.any():
        axes.legend(frameon=False)


def _gain(axes: Axes, label: Array, score: Array, threshold: float) -> None:
    order = np.argsort(-score, kind="stable")
    found = np.insert(np.cumsum(label[order]) / max(int(label.sum()), 1), 0, 0)
    share = np.arange(len(label) + 1) / len(label)
    axes.plot(share, found, color=HUE, label="model")
    axes.plot(share, np.minimum(share / label.mean(), 1), color=FAINT, linewidth=1, label="perfect")
    axes.plot(share, share, color=FAINT, linestyle="--", linewidth=1, label="chance")
    reviewed = int(np.count_nonzero(score >= threshold))
    axes.plot(
        share[reviewed], found[reviewed], "o", color=INK, label=f"threshold: {found[reviewed]:.0%} found in {share[reviewed]:.1%}"
    )
    axes.set(xlabel="orders reviewed, highest score first (log)", ylabel="frauds found", title="Gain")
    axes.set(xscale="log", xlim=(1 / len(label), 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper left")


def _confusion(axes: Axes, label: Array, flagged: Array) -> None:
    cells = np.array(
        [[np.count_nonzero((label == truth) & (flagged == predicted)) for predicted in (False, True)] for truth in (0, 1)]
    )
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in (0, 1):
        for column in (0, 1):
            colour = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, f"{cells[row, column]:,}\n{shares[row, column]:.1%}", ha="center", va="center", color=colour)
    axes.set_xticks([0, 1], ["passed", "flagged"])
    axes.set_yticks([0, 1], ["honest", "fraud"])
    axes.set_title("Orders at the threshold")


def _drawn(draw: Callable[[Axes], None], size: tuple[float, float] = (6.4, 4.4)) -> bytes:
    # not pyplot, which keeps figures in global state and selects a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
