"""The page that monitoring writes: one HTML file with its pictures inside, to be opened anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ml.evaluation.drift import Distance, Drift, DriftSettings, Realised
from ml.evaluation.plots import FAINT, HUE, INK
from ml.evaluation.served_scores import ScoreDifference, ServedScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN, DRAWN = 20, 6
NOTHING = ServedScores()
ALARM, WARN = "#b3261e", "#b26a00"
COLOURS = {"steady": HUE, "moved": WARN, "drifted": ALARM}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2a2a2a; max-width: 62em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left } td.n, th.n { text-align: right }
th { border-bottom: 1px solid #b5b5b5; font-weight: 600 } img { max-width: 100% }
.drifted { color: #b3261e; font-weight: 600 } .moved { color: #b26a00; font-weight: 600 }
"""


def pictures_of(drift: Drift, settings: DriftSettings) -> dict[str, bytes]:
    """The report's pictures, by file name."""
    drawn = {
        "score.png": _drawn(lambda axes: _bins(axes, drift.score, "Scores"), (8.0, 3.4)),
        "features.png": _drawn(
            lambda axes: _bars(axes, drift.features[:SHOWN], settings), (8.0, 1.2 + 0.26 * min(SHOWN, len(drift.features)))
        ),
    }
    for one in drift.features[:DRAWN]:
        drawn[f"feature_{one.name}.png"] = _drawn(lambda axes, one=one: _bins(axes, one, one.name), (8.0, 3.2))  # type: ignore[misc]
    if drift.realised is not None and drift.realised.weeks:
        realised = drift.realised
        drawn["realised.png"] = _drawn(lambda axes: _realised(axes, realised), (8.0, 3.6))
    return drawn


def page(drift: Drift, settings: DriftSettings, model: str, promised_over: str, live: ServedScores = NOTHING) -> str:
    """The whole page. model: the model's name and version; promised_over: the orders that it was judged on, in words;
    live: scores as they were served against those of the lakehouse."""
    drawn = pictures_of(drift, settings)
    alarms = drift.alarms
    verdict = (
        f'<p class="drifted">Drift: {escape(", ".join(alarms))}.</p>'
        if alarms
        else "<p>No drift: the model keeps its promises.</p>"
    )
    parts = [
        f"<h1>Monitoring of {escape(model)}</h1>",
        f"<p>{drift.orders:,} orders placed from {drift.since:%Y-%m-%d} to {drift.until:%Y-%m-%d}, "
        f"against {escape(promised_over)}.</p>",
        verdict,
        f"<p>Distance is the population stability index (PSI): from {settings.moved:g} on something moved, from "
        f"{settings.drifted:g} on the population is another one; a distance that chance alone explains is steady.</p>",
        "<h2>Scores</h2>",
        f"<p>PSI {drift.score.psi:.3f} ({_state(drift.score.state)}).</p>",
        _image(drawn["score.png"], "shares of orders by score"),
        "<h2>Features</h2>",
        _image(drawn["features.png"], "PSI of the features that moved most"),
        _table(drift.features[:SHOWN]),
        *(_image(drawn[f"feature_{one.name}.png"], f"shares of orders by {one.name}") for one in drift.features[:DRAWN]),
        "<h2>Precision as chargebacks come in</h2>",
        _realised_text(drift.realised),
    ]
    if "realised.png" in drawn:
        parts.append(_image(drawn["realised.png"], "precision by week"))
    parts += ["<h2>Scores as they were served</h2>", f"<p>{escape(live.in_words)}</p>", _served(live.features[:SHOWN])]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Monitoring of {escape(model)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _state(state: str) -> str:
    return f'<span class="{state}">{state}</span>'


def _table(distances: tuple[Distance, ...]) -> str:
    rows = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{one.psi:.3f}</td><td class="n">{one.chance:.3f}</td>'
        f"<td>{_state(one.state)}</td></tr>"
        for one in distances
    )
    return f'<table><tr><th>feature</th><th class="n">PSI</th><th class="n">by chance up to</th><th>state</th></tr>{rows}</table>'


def _served(features: tuple[ScoreDifference, ...]) -> str:
    if not features:
        return ""
    rows = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{one.orders:,}</td>'
        f'<td class="n">{"" if one.largest is None else f"{one.largest:.6g}"}</td><td>{escape(one.cause)}</td></tr>'
        for one in features
    )
    head = '<th>feature</th><th class="n">orders</th><th class="n">largest difference</th><th>why</th>'
    return f"<table><tr>{head}</tr>{rows}</table>"


def _realised_text(realised: Realised | None) -> str:
    if realised is None or not realised.weeks:
        return "<p>No order is newer than those that the model was judged on.</p>"
    if not realised.reviewed:
        return "<p>No reviewed order is old enough for its label to be known.</p>"
    return (
        f"<p>Of {realised.reviewed:,} orders at or above the threshold whose label is known, {realised.caught:,} were reported: "
        f"precision {realised.precision:.3f} (95% interval {realised.low:.3f} to {realised.high:.3f}), "
        f"promised {realised.promised:.3f}: {_state(realised.state)}.</p>"
    )


def _image(picture: bytes, told: str) -> str:
    return f'<p><img alt="{escape(told)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'


def _bars(axes: Axes, distances: tuple[Distance, ...], settings: DriftSettings) -> None:
    shown = distances[::-1]
    axes.barh([one.name for one in shown], [one.psi for one in shown], color=[COLOURS[one.state] for one in shown], height=0.7)
    for limit in (settings.moved, settings.drifted):
        axes.axvline(limit, color=FAINT, linestyle="--", linewidth=1)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set(xlabel="PSI", title="What moved most")


def _bins(axes: Axes, one: Distance, title: str) -> None:
    used = [place for place, pair in enumerate(zip(one.reference, one.live, strict=True)) if any(pair)]
    at = np.arange(len(used))
    axes.bar(at - 0.2, [one.reference[place] for place in used], 0.38, color=FAINT, label="when judged")
    axes.bar(at + 0.2, [one.live[place] for place in used], 0.38, color=COLOURS[one.state], label="live")
    axes.set_xticks(at, [one.labels[place] for place in used], fontsize=8, rotation=20, ha="right")
    axes.set(ylabel="share of orders", title=f"{title} (PSI {one.psi:.3f})")
    axes.legend(frameon=False)


def _realised(axes: Axes, realised: Realised) -> None:
    weeks = realised.weeks
    at = np.arange(len(weeks))
    colours = [HUE if week.settled else FAINT for week in weeks]
    shares = [week.caught / week.reviewed if week.reviewed else 0.0 for week in weeks]
    axes.bar(at, shares, color=colours, width=0.7)
    for place, week in enumerate(weeks):
        axes.annotate(f"{week.caught}/{week.reviewed}", (place, shares[place]), ha="center", va="bottom", fontsize=7)
    axes.axhline(realised.promised, color=INK, linestyle="--", linewidth=1, label=f"promised {realised.promised:.3f}")
    axes.set_xticks(at, [f"{week.begin:%m-%d}" for week in weeks], fontsize=8, rotation=45)
    axes.set(ylim=(0, 1.08), ylabel="reported / reviewed", xlabel="week of the order (grey: reports still come in)")
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
