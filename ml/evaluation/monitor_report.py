"""The report page of monitoring: one HTML file with embedded pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ml.evaluation.drift import STATE_WORDS, Distance, Drift, DriftSettings, RealisedPrecision, State
from ml.evaluation.plots import FAINT, HUE, INK
from ml.evaluation.served_scores import ScoreDifference, ServedScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS, MAX_PICTURES = 20, 6
NO_SCORES = ServedScores()
ALARM, WARN = "#b3261e", "#b26a00"
COLOURS: dict[State, str] = {"steady": HUE, "moved": WARN, "drifted": ALARM}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2a2a2a; max-width: 62em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left } td.n, th.n { text-align: right }
th { border-bottom: 1px solid #b5b5b5; font-weight: 600 } img { max-width: 100% }
.drifted { color: #b3261e; font-weight: 600 } .moved { color: #b26a00; font-weight: 600 }
"""


def pictures_of(drift: Drift, settings: DriftSettings) -> dict[str, bytes]:
    """Return the pictures of the report, by file name."""
    drawn = {
        "score.png": _drawn(lambda axes: _bins(axes, drift.score, "Scores"), (8.0, 3.4)),
        "features.png": _drawn(
            lambda axes: _bars(axes, drift.features[:MAX_ROWS], settings), (8.0, 1.2 + 0.26 * min(MAX_ROWS, len(drift.features)))
        ),
    }
    for one in drift.features[:MAX_PICTURES]:
        drawn[f"feature_{one.name}.png"] = _drawn(lambda axes, one=one: _bins(axes, one, one.name), (8.0, 3.2))  # type: ignore[misc]
    if drift.realised is not None and drift.realised.weeks:
        realised = drift.realised
        drawn["realised.png"] = _drawn(lambda axes: _realised(axes, realised), (8.0, 3.6))
    return drawn


def page(drift: Drift, settings: DriftSettings, model: str, reference: str, served: ServedScores = NO_SCORES) -> str:
    """Return the page. model: name and version; reference: the orders that it was evaluated on, in words."""
    drawn = pictures_of(drift, settings)
    alarms = drift.alarms
    verdict = f'<p class="drifted">Drift: {escape(", ".join(alarms))}.</p>' if alarms else "<p>No drift.</p>"
    parts = [
        f"<h1>Monitoring of {escape(model)}</h1>",
        f"<p>{drift.orders:,} orders placed from {drift.since:%Y-%m-%d} to {drift.until:%Y-%m-%d}, "
        f"compared with {escape(reference)}.</p>",
        verdict,
        f"<p>The distance is the population stability index (PSI): from {settings.moved:g} on a distribution has shifted, from "
        f"{settings.drifted:g} on it has drifted. A distance within the range of chance is stable.</p>",
        "<h2>Scores</h2>",
        f"<p>PSI {drift.score.psi:.3f} ({_state(drift.score.state)}).</p>",
        _image(drawn["score.png"], "shares of orders by score"),
        "<h2>Features</h2>",
        _image(drawn["features.png"], "features with the largest PSI"),
        _table(drift.features[:MAX_ROWS]),
        *(_image(drawn[f"feature_{one.name}.png"], f"shares of orders by {one.name}") for one in drift.features[:MAX_PICTURES]),
        "<h2>Precision on reported chargebacks</h2>",
        _realised_text(drift.realised),
    ]
    if "realised.png" in drawn:
        parts.append(_image(drawn["realised.png"], "precision by week"))
    parts += ["<h2>Served scores</h2>", f"<p>{escape(served.in_words)}</p>", _served(served.features[:MAX_ROWS])]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Monitoring of {escape(model)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _state(state: State) -> str:
    return f'<span class="{state}">{STATE_WORDS[state]}</span>'


def _table(distances: tuple[Distance, ...]) -> str:
    rows = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{one.psi:.3f}</td><td class="n">{one.chance:.3f}</td>'
        f"<td>{_state(one.state)}</td></tr>"
        for one in distances
    )
    return (
        f'<table><tr><th>feature</th><th class="n">PSI</th><th class="n">largest by chance</th><th>state</th></tr>{rows}</table>'
    )


def _served(features: tuple[ScoreDifference, ...]) -> str:
    if not features:
        return ""
    rows = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{one.orders:,}</td>'
        f'<td class="n">{"" if one.largest is None else f"{one.largest:.6g}"}</td><td>{escape(one.cause)}</td></tr>'
        for one in features
    )
    head = '<th>feature</th><th class="n">orders</th><th class="n">largest difference</th><th>cause</th>'
    return f"<table><tr>{head}</tr>{rows}</table>"


def _realised_text(realised: RealisedPrecision | None) -> str:
    if realised is None or not realised.weeks:
        return "<p>No order is newer than those that the model was evaluated on.</p>"
    if not realised.reviewed:
        return "<p>No reviewed order has a mature label yet.</p>"
    return (
        f"<p>Of {realised.reviewed:,} orders at or above the threshold with a mature label, {realised.caught:,} were reported: "
        f"precision {realised.precision:.3f} (95% interval {realised.low:.3f} to {realised.high:.3f}), "
        f"expected {realised.promised:.3f}: {_state(realised.state)}.</p>"
    )


def _image(picture: bytes, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'


def _bars(axes: Axes, distances: tuple[Distance, ...], settings: DriftSettings) -> None:
    shown = distances[::-1]
    axes.barh([one.name for one in shown], [one.psi for one in shown], color=[COLOURS[one.state] for one in shown], height=0.7)
    for limit in (settings.moved, settings.drifted):
        axes.axvline(limit, color=FAINT, linestyle="--", linewidth=1)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set(xlabel="PSI", title="Largest distances")


def _bins(axes: Axes, one: Distance, title: str) -> None:
    bins = [place for place, pair in enumerate(zip(one.reference, one.live, strict=True)) if any(pair)]
    at = np.arange(len(bins))
    axes.bar(at - 0.2, [one.reference[place] for place in bins], 0.38, color=FAINT, label="reference")
    axes.bar(at + 0.2, [one.live[place] for place in bins], 0.38, color=COLOURS[one.state], label="live")
    axes.set_xticks(at, [one.labels[place] for place in bins], fontsize=8, rotation=20, ha="right")
    axes.set(ylabel="share of orders", title=f"{title} (PSI {one.psi:.3f})")
    axes.legend(frameon=False)


def _realised(axes: Axes, realised: RealisedPrecision) -> None:
    weeks = realised.weeks
    at = np.arange(len(weeks))
    colours = [HUE if week.settled else FAINT for week in weeks]
    shares = [week.caught / week.reviewed if week.reviewed else 0.0 for week in weeks]
    axes.bar(at, shares, color=colours, width=0.7)
    for place, week in enumerate(weeks):
        axes.annotate(f"{week.caught}/{week.reviewed}", (place, shares[place]), ha="center", va="bottom", fontsize=7)
    axes.axhline(realised.promised, color=INK, linestyle="--", linewidth=1, label=f"expected {realised.promised:.3f}")
    axes.set_xticks(at, [f"{week.begin:%m-%d}" for week in weeks], fontsize=8, rotation=45)
    axes.set(ylim=(0, 1.08), ylabel="reported / reviewed", xlabel="week of the order (grey: labels not yet mature)")
    axes.set_title("Precision by week")
    axes.legend(frameon=False)


def _drawn(draw: Callable[[Axes], None], size: tuple[float, float]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
